//! Byte streams that outlive the streams on them. To open one costs a round trip, and the window of a new one grows over
//! several more; rounds and requests between the same two peers come again and again.
//!
//! When a stream has ended on both sides, whoever had accepted it writes [`READY`]; whoever had opened it keeps it, and
//! opens its next stream of the same protocol by writing [`BEGIN`], without waiting for an answer. Without READY, or
//! after a better connection has come, it is not used again. Whoever cannot take the next stream writes [`BUSY`] or
//! [`UNKNOWN`] in the place of its first frame, which ends that stream as if it had been dropped.

use crate::shared::{NoPlace, Shared, lock};
use crate::traffic::StreamMeter;
use crate::usage::{InUse, Usage};
use crate::wire::{self, DROPPED, FINISHED, HEAD_BYTES, Left, Owner, Place};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::swarm::ConnectionId;
use potluck_net::{OpenError, Path, PeerId, Protocol, Stream, StreamError, Tasks};
use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// The mark of whoever opens a stream on a byte stream that is kept.
const BEGIN: u32 = u32::MAX - 2;
/// The mark of whoever accepts one: the last stream has ended here.
const READY: u32 = u32::MAX - 3;
/// The marks of whoever does not take a stream that was begun again: its backlog is full, or nobody there speaks that.
pub(crate) const BUSY: u32 = u32::MAX - 4;
pub(crate) const UNKNOWN: u32 = u32::MAX - 5;
/// Byte streams kept for one peer and protocol. Requests to one peer are seldom more at a time.
const KEPT_PER_PROTOCOL_MAX: usize = 4;
/// Byte streams kept for all peers.
const KEPT_MAX: usize = 1024;
/// How long one is kept without being used, and how much longer the other side waits for its next use.
const KEPT_FOR: Duration = Duration::from_secs(120);
const ACCEPTED_KEPT_FOR: Duration = Duration::from_secs(180);
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// What is left of an ended stream may take this long and be this large; more is cut off by a reset.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
const UNREAD_BYTES_MAX: usize = 1 << 20;
/// How much of it is read at once.
const SKIPPED_BYTES: usize = 16 << 10;
/// Ended streams that may wait for the caretaker.
const RETIRED_WAITING_MAX: usize = 256;

/// Whose a stream is, and what becomes of its byte stream.
pub(crate) struct Lease {
    shared: Arc<Shared>,
    meter: StreamMeter,
    with: With,
    _in_use: InUse,
}

/// Between whom a byte stream runs, and for what.
#[derive(Clone)]
pub(crate) struct With {
    pub(crate) peer: PeerId,
    pub(crate) protocol: Protocol,
    pub(crate) path: Path,
    /// The connection, if we opened the byte stream.
    pub(crate) opened_on: Option<ConnectionId>,
    pub(crate) usage: Arc<Usage>,
}

impl Lease {
    pub(crate) fn new(shared: Arc<Shared>, meter: StreamMeter, with: With) -> Self {
        let in_use = with.usage.begin();
        Self { shared, meter, with, _in_use: in_use }
    }

    /// Frames for the application.
    pub(crate) fn stream(self, bytes: libp2p::Stream) -> Stream {
        let (buffers, With { peer, protocol, .. }) = (self.shared.buffers.clone(), self.with.clone());
        let (sink, frames) = wire::frames(bytes, self, &buffers);
        Stream::new(peer, protocol, sink, frames)
    }
}

impl Owner<libp2p::Stream> for Lease {
    fn sent(&self, bytes: usize) {
        self.meter.sent(bytes);
    }

    fn received(&self, bytes: usize) {
        self.meter.received(bytes);
    }

    fn refusal(&self, mark: u32) -> Option<StreamError> {
        let With { peer, protocol, opened_on, .. } = &self.with;
        let (peer, protocol) = (*peer, protocol.clone());
        let refusal = match mark {
            BUSY => OpenError::Busy { peer, protocol },
            UNKNOWN => OpenError::UnknownProtocol { peer, protocol },
            _ => return None,
        };
        // Only what we have opened can be refused.
        opened_on.map(|_| StreamError::Refused(refusal))
    }

    fn retire(&self, left: Left<libp2p::Stream>) {
        // Where there is no room, or nobody cares any more, it is dropped, which resets it.
        let _reset = self.shared.kept.retired.0.try_send((self.with.clone(), left));
    }
}

type Retired = (With, Left<libp2p::Stream>);

/// Byte streams that we opened and that are not in use.
pub(crate) struct Kept {
    idle: Mutex<BTreeMap<(PeerId, Protocol), Vec<Idle>>>,
    retired: (mpsc::Sender<Retired>, Mutex<Option<mpsc::Receiver<Retired>>>),
}

struct Idle {
    bytes: libp2p::Stream,
    opened_on: ConnectionId,
    since: Instant,
    /// The other side has said so.
    ready: bool,
}

impl Idle {
    /// Whether the other side is ready and has said nothing else; pending while it has said nothing at all.
    fn poll_usable(&mut self) -> Poll<bool> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut mark = [0; HEAD_BYTES];
        if !self.ready {
            match Pin::new(&mut self.bytes).poll_read(&mut cx, &mut mark) {
                Poll::Ready(Ok(HEAD_BYTES)) if u32::from_be_bytes(mark) == READY => self.ready = true,
                Poll::Ready(_) => return Poll::Ready(false),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Pin::new(&mut self.bytes).poll_read(&mut cx, &mut mark).is_pending())
    }
}

impl Default for Kept {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(RETIRED_WAITING_MAX);
        Self { idle: Mutex::default(), retired: (sender, Mutex::new(Some(receiver))) }
    }
}

impl Kept {
    fn keep(&self, with: With, opened_on: ConnectionId, bytes: libp2p::Stream) {
        let mut idle = lock(&self.idle);
        let total: usize = idle.values().map(Vec::len).sum();
        let of = idle.entry((with.peer, with.protocol)).or_default();
        if of.len() >= KEPT_PER_PROTOCOL_MAX {
            of.remove(0);
        } else if total >= KEPT_MAX {
            return;
        }
        of.push(Idle { bytes, opened_on, since: Instant::now(), ready: false });
    }

    /// A byte stream to `peer` on this connection on which its side waits for the next stream; the last used one.
    fn take(&self, peer: PeerId, protocol: &Protocol, on: ConnectionId) -> Option<libp2p::Stream> {
        let mut idle = lock(&self.idle);
        let key = (peer, protocol.clone());
        let of = idle.get_mut(&key)?;
        let mut found = None;
        for mut one in std::mem::take(of).into_iter().rev() {
            if found.is_some() {
                of.insert(0, one);
                continue;
            }
            match one.poll_usable() {
                _ if one.opened_on != on => {}
                Poll::Ready(true) => found = Some(one.bytes),
                Poll::Ready(false) => {}
                Poll::Pending => of.insert(0, one),
            }
        }
        if of.is_empty() {
            idle.remove(&key);
        }
        found
    }

    fn sweep(&self, now: Instant) {
        lock(&self.idle).retain(|_, of| {
            of.retain(|one| now < one.since + KEPT_FOR);
            !of.is_empty()
        });
    }

    /// Let go of everything.
    pub(crate) fn close(&self) {
        lock(&self.idle).clear();
    }
}

/// Begin another stream on a byte stream that was kept, if there is one.
pub(crate) async fn begin_again(
    kept: &Kept,
    peer: PeerId,
    protocol: &Protocol,
    on: ConnectionId,
) -> Option<libp2p::Stream> {
    let mut bytes = kept.take(peer, protocol, on)?;
    tell(&mut bytes, BEGIN).await.ok()?;
    Some(bytes)
}

async fn tell<S: AsyncWrite + Unpin>(bytes: &mut S, mark: u32) -> io::Result<()> {
    bytes.write_all(&mark.to_be_bytes()).await?;
    bytes.flush().await
}

/// Look after ended streams until the transport ends.
pub(crate) async fn care(shared: Arc<Shared>) {
    let Some(mut retired) = lock(&shared.kept.retired.1).take() else { return };
    let tasks = Tasks::new();
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    loop {
        tokio::select! {
            next = retired.recv() => {
                let Some((with, left)) = next else { return };
                tasks.spawn(look_after(shared.clone(), with, left));
            }
            now = sweep.tick() => shared.kept.sweep(now),
        }
    }
}

async fn look_after(shared: Arc<Shared>, with: With, left: Left<libp2p::Stream>) {
    if let Some(on) = with.opened_on {
        if let Some(bytes) = settle(left).await {
            shared.kept.keep(with, on, bytes);
        }
        return;
    }
    let Some(place) = shared.peers.place_to_wait(with.peer) else { return };
    let mut left = left;
    loop {
        let Ok(Some(bytes)) = timeout(ACCEPTED_KEPT_FOR, begun(left)).await else { return };
        let mark = match shared.registry.reserve(&with.protocol) {
            Ok(queue) => {
                drop(place);
                let meter = shared.traffic.meter(with.peer, with.path, None);
                queue.send(Lease::new(shared, meter, with).stream(bytes));
                return;
            }
            Err(NoPlace::Busy) => BUSY,
            Err(NoPlace::Unknown) => UNKNOWN,
        };
        left = Left { bytes, untold: Some(mark), unread: Some(Place::default()) };
    }
}

/// Say that another stream may begin, and wait until one does.
async fn begun<S: AsyncRead + AsyncWrite + Unpin>(left: Left<S>) -> Option<S> {
    let mut bytes = settle(left).await?;
    tell(&mut bytes, READY).await.ok()?;
    let mut mark = [0; HEAD_BYTES];
    bytes.read_exact(&mut mark).await.ok()?;
    (u32::from_be_bytes(mark) == BEGIN).then_some(bytes)
}

/// Let pass what still must. The byte stream, if another stream may begin on it.
async fn settle<S: AsyncRead + AsyncWrite + Unpin>(left: Left<S>) -> Option<S> {
    timeout(SETTLE_TIMEOUT, let_pass(left)).await.ok()?
}

/// As [`settle`], however long it takes.
pub(crate) async fn let_pass<S: AsyncRead + AsyncWrite + Unpin>(left: Left<S>) -> Option<S> {
    let Left { bytes, untold, unread } = left;
    let (mut reader, mut writer) = bytes.split();
    let told = async {
        match untold {
            Some(mark) => tell(&mut writer, mark).await,
            None => Ok(()),
        }
    };
    let read = async {
        match unread {
            Some(place) => read_on(&mut reader, place).await,
            None => Ok(()),
        }
    };
    // At the same time: the other side may not take ours before we take what it is writing.
    futures::future::try_join(told, read).await.ok()?;
    reader.reunite(writer).ok()
}

/// Skip frames until the other side's end.
async fn read_on<S: AsyncRead + Unpin>(reader: &mut S, place: Place) -> io::Result<()> {
    let Place { mut head, head_len, mut rest } = place;
    let mut missing = head.get_mut(head_len..).unwrap_or_default();
    let mut allowed = UNREAD_BYTES_MAX;
    let mut skipped = Vec::new();
    loop {
        allowed = allowed
            .checked_sub(rest.saturating_add(HEAD_BYTES))
            .ok_or_else(|| io::Error::other("too much was left unread"))?;
        while rest > 0 {
            // Most requests and answers leave nothing but the mark.
            skipped.resize(SKIPPED_BYTES, 0);
            let most = rest.min(SKIPPED_BYTES);
            match reader.read(&mut skipped[..most]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => rest -= count,
            }
        }
        reader.read_exact(missing).await?;
        match u32::from_be_bytes(head) {
            FINISHED | DROPPED | BUSY | UNKNOWN => return Ok(()),
            length => rest = usize::try_from(length).unwrap_or(usize::MAX),
        }
        missing = &mut head;
    }
}

#[cfg(test)]
#[path = "kept_tests.rs"]
mod tests;
