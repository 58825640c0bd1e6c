//! The all-reduce of one round: one stream per pair of members, contributions one way, averages the other, and parts
//! that move to the next reducer when theirs is lost. Decisions about order are in `reducer.rs` and `station.rs`.

use crate::pair::{Event, Pairs};
use crate::reducing::Reducing;
use crate::router::Arrival;
use crate::spans::{Chunk, Layout};
use crate::store::{Average, Store};
use crate::swarm::Inner;
use crate::wire::{AVERAGE_HEAD_BYTES, PairFrame, Plan};
use bytes::Bytes;
use potluck_net::{FaultKind, PeerFault, PeerId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, mpsc};

/// Events of all pairs that may wait for the round's loop.
const EVENTS: usize = 64;

/// What one member must still be sent.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    pub(crate) frames: VecDeque<PairFrame>,
    /// Parts that it reduces: the next chunk of our contribution.
    pub(crate) contributions: BTreeMap<usize, u32>,
    /// Parts that it receives from us: the next chunk.
    pub(crate) averages: BTreeMap<usize, u32>,
}

#[derive(Debug)]
pub(crate) struct Traffic {
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

pub(crate) struct Board {
    pub(crate) store: Store,
    pub(crate) outboxes: Vec<Outbox>,
    pub(crate) lost: Vec<bool>,
    /// Members that got nothing of ours yet over their current stream; see `pair.rs`.
    pub(crate) needs: Vec<BTreeMap<usize, u32>>,
    pub(crate) traffic: Traffic,
}

/// What the round's loop and the tasks of its pairs share.
pub(crate) struct Shared {
    pub(crate) swarm: Arc<Inner>,
    pub(crate) plan: Arc<Plan>,
    pub(crate) hash: [u8; 32],
    pub(crate) phase: u8,
    pub(crate) layout: Layout,
    pub(crate) vector: Arc<Vec<f32>>,
    pub(crate) me: usize,
    board: Mutex<Board>,
    pub(crate) wake: Vec<Notify>,
    /// Values that we encoded and that the scheme had to clamp.
    pub(crate) saturated: AtomicU64,
}

impl Shared {
    pub(crate) fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peer(&self, member: usize) -> PeerId {
        self.plan.members[member].peer
    }

    /// Whether a member contributes values.
    pub(crate) fn sends(&self, member: usize) -> bool {
        let member = &self.plan.members[member];
        !member.auxiliary && member.weight > 0.0
    }

    pub(crate) fn wake_all(&self) {
        self.wake.iter().for_each(Notify::notify_one);
    }
}

/// A part that we took over, while we ask who holds how much of it.
struct Adoption {
    answers: BTreeMap<usize, u32>,
    copying: Option<usize>,
}

pub(crate) struct Exchange {
    pub(crate) shared: Arc<Shared>,
    pub(crate) reducers: BTreeMap<usize, Reducing>,
    adoptions: BTreeMap<usize, Adoption>,
    sources: Vec<usize>,
    /// Parts that are fetched again because others hold different bits.
    refetching: BTreeMap<usize, usize>,
    events: mpsc::Receiver<Event>,
    arrivals: mpsc::Receiver<Arrival>,
    pairs: Pairs,
    /// Relative to the largest one.
    pub(crate) weights: Vec<f64>,
    /// Every chunk is decoded into it as soon as it is finished; what it holds counts once the group has agreed.
    pub(crate) vector: Vec<f32>,
    pub(crate) faults: Vec<PeerFault>,
    pub(crate) reassigned: u32,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.shared.swarm.router.remove(&(self.shared.hash, self.shared.phase));
    }
}

impl Exchange {
    pub(crate) fn start(
        swarm: &Arc<Inner>,
        plan: &Arc<Plan>,
        (hash, phase): ([u8; 32], u8),
        (layout, parts): (Layout, Vec<std::ops::Range<usize>>),
        vector: Arc<Vec<f32>>,
        mut output: Vec<f32>,
    ) -> Self {
        output.resize(if swarm.config.auxiliary { 0 } else { layout.values }, 0.0);
        let members = plan.members.len();
        let me = plan.index_of(swarm.me).expect("a plan without us is not accepted");
        let store = Store::new(parts);
        let shared = Arc::new(Shared {
            board: Mutex::new(Board {
                store,
                outboxes: (0..members).map(|_| Outbox::default()).collect(),
                lost: vec![false; members],
                needs: vec![BTreeMap::new(); members],
                traffic: Traffic { sent: 0, received: 0 },
            }),
            swarm: swarm.clone(),
            plan: plan.clone(),
            hash,
            phase,
            layout,
            vector,
            me,
            wake: (0..members).map(|_| Notify::new()).collect(),
            saturated: AtomicU64::new(0),
        });
        let heaviest = plan.members.iter().map(|m| m.weight).fold(0.0, f64::max);
        let (sender, events) = mpsc::channel(EVENTS);
        let mut exchange = Self {
            reducers: BTreeMap::new(),
            adoptions: BTreeMap::new(),
            sources: (0..members).collect(),
            refetching: BTreeMap::new(),
            events,
            arrivals: swarm.router.register((hash, phase)),
            pairs: Pairs::new(&shared, sender),
            weights: plan.members.iter().map(|m| m.weight / heaviest.max(f64::MIN_POSITIVE)).collect(),
            vector: output,
            faults: Vec::new(),
            reassigned: 0,
            shared,
        };
        exchange.assign();
        exchange.pairs.start();
        exchange
    }

    /// The planned work: what we reduce, and what we send to whom.
    fn assign(&mut self) {
        let shared = self.shared.clone();
        let mut board = shared.board();
        let me = shared.me;
        for part in 0..shared.plan.members.len() {
            if board.store.parts[part].range.is_empty() {
                continue;
            }
            if part == me {
                let chunks = board.store.parts[part].range.len() as u32;
                self.reducers.insert(part, self.reducing(0, chunks));
                for member in (0..shared.plan.members.len()).filter(|m| *m != me) {
                    if !shared.plan.members[member].auxiliary {
                        board.outboxes[member].averages.insert(part, 0);
                    }
                }
            } else if shared.sends(me) {
                board.outboxes[part].contributions.insert(part, 0);
            }
        }
        drop(board);
        self.publish_needs();
    }

    fn reducing(&self, first: u32, chunks: u32) -> Reducing {
        let senders = (0..self.shared.plan.members.len()).filter(|m| self.shared.sends(*m)).collect();
        Reducing::new(self.shared.me, senders, first, chunks)
    }

    /// For pairs that connect again: the next chunk that we need of each sender.
    pub(crate) fn publish_needs(&self) {
        let mut board = self.shared.board();
        for (member, needs) in board.needs.iter_mut().enumerate() {
            let of = |(part, reducing): (&usize, &Reducing)| (*part, reducing.order.needs_from(member));
            *needs = self.reducers.iter().map(of).collect();
        }
    }

    /// The next thing that happened. Cancel-safe.
    pub(crate) async fn next_event(&mut self) -> Event {
        self.pairs.break_silence();
        tokio::select! {
            biased;
            Some(event) = self.events.recv() => event,
            Some(arrival) = self.arrivals.recv() => Event::Arrived(arrival),
            else => futures::future::pending().await,
        }
    }

    pub(crate) async fn handle(&mut self, event: Event) {
        match event {
            Event::Arrived(arrival) => {
                if let Some(member) = self.shared.plan.index_of(arrival.stream.peer()) {
                    self.pairs.arrived(member, arrival);
                }
            }
            Event::Contribution { from, part, chunk, payload } => {
                if let Some(reducing) = self.reducers.get_mut(&part) {
                    reducing.order.offer(from, chunk, payload);
                    self.reduce(part).await;
                }
            }
            Event::Average { from, part, generation, chunk, mask, whole } => {
                if self.expects(from, part, generation) {
                    self.on_average(from, part, chunk, mask, whole).await;
                }
            }
            Event::Malformed { from, reason } => {
                // It would send the like again on every new stream: the round goes on without it.
                self.lose(from, FaultKind::Malformed, &format!(": {reason}")).await;
            }
            Event::Resumed { with } => self.say_again(with),
            Event::Frame { from, frame } => self.on_frame(from, frame).await,
        }
    }

    /// Start with what needs nobody else: our own values.
    pub(crate) async fn kick(&mut self) {
        let parts: Vec<usize> = self.reducers.keys().copied().collect();
        for part in parts {
            self.reduce(part).await;
        }
    }

    /// Whether averages of a part are due from this member.
    fn expects(&self, from: usize, part: usize, generation: u16) -> bool {
        let copying = self.adoptions.get(&part).and_then(|adoption| adoption.copying);
        let refetching = self.refetching.get(&part).copied();
        let expected = refetching.or(copying).or_else(|| self.sources.get(part).copied());
        let current = self.shared.board().store.parts.get(part).map(|held| held.generation);
        expected == Some(from) && current.is_some_and(|current| refetching.is_some() || current == generation)
    }

    async fn on_average(&mut self, from: usize, part: usize, chunk: u32, mask: u64, whole: Bytes) {
        let shared = self.shared.clone();
        let due = shared.board().store.next(&shared.layout, part, chunk).map(Chunk::encoded_bytes);
        let Some(due) = due else { return };
        let found = whole.len().saturating_sub(AVERAGE_HEAD_BYTES);
        if found != due {
            // Nobody keeps or passes on what is not as long as it must be, so this is its sender's own doing; to wait for
            // better from it would cost the round.
            let reason = format!(": an average of {found} bytes, where {due} are due");
            return self.lose(from, FaultKind::Malformed, &reason).await;
        }
        let mut vector = std::mem::take(&mut self.vector);
        let open = move || {
            let next = shared.board().store.next(&shared.layout, part, chunk).cloned();
            let average = next.map(|next| Average::open(whole, mask, &next, &mut vector));
            (average, vector)
        };
        let (average, vector) = self.shared.swarm.env.offload(open).await;
        self.vector = vector;
        let Some(average) = average else { return };
        if !self.shared.board().store.push(&self.shared.layout, part, chunk, average) {
            return;
        }
        if self.adoptions.get(&part).is_some_and(|adoption| adoption.copying.is_some()) {
            self.shared.wake_all();
            self.settle(part).await;
        } else if self.shared.board().outboxes.iter().any(|outbox| outbox.averages.contains_key(&part)) {
            // Somebody has it from us.
            self.shared.wake_all();
        }
    }

    async fn on_frame(&mut self, from: usize, frame: PairFrame) {
        match frame {
            PairFrame::Adopt { part, generation } => self.on_adopt(from, part.into(), generation),
            PairFrame::Prefix { part, generation, chunks } => {
                let part = usize::from(part);
                let current = self.shared.board().store.parts.get(part).map(|p| p.generation);
                if current == Some(generation)
                    && let Some(adoption) = self.adoptions.get_mut(&part)
                {
                    adoption.answers.insert(from, chunks);
                    self.settle(part).await;
                }
            }
            PairFrame::Pull { part, chunk, .. } => {
                if self.shared.sends(self.shared.me) {
                    self.shared.board().outboxes[from].contributions.insert(part.into(), chunk);
                    self.shared.wake[from].notify_one();
                }
            }
            PairFrame::Copy { part, chunk, .. } => {
                self.shared.board().outboxes[from].averages.insert(part.into(), chunk);
                self.shared.wake[from].notify_one();
            }
            PairFrame::Complain { part, generation } => {
                let part = usize::from(part);
                let current = self.shared.board().store.parts.get(part).map(|p| p.generation);
                let ours = self.shared.plan.reducer(part, generation.into()) == self.shared.me;
                match current {
                    Some(current) if generation <= current => {}
                    Some(_) if ours => self.adopt(part, generation).await,
                    Some(_) => self.moved(from, part, generation),
                    None => {}
                }
            }
            PairFrame::Hello { .. } | PairFrame::Contribution { .. } | PairFrame::Average { .. } => {}
        }
    }

    /// Requests whose answer is outstanding; positions are in the streams' first frames.
    fn say_again(&mut self, member: usize) {
        let mut board = self.shared.board();
        let board = &mut *board;
        let frames = &mut board.outboxes[member].frames;
        for (at, held) in board.store.parts.iter().enumerate() {
            let (part, generation, chunk) = (at as u16, held.generation, held.done.len() as u32);
            if let Some(adoption) = self.adoptions.get(&at) {
                if !adoption.answers.contains_key(&member) {
                    frames.push_back(PairFrame::Adopt { part, generation });
                }
                if adoption.copying == Some(member) {
                    frames.push_back(PairFrame::Copy { part, generation, chunk });
                }
            } else if self.refetching.get(&at) == Some(&member) && !held.is_complete() {
                frames.push_back(PairFrame::Copy { part, generation, chunk });
            } else if self.sources[at] == member && !held.is_complete() {
                // A complaint of ours made it the source, or it passes on what another reduces; say so again.
                frames.push_back(PairFrame::Copy { part, generation, chunk });
                let next = self.shared.plan.next_generation(at, generation.into(), &board.lost);
                let theirs = next.filter(|next| self.shared.plan.reducer(at, *next) == member);
                if let Some(next) = theirs.filter(|next| *next > usize::from(generation)) {
                    frames.push_back(PairFrame::Complain { part, generation: next as u16 });
                }
            }
        }
        self.shared.wake[member].notify_one();
    }

    fn on_adopt(&mut self, from: usize, part: usize, generation: u16) {
        let mut board = self.shared.board();
        let Some(held) = board.store.parts.get_mut(part) else { return };
        let due = self.shared.plan.reducer(part, generation.into()) == from;
        if !due || generation < held.generation {
            return;
        }
        held.generation = generation;
        let chunks = held.done.len() as u32;
        let before = std::mem::replace(&mut self.sources[part], from);
        self.reducers.remove(&part);
        self.adoptions.remove(&part);
        for outbox in &mut board.outboxes {
            outbox.contributions.remove(&part);
            outbox.averages.remove(&part);
        }
        board.outboxes[from].frames.push_back(PairFrame::Prefix { part: part as u16, generation, chunks });
        drop(board);
        self.shared.wake[from].notify_one();
        if before != from {
            // Lost to its successor only, it does not know that we send it nothing more.
            self.tell_moved([before], part, generation);
        }
    }

    /// A part has passed to a reducer of which we have not heard, perhaps because we are lost to each other. Whoever says
    /// so passes its averages on, and so do we.
    fn moved(&mut self, from: usize, part: usize, generation: u16) {
        let mut board = self.shared.board();
        let Some(held) = board.store.parts.get_mut(part) else { return };
        held.generation = generation;
        let chunk = held.done.len() as u32;
        self.sources[part] = from;
        self.reducers.remove(&part);
        self.adoptions.remove(&part);
        for outbox in &mut board.outboxes {
            outbox.contributions.remove(&part);
        }
        board.outboxes[from].frames.push_back(PairFrame::Copy { part: part as u16, generation, chunk });
        drop(board);
        self.shared.wake[from].notify_one();
        let others = (0..self.shared.plan.members.len()).filter(|member| *member != from);
        self.tell_moved(others, part, generation);
    }

    fn tell_moved(&self, members: impl IntoIterator<Item = usize>, part: usize, generation: u16) {
        let mut board = self.shared.board();
        for member in members {
            if member != self.shared.me && !board.lost[member] {
                let moved = PairFrame::Complain { part: part as u16, generation };
                board.outboxes[member].frames.push_back(moved);
                self.shared.wake[member].notify_one();
            }
        }
    }

    /// Take a part over: first learn how much of it is finished anywhere.
    async fn adopt(&mut self, part: usize, generation: u16) {
        let members = self.shared.plan.members.len();
        {
            let mut board = self.shared.board();
            board.store.parts[part].generation = generation;
            for member in (0..members).filter(|m| *m != self.shared.me) {
                board.outboxes[member].contributions.remove(&part);
                board.outboxes[member].averages.remove(&part);
                board.outboxes[member].frames.push_back(PairFrame::Adopt { part: part as u16, generation });
            }
        }
        self.sources[part] = self.shared.me;
        self.reassigned += 1;
        self.adoptions.insert(part, Adoption { answers: BTreeMap::new(), copying: None });
        self.shared.wake_all();
        self.settle(part).await;
    }

    /// Go on with a part that we took over, once everybody alive has answered and its finished chunks are here.
    async fn settle(&mut self, part: usize) {
        let Some(adoption) = self.adoptions.get_mut(&part) else { return };
        let me = self.shared.me;
        let members = self.shared.plan.members.len();
        {
            let mut board = self.shared.board();
            let missing = |m: &usize| *m != me && !board.lost[*m] && !adoption.answers.contains_key(m);
            if (0..members).any(|member| missing(&member)) {
                return;
            }
            let alive = adoption.answers.iter().filter(|(member, _)| !board.lost[**member]);
            let best = alive.map(|(member, chunks)| (*chunks, *member)).max();
            let held = board.store.parts[part].done.len() as u32;
            let generation = board.store.parts[part].generation;
            for (member, chunks) in &adoption.answers {
                if !self.shared.plan.members[*member].auxiliary {
                    board.outboxes[*member].averages.entry(part).or_insert(*chunks);
                }
            }
            if let Some((chunks, holder)) = best
                && chunks > held
            {
                if adoption.copying != Some(holder) {
                    adoption.copying = Some(holder);
                    let copy = PairFrame::Copy { part: part as u16, generation, chunk: held };
                    board.outboxes[holder].frames.push_back(copy);
                    self.shared.wake[holder].notify_one();
                }
                return;
            }
            let chunks = board.store.parts[part].range.len() as u32;
            for member in (0..members).filter(|m| *m != me && self.shared.sends(*m) && held < chunks) {
                let pull = PairFrame::Pull { part: part as u16, generation, chunk: held };
                board.outboxes[member].frames.push_back(pull);
            }
            let mut reducing = self.reducing(held, chunks);
            let lost = board.lost.iter().enumerate().filter(|(_, lost)| **lost);
            lost.for_each(|(member, _)| reducing.order.lose(member));
            self.reducers.insert(part, reducing);
        }
        self.adoptions.remove(&part);
        self.shared.wake_all();
        self.reduce(part).await;
    }

    pub(crate) fn exclude(&mut self, part: usize, sender: usize, kind: FaultKind, reason: &str) {
        let plan = &self.shared.plan;
        let context = format!("{}, part {part}: {reason}", plan.round());
        self.faults.push(PeerFault::new(self.shared.peer(sender), kind, context));
        for reducing in self.reducers.values_mut() {
            reducing.order.exclude(sender);
        }
    }

    /// Members that are no longer with us; what they owed is done without them.
    pub(crate) async fn lose(&mut self, member: usize, kind: FaultKind, reason: &str) {
        {
            let mut board = self.shared.board();
            if std::mem::replace(&mut board.lost[member], true) {
                return;
            }
        }
        let peer = self.shared.peer(member);
        if kind != FaultKind::Left || !self.is_complete() {
            let plan = &self.shared.plan;
            let context = format!("lost in {}, attempt {}{reason}", plan.round(), plan.attempt + 1);
            self.faults.push(PeerFault::new(peer, kind, context));
        }
        self.pairs.lose(member);
        self.shared.wake[member].notify_one();
        for reducing in self.reducers.values_mut() {
            reducing.order.lose(member);
        }
        let parts: Vec<usize> = self.reducers.keys().copied().collect();
        for part in parts {
            self.reduce(part).await;
        }
        self.reassign(member).await;
        let adopted: Vec<usize> = self.adoptions.keys().copied().collect();
        for part in adopted {
            if let Some(adoption) = self.adoptions.get_mut(&part)
                && adoption.copying == Some(member)
            {
                adoption.copying = None;
            }
            self.settle(part).await;
        }
    }

    async fn reassign(&mut self, member: usize) {
        for part in 0..self.sources.len() {
            if self.sources[part] != member {
                continue;
            }
            let next = {
                let board = self.shared.board();
                let held = &board.store.parts[part];
                if held.is_complete() || self.shared.plan.members[self.shared.me].auxiliary {
                    continue;
                }
                self.shared.plan.next_generation(part, usize::from(held.generation) + 1, &board.lost)
            };
            let Some(generation) = next else { continue };
            let reducer = self.shared.plan.reducer(part, generation);
            if reducer == self.shared.me {
                self.adopt(part, generation as u16).await;
            } else {
                let complaint = PairFrame::Complain { part: part as u16, generation: generation as u16 };
                self.shared.board().outboxes[reducer].frames.push_back(complaint);
                self.shared.wake[reducer].notify_one();
                // If that one is lost as well, its loss leads to the next.
                self.sources[part] = reducer;
            }
        }
    }

    /// Fetch a part anew from a member that holds what the group agreed on.
    pub(crate) fn refetch(&mut self, part: usize, holder: usize) {
        if self.refetching.insert(part, holder).is_some() {
            return;
        }
        let mut board = self.shared.board();
        board.store.parts[part].done.clear();
        let generation = board.store.parts[part].generation;
        let copy = PairFrame::Copy { part: part as u16, generation, chunk: 0 };
        board.outboxes[holder].frames.push_back(copy);
        drop(board);
        self.reducers.remove(&part);
        self.shared.wake[holder].notify_one();
    }

    /// A part that the group agreed on as somebody else holds it, who was lost before it came.
    pub(crate) fn out_of_reach(&self) -> Option<usize> {
        let board = self.shared.board();
        let missing = |(part, holder): &(&usize, &usize)| {
            board.lost[**holder] && !board.store.parts[**part].is_complete()
        };
        self.refetching.iter().find(missing).map(|(part, _)| *part)
    }

    /// Members that were given up in this phase.
    pub(crate) fn lost(&self) -> Vec<PeerId> {
        let board = self.shared.board();
        let lost = board.lost.iter().enumerate().filter(|(_, lost)| **lost);
        lost.map(|(member, _)| self.shared.peer(member)).collect()
    }

    /// Whether we hold all that we need: every part, or, without a vector of our own, those that we reduce.
    pub(crate) fn is_complete(&self) -> bool {
        let board = self.shared.board();
        if self.shared.plan.members[self.shared.me].auxiliary {
            let ours = self.sources.iter().enumerate().filter(|(_, source)| **source == self.shared.me);
            return ours.map(|(part, _)| &board.store.parts[part]).all(crate::store::Part::is_complete);
        }
        board.store.is_complete()
    }
}
