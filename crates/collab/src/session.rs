//! One peer's part in a run. The training program drives: it calls `step` and does what it answers.

mod loading;
mod waiting;

use crate::core::Core;
use crate::dialect::{Channel, Dialect, RoundCall, RoundFailed, RoundStats, Snapshot, Terms};
use crate::events::{EVENTS_MAX, Event};
use crate::factors::Factors;
use crate::memory::{self, Held, Ledger, Purpose, bytes_of};
use crate::native::Native;
use crate::policy::{Background, Step};
use crate::status::Status;
use crate::{Invite, JoinError, Lineage, PolicyKind, SessionConfig, manifest, manifest_hash};
use bytes::Bytes;
use potluck_net::{Env, Outcome, PeerFault, PeerId, Tasks, Transport};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{broadcast, watch};
use waiting::Waiting;

/// How many times a round is tried while its peers are there and nobody has moved on.
const ROUND_ATTEMPTS: u32 = 3;

/// An average, or what this peer goes on with when there was none.
#[derive(Debug, Clone, PartialEq)]
pub struct Averaged {
    /// The weighted mean, bit-identical at all members; this peer's own values if `alone`.
    pub vector: Vec<f32>,
    /// Who took part, in group order, this peer included.
    pub members: Vec<PeerId>,
    /// What each of them handed to all.
    pub gathered: Vec<Bytes>,
    /// The sum of the members' weights.
    pub weight_total: f64,
    /// Nobody else's values are in it: nobody came, or all had the same state.
    pub alone: bool,
    /// The others have finished the round without this peer and gone on: apply nothing, `step` answers `LoadState`.
    pub missed: bool,
    /// What it cost.
    pub stats: RoundStats,
}

/// What ran in the background and is ready to be applied.
#[derive(Debug)]
pub struct Started {
    /// What was averaged.
    pub channel: Channel,
    /// The average, with the faults met on the way.
    pub averaged: Outcome<Averaged>,
}

/// What `load_state` has for the training program.
#[derive(Debug, Clone, PartialEq)]
pub enum Loaded {
    /// Nothing: nobody is ahead, or it did not work (an event says why).
    Nothing,
    /// A complete state that replaces everything.
    State(Snapshot),
    /// The averaged gradients of a round that this peer missed: step the optimizer with them, then `epoch_done`.
    Gradients(Vec<f32>),
    /// The parameters that the others have since a round that this peer missed. Where rounds of the state end epochs (local
    /// updates, DiLoCo), `epoch_done` follows.
    Parameters(Vec<f32>),
}

/// The status is renewed at most this often, and at least this often, beside the calls that change it.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// One peer's part in a run. Cheap to clone; the last clone that goes ends everything it started.
#[derive(Clone)]
pub struct Session {
    inner: Arc<Inner>,
    tasks: Tasks,
}

struct Inner {
    dialect: Arc<dyn Dialect>,
    env: Env,
    config: SessionConfig,
    core: Mutex<Core>,
    /// What runs in the background and has its average, which waits here.
    started: Mutex<Option<(Started, Held)>>,
    ledger: Ledger,
    status: watch::Sender<Status>,
    events: broadcast::Sender<Event>,
}

impl Session {
    /// Join a run in which all peers speak the native protocol.
    ///
    /// # Errors
    /// [`JoinError`]: the config, the invite, a differing manifest, or the network.
    pub async fn join(
        transport: Arc<dyn Transport>,
        env: Env,
        config: SessionConfig,
    ) -> Result<Self, JoinError> {
        config.validate()?;
        Invite::admit(config.owner, &config.run_id, config.invite.as_deref())?;
        let factors = Factors::new(&config)?;
        let dialect = Native::join(transport.clone(), env.clone(), &config, factors.clone()).await?;
        let session = Self::with_dialect(Arc::new(dialect), env, config)?;
        session.inner.core().factors = factors;
        crate::sight::serve(&*transport, &session.tasks, &session.inner.config, session.status());
        crate::serve_speed(&*transport, &session.tasks);
        Ok(session)
    }

    /// Join over a protocol that is already running.
    ///
    /// # Errors
    /// [`JoinError::Config`].
    pub fn with_dialect(
        dialect: Arc<dyn Dialect>,
        env: Env,
        config: SessionConfig,
    ) -> Result<Self, JoinError> {
        config.validate()?;
        let genesis = Lineage::genesis(&config.run_id, &manifest_hash(&manifest(&config)));
        let core = Core::new(dialect.local_peer(), config.clone(), genesis, env.random_u64());
        let status = watch::Sender::new(core.status());
        let inner = Inner {
            dialect,
            env,
            config,
            core: Mutex::new(core),
            started: Mutex::new(None),
            ledger: Ledger::default(),
            status,
            events: broadcast::Sender::new(EVENTS_MAX),
        };
        inner.tell(false);
        let (inner, tasks) = (Arc::new(inner), Tasks::new());
        let watched = inner.clone();
        tasks.spawn(async move { watched.keep_looking().await });
        Ok(Self { inner, tasks })
    }

    /// Who we are.
    pub fn local_peer(&self) -> PeerId {
        self.inner.dialect.local_peer()
    }

    /// The epoch that this peer works on.
    pub fn epoch(&self) -> u64 {
        self.inner.core().lineage.epoch
    }

    /// The history of this peer's parameters.
    pub fn lineage(&self) -> Lineage {
        self.inner.core().lineage
    }

    /// Add samples that were computed since the last call; answers what to do next. Never waits. A state that was loaded before
    /// is taken over for good: until then others neither hear of it nor are offered it.
    pub fn step(&self, samples: u64) -> Step {
        self.inner.step(samples)
    }

    /// Resolves when the answer of `step(0)` may have changed, for a peer that has nothing else to do. Cancel-safe.
    pub async fn changed(&self) {
        self.inner.dialect.changed().await;
    }

    /// Average the mean gradients of this peer's samples with everybody's, weighted by samples. When there is no
    /// average, the own gradients come back with the faults: training goes on.
    pub async fn average_gradients(&self, vector: Vec<f32>, weight: f64) -> Outcome<Averaged> {
        self.average_gradients_on(Terms::default(), vector, weight).await
    }

    /// As [`Self::average_gradients`], on terms of this round's own.
    pub async fn average_gradients_on(
        &self,
        terms: Terms,
        vector: Vec<f32>,
        weight: f64,
    ) -> Outcome<Averaged> {
        let averaged = self.inner.round(Channel::Gradients, vector, weight, terms).await;
        let mut core = self.inner.core();
        core.own.restart_clock(self.inner.env.now());
        if self.inner.config.policy == PolicyKind::DelayedOptimizer && !averaged.value.missed {
            core.begin_background(Channel::Gradients);
        }
        averaged
    }

    /// Average the parameters; the result is what they are to be replaced by. Sent as the difference to the last
    /// agreed parameters. Under local updates and DiLoCo this ends the epoch, and samples are the weight.
    pub async fn average_state(&self, vector: Vec<f32>) -> Outcome<Averaged> {
        let averaged = self.inner.state_round(vector).await;
        self.inner.core().own.restart_clock(self.inner.env.now());
        averaged
    }

    /// Start averaging gradients beside the next samples; `step` answers `Apply` when it is ready.
    pub fn start_gradients(&self, vector: Vec<f32>, weight: f64) {
        self.inner.core().begin_background(Channel::Gradients);
        let inner = self.inner.clone();
        self.tasks.spawn(async move {
            let averaged = inner.round(Channel::Gradients, vector, weight, Terms::default()).await;
            inner.finish_background(Channel::Gradients, averaged);
        });
    }

    /// Start averaging parameters beside the next samples; when `step` answers `Apply`, add what the average differs
    /// from the vector given here to the parameters of then.
    pub fn start_state(&self, vector: Vec<f32>) {
        self.inner.core().begin_background(Channel::State);
        let inner = self.inner.clone();
        self.tasks.spawn(async move {
            let averaged = inner.state_round(vector).await;
            inner.finish_background(Channel::State, averaged);
        });
    }

    /// What was started and is ready.
    pub fn take_started(&self) -> Option<Started> {
        let waiting = self.inner.started.lock().unwrap_or_else(PoisonError::into_inner).take();
        let started = waiting.map(|(started, _held)| started);
        match &started {
            Some(started) if started.averaged.value.missed => self.inner.core().forget_background(),
            Some(Started { channel: Channel::State, .. }) => self.inner.core().apply_state(),
            _ => {}
        }
        self.inner.remember();
        started
    }

    /// Delayed optimizer: its step, running beside the samples, has finished; `step` answers `Apply` next.
    pub fn optimizer_ready(&self) {
        let mut core = self.inner.core();
        if core.background == Background::Running {
            core.background = Background::Ready;
        }
    }

    /// If the last round failed although others were here, and nothing was applied: everything is as it was before.
    /// Whether it was so.
    pub fn round_void(&self) -> bool {
        let void = self.inner.core().round_void();
        self.inner.tell(void);
        void
    }

    /// An error in the program came between an average and `epoch_done`: what was to be applied is given up, and the epoch is
    /// still to be made. Whether there was anything; then `publish` the state as it is now. Whoever has applied the average, or
    /// has at least the state of before, replaces it.
    pub fn abandon(&self) -> bool {
        let abandoned = {
            let mut core = self.inner.core();
            // Under this lock, an average that is ready and not here was handed out. One of the state waits for the epoch's end.
            let started = self.inner.started.lock().unwrap_or_else(PoisonError::into_inner);
            let waits = started.as_ref().is_some_and(|(it, _)| it.channel == Channel::Gradients);
            !waits && core.abandon()
        };
        self.inner.tell(abandoned);
        abandoned
    }

    /// The average was applied: one epoch further. The snapshot, if given, is offered to newcomers. When the round
    /// failed although others were here, what was applied alone ends no epoch: `epoch` stays, and the history changes.
    pub fn epoch_done(&self, snapshot: Option<Snapshot>) {
        self.inner.core().epoch_done();
        self.inner.remember();
        match snapshot {
            Some(snapshot) => self.publish(snapshot),
            None => self.inner.tell(true),
        }
    }

    /// Offer the present state to newcomers: once before the first epoch, and again whenever the parameters changed
    /// other than by an epoch (state averaging). Its epoch and lineage are filled in.
    pub fn publish(&self, snapshot: Snapshot) {
        let sealed = {
            let mut core = self.inner.core();
            // What was loaded is in it.
            core.accept();
            core.seal(snapshot)
        };
        self.inner.dialect.publish(sealed);
        self.inner.tell(true);
    }

    /// Get what others have, if any is ahead or has won: the next round that this peer missed, if somebody still has it,
    /// else their state. With [`Loaded::Nothing`] the program goes on; `step` says so again if it must.
    pub async fn load_state(&self) -> Outcome<Loaded> {
        let loaded = self.inner.load_state(true, self.inner.config.load_state_timeout).await;
        self.inner.core().own.forget_clock();
        self.inner.tell(true);
        loaded
    }

    /// For a program that has no use for rounds which it missed: the whole state of others or `None`, with a limit of this
    /// call's own.
    pub async fn load_whole_state(&self, limit: Option<Duration>) -> Outcome<Option<Snapshot>> {
        let limit = limit.unwrap_or(self.inner.config.load_state_timeout);
        let Outcome { value, faults } = self.inner.load_state(false, limit).await;
        self.inner.core().own.forget_clock();
        self.inner.tell(true);
        Outcome { value: if let Loaded::State(snapshot) = value { Some(snapshot) } else { None }, faults }
    }

    /// The program goes on with the state that it was given last: others hear of it, and are offered it. The next `step`, round or
    /// publication says the same.
    pub fn accept_state(&self) {
        self.inner.accept();
        self.inner.tell(true);
    }

    /// The program does not go on with the state that it was given last: this peer is on the history of before again, or, if it
    /// has not `kept` all of its own state, on one of its own, which gives way to that. Whoever said that it had the state is not
    /// believed for a while if the own one was kept. Whether there was such a state; then `publish` the own one.
    pub fn refuse_state(&self, reason: &str, kept: bool) -> bool {
        let refused = self.inner.core().refuse(self.inner.env.now(), kept);
        if refused {
            self.inner
                .emit(Event::StateFailed { reason: format!("the state of others cannot be used: {reason}") });
        }
        self.inner.tell(refused);
        refused
    }

    /// Take over the history of those who are ahead, without their state: for averages of values that differ on
    /// purpose. Whether somebody was.
    pub fn follow(&self) -> bool {
        let now = self.inner.env.now();
        let mut core = self.inner.core();
        self.inner.look(&mut core);
        let Some(winner) = core.winner(now) else { return false };
        core.adopt_lineage(winner.lineage, now);
        drop(core);
        self.inner.drop_started();
        self.inner.tell(true);
        true
    }

    /// The parameters of the epoch that has just begun, for `StateEvery::Drift`.
    pub fn observe_state(&self, vector: &[f32]) {
        self.inner.core().observe_state(vector);
        self.inner.tell(false);
    }

    /// The training program's loss, to be shown to everybody.
    pub fn report_loss(&self, loss: f32) {
        self.inner.core().report_loss(loss);
    }

    /// Where whoever holds memory for this session enters it, to be shown in the status.
    pub fn ledger(&self) -> &Ledger {
        &self.inner.ledger
    }

    /// The present state of the session, renewed with every call that changes it.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.inner.status.subscribe()
    }

    /// What happens from now on. Bounded: a slow reader misses the oldest.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    /// Announce that we leave, and end everything. Idempotent.
    pub async fn leave(&self) {
        self.tasks.shutdown().await;
        self.inner.dialect.leave().await;
        self.inner.drop_started();
        self.inner.core().let_go();
        self.inner.show();
        self.inner.emit(Event::Left);
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({}, {:?})", self.local_peer().short(), self.lineage())
    }
}

impl Inner {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this peer has been part of, for those who were not.
    fn remember(&self) {
        let sequels = self.core().take_sequels();
        sequels.into_iter().for_each(|sequel| self.dialect.remember(sequel));
    }

    fn emit(&self, event: Event) {
        match &event {
            event if event.is_warning() => tracing::warn!(target: "potluck", "{event}"),
            _ => tracing::info!(target: "potluck", "{event}"),
        }
        // Nobody has to listen.
        let _listeners = self.events.send(event);
    }

    /// The program goes on with the state that it loaded last.
    fn accept(&self) {
        let loaded = self.core().accept();
        loaded.into_iter().for_each(|snapshot| self.dialect.publish(snapshot));
    }

    fn step(&self, samples: u64) -> Step {
        self.accept();
        let now = self.env.now();
        let mut core = self.core();
        core.own.add(now, samples);
        self.look(&mut core);
        let epoch = core.lineage.epoch;
        let step = core.next(now, |channel| self.dialect.round_open(channel, epoch));
        let urgent = core.is_news(now) || matches!(step, Step::Average | Step::AverageState);
        drop(core);
        self.tell(urgent);
        step
    }

    fn look(&self, core: &mut Core) {
        let mut events = Vec::new();
        let has_left = |peer: &PeerId| self.dialect.has_left(peer);
        core.see(self.dialect.peers(), self.dialect.twice(), has_left, &mut events);
        for event in events {
            self.emit(event);
        }
    }

    /// Who came and went shows in the status and the events also while the program computes and asks for nothing.
    async fn keep_looking(&self) {
        loop {
            tokio::time::sleep(LOOK_PAUSE).await;
            let _timeout = tokio::time::timeout(LOOK_EVERY, self.dialect.changed()).await;
            let mut core = self.core();
            self.look(&mut core);
            drop(core);
            self.show();
        }
    }

    /// Let the other peers and the watchers of the status know.
    fn tell(&self, urgent: bool) {
        let core = self.core();
        self.dialect.report(core.report(urgent));
        drop(core);
        self.show();
    }

    /// Let the watchers of the status know.
    fn show(&self) {
        let core = self.core();
        let traffic = self.dialect.traffic();
        let held = self.dialect.memory().into_iter().chain(core.memory()).chain(self.ledger.sums());
        let mut status = Status {
            bytes_sent: traffic.bytes_sent,
            bytes_received: traffic.bytes_received,
            memory: memory::by_name(held),
            ..core.status()
        };
        drop(core);
        for me in status.peers.iter_mut().filter(|peer| peer.is_me) {
            me.rates = self.dialect.rates();
        }
        self.status.send_replace(status);
    }

    fn finish_background(&self, channel: Channel, averaged: Outcome<Averaged>) {
        let held = self.ledger.hold(Purpose::Rounds, bytes_of(&averaged.value.vector));
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Started { channel, averaged }, held));
        self.core().background = Background::Ready;
    }

    /// An average for parameters that are no more.
    fn drop_started(&self) {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    async fn state_round(&self, vector: Vec<f32>) -> Outcome<Averaged> {
        let (movement, weight) = {
            let core = self.core();
            let by_samples = self.config.policy.ends_epochs_with_state();
            (core.movement(&vector), if by_samples { core.own.samples as f64 } else { 1.0 })
        };
        let mut outcome = self.round(Channel::State, movement, weight, Terms::default()).await;
        let movement = std::mem::take(&mut outcome.value.vector);
        // Alone, DiLoCo's outer step still applies; a failed round in company leaves the agreed state as it was.
        let mut core = self.core();
        let in_company = core.in_company(self.env.now());
        let keeps = outcome.value.missed || outcome.value.alone && (in_company || !core.agrees_alone());
        outcome.value.vector = if keeps { vector } else { core.agree(movement) };
        drop(core);
        outcome
    }

    /// One round; never an error.
    async fn round(
        &self,
        channel: Channel,
        mut vector: Vec<f32>,
        weight: f64,
        terms: Terms,
    ) -> Outcome<Averaged> {
        self.accept();
        let until = terms.limit.map(|limit| self.env.now() + limit);
        let _held = self.ledger.hold(Purpose::Rounds, bytes_of(&vector));
        let (epoch, lineage) = {
            let core = self.core();
            (core.lineage.epoch, core.lineage.hash)
        };
        let mut faults = Vec::new();
        let mut reason = String::new();
        for _ in 0..ROUND_ATTEMPTS {
            // Alone, or left behind: a round could only fail.
            if self.dialect.peers().is_empty() || self.is_behind() {
                break;
            }
            if channel == Channel::State {
                self.wait_for_members().await;
            }
            let left = until.map(|until| until.saturating_duration_since(self.env.now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let timeout = left.into_iter().chain(self.config.averaging_timeout).min();
            let gather = terms.gather.clone();
            let call = RoundCall { epoch, lineage, vector, weight, timeout, gather };
            let waiting = Waiting::begin(self, channel);
            let values = call.vector.len();
            let result = tokio::select! {
                biased;
                result = self.dialect.average(channel, call) => result,
                () = self.left_behind() => Err(RoundFailed {
                    epoch,
                    reason: "the others have finished it and gone on".to_owned(),
                    // What is applied now is replaced by the state of the others in the next step.
                    vector: vec![0.0; values],
                    faults: Vec::new(),
                }),
            };
            drop(waiting);
            match result {
                Ok(outcome) if outcome.value.members.len() > 1 => {
                    faults.extend(outcome.faults);
                    return self.averaged(channel, outcome.value, faults);
                }
                Ok(outcome) => {
                    vector = outcome.value.vector;
                    faults.extend(outcome.faults);
                    reason = "nobody else came".to_owned();
                    break;
                }
                Err(failed) => {
                    vector = failed.vector;
                    faults.extend(failed.faults);
                    reason = failed.reason;
                }
            }
        }
        self.not_averaged(channel, (vector, weight), reason, faults)
    }

    fn averaged(
        &self,
        channel: Channel,
        result: crate::RoundResult,
        faults: Vec<PeerFault>,
    ) -> Outcome<Averaged> {
        let event = self.core().averaged(channel, &result, &faults);
        self.emit(event);
        self.remember();
        let alone = result.members.len() <= 1 || result.unchanged;
        let value = Averaged {
            vector: result.vector,
            members: result.members,
            gathered: result.gathered,
            weight_total: result.weight_total,
            alone,
            missed: false,
            stats: result.stats,
        };
        Outcome { value, faults }
    }

    fn not_averaged(
        &self,
        channel: Channel,
        (vector, weight): (Vec<f32>, f64),
        reason: String,
        faults: Vec<PeerFault>,
    ) -> Outcome<Averaged> {
        let mut core = self.core();
        self.look(&mut core);
        let now = self.env.now();
        let in_company = core.in_company(now);
        let ends_epoch = channel == Channel::Gradients || self.config.policy.ends_epochs_with_state();
        let missed = ends_epoch && core.winner(now).is_some();
        core.not_averaged(now, channel, in_company, &faults);
        core.unsettled = ends_epoch && !missed;
        let epoch = core.lineage.epoch;
        drop(core);
        if in_company {
            let reason = if reason.is_empty() { "others have moved on".to_owned() } else { reason };
            let faults = faults.clone();
            self.emit(match missed {
                true => Event::RoundMissed { epoch, channel, reason, faults },
                false => Event::RoundFailed { epoch, channel, reason, faults },
            });
        }
        let members = vec![self.dialect.local_peer()];
        let stats = RoundStats::default();
        let gathered = vec![Bytes::new()];
        let value = Averaged { vector, members, gathered, weight_total: weight, alone: true, missed, stats };
        Outcome { value, faults }
    }
}
