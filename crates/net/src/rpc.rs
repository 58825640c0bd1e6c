//! Unary rpc on streams: one request frame, one answer frame, one deadline.

use crate::{
    FaultKind, Incoming, OpenError, PeerFault, PeerId, Protocol, Stream, StreamError, Tasks, Transport,
};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// How long a caller may take to deliver its request once its stream is open; guards against slow-loris callers.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a short answer may take to leave ...
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// ... and each of so many bytes of it a second more: a home's uplink of 1 Mbit/s that twelve share.
const ANSWER_RATE_MIN: f64 = 10_000.0;

/// How many requests a service reads and answers at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Of everybody together; more wait in the accept backlog.
    pub total: usize,
    /// Of one peer; more are refused at once, or a single one that opens streams and says nothing would hold every
    /// place and the backlog too. More than an honest peer asks at a time: a place is free some time after its answer.
    pub per_peer: usize,
}

/// Send `request` and wait for the answer until `deadline`. Dropping the future cancels the call at both ends.
///
/// # Errors
/// The fault of the peer: the caller collects it.
pub async fn call(
    transport: &dyn Transport,
    peer: PeerId,
    protocol: &Protocol,
    request: Bytes,
    deadline: Instant,
) -> Result<Bytes, PeerFault> {
    let exchange = async {
        let mut stream =
            transport.open(peer, protocol.clone()).await.map_err(|error| open_fault(peer, error))?;
        stream.send(request).await.map_err(|error| stream_fault(peer, &error))?;
        stream.finish().await.map_err(|error| stream_fault(peer, &error))?;
        match stream.recv().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => {
                Err(PeerFault::new(peer, FaultKind::Refused, format!("{protocol}: closed without an answer")))
            }
            Err(error) => Err(stream_fault(peer, &error)),
        }
    };
    match tokio::time::timeout_at(deadline, exchange).await {
        Ok(result) => result,
        Err(_) => {
            Err(PeerFault::new(peer, FaultKind::Silent, format!("{protocol}: no answer before the deadline")))
        }
    }
}

/// The fault that a failed open is.
pub fn open_fault(peer: PeerId, error: OpenError) -> PeerFault {
    let kind = match &error {
        OpenError::Unreachable { .. } | OpenError::Closed => FaultKind::Unreachable,
        OpenError::UnknownProtocol { .. } => FaultKind::Refused,
        // Too many of our own is no failure of the peer either: try again later and give up nobody.
        OpenError::Busy { .. } | OpenError::TooMany { .. } => FaultKind::Busy,
        OpenError::TimedOut { .. } => FaultKind::Silent,
    };
    PeerFault::new(peer, kind, error.to_string())
}

/// The fault that a broken stream is.
pub fn stream_fault(peer: PeerId, error: &StreamError) -> PeerFault {
    let kind = match error {
        StreamError::FrameTooLarge { .. } => FaultKind::Malformed,
        StreamError::Reset { .. } | StreamError::Finished => FaultKind::Reset,
        StreamError::Refused(refusal) => return open_fault(peer, refusal.clone()),
    };
    PeerFault::new(peer, kind, error.to_string())
}

/// Answer requests with `handler`, in as many `places`, until the transport closes or `tasks` ends. A handler that
/// returns `None` refuses: the caller sees [`FaultKind::Refused`], as it does beyond its own places.
pub fn serve<F, Fut>(mut incoming: Incoming, tasks: &Tasks, places: Places, handler: F)
where
    F: Fn(PeerId, Bytes) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Option<Bytes>> + Send + 'static,
{
    let handler = Arc::new(handler);
    let (answering, refusing) = (Seats::new(places), Seats::new(places));
    let scope = Tasks::new();
    tasks.spawn(async move {
        // Taking the permit first makes the accept backlog the only queue, so overload reaches the opener as `Busy`.
        while let Ok(permit) = answering.free.clone().acquire_owned().await {
            let Some(stream) = incoming.next().await else { return };
            if let Some(seat) = answering.seat(stream.peer(), permit) {
                let handler = handler.clone();
                scope.spawn(async move {
                    answer(stream, &*handler).await;
                    drop(seat);
                });
            } else if let Ok(permit) = refusing.free.clone().try_acquire_owned()
                && let Some(seat) = refusing.seat(stream.peer(), permit)
            {
                scope.spawn(async move {
                    refuse(stream).await;
                    drop(seat);
                });
            }
            // Whoever has that many refusals under way is not worth one more: its stream is reset.
        }
    });
}

/// Places and who sits in them.
struct Seats {
    free: Arc<Semaphore>,
    per_peer: usize,
    taken: Arc<Mutex<BTreeMap<PeerId, usize>>>,
}

impl Seats {
    fn new(places: Places) -> Self {
        let free = Arc::new(Semaphore::new(places.total));
        Self { free, per_peer: places.per_peer, taken: Arc::default() }
    }

    /// A seat for `peer`, unless it has its share.
    fn seat(&self, peer: PeerId, permit: OwnedSemaphorePermit) -> Option<Seat> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.get(&peer).copied().unwrap_or(0);
        if own >= self.per_peer {
            return None;
        }
        taken.insert(peer, own + 1);
        Some(Seat { peer, taken: self.taken.clone(), _permit: permit })
    }
}

/// One place, held until it is dropped.
struct Seat {
    peer: PeerId,
    taken: Arc<Mutex<BTreeMap<PeerId, usize>>>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.peer) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

/// An end without an answer, at once. Then its request is taken in: a stream that is dropped unread looks broken.
async fn refuse(mut stream: Stream) {
    let told = tokio::time::timeout(REQUEST_TIMEOUT, async {
        stream.finish().await?;
        stream.recv().await
    });
    if !matches!(told.await, Ok(Ok(_))) {
        let peer = stream.peer();
        tracing::debug!(target: "potluck::rpc", %peer, protocol = %stream.protocol(), "refusal was not taken");
    }
}

async fn answer<F, Fut>(mut stream: Stream, handler: &F)
where
    F: Fn(PeerId, Bytes) -> Fut,
    Fut: Future<Output = Option<Bytes>>,
{
    let peer = stream.peer();
    let Ok(Ok(Some(request))) = tokio::time::timeout(REQUEST_TIMEOUT, stream.recv()).await else {
        tracing::debug!(target: "potluck::rpc", %peer, protocol = %stream.protocol(), "caller gave up");
        return;
    };
    let Some(reply) = handler(peer, request).await else {
        // An end without an answer is a refusal; a drop would look like a broken connection.
        if !matches!(tokio::time::timeout(ANSWER_TIMEOUT, stream.finish()).await, Ok(Ok(()))) {
            tracing::debug!(target: "potluck::rpc", %peer, protocol = %stream.protocol(), "refusal was not taken");
        }
        return;
    };
    let limit = ANSWER_TIMEOUT + Duration::from_secs_f64(reply.len() as f64 / ANSWER_RATE_MIN);
    let sent = tokio::time::timeout(limit, async {
        stream.send(reply).await?;
        stream.finish().await
    });
    if !matches!(sent.await, Ok(Ok(()))) {
        tracing::debug!(target: "potluck::rpc", %peer, protocol = %stream.protocol(), "answer was not taken");
    }
}
