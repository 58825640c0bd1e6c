//! Rounds of one channel: gather, exchange, agree, apply. The caller's vector goes in and comes back as the average; if
//! the round fails it comes back unchanged inside the error.

use crate::phases::{Finished, Own, everybody};
use crate::record::Record;
use crate::spans::Layout;
use crate::station::{Out, Station, Wish};
use crate::swarm::{ChannelHandler, Inner, Swarm};
use crate::view::{Member, View};
use crate::wire::{GATHER_BYTES_MAX, Plan, Ready, RoundMessage};
use bytes::Bytes;
use potluck_compression::{Policy, TensorInfo, tally};
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
    /// The tensors of a second vector, which follows from the average of the first and is averaged by the same plan.
    pub second: Option<Vec<TensorInfo>>,
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
        Self { tensors, second: None, compression, target_group_size: None, check_own: true }
    }
}

/// Makes the second vector of a round from the average of the first, or says why this peer gives the round up.
pub type Between = dyn Fn(&[f32]) -> Result<Vec<f32>, String> + Send + Sync;

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
    /// The Euclidean norm that is announced; `None`: that of `vector`. No vector of this round may be much longer.
    pub norm: Option<f64>,
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
    /// If `gather` is the same at all members with a vector, then so are their vectors: nothing is to be averaged.
    pub gather_names_vector: bool,
}

impl RoundRequest {
    /// A step with the usual settings.
    pub fn new(epoch: Option<u64>, vector: Vec<f32>, weight: f64) -> Self {
        Self {
            epoch,
            vector,
            weight,
            norm: None,
            gather: Bytes::new(),
            expected: Expect::AllLive,
            gather_timeout: None,
            timeout: Duration::from_secs(600),
            min_group_size: 1,
            gather_names_vector: false,
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
    /// Values beyond the range of the compression that we clamped to its end: of our contribution as it was sent, and
    /// of the averages that we made.
    pub saturated: u64,
}

/// A finished round.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// The average; empty for auxiliary peers.
    pub vector: Vec<f32>,
    /// The average of the second vector, if there is one.
    pub second: Vec<f32>,
    /// Who took part, in group order.
    pub members: Vec<MemberReport>,
    /// Sum of their weights.
    pub weight_total: f64,
    /// Names the plan; all members report the same.
    pub plan_hash: [u8; 32],
    /// Names the plan and every bit of what the group agreed on.
    pub result_hash: [u8; 32],
    /// All members had the same vector, and this is it: nothing was sent.
    pub unchanged: bool,
    /// Number of the attempt.
    pub attempt: u32,
    /// Which members (bit i: the i-th) are in all of the averages.
    pub full_contributors: u64,
    /// The averages as they travelled; `None` where this peer has none, or nothing was averaged.
    pub record: Option<Record>,
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
    /// Most of the group was lost. Those at the other end of the broken line finish the round, if there are any, and
    /// everybody would have to take over what we make of it alone. Step again.
    #[error("cut off from {lost} of {members} members")]
    CutOff {
        /// Members that were given up.
        lost: usize,
        /// Members of the plan.
        members: usize,
    },
    /// The group agreed on something that we could not fetch. Step again.
    #[error("the group's result could not be obtained: {reason}")]
    Diverged {
        /// What was missing.
        reason: String,
    },
    /// The average of the first vector gave no second one. Load the state of the others, then step again.
    #[error("the first phase gave nothing to go on with: {reason}")]
    Unusable {
        /// Why.
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
    pub(crate) channel: Arc<Channel>,
    pub(crate) config: AveragerConfig,
    layout_hash: [u8; 32],
    values: usize,
    stepping: tokio::sync::Mutex<()>,
    /// The vector that went into the last round: memory for the average of the next.
    spare: Mutex<Vec<f32>>,
    // Keeps the membership running.
    _swarm: Swarm,
}

pub(crate) struct Channel {
    pub(crate) swarm: Arc<Inner>,
    pub(crate) name: String,
    station: Mutex<Station>,
    pub(crate) changed: Notify,
}

impl Channel {
    pub(crate) fn station(&self) -> MutexGuard<'_, Station> {
        self.station.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn deliver(&self, out: Out) {
        for (peers, message) in out {
            self.swarm.send_round(&peers, &self.name, &message);
        }
    }
}

impl ChannelHandler for Channel {
    fn message(&self, now: Instant, from: PeerId, message: RoundMessage) {
        let mut out = Out::default();
        self.station().message(now, from, message, &mut out);
        self.deliver(out);
        self.changed.notify_one();
    }

    fn view_changed(&self, _now: Instant) {
        self.changed.notify_one();
    }

    fn leaders(&self, view: &View, epoch: u64) -> Vec<PeerId> {
        self.station().leaders(view, epoch)
    }
}

/// The number of one step. Its upper half names the process, so that a plan shows which one promised to take part.
fn nonce(me: Option<&Member>, random: u64) -> u64 {
    u64::from(me.map_or(0, |me| me.process)) << 32 | random & u64::from(u32::MAX)
}

/// Ends the round for the others when a step fails or is dropped.
struct Leaving<'a>(&'a Channel);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut out = Out::default();
        self.0.station().end(self.0.swarm.env.now(), &mut out);
        self.0.deliver(out);
    }
}

impl Averager {
    /// A channel on a swarm. Channels of one swarm need different names; peers meet under equal ones.
    pub fn new(swarm: &Swarm, channel: &str, config: AveragerConfig) -> Self {
        let inner = swarm.inner.clone();
        let group = config.target_group_size.unwrap_or(crate::GROUP_MAX).clamp(2, crate::GROUP_MAX);
        let layout = Layout::new(&config.tensors, &config.compression);
        let second = config.second.as_ref().map(|tensors| Layout::new(tensors, &config.compression));
        let phases = if second.is_some() { 2 } else { 1 };
        let channel = Arc::new(Channel {
            station: Mutex::new(Station::new(inner.me, &inner.config.run, channel, group, phases)),
            name: channel.to_owned(),
            changed: Notify::new(),
            swarm: inner,
        });
        let handler: Weak<dyn ChannelHandler> = Arc::downgrade(&channel) as Weak<dyn ChannelHandler>;
        channel.swarm.register(&channel.name, handler);
        Self {
            layout_hash: match second {
                None => layout.hash(),
                Some(second) => *blake3::hash(&[layout.hash(), second.hash()].concat()).as_bytes(),
            },
            values: layout.values,
            channel,
            config,
            stepping: tokio::sync::Mutex::new(()),
            spare: Mutex::default(),
            _swarm: swarm.clone(),
        }
    }

    /// Average with the group. Steps of one channel follow one another. Dropping the future gives the round up and
    /// tells the others.
    ///
    /// # Errors
    /// [`RoundError`], with the vector unchanged inside.
    pub async fn step(&self, request: RoundRequest) -> Result<Outcome<Round>, RoundError> {
        self.run(request, None).await
    }

    /// Average twice with the same group: first the request's vector, then what `between` makes of its average. Either
    /// both come back, or neither does. (Auxiliary peers have no vectors and call [`step`](Self::step).)
    ///
    /// # Errors
    /// [`RoundError`], with the vector unchanged inside.
    pub async fn step_twice(
        &self,
        request: RoundRequest,
        between: Arc<Between>,
    ) -> Result<Outcome<Round>, RoundError> {
        self.run(request, Some(between)).await
    }

    async fn run(
        &self,
        request: RoundRequest,
        between: Option<Arc<Between>>,
    ) -> Result<Outcome<Round>, RoundError> {
        let _one_at_a_time = self.stepping.lock().await;
        if let Err(kind) = self.check(&request, between.is_some()) {
            return Err(RoundError { kind, vector: request.vector, faults: Vec::new() });
        }
        let env = self.channel.swarm.env.clone();
        let started = env.now();
        let deadline = started + request.timeout;
        let check_own = self.config.check_own;
        let own = request.vector;
        let (vector, norm, bad) = env
            .offload(move || {
                let found = tally(&own);
                (own, found.square_sum.sqrt(), found.first_non_finite.filter(|_| check_own))
            })
            .await;
        let request = RoundRequest { vector: Vec::new(), ..request };
        let norm = if bad.is_some() { 0.0 } else { request.norm.unwrap_or(norm) };
        let ready = self.ready(&request, norm, bad.is_some());
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
        let spare = std::mem::take(&mut *self.spare());
        let own = Own { vector: vector.clone(), spare, bad: bad.is_some(), between };
        let result = self.round(&request, own, started, deadline, &mut faults).await;
        faults.append(&mut self.channel.station().faults);
        drop(leaving);
        let original = Arc::try_unwrap(vector).unwrap_or_else(|shared| shared.as_ref().clone());
        match result {
            Ok(Finished::Alone) => Ok(Outcome { value: self.alone(request, original), faults }),
            Ok(Finished::Unchanged { plan, hash, stats }) => {
                let members: Vec<MemberReport> = plan.members.iter().map(report).collect();
                let round = Round {
                    vector: original,
                    second: Vec::new(),
                    weight_total: members.iter().map(|member| member.weight).sum(),
                    members,
                    plan_hash: hash,
                    result_hash: hash,
                    unchanged: true,
                    attempt: plan.attempt,
                    full_contributors: everybody(&plan),
                    record: None,
                    stats,
                };
                Ok(Outcome { value: round, faults })
            }
            Ok(Finished::Averaged { average, second, plan, hash, result, contributors, record, stats }) => {
                *self.spare() = original;
                name_missing(&plan, contributors, &mut faults);
                let members: Vec<MemberReport> = plan.members.iter().map(report).collect();
                let round = Round {
                    vector: average,
                    second,
                    weight_total: members.iter().map(|member| member.weight).sum(),
                    members,
                    plan_hash: hash,
                    result_hash: result,
                    unchanged: false,
                    attempt: plan.attempt,
                    full_contributors: contributors,
                    record: (!self.channel.swarm.config.auxiliary).then_some(record),
                    stats,
                };
                Ok(Outcome { value: round, faults })
            }
            Err(kind) => Err(RoundError { kind, vector: original, faults }),
        }
    }

    /// What is averaged here.
    pub fn config(&self) -> &AveragerConfig {
        &self.config
    }

    fn spare(&self) -> MutexGuard<'_, Vec<f32>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, request: &RoundRequest, twice: bool) -> Result<(), RoundErrorKind> {
        let auxiliary = self.channel.swarm.config.auxiliary;
        let values = if auxiliary { 0 } else { self.values };
        let wrong = |field, reason| Err(RoundErrorKind::Request { field, reason });
        if request.vector.len() != values {
            return wrong("vector", format!("{} values, {values} expected", request.vector.len()));
        }
        if twice != self.config.second.is_some() && !auxiliary {
            return wrong(
                "second",
                "step_twice is for channels with a second vector, step for others".into(),
            );
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
            second: Vec::new(),
            members: vec![MemberReport { peer, weight: request.weight, gathered: request.gather }],
            weight_total: request.weight,
            plan_hash: [0; 32],
            result_hash: [0; 32],
            unchanged: false,
            attempt: 0,
            full_contributors: 1,
            record: None,
            stats: RoundStats::default(),
        }
    }
}

/// Whoever is not in all of the average is named by everybody, not only by the reducers that know why.
fn name_missing(plan: &Plan, contributors: u64, faults: &mut Vec<PeerFault>) {
    for (at, member) in plan.members.iter().enumerate() {
        let missing = member.weight > 0.0 && contributors & (1 << at) == 0;
        if missing && !faults.iter().any(|fault| fault.peer == member.peer) {
            let context = format!("not in all parts of {}; their reducers know why", plan.round());
            faults.push(PeerFault::new(member.peer, FaultKind::Missing, context));
        }
    }
}

fn report(member: &crate::wire::PlanMember) -> MemberReport {
    MemberReport { peer: member.peer, weight: member.weight, gathered: member.gathered.clone() }
}
