//! Sans-I/O. Everything that a session remembers, and its decisions: events in, a step or a report out.

mod sequels;
mod shown;
pub(crate) mod snapshots;

use crate::dialect::{Offered, PeerView, Report, RoundResult};
use crate::factors::Factors;
use crate::gone::{self, Gone};
use crate::nearing::Nearing;
use crate::past::Past;
use crate::policy::diloco::Outer;
use crate::policy::{self, Background, Situation, Step};
use crate::progress::{self, Behind, Own, Winner};
use crate::sketch::Sketch;
use crate::status::RoundStatus;
use crate::wire::Note;
use crate::{Channel, Event, Lineage, PolicyKind, Sequel, SessionConfig, StateEvery};
use potluck_net::{PeerFault, PeerId};
use sequels::Applied;
use snapshots::Replaced;
pub(crate) use snapshots::{SAMPLES_META, STATE_AVERAGES_META};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a peer computes on after a round that failed although others were here, before it tries again; doubles with every
/// further one. A round of those who went on without it must end first, and trying meanwhile could only fail.
const FAILED_PAUSE: Duration = Duration::from_millis(100);
const FAILED_PAUSE_MAX: Duration = Duration::from_secs(2);

/// Whoever asks for an average of the state asks for the next epoch's, and is at most a few epochs ahead.
const DUE_AHEAD_MAX: u64 = 4;

pub(crate) struct Core {
    pub(crate) me: PeerId,
    /// Tells this life of the session from its others.
    nonce: u64,
    pub(crate) lineage: Lineage,
    past: Past,
    pub(crate) own: Own,
    pub(crate) background: Background,
    /// The epoch in which background work was started.
    background_epoch: u64,
    /// A state average that is ready but not applied.
    state_next: Option<Applied>,
    /// The round whose average the next `epoch_done` applies.
    applied: Option<Applied>,
    /// A round that ends an epoch gave something to apply, and `epoch_done` has not said that it was: nobody knows what the
    /// parameters are until then.
    pub(crate) unsettled: bool,
    /// The program gave up what it was to apply: the state that it offers next is its own alone.
    abandoned: bool,
    /// How often it did.
    given_up: u64,
    /// What led from one history to the next, and nobody was told yet.
    sequels: Vec<Sequel>,
    /// The round failed although others were here: what this peer applies alone ends no epoch.
    void: bool,
    /// The round in which this peer waits for the others.
    pub(crate) waiting: Option<Channel>,
    /// Not before then is a round tried again, and the pause after the next failure.
    retry: Option<(Instant, Duration)>,
    behind: Behind,
    /// What was before a state that was loaded and that the program may refuse yet.
    replaced: Option<Replaced>,
    /// The last state that all peers of this lineage agreed on.
    agreed: Option<Vec<f32>>,
    /// What will be agreed on when the state that was averaged in the background is applied.
    agreed_next: Option<Vec<f32>>,
    outer: Option<Outer>,
    /// Low-rank compression, if the session uses it: what of a round is kept is decided here.
    pub(crate) factors: Option<Arc<Factors>>,
    state_due: bool,
    /// The epoch at whose start the state was averaged last: once is enough, whoever calls.
    state_averaged_at: Option<u64>,
    state_due_from: Option<u64>,
    sketch: Option<Sketch>,
    contributed: u64,
    loss: Option<f32>,
    peers: BTreeMap<PeerId, PeerView>,
    gone: Gone,
    nearing: Nearing,
    was_in_company: bool,
    /// Whose identity more than one machine uses.
    twice: BTreeSet<PeerId>,
    pub(crate) rounds: u64,
    pub(crate) rounds_failed: u64,
    rounds_unchanged: u64,
    faults: BTreeMap<String, u64>,
    last_round: Option<RoundStatus>,
    bytes_plain: u64,
    bytes_encoded: u64,
    config: SessionConfig,
}

impl Core {
    pub(crate) fn new(me: PeerId, config: SessionConfig, genesis: Lineage, nonce: u64) -> Self {
        let outer = match config.policy {
            PolicyKind::DiLoCo { outer_lr, outer_momentum, .. } => Some(Outer::new(outer_lr, outer_momentum)),
            _ => None,
        };
        let mut behind = Behind::default();
        behind.suspect();
        Self {
            me,
            nonce,
            lineage: genesis,
            past: Past::default(),
            own: Own::new(),
            background: Background::Idle,
            background_epoch: 0,
            state_next: None,
            applied: None,
            unsettled: false,
            abandoned: false,
            given_up: 0,
            sequels: Vec::new(),
            void: false,
            waiting: None,
            retry: None,
            behind,
            replaced: None,
            agreed: None,
            agreed_next: None,
            outer,
            factors: None,
            state_due: false,
            state_averaged_at: None,
            state_due_from: None,
            sketch: None,
            contributed: 0,
            loss: None,
            peers: BTreeMap::new(),
            gone: Gone::default(),
            nearing: Nearing::default(),
            was_in_company: false,
            twice: BTreeSet::new(),
            rounds: 0,
            rounds_failed: 0,
            rounds_unchanged: 0,
            faults: BTreeMap::new(),
            last_round: None,
            bytes_plain: 0,
            bytes_encoded: 0,
            config,
        }
    }

    /// Take in who is here; answers what changed. `has_left` tells of those who are gone whether they said farewell.
    pub(crate) fn see(
        &mut self,
        peers: Vec<PeerView>,
        twice: BTreeSet<PeerId>,
        has_left: impl Fn(&PeerId) -> bool,
        events: &mut Vec<Event>,
    ) {
        let seen: BTreeMap<PeerId, PeerView> = peers.into_iter().map(|view| (view.peer, view)).collect();
        let count = seen.len() + 1;
        for (peer, view) in &seen {
            let Some(before) = self.peers.get(peer) else {
                self.gone.came(*peer, gone::told(&view.note));
                events.push(Event::Joined { peer: *peer, peers: count });
                continue;
            };
            if before.note != view.note {
                let (then, now) = (gone::told(&before.note), gone::told(&view.note));
                self.gone.changed(*peer, before.epoch, then, now);
            }
        }
        let mut politely = true;
        for (peer, view) in self.peers.iter().filter(|(peer, _)| !seen.contains_key(peer)) {
            self.gone.lost(*peer, view.epoch, gone::told(&view.note));
            let left = has_left(peer);
            politely &= left || view.auxiliary;
            events.push(Event::Lost { peer: *peer, peers: count, left });
        }
        // A keeper or a helper computes nothing: with only them, this peer trains alone.
        let company = seen.values().any(|view| !view.auxiliary);
        if !company && self.was_in_company {
            events.push(Event::Alone { epoch: self.lineage.epoch, left: politely });
        }
        self.was_in_company = company;
        self.peers = seen;
        for peer in twice.difference(&self.twice) {
            events.push(Event::Copied { peer: *peer, is_me: *peer == self.me });
        }
        self.twice = twice;
    }

    /// Whether somebody else works on our epoch or is ahead: whoever is behind cannot take part in our round, and whoever is
    /// not believed will not. Nobody can be ahead without a history that says so.
    pub(crate) fn in_company(&self, now: Instant) -> bool {
        let ours = self.lineage.epoch;
        let is_level = |view: &PeerView| match Note::decode(&view.note) {
            Some(note) => note.lineage.epoch >= ours,
            None => view.epoch == ours,
        };
        let comes = |view: &PeerView| !view.auxiliary && is_level(view);
        self.peers.values().any(|view| comes(view) && self.behind.believes(now, &view.peer))
    }

    /// Whether a member of the last round is alive and has not yet said that it has its result.
    pub(crate) fn members_are_finishing(&self) -> bool {
        let members = self.last_round.iter().flat_map(|round| &round.members);
        let mut views = members.filter_map(|member| self.peers.get(member));
        views.any(|view| view.epoch.saturating_add(1) == self.lineage.epoch)
    }

    fn views(&self) -> Vec<PeerView> {
        self.peers.values().cloned().collect()
    }

    /// The history that replaces ours, if there is one that must be loaded now.
    pub(crate) fn winner(&mut self, now: Instant) -> Option<Winner> {
        let views = self.views();
        self.behind.check(now, &self.lineage, &views)
    }

    /// The state of a winner did not come. Whether it is given up, and whoever says that it has it not believed for a while.
    pub(crate) fn not_loaded(&mut self, now: Instant, winner: &Winner, offered: Offered) -> bool {
        let views = self.views();
        self.behind.failed(now, winner, offered, &views)
    }

    /// The state of a winner cannot be used.
    pub(crate) fn distrust(&mut self, now: Instant, winner: &Winner) {
        let views = self.views();
        self.behind.doubt(now, winner, &views);
    }

    /// What the training program does next. `open` tells whether others wait for us in a round.
    pub(crate) fn next(&mut self, now: Instant, open: impl Fn(Channel) -> bool) -> Step {
        let views = self.views();
        let beside = self.config.policy == PolicyKind::DelayedState;
        match (self.background, self.winner(now)) {
            (Background::Idle, Some(_)) => return Step::LoadState,
            // The average belongs to a history that is given up.
            (Background::Ready, Some(_)) if beside => return Step::LoadState,
            // It ends soon; a round of gradients meanwhile could only fail.
            (Background::Running, Some(_)) if beside => return Step::Accumulate,
            _ => {}
        }
        self.ask_for_state(&views);
        let swarm = progress::sum(self.lineage.epoch, &self.own, &views);
        let ours = self.lineage;
        let called = |channel| {
            let notes = views.iter().filter_map(|view| Note::decode(&view.note));
            let mut calls = notes.filter(|note| note.waiting == Some(channel) && note.lineage == ours);
            calls.next().is_some() || open(channel)
        };
        // Called by peers that have no samples either, everybody would wait for everybody and nobody would compute.
        let something = swarm.samples > 0;
        let situation = Situation {
            samples_total: swarm.samples.saturating_sub(self.own.samples_under_way),
            target: self.config.target_batch_size,
            local_steps: self.own.steps,
            gradients_open: something && called(Channel::Gradients),
            state_open: self.state_averaged_at != Some(self.lineage.epoch)
                && (something || !self.config.policy.ends_epochs_with_state())
                && called(Channel::State),
            state_due: self.state_due,
            background: self.background,
            background_due: self.lineage.epoch > self.background_epoch,
        };
        match policy::next(self.config.policy, &situation) {
            // A round has just failed: whatever else runs beside, nobody asks for the next one without a pause.
            Step::Average | Step::AverageState if self.retry.is_some_and(|(at, _)| now < at) => {
                Step::Accumulate
            }
            step => step,
        }
    }

    /// Whether the others must know of our samples before the next heartbeat.
    pub(crate) fn is_news(&mut self, now: Instant) -> bool {
        self.nearing.must_tell(now, self.lineage.epoch, self.config.target_batch_size, &self.own, &self.peers)
    }

    /// By drift: ask for an average of the state when the sketches of this epoch are too far apart.
    fn ask_for_state(&mut self, views: &[PeerView]) {
        let StateEvery::Drift(tolerance) = self.config.average_state_every else { return };
        let epoch = self.lineage.epoch;
        for note in views.iter().filter_map(|view| Note::decode(&view.note)) {
            let drift =
                self.sketch.as_ref().zip(note.sketch.as_ref()).and_then(|(our, their)| our.drift(their));
            if drift.is_some_and(|drift| drift > tolerance) {
                self.state_due_from = Some(epoch + 1);
            }
            if note.state_due.is_some_and(|due| due > epoch && due - epoch <= DUE_AHEAD_MAX) {
                self.state_due_from = self.state_due_from.max(note.state_due);
            }
        }
    }

    pub(crate) fn observe_state(&mut self, vector: &[f32]) {
        self.sketch = Some(Sketch::of(self.lineage.epoch, vector));
    }

    pub(crate) fn report_loss(&mut self, loss: f32) {
        self.loss = loss.is_finite().then_some(loss);
    }

    pub(crate) fn report(&self, urgent: bool) -> Report {
        // Of a state that the program may refuse yet, the others hear nothing.
        let lineage = self.replaced.as_ref().map_or(self.lineage, |before| before.lineage);
        let note = Note {
            lineage,
            contributed: self.contributed,
            loss: self.loss,
            state_due: self.state_due_from,
            sketch: self.sketch,
            waiting: self.waiting,
        };
        Report {
            epoch: lineage.epoch,
            samples: self.own.samples,
            samples_per_second: self.own.samples_per_second,
            urgent,
            note: note.encode(),
        }
    }

    /// A round gave an average.
    pub(crate) fn averaged(&mut self, channel: Channel, result: &RoundResult, faults: &[PeerFault]) -> Event {
        self.rounds += 1;
        self.count(faults);
        self.bytes_plain += result.stats.bytes_plain;
        self.bytes_encoded += result.stats.bytes_encoded;
        let samples = if result.weight_total.is_finite() { result.weight_total.max(0.0) as u64 } else { 0 };
        if channel == Channel::Gradients || self.config.policy.ends_epochs_with_state() {
            self.applied = Some(Applied::new(channel, result, samples));
            self.unsettled = true;
        } else {
            self.state_is_done();
            match self.background {
                // Who has not been there, such as a newcomer, has missed nothing.
                _ if result.unchanged => {}
                Background::Idle => self.state_goes_on(Applied::new(channel, result, samples)),
                _ => self.state_next = Some(Applied::new(channel, result, samples)),
            }
        }
        self.void = false;
        self.retry = None;
        self.behind.trust();
        let round = RoundStatus {
            epoch: self.lineage.epoch,
            channel,
            members: result.members.clone(),
            weight_total: result.weight_total,
            unchanged: result.unchanged,
            stats: result.stats,
            faults: faults.to_vec(),
        };
        self.rounds_unchanged += u64::from(result.unchanged);
        // Where nothing was to be done, the round before says more.
        if !result.unchanged || !faults.is_empty() || self.last_round.is_none() {
            self.last_round = Some(round.clone());
        }
        Event::Round(round)
    }

    /// There was no average; this peer goes on with what it has. With nobody else here, that is as it should be.
    pub(crate) fn not_averaged(
        &mut self,
        now: Instant,
        channel: Channel,
        in_company: bool,
        faults: &[PeerFault],
    ) {
        self.count(faults);
        self.rounds_failed += u64::from(in_company);
        if channel == Channel::State {
            self.state_is_done();
        }
        self.applied = None;
        self.void =
            in_company && (channel == Channel::Gradients || self.config.policy.ends_epochs_with_state());
        self.retry = in_company.then(|| {
            let pause = self.retry.map_or(FAILED_PAUSE, |(_, pause)| (pause * 2).min(FAILED_PAUSE_MAX));
            (now + pause, pause)
        });
        if in_company {
            self.behind.suspect();
        }
    }

    /// Background work begins.
    pub(crate) fn begin_background(&mut self, channel: Channel) {
        self.background = Background::Running;
        self.background_epoch = self.lineage.epoch;
        if channel == Channel::Gradients {
            self.own.samples_under_way = self.own.samples;
        } else {
            self.state_is_done();
        }
    }

    /// A state that was averaged in the background is applied now.
    pub(crate) fn apply_state(&mut self) {
        self.background = Background::Idle;
        if let Some(agreed) = self.agreed_next.take() {
            self.agreed = Some(agreed);
        }
        if let Some(mut averaged) = self.state_next.take() {
            if self.background_epoch != self.lineage.epoch {
                // It adds to parameters that have moved meanwhile: nobody else can tell from it what came of them.
                averaged.record = None;
            }
            self.state_goes_on(averaged);
        }
    }

    /// The parameters themselves were averaged.
    fn state_goes_on(&mut self, by: Applied) {
        let before = self.lineage;
        self.lineage = before.state_averaged(&by.plan_hash);
        self.went_on(&before, by);
    }

    fn state_is_done(&mut self) {
        self.state_due = false;
        self.state_averaged_at = Some(self.lineage.epoch);
    }

    fn count(&mut self, faults: &[PeerFault]) {
        for fault in faults {
            *self.faults.entry(fault.kind.to_string()).or_default() += 1;
        }
    }

    /// What goes into a round of the state: the movement away from the last agreed state, if there is one.
    pub(crate) fn movement(&self, vector: &[f32]) -> Vec<f32> {
        match self.agreed.as_ref().filter(|agreed| agreed.len() == vector.len()) {
            Some(agreed) => vector.iter().zip(agreed).map(|(now, agreed)| now - agreed).collect(),
            None => vector.to_vec(),
        }
    }

    /// The new agreed state, from the averaged movement.
    pub(crate) fn agree(&mut self, movement: Vec<f32>) -> Vec<f32> {
        let agreed = match self.agreed.as_ref().filter(|agreed| agreed.len() == movement.len()) {
            None => movement,
            Some(agreed) => match &mut self.outer {
                Some(outer) => outer.step(agreed, &movement),
                None => agreed.iter().zip(&movement).map(|(agreed, movement)| agreed + movement).collect(),
            },
        };
        if self.background == Background::Idle {
            self.agreed = Some(agreed.clone());
        } else {
            self.agreed_next = Some(agreed.clone());
        }
        agreed
    }

    /// Whether a state that was averaged with nobody is one that newcomers will agree with: only where it ends an
    /// epoch and so becomes part of the history.
    pub(crate) fn agrees_alone(&self) -> bool {
        self.config.policy.ends_epochs_with_state()
    }

    /// The epoch is over: one epoch further, history extended, counters on.
    pub(crate) fn epoch_done(&mut self) {
        let used = self.own.end_epoch();
        self.own_alone();
        self.replaced = None;
        self.unsettled = false;
        if std::mem::take(&mut self.void) {
            self.settle_factors(false);
            // Else the one peer whose round failed would be an epoch ahead, and everybody would load its state. Without
            // samples it has not moved, so its history is what it was.
            if used > 0 || !self.config.policy.ends_epochs_with_state() {
                self.lineage = self.lineage.spoiled(&self.alone_hash());
            }
            self.gradients_are_applied();
            return;
        }
        self.settle_factors(self.applied.is_some());
        let before = self.lineage;
        match self.applied.take() {
            Some(applied) => {
                self.lineage = before.next_epoch(&applied.plan_hash, applied.samples);
                self.went_on(&before, applied);
            }
            None => self.lineage = before.next_epoch(&self.alone_hash(), used),
        }
        self.past.note(&self.lineage);
        self.contributed = self.contributed.saturating_add(used);
        self.gradients_are_applied();
        let epoch = self.lineage.epoch;
        self.state_due = match self.config.average_state_every {
            StateEvery::Epochs(every) => epoch.is_multiple_of(u64::from(every.max(1))),
            StateEvery::Drift(_) => self.state_due_from.is_some_and(|due| due <= epoch),
            StateEvery::Never => false,
        } && !self.config.policy.ends_epochs_with_state();
        if self.state_due_from.is_some_and(|due| due <= epoch) {
            self.state_due_from = None;
        }
    }

    /// What runs in the background is over with the epoch, unless it is an average of the state, which ends by itself.
    fn gradients_are_applied(&mut self) {
        if self.config.policy != PolicyKind::DelayedState {
            self.background = Background::Idle;
        }
    }

    /// Low-rank compression moves on with the parameters, or not at all.
    fn settle_factors(&self, applied: bool) {
        match &self.factors {
            Some(factors) if applied => factors.commit(),
            Some(factors) => factors.abort(),
            None => {}
        }
    }

    fn alone_hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("potluck lineage alone v1");
        hasher.update(self.me.as_bytes());
        // The same peer may reach the same point twice, with other samples.
        hasher.update(&self.nonce.to_le_bytes());
        hasher.update(&self.rounds.to_le_bytes());
        hasher.update(&self.rounds_failed.to_le_bytes());
        hasher.update(&self.given_up.to_le_bytes());
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
