//! One pair of members in a round: the stream between them, opened by the one that is harder to reach, opened again when
//! it breaks, and resumed at the chunk where it broke.

use crate::exchange::{Outbox, Shared};
use crate::router::{self, Arrival};
use crate::wire::{PairFrame, contribution_head};
use bytes::Bytes;
use potluck_compression::Scratch;
use potluck_net::{FrameReceiver, FrameSender, Stream, Tasks};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Contributions of one sender that may wait for their turn, and their bytes if these are more: beyond that the sender
/// feels back-pressure. Less would stall senders whenever one of them is behind the others for a moment.
const WINDOW: usize = 4;
const WINDOW_BYTES: usize = 2 << 20;
/// First and longest pause between attempts to connect.
const PAUSE: std::ops::Range<Duration> = Duration::from_millis(20)..Duration::from_millis(640);

/// Chunks from which parts are wanted.
type Positions = Vec<(u16, u32)>;

/// An encoded contribution; its place in the window is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Payload {
    bytes: Bytes,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// What the round's loop hears of.
pub(crate) enum Event {
    Arrived(Arrival),
    Contribution {
        from: usize,
        part: usize,
        chunk: u32,
        payload: Payload,
    },
    Average {
        from: usize,
        part: usize,
        generation: u16,
        chunk: u32,
        mask: u64,
        /// As it arrived.
        whole: Bytes,
    },
    Frame {
        from: usize,
        frame: PairFrame,
    },
    /// Bytes that the protocol does not know; the stream that brought them is closed.
    Malformed {
        from: usize,
        reason: String,
    },
    /// A new stream stands; what the old one took with it must be said again.
    Resumed {
        with: usize,
    },
}

/// The pairs that we are one of. A task and its queue stand only where there is something to say.
pub(crate) struct Pairs {
    shared: Arc<Shared>,
    /// Where streams that others opened go; none before the pair has a task, and after the member is lost.
    inlets: Vec<Option<mpsc::Sender<Arrival>>>,
    /// Between whom and us the plan moves nothing, and nobody had anything to say yet.
    quiet: BTreeSet<usize>,
    events: mpsc::Sender<Event>,
    tasks: Tasks,
}

impl Pairs {
    pub(crate) fn new(shared: &Arc<Shared>, events: mpsc::Sender<Event>) -> Self {
        let members = shared.plan.members.len();
        Self {
            shared: shared.clone(),
            inlets: (0..members).map(|_| None).collect(),
            quiet: (0..members).filter(|member| *member != shared.me).collect(),
            events,
            tasks: Tasks::new(),
        }
    }

    /// Begin to talk to those to whom the plan gives us something to say.
    pub(crate) fn start(&mut self) {
        let planned: Vec<usize> =
            self.quiet.iter().copied().filter(|member| is_planned(&self.shared, *member)).collect();
        for member in planned {
            self.quiet.remove(&member);
            self.begin(member);
        }
    }

    fn begin(&mut self, member: usize) {
        let (inlet, arrivals) = mpsc::channel(4);
        self.inlets[member] = Some(inlet);
        self.tasks.spawn(run(self.shared.clone(), member, arrivals, self.events.clone()));
    }

    /// A member has opened a stream.
    pub(crate) fn arrived(&mut self, member: usize, arrival: Arrival) {
        if self.quiet.remove(&member) {
            self.begin(member);
        }
        if let Some(inlet) = &self.inlets[member] {
            let _one_too_many = inlet.try_send(arrival);
        }
    }

    pub(crate) fn lose(&mut self, member: usize) {
        self.quiet.remove(&member);
        self.inlets[member] = None;
    }

    /// Begin to talk to those for whom there is something now.
    pub(crate) fn break_silence(&mut self) {
        let due: Vec<usize> = {
            let board = self.shared.board();
            self.quiet.iter().copied().filter(|member| !is_empty(&board.outboxes[*member])).collect()
        };
        for member in due {
            self.quiet.remove(&member);
            self.begin(member);
        }
    }
}

fn is_empty(outbox: &Outbox) -> bool {
    outbox.frames.is_empty() && outbox.contributions.is_empty() && outbox.averages.is_empty()
}

/// Keep a stream to `member` until the round ends or the member is lost. Where the plan moves nothing between the two,
/// there is none until either has something to say, as when a part passes to another reducer.
async fn run(
    shared: Arc<Shared>,
    member: usize,
    mut arrivals: mpsc::Receiver<Arrival>,
    events: mpsc::Sender<Event>,
) {
    let first = shared.plan.opens(shared.me, member) == shared.me;
    let quiet = !is_planned(&shared, member);
    let mut opens = first && !quiet;
    let window = Arc::new(Semaphore::new(WINDOW.max(WINDOW_BYTES / shared.plan.chunk_bytes as usize)));
    let mut pause = PAUSE.start;
    let mut next: Option<Arrival> = None;
    let mut fresh = true;
    while !shared.board().lost[member] {
        let arrival = match next.take().map_or_else(|| arrivals.try_recv(), Ok) {
            Ok(arrival) => Some(arrival),
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) if opens => None,
            Err(TryRecvError::Empty) => tokio::select! {
                biased;
                arrival = arrivals.recv() => match arrival {
                    Some(arrival) => Some(arrival),
                    None => return,
                },
                () = has_work(&shared, member), if quiet => {
                    opens = true;
                    continue;
                }
            },
        };
        // If both open one at the same time, that of the first counts.
        let ours = arrival.is_none();
        let (stream, wanted) = match arrival {
            Some(arrival) => {
                opens = first;
                (arrival.stream, Some((arrival.contributions, arrival.averages)))
            }
            None => match open(&shared, member).await {
                Some(stream) => (stream, None),
                None => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.end);
                    continue;
                }
            },
        };
        pause = PAUSE.start;
        let talk = talk(&shared, member, stream, wanted, fresh, &events, &window);
        tokio::select! {
            biased;
            arrival = arrivals.recv(), if !(ours && first) => match arrival {
                // The other side gave the old stream up.
                Some(arrival) => next = Some(arrival),
                None => return,
            },
            () = talk => {}
        }
        fresh = false;
        if opens && next.is_none() {
            tokio::time::sleep(pause).await;
        }
    }
}

/// Whether the plan moves anything between us and a member. Between a member that others cannot dial and any other there
/// is always a stream: the other could not open one when it must.
fn is_planned(shared: &Shared, member: usize) -> bool {
    let board = shared.board();
    [shared.me, member]
        .iter()
        .any(|at| !board.store.parts[*at].range.is_empty() || shared.plan.members[*at].private)
}

/// Resolves when there is something to send to a member.
async fn has_work(shared: &Shared, member: usize) {
    while is_empty(&shared.board().outboxes[member]) {
        shared.wake[member].notified().await;
    }
}

async fn open(shared: &Shared, member: usize) -> Option<Stream> {
    let protocol = router::protocol(&shared.swarm.config.run);
    let opened = shared.swarm.transport.open(shared.peer(member), protocol);
    tokio::time::timeout(Duration::from_secs(5), opened).await.ok()?.ok()
}

fn hello(shared: &Shared, member: usize) -> PairFrame {
    let board = shared.board();
    let contributions = board.needs[member].iter().map(|(part, chunk)| (*part as u16, *chunk)).collect();
    let parts = board.store.parts.iter().enumerate();
    let theirs = parts.filter(|(part, held)| {
        shared.plan.reducer(*part, held.generation.into()) == member && !held.range.is_empty()
    });
    let averages = theirs.map(|(part, held)| (part as u16, held.done.len() as u32)).collect();
    PairFrame::Hello { plan: shared.hash, phase: shared.phase, contributions, averages }
}

/// Point what we send at where the other side says it is.
fn resume(shared: &Shared, member: usize, contributions: &[(u16, u32)], averages: &[(u16, u32)]) {
    let mut board = shared.board();
    let parts = board.store.parts.len();
    let may_receive = !shared.plan.members[member].auxiliary;
    let outbox = &mut board.outboxes[member];
    for (part, chunk) in contributions.iter().filter(|(part, _)| usize::from(*part) < parts) {
        if shared.sends(shared.me) {
            outbox.contributions.insert((*part).into(), *chunk);
        }
    }
    for (part, chunk) in averages.iter().filter(|(part, _)| usize::from(*part) < parts && may_receive) {
        outbox.averages.insert((*part).into(), *chunk);
    }
}

/// Talk over one stream until it breaks. `fresh`: nothing was ever sent to this member.
async fn talk(
    shared: &Arc<Shared>,
    member: usize,
    stream: Stream,
    wanted: Option<(Positions, Positions)>,
    fresh: bool,
    events: &mpsc::Sender<Event>,
    window: &Arc<Semaphore>,
) {
    let (mut sender, mut receiver) = stream.split();
    if let Some((contributions, averages)) = &wanted {
        resume(shared, member, contributions, averages);
    }
    if sender.send(hello(shared, member).encode()).await.is_err() {
        return;
    }
    if !fresh && events.send(Event::Resumed { with: member }).await.is_err() {
        return;
    }
    // The first stream of a pair starts at the beginning without waiting for an answer.
    if wanted.is_none() && !fresh {
        let Ok(Some(frame)) = receiver.recv().await else { return };
        match PairFrame::decode(frame) {
            Ok(PairFrame::Hello { contributions, averages, .. }) => {
                resume(shared, member, &contributions, &averages);
            }
            Ok(_) => return malformed(member, "the first frame is no hello", events).await,
            Err(error) => return malformed(member, &error.to_string(), events).await,
        }
    }
    let read = read(shared, member, &mut receiver, events, window);
    let write = write(shared, member, &mut sender);
    tokio::select! {
        biased;
        () = read => {}
        () = write => {}
    }
}

async fn malformed(from: usize, reason: &str, events: &mpsc::Sender<Event>) {
    // If nobody hears it, the round has ended.
    let _ended = events.send(Event::Malformed { from, reason: reason.to_owned() }).await;
}

async fn read(
    shared: &Arc<Shared>,
    member: usize,
    receiver: &mut FrameReceiver,
    events: &mpsc::Sender<Event>,
    window: &Arc<Semaphore>,
) {
    loop {
        let Ok(Some(frame)) = receiver.recv().await else { return };
        shared.swarm.heard_bulk(shared.peer(member));
        shared.swarm.received(frame.len());
        shared.board().traffic.received += frame.len() as u64;
        let whole = frame.clone();
        let frame = match PairFrame::decode(frame) {
            Ok(frame) => frame,
            Err(error) => return malformed(member, &error.to_string(), events).await,
        };
        let event = match frame {
            PairFrame::Hello { .. } => continue,
            PairFrame::Contribution { part, chunk, bytes } => {
                let Ok(place) = window.clone().acquire_owned().await else { return };
                let payload = Payload { bytes, _place: place };
                Event::Contribution { from: member, part: part.into(), chunk, payload }
            }
            PairFrame::Average { part, generation, chunk, mask, .. } => {
                Event::Average { from: member, part: part.into(), generation, chunk, mask, whole }
            }
            frame => Event::Frame { from: member, frame },
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// What to send next.
enum Work {
    Frame(Bytes),
    Encode { part: usize, chunk: u32 },
}

fn next_work(shared: &Shared, member: usize) -> Option<Work> {
    let mut board = shared.board();
    let board = &mut *board;
    let outbox = &mut board.outboxes[member];
    if let Some(frame) = outbox.frames.pop_front() {
        return Some(Work::Frame(frame.encode()));
    }
    for (part, next) in &mut outbox.averages {
        let held = &board.store.parts[*part];
        if let Some(average) = held.done.get(*next as usize) {
            let frame = average.frame(*part as u16, held.generation, *next);
            *next += 1;
            return Some(Work::Frame(frame));
        }
    }
    for (part, next) in &mut outbox.contributions {
        if (*next as usize) < board.store.parts[*part].range.len() {
            let work = Work::Encode { part: *part, chunk: *next };
            *next += 1;
            return Some(work);
        }
    }
    None
}

async fn write(shared: &Arc<Shared>, member: usize, sender: &mut FrameSender) {
    let mut scratch = Scratch::new();
    loop {
        let Some(work) = next_work(shared, member) else {
            if sender.flush().await.is_err() {
                return;
            }
            shared.wake[member].notified().await;
            continue;
        };
        let frame = match work {
            Work::Frame(frame) => frame,
            Work::Encode { part, chunk } => {
                let source = shared.clone();
                let mut memory = std::mem::take(&mut scratch);
                let encode = move || {
                    let index = source.board().store.parts[part].range.start + chunk as usize;
                    let of = &source.layout.chunks[index];
                    let head = contribution_head(part as u16, chunk);
                    let mut frame = source.swarm.pool.take(head.len() + of.encoded_bytes());
                    frame.extend_from_slice(&head);
                    // A value that the scheme cannot express becomes an empty frame: the reducer excludes and names us.
                    let values = &source.vector[of.range.clone()];
                    if let Ok(report) = of.scheme.encode(values, &mut frame, &mut memory) {
                        source.saturated.fetch_add(report.saturated as u64, Ordering::Relaxed);
                    }
                    (source.swarm.pool.bytes(frame), memory)
                };
                let (frame, memory) = shared.swarm.env.offload(encode).await;
                scratch = memory;
                frame
            }
        };
        let len = frame.len();
        if !feed(shared, sender, frame).await {
            return;
        }
        shared.board().traffic.sent += len as u64;
    }
}

/// Put a frame into the stream, and note how long it has to wait; false if the stream is broken.
async fn feed(shared: &Shared, sender: &mut FrameSender, frame: Bytes) -> bool {
    let len = frame.len();
    let mut feeding = std::pin::pin!(sender.feed(frame));
    if let Poll::Ready(fed) = futures::poll!(feeding.as_mut()) {
        return fed.is_ok();
    }
    let waiting = shared.swarm.wait_for_room();
    let fed = feeding.await.is_ok();
    if fed {
        waiting.done(len);
    }
    fed
}
