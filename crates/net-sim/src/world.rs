//! The clock-free fabric: peers, pipes, streams, and the queue of events that moves chunks between them.
//!
//! Everything happens inside one mutex. Nothing that is dropped in here may hold a `Stream`, because dropping a stream
//! locks the world again; that is why opens are kept as ids and streams are made by whoever receives them.

use crate::control::{Conn, Pending};
use crate::flow::{Chunk, Flow, Payload};
use crate::kept::Kept;
use crate::pipe::{FlowRef, Pipe};
use crate::streams::Streams;
use crate::trace::{Entry, Log, What};
use crate::{PeerSpec, Traffic};
use potluck_net::{Env, Identity, PeerId, Protocol, Stream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Weak;
use std::task::Waker;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// A peer's index, in the order in which peers were added.
pub(crate) type Node = u32;
/// The "rule" of a stall that nobody lifts.
pub(crate) const FOREVER: u64 = u64::MAX;

/// How alive a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    Up,
    /// Closed or killed: its host answers that nobody listens.
    Down,
    /// Without power: nothing answers.
    Vanished,
}

pub(crate) struct Peer {
    pub(crate) identity: Identity,
    pub(crate) spec: PeerSpec,
    pub(crate) env: Env,
    pub(crate) life: Life,
    pub(crate) incarnation: u64,
    pub(crate) frozen: bool,
    pub(crate) accepts: BTreeMap<Protocol, (u64, mpsc::Sender<Stream>)>,
    pub(crate) streams: BTreeSet<u64>,
    pub(crate) neighbours: BTreeSet<Node>,
    pub(crate) traffic: Traffic,
}

pub(crate) enum Event {
    PipeDone(usize),
    Arrive(FlowRef, Chunk),
    /// The sender of this stream's end may look for credit.
    Credit(u64, u8),
    /// The end learns that the other side is gone; `whole` stream or only what this end sends.
    Reset {
        stream: u64,
        end: u8,
        whole: bool,
        reason: &'static str,
    },
    OpenArrive(u64),
    /// A stream on one that was kept.
    BeginArrive(u64),
    BeginRefused(u64, Box<potluck_net::OpenError>),
    OpenAnswer(u64, Box<Result<u64, potluck_net::OpenError>>),
    /// Nothing came through this connection since then.
    Silence((Node, Node), Instant),
    /// The peer may have connections to give up.
    Trim(Node),
}

struct Timed {
    at: Instant,
    /// Two events of one instant happen in the order in which they were scheduled.
    sequence: u64,
    event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.sequence == other.sequence
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

pub(crate) struct World {
    pub(crate) inner: Weak<crate::sim::Inner>,
    pub(crate) rng: StdRng,
    start: Instant,
    /// The time of the event that is being handled, or of the last call from outside.
    pub(crate) now: Instant,
    events: BinaryHeap<Reverse<Timed>>,
    sequence: u64,
    /// When the driver will wake by itself.
    pub(crate) armed: Option<Instant>,
    pub(crate) driver: Option<Waker>,
    pub(crate) peers: Vec<Peer>,
    pub(crate) by_id: BTreeMap<PeerId, Node>,
    pipes: Vec<Pipe>,
    pub(crate) streams: Streams,
    pub(crate) conns: BTreeMap<(Node, Node), Conn>,
    pub(crate) pending: BTreeMap<u64, Pending>,
    pub(crate) kept: Kept,
    /// Opens and resets that wait for a link to heal or a peer to wake.
    pub(crate) parked: Vec<Event>,
    pub(crate) partitions: BTreeMap<u64, (BTreeSet<Node>, BTreeSet<Node>)>,
    /// Rules that stand: a stall lasts as long as its rule.
    pub(crate) rules: BTreeSet<u64>,
    pub(crate) log: Log,
    next_id: u64,
}

impl World {
    pub(crate) fn new(inner: Weak<crate::sim::Inner>, seed: u64) -> Self {
        let now = Instant::now();
        Self {
            inner,
            rng: StdRng::seed_from_u64(seed),
            start: now,
            now,
            events: BinaryHeap::new(),
            sequence: 0,
            armed: None,
            driver: None,
            peers: Vec::new(),
            by_id: BTreeMap::new(),
            pipes: Vec::new(),
            streams: Streams::default(),
            conns: BTreeMap::new(),
            pending: BTreeMap::new(),
            kept: Kept::default(),
            parked: Vec::new(),
            partitions: BTreeMap::new(),
            rules: BTreeSet::from([FOREVER]),
            log: Log::default(),
            next_id: 0,
        }
    }

    /// A number that was not given out before.
    pub(crate) fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(crate) fn peer(&self, node: Node) -> &Peer {
        &self.peers[node as usize]
    }

    pub(crate) fn peer_mut(&mut self, node: Node) -> &mut Peer {
        &mut self.peers[node as usize]
    }

    pub(crate) fn peer_id(&self, node: Node) -> PeerId {
        self.peer(node).identity.peer_id()
    }

    pub(crate) fn add_peer(&mut self, identity: Identity, spec: PeerSpec, env: Env) -> Node {
        let node = self.peers.len() as Node;
        let id = identity.peer_id();
        assert!(self.by_id.insert(id, node).is_none(), "two peers named {:?}", spec.name);
        self.pipes.push(Pipe::new(spec.up_bytes_per_second));
        self.pipes.push(Pipe::new(spec.down_bytes_per_second));
        self.peers.push(Peer {
            identity,
            spec,
            env,
            life: Life::Up,
            incarnation: 0,
            frozen: false,
            accepts: BTreeMap::new(),
            streams: BTreeSet::new(),
            neighbours: BTreeSet::new(),
            traffic: Traffic::default(),
        });
        self.note(node, node, None, 0, What::Added);
        node
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now.duration_since(self.start)
    }

    pub(crate) fn note(&mut self, from: Node, to: Node, protocol: Option<&Protocol>, bytes: u64, what: What) {
        let at = self.elapsed();
        self.log.push(Entry { at, from, to, protocol: protocol.cloned(), bytes, what });
    }

    /// Whether nothing gets from one peer to another right now.
    pub(crate) fn cut(&self, from: Node, to: Node) -> bool {
        self.peer(from).life == Life::Vanished
            || self.peer(to).life == Life::Vanished
            || self.partitions.values().any(|(a, b)| a.contains(&from) && b.contains(&to))
    }

    // ---- time -------------------------------------------------------------------------------------------------

    pub(crate) fn schedule(&mut self, at: Instant, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse(Timed { at, sequence: self.sequence, event }));
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            if let Some(driver) = self.driver.take() {
                driver.wake();
            }
        }
    }

    pub(crate) fn next_event(&self) -> Option<Instant> {
        self.events.peek().map(|Reverse(timed)| timed.at)
    }

    /// Handle everything that is due. Events have exact times although tokio's timers fire by the millisecond: a chain
    /// of short steps inside one millisecond is handled in one go, with its own times.
    pub(crate) fn run_until(&mut self, now: Instant) {
        while self.next_event().is_some_and(|at| at <= now) {
            let Some(Reverse(timed)) = self.events.pop() else { break };
            self.now = timed.at.max(self.now);
            self.handle(timed.event);
        }
        self.now = now.max(self.now);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::PipeDone(pipe) => self.pipe_done(pipe),
            Event::Arrive(flow, chunk) => self.arrive(flow, chunk),
            Event::Credit(stream, end) => {
                if let Some(state) = self.streams.get_mut(stream) {
                    state.flows[usize::from(end)].wake_sender();
                }
            }
            Event::Reset { stream, end, whole, reason } => self.reset_arrives(stream, end, whole, reason),
            Event::OpenArrive(open) => self.open_arrives(open),
            Event::BeginArrive(stream) => self.begin_arrives(stream),
            Event::BeginRefused(stream, refusal) => self.refusal_arrives(stream, *refusal),
            Event::OpenAnswer(open, result) => self.open_answered(open, *result),
            Event::Silence(key, since) => self.silence(key, since),
            Event::Trim(node) => self.trim(node),
        }
    }

    // ---- frames -----------------------------------------------------------------------------------------------

    /// What jitter and the sender's fault rates make of a frame: lateness, stall, reset.
    pub(crate) fn seeded_fate(&mut self, from: Node, to: Node) -> (Duration, bool, bool) {
        let faults = self.peer(from).spec.faults;
        let jitter = self.peer(from).spec.jitter + self.peer(to).spec.jitter;
        let mut late = Duration::ZERO;
        // No draw where nothing is random: a peer's faults do not change its neighbours' luck.
        if !jitter.is_zero() {
            late += jitter.mul_f64(self.rng.random::<f64>());
        }
        if self.strikes(faults.delay) {
            late += faults.delay_max.mul_f64(self.rng.random::<f64>());
        }
        (late, self.strikes(faults.stall), self.strikes(faults.reset))
    }

    pub(crate) fn strikes(&mut self, rate: f64) -> bool {
        rate > 0.0 && self.rng.random::<f64>() < rate
    }

    /// Put a chunk into the line of its flow at one hop.
    pub(crate) fn enqueue(&mut self, at: FlowRef, chunk: Chunk) {
        let Some(state) = self.streams.get_mut(at.stream) else { return };
        let hop = &mut state.flows[usize::from(at.dir)].hops[usize::from(at.hop)];
        let (pipe, bytes) = (hop.pipe, chunk.bytes);
        hop.queue.push_back(chunk);
        if !hop.queued {
            hop.queued = true;
            self.pipes[pipe].enqueue(at, bytes);
            self.serve(pipe);
        }
    }

    /// Start the next turn of a pipe that is free.
    fn serve(&mut self, pipe: usize) {
        if self.pipes[pipe].serving.is_some() {
            return;
        }
        let quantum = self.pipes[pipe].quantum();
        while let Some(at) = self.pipes[pipe].next() {
            let Some(state) = self.streams.get_mut(at.stream) else { continue };
            let hop = &mut state.flows[usize::from(at.dir)].hops[usize::from(at.hop)];
            hop.queued = false;
            let Some(front) = hop.queue.front_mut() else { continue };
            let chunk = if front.bytes > quantum {
                front.bytes -= quantum;
                Chunk { bytes: quantum, payload: Payload::Part, late: Duration::ZERO, stall: front.stall }
            } else {
                let Some(chunk) = hop.queue.pop_front() else { continue };
                chunk
            };
            if !hop.queue.is_empty() {
                hop.queued = true;
                self.pipes[pipe].requeue(at);
            }
            let done = self.now + self.pipes[pipe].duration(chunk.bytes);
            self.pipes[pipe].serving = Some((at, chunk));
            self.schedule(done, Event::PipeDone(pipe));
            return;
        }
    }

    fn pipe_done(&mut self, pipe: usize) {
        if let Some((at, chunk)) = self.pipes[pipe].serving.take() {
            self.count(pipe, at, &chunk);
            self.leave_hop(at, chunk);
        }
        self.serve(pipe);
    }

    fn count(&mut self, pipe: usize, at: FlowRef, chunk: &Chunk) {
        let traffic = &mut self.peers[pipe / 2].traffic;
        match (pipe.is_multiple_of(2), at.hop) {
            (true, _) => traffic.up_bytes += chunk.bytes,
            (false, hop) => {
                traffic.down_bytes += chunk.bytes;
                let last = self.streams.get(at.stream).map(|state| state.flows[0].hops.len() - 1);
                if last.is_some_and(|last| usize::from(hop) < last) {
                    traffic.relayed_bytes += chunk.bytes;
                }
            }
        }
    }

    /// A pipe has sent a chunk: on to the next pipe, or to the reader.
    fn leave_hop(&mut self, at: FlowRef, chunk: Chunk) {
        let now = self.now;
        let Some(state) = self.streams.get_mut(at.stream) else { return };
        let flow = &mut state.flows[usize::from(at.dir)];
        let next = FlowRef { hop: at.hop + 1, ..at };
        let Some(hop) = flow.hops.get_mut(usize::from(next.hop)) else { return self.deliver(at, chunk) };
        if hop.from == hop.to {
            return self.enqueue(next, chunk);
        }
        let late = if at.hop == 0 { chunk.late } else { Duration::ZERO };
        let arrival = (now + hop.latency + late).max(hop.not_before.unwrap_or(now));
        hop.not_before = Some(arrival);
        self.schedule(arrival, Event::Arrive(next, chunk));
    }

    /// A chunk has crossed a link, unless the link is cut or the stream stalls here.
    fn arrive(&mut self, at: FlowRef, chunk: Chunk) {
        let Some(state) = self.streams.get(at.stream) else { return };
        let flow = &state.flows[usize::from(at.dir)];
        let hop = &flow.hops[usize::from(at.hop)];
        let stall = chunk.stall.filter(|rule| self.rules.contains(rule)).or(flow.stalled_by);
        let held = stall.is_some() || !hop.held.is_empty() || self.cut(hop.from, hop.to);
        if !held {
            return self.enqueue(at, chunk);
        }
        let Some(state) = self.streams.get_mut(at.stream) else { return };
        let flow = &mut state.flows[usize::from(at.dir)];
        flow.stalled_by = stall;
        flow.hops[usize::from(at.hop)].held.push_back(chunk);
    }

    /// After a heal: whatever was held and may move now does, in order.
    pub(crate) fn release_held(&mut self) {
        let mut held = Vec::new();
        for (stream, state) in self.streams.iter_mut() {
            for (dir, flow) in state.flows.iter_mut().enumerate() {
                if flow.stalled_by.is_some_and(|rule| !self.rules.contains(&rule)) {
                    flow.stalled_by = None;
                }
                for (index, hop) in flow.hops.iter_mut().enumerate() {
                    let at = FlowRef { stream, dir: dir as u8, hop: index as u8 };
                    held.extend(hop.held.drain(..).map(|chunk| (at, chunk)));
                }
            }
        }
        for (at, chunk) in held {
            self.arrive(at, chunk);
        }
    }

    fn deliver(&mut self, at: FlowRef, chunk: Chunk) {
        let Some(state) = self.streams.get_mut(at.stream) else { return };
        let dir = usize::from(at.dir);
        let (from, to) = (state.ends[dir], state.ends[1 - dir]);
        let flow: &mut Flow = &mut state.flows[dir];
        if flow.recv_error.is_some() {
            return;
        }
        let (bytes, what) = match chunk.payload {
            Payload::Part => return,
            Payload::Frame(frame) => {
                let bytes = frame.len() as u64;
                flow.inbox.push_back(frame);
                (bytes, What::Delivered)
            }
            Payload::Finish => {
                flow.finish_arrived = true;
                (0, What::Finished)
            }
        };
        flow.wake_receiver();
        let protocol = state.protocol.clone();
        if what == What::Delivered {
            self.peer_mut(to).traffic.frames_received += 1;
        }
        self.note(from, to, Some(&protocol), bytes, what);
    }
}
