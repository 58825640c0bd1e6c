//! Rounds of one channel: gather, exchange, agree, apply. The caller's vector goes in and comes back as the average; if
//! the round fails it comes back unchanged inside the error.

use crate::detector::HEARTBEAT;
use crate::exchange::Exchange;
use crate::membership::Member;
use crate::spans::Layout;
use crate::station::{Agreed, Gathering, Out, PlanHash, Station, Wish};
use crate::sum::square_sum;
use crate::swarm::{ChannelHandler, Inner, Swarm};
use crate::wire::{GATHER_BYTES_MAX, Plan, Ready, RoundMessage};
use bytes::Bytes;
use potluck_compression::{Policy, TensorInfo, first_non_finite};
use potluck_net::{FaultKind, Outcome, PeerFault, PeerId, Reachability};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What is averaged and how it travels. Equal at all peers of a channel.
#[derive(Debug, Clone)]
pub struct AveragerConfig {
    /// The tensors that make up the vector, in order.
    pub tensors: Vec<TensorInfo>,
    /// How each travels.
    pub compression: Policy,
    /// Largest group; larger swarms average in a grid of groups. At most [`crate::GROUP_MAX`].
    pub target_group_size: Option<usize>,
    /// Look for NaN and infinity in our own vector before it is offered, and offer it with weight 0 if there are any.
    pub check_own: bool,
}

impl AveragerConfig {
    /// With the usual settings.
    pub fn new(tensors: Vec<TensorInfo>, compression: Policy) -> Self {
        Self { tensors, compression, target_group_size: None, check_own: true }
    }
}

/// Whom a round waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expect {
    /// Every live peer that works on this epoch.
    #[default]
    AllLive,
}

/// One step of a channel.
#[derive(Debug, Clone)]
pub struct RoundRequest {
    /// Rounds of different epochs never mix; `None` averages with whoever steps now.
    pub epoch: Option<u64>,
    /// Our values; empty for auxiliary peers.
    pub vector: Vec<f32>,
    /// Their weight, such as the number of samples.
    pub weight: f64,
    /// Handed to all members, at most [`GATHER_BYTES_MAX`] bytes.
    pub gather: Bytes,
    /// Whom to wait for.
    pub expected: Expect,
    /// How long peers that are expected but silent are waited for; `None` follows earlier rounds.
    pub gather_timeout: Option<Duration>,
    /// Limit of the whole step.
    pub timeout: Duration,
    /// Fewer members are no round.
    pub min_group_size: usize,
}

impl RoundRequest {
    /// A step with the usual settings.
    pub fn new(epoch: Option<u64>, vector: Vec<f32>, weight: f64) -> Self {
        Self {
            epoch,
            vector,
            weight,
            gather: Bytes::new(),
            expected: Expect::AllLive,
            gather_timeout: None,
            timeout: Duration::from_secs(600),
            min_group_size: 1,
        }
    }
}

/// A member of a finished round.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberReport {
    /// Who.
    pub peer: PeerId,
    /// With which weight; 0 if its contribution was refused.
    pub weight: f64,
    /// What it handed to all.
    pub gathered: Bytes,
}

/// Figures of a round.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoundStats {
    /// Seconds until the round began.
    pub gather_seconds: f64,
    /// Seconds until we held every part.
    pub transfer_seconds: f64,
    /// Seconds until the group agreed and the average was applied.
    pub agree_seconds: f64,
    /// Bytes that we sent, framing included.
    pub bytes_sent: u64,
    /// Bytes that we received.
    pub bytes_received: u64,
    /// Bytes of one encoded vector.
    pub encoded_bytes: u64,
    /// Parts that we took over from lost reducers.
    pub parts_reassigned: u32,
}

/// A finished round.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// The average; empty for auxiliary peers.
    pub vector: Vec<f32>,
    /// Who took part, in group order.
    pub members: Vec<MemberReport>,
    /// Sum of their weights.
    pub weight_total: f64,
    /// Names the plan; all members report the same.
    pub plan_hash: [u8; 32],
    /// Number of the attempt.
    pub attempt: u32,
    /// Which members (bit i: the i-th) are in all of the averages.
    pub full_contributors: u64,
    /// Figures.
    pub stats: RoundStats,
}

/// Why a step brought no average. The vector is unchanged.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{kind}")]
pub struct RoundError {
    /// What happened.
    pub kind: RoundErrorKind,
    /// The caller's vector, as it was.
    pub vector: Vec<f32>,
    /// Who failed us.
    pub faults: Vec<PeerFault>,
}

/// The ways in which a step ends without an average.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RoundErrorKind {
    /// Time is up. Step again, or with a longer timeout.
    #[error("no average within the timeout while {phase}")]
    TimedOut {
        /// What was going on.
        phase: &'static str,
    },
    /// The group began without us. Load the state of the others, then step again.
    #[error("the round began without us: catch up and step again")]
    LeftOut,
    /// The group agreed on something that we could not fetch. Step again.
    #[error("the group's result could not be obtained: {reason}")]
    Diverged {
        /// What was missing.
        reason: String,
    },
    /// Nobody contributed with a positive weight. Step again when there is something to average.
    #[error("no member contributed with a positive weight")]
    Empty,
    /// The request is wrong.
    #[error("{field}: {reason}")]
    Request {
        /// Which field.
        field: &'static str,
        /// Found and allowed.
        reason: String,
    },
}

/// One channel of a swarm: a vector that all peers average now and then.
pub struct Averager {
    channel: Arc<Channel>,
    config: AveragerConfig,
    layout_hash: [u8; 32],
    values: usize,
    stepping: tokio::sync::Mutex<()>,
    // Keeps the membership running.
    _swarm: Swarm,
}

struct Channel {
    swarm: Arc<Inner>,
    name: String,
    station: Mutex<Station>,
    changed: Notify,
}

impl Channel {
    fn station(&self) -> MutexGuard<'_, Station> {
        self.station.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, out: Out) {
        for (peer, message) in out {
            self.swarm.send_round(peer, &self.name, message);
        }
    }
}

impl ChannelHandler for Channel {
    fn message(&self, now: Instant, from: PeerId, message: RoundMessage) {
        let mut out = Vec::new();
        self.station().message(now, from, message, &mut out);
        self.deliver(out);
        self.changed.notify_one();
    }

    fn view_changed(&self, _now: Instant) {
        self.changed.notify_one();
    }
}

/// The number of one step. Its upper half names the process, so that a plan shows which one promised to take part.
fn nonce(me: Option<&Member>, random: u64) -> u64 {
    u64::from(me.map_or(0, |me| me.process)) << 32 | random & u64::from(u32::MAX)
}

/// Whether another process than the one that promised to take part is there now. It owes nothing, and nobody may wait
/// for its predecessor. A plan may also be ahead of the heartbeats, so these get the time to follow.
fn is_restarted(now: &Member, nonce: u64, age: Duration) -> bool {
    let promised = nonce >> 32;
    // 0: not known yet.
    age > HEARTBEAT * 2 && now.process != 0 && promised != 0 && u64::from(now.process) != promised
}

/// Ends the round for the others when a step fails or is dropped.
struct Leaving<'a>(&'a Channel);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut out = Vec::new();
        self.0.station().end(self.0.swarm.env.now(), &mut out);
        self.0.deliver(out);
    }
}

impl Averager {
    /// A channel on a swarm. Channels of one swarm need different names; peers meet under equal ones.
    pub fn new(swarm: &Swarm, channel: &str, config: AveragerConfig) -> Self {
        let inner = swarm.inner.clone();
        let group = config.target_group_size.unwrap_or(crate::GROUP_MAX).clamp(2, crate::GROUP_MAX);
        let layout = Layout::new(&config.tensors, &config.compression, 1);
        let channel = Arc::new(Channel {
            station: Mutex::new(Station::new(inner.me, &inner.config.run, channel, group)),
            name: channel.to_owned(),
            changed: Notify::new(),
            swarm: inner,
        });
        let handler: Weak<dyn ChannelHandler> = Arc::downgrade(&channel) as Weak<dyn ChannelHandler>;
        channel.swarm.register(&channel.name, handler);
        Self {
            layout_hash: layout.hash(),
            values: layout.values,
            channel,
            config,
            stepping: tokio::sync::Mutex::new(()),
            _swarm: swarm.clone(),
        }
    }

    /// Average with the group. Steps of one channel follow one another. Dropping the future gives the round up and
    /// tells the others.
    ///
    /// # Errors
    /// [`RoundError`], with the vector unchanged inside.
    pub async fn step(&self, request: RoundRequest) -> Result<Outcome<Round>, RoundError> {
        let _one_at_a_time = self.stepping.lock().await;
        if let Err(kind) = self.check(&request) {
            return Err(RoundError { kind, vector: request.vector, faults: Vec::new() });
        }
        let env = self.channel.swarm.env.clone();
        let started = env.now();
        let deadline = started + request.timeout;
        let check_own = self.config.check_own;
        let own = request.vector;
        let (vector, norm, bad) = env
            .offload(move || {
                let bad = if check_own { first_non_finite(&own) } else { None };
                let norm = square_sum(&own).sqrt();
                (own, norm, bad)
            })
            .await;
        let request = RoundRequest { vector: Vec::new(), ..request };
        let ready = self.ready(&request, if bad.is_some() { 0.0 } else { norm }, bad.is_some());
        let mut faults = Vec::new();
        if let Some(at) = bad {
            let context = format!("our own value {at} is {}: averaging without it", vector[at]);
            faults.push(PeerFault::new(self.channel.swarm.me, FaultKind::NotFinite, context));
        }
        let wish =
            Wish { ready, started, patience: request.gather_timeout, group_size_min: request.min_group_size };
        self.channel.station().start(wish);
        let leaving = Leaving(&self.channel);
        let vector = Arc::new(vector);
        let result =
            self.round(&request, vector.clone(), bad.is_some(), started, deadline, &mut faults).await;
        faults.append(&mut self.channel.station().faults);
        drop(leaving);
        let original = Arc::try_unwrap(vector).unwrap_or_else(|shared| shared.as_ref().clone());
        match result {
            Ok(Finished::Alone) => Ok(Outcome { value: self.alone(request, original), faults }),
            Ok(Finished::Averaged { average, plan, hash, contributors, stats }) => {
                let members: Vec<MemberReport> = plan.members.iter().map(report).collect();
                let round = Round {
                    vector: average,
                    weight_total: members.iter().map(|member| member.weight).sum(),
                    members,
                    plan_hash: hash,
                    attempt: plan.attempt,
                    full_contributors: contributors,
                    stats,
                };
                Ok(Outcome { value: round, faults })
            }
            Err(kind) => Err(RoundError { kind, vector: original, faults }),
        }
    }

    fn check(&self, request: &RoundRequest) -> Result<(), RoundErrorKind> {
        let auxiliary = self.channel.swarm.config.auxiliary;
        let values = if auxiliary { 0 } else { self.values };
        let wrong = |field, reason| Err(RoundErrorKind::Request { field, reason });
        if request.vector.len() != values {
            return wrong("vector", format!("{} values, {values} expected", request.vector.len()));
        }
        if !(request.weight.is_finite() && request.weight >= 0.0) {
            return wrong("weight", format!("{} is not a finite number of at least 0", request.weight));
        }
        if request.gather.len() > GATHER_BYTES_MAX {
            return wrong("gather", format!("{} bytes, at most {GATHER_BYTES_MAX}", request.gather.len()));
        }
        Ok(())
    }

    fn ready(&self, request: &RoundRequest, norm: f64, bad: bool) -> Ready {
        let swarm = &self.channel.swarm;
        let (up, down) = swarm.rates();
        let auxiliary = swarm.config.auxiliary;
        Ready {
            epoch: request.epoch,
            nonce: nonce(swarm.current_view().members.get(&swarm.me), swarm.env.random_u64()),
            attempt: self.channel.station().attempt(request.epoch),
            weight: if auxiliary || bad { 0.0 } else { request.weight },
            norm,
            gathered: request.gather.clone(),
            rate: if up > 0.0 && down > 0.0 { up.min(down) } else { up.max(down) },
            private: swarm.config.client_mode || swarm.transport.reachability() == Reachability::Private,
            auxiliary,
            layout: self.layout_hash,
        }
    }

    fn alone(&self, request: RoundRequest, vector: Vec<f32>) -> Round {
        let peer = self.channel.swarm.me;
        Round {
            vector,
            members: vec![MemberReport { peer, weight: request.weight, gathered: request.gather }],
            weight_total: request.weight,
            plan_hash: [0; 32],
            attempt: 0,
            full_contributors: 1,
            stats: RoundStats::default(),
        }
    }

    async fn round(
        &self,
        request: &RoundRequest,
        vector: Arc<Vec<f32>>,
        bad: bool,
        started: Instant,
        deadline: Instant,
        faults: &mut Vec<PeerFault>,
    ) -> Result<Finished, RoundErrorKind> {
        let swarm = &self.channel.swarm;
        let Some((plan, hash)) = self.gather(deadline).await? else {
            return if bad { Err(RoundErrorKind::Empty) } else { Ok(Finished::Alone) };
        };
        if plan.members.iter().all(|member| member.weight == 0.0) {
            return Err(RoundErrorKind::Empty);
        }
        tracing::debug!(target: "potluck::round", channel = %self.channel.name, epoch = ?request.epoch,
            members = plan.members.len(), "round begins");
        let begun = swarm.env.now();
        let layout = Layout::new(&self.config.tensors, &self.config.compression, plan.members.len());
        let mut exchange = Exchange::start(swarm, &plan, hash, 0, layout, vector.clone());
        let agreed = self.exchange(&mut exchange, &plan, deadline).await;
        faults.append(&mut exchange.faults);
        let finished_at = agreed?;
        let shared = exchange.shared.clone();
        let mut stats = RoundStats {
            gather_seconds: (begun - started).as_secs_f64(),
            transfer_seconds: (finished_at - begun).as_secs_f64(),
            encoded_bytes: shared.layout.encoded_bytes() as u64,
            parts_reassigned: exchange.reassigned,
            ..RoundStats::default()
        };
        drop(exchange);
        let auxiliary = swarm.config.auxiliary;
        let decoding = shared.clone();
        let (average, contributors) = swarm
            .env
            .offload(move || {
                let board = decoding.board();
                let mut average = vec![0.0; if auxiliary { 0 } else { decoding.layout.values }];
                let decoded =
                    if auxiliary { Ok(()) } else { board.store.decode(&decoding.layout, &mut average) };
                let masks = board.store.parts.iter().flat_map(|part| &part.done).map(|average| average.mask);
                decoded.map(|()| (average, masks.fold(u64::MAX, |all, mask| all & mask)))
            })
            .await
            .map_err(|reason| RoundErrorKind::Diverged { reason })?;
        stats.agree_seconds = (swarm.env.now() - finished_at).as_secs_f64();
        {
            let board = shared.board();
            (stats.bytes_sent, stats.bytes_received) = (board.traffic.sent, board.traffic.received);
        }
        let everybody = u64::MAX >> (64 - plan.members.len().clamp(1, 64));
        Ok(Finished::Averaged { average, plan, hash, contributors: contributors & everybody, stats })
    }

    async fn gather(&self, deadline: Instant) -> Result<Option<(Arc<Plan>, PlanHash)>, RoundErrorKind> {
        let channel = &self.channel;
        loop {
            let now = channel.swarm.env.now();
            let mut out = Vec::new();
            let view = channel.swarm.current_view();
            let state = channel.station().gather(now, &view, &mut out);
            channel.deliver(out);
            let wakeup = match state {
                Gathering::Wait(at) => at,
                Gathering::Alone => return Ok(None),
                Gathering::Begun(plan, hash) => return Ok(Some((plan, hash))),
                Gathering::LeftOut => return Err(RoundErrorKind::LeftOut),
            };
            if now >= deadline {
                return Err(RoundErrorKind::TimedOut { phase: "waiting for the group" });
            }
            tokio::select! {
                biased;
                () = channel.changed.notified() => {}
                () = tokio::time::sleep_until(wakeup.min(deadline)) => {}
            }
        }
    }

    /// Move the bytes until the group has agreed and we hold what it agreed on. Returns when we first held everything.
    async fn exchange(
        &self,
        exchange: &mut Exchange,
        plan: &Plan,
        deadline: Instant,
    ) -> Result<Instant, RoundErrorKind> {
        let channel = &self.channel;
        let begun = channel.swarm.env.now();
        let mut finished_at = None;
        exchange.kick().await;
        loop {
            let now = channel.swarm.env.now();
            self.lose_the_gone(exchange, plan, now - begun).await;
            if finished_at.is_none() && exchange.is_complete() {
                finished_at = Some(now);
                let auxiliary = channel.swarm.config.auxiliary;
                let digests = if auxiliary { Vec::new() } else { exchange.shared.board().store.digests() };
                channel.station().finished(now, digests);
            }
            let spent = finished_at.unwrap_or(now) - begun;
            let alive: Vec<PeerId> = channel.swarm.current_view().members.keys().copied().collect();
            let mut out = Vec::new();
            let agreed =
                channel.station().agree(now, &alive, spent.max(Duration::from_secs(2)) * 2, &mut out);
            channel.deliver(out);
            if let (Some(agreed), Some(finished)) = (agreed, finished_at)
                && self.conforms(exchange, plan, &agreed)?
            {
                return Ok(finished);
            }
            if now >= deadline {
                return Err(RoundErrorKind::TimedOut { phase: "averaging" });
            }
            let tick = (now + Duration::from_millis(250)).min(deadline);
            tokio::select! {
                biased;
                event = exchange.next_event() => exchange.handle(event).await,
                () = channel.changed.notified() => {}
                () = tokio::time::sleep_until(tick) => {}
            }
        }
    }

    async fn lose_the_gone(&self, exchange: &mut Exchange, plan: &Plan, age: Duration) {
        let channel = &self.channel;
        let withdrawn = channel.station().withdrawn();
        let view = channel.swarm.current_view();
        for (at, member) in plan.members.iter().enumerate() {
            if member.peer == channel.swarm.me {
                continue;
            }
            if withdrawn.contains(&member.peer) {
                exchange.lose(at, FaultKind::Left).await;
            } else if view.members.get(&member.peer).is_none_or(|now| is_restarted(now, member.nonce, age)) {
                exchange.lose(at, FaultKind::Silent).await;
            }
        }
    }

    /// Whether we hold what was agreed; parts that differ are fetched again.
    fn conforms(
        &self,
        exchange: &mut Exchange,
        plan: &Plan,
        agreed: &Agreed,
    ) -> Result<bool, RoundErrorKind> {
        if self.channel.swarm.config.auxiliary {
            return Ok(true);
        }
        if !exchange.is_complete() {
            return Ok(false);
        }
        let own = exchange.shared.board().store.digests();
        let mut conforms = true;
        for (part, (ours, theirs)) in own.iter().zip(&agreed.digests).enumerate() {
            if ours == theirs {
                continue;
            }
            conforms = false;
            let holder = agreed.holders.get(part).and_then(|peer| plan.index_of(*peer));
            match holder.filter(|holder| *holder != exchange.shared.me) {
                Some(holder) => exchange.refetch(part, holder),
                None => {
                    let reason = format!("nobody is named for part {part}");
                    return Err(RoundErrorKind::Diverged { reason });
                }
            }
        }
        Ok(conforms)
    }
}

enum Finished {
    Alone,
    Averaged { average: Vec<f32>, plan: Arc<Plan>, hash: PlanHash, contributors: u64, stats: RoundStats },
}

fn report(member: &crate::wire::PlanMember) -> MemberReport {
    MemberReport { peer: member.peer, weight: member.weight, gathered: member.gathered.clone() }
}
