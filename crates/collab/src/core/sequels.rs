//! What leads from one history to the next: kept of the rounds that this peer took part in, and made up for where it did not.

use super::Core;
use crate::dialect::{Channel, MissedRound, RoundResult, Sequel};
use crate::policy::Background;
use crate::{Lineage, PolicyKind, Record};
use tokio::time::Instant;

/// A round whose average is applied next.
#[derive(Debug)]
pub(super) struct Applied {
    pub(super) plan_hash: [u8; 32],
    pub(super) samples: u64,
    channel: Channel,
    pub(super) record: Option<Record>,
}

impl Applied {
    pub(super) fn new(channel: Channel, result: &RoundResult, samples: u64) -> Self {
        Self { plan_hash: result.plan_hash, samples, channel, record: result.record.clone() }
    }
}

impl Core {
    /// The history has gone on from `before` by this round.
    pub(super) fn went_on(&mut self, before: &Lineage, by: Applied) {
        let Applied { plan_hash, samples, channel, record } = by;
        let Some(record) = record else { return };
        let (epoch, after) = (self.lineage.epoch, self.lineage.hash);
        self.sequels.push(Sequel { before: before.hash, epoch, after, channel, plan_hash, samples, record });
    }

    /// What others may be given from now on.
    pub(crate) fn take_sequels(&mut self) -> Vec<Sequel> {
        std::mem::take(&mut self.sequels)
    }

    /// Whether what is missing up to `winner` may be few enough rounds to make up for one by one. A newcomer starts with a
    /// state, and so does a program that failed over what it was to apply.
    pub(crate) fn may_make_up(&self, winner: &Lineage) -> bool {
        let behind = winner.epoch.saturating_sub(self.lineage.epoch);
        !self.unsettled && behind <= if self.lineage.samples == 0 { 1 } else { MISSED_MAX }
    }

    /// Take up a round of others, as if this peer had been in it without samples; answers what the program applies. If it
    /// ends an epoch, `epoch_done` follows.
    ///
    /// # Errors
    /// It does not go on from our history in the way that it says.
    pub(crate) fn make_up(&mut self, missed: MissedRound, now: Instant) -> Result<Vec<f32>, String> {
        let MissedRound { channel, plan_hash, samples, after, vector } = missed;
        let ends_epoch = channel == Channel::Gradients || self.config.policy.ends_epochs_with_state();
        let next = match ends_epoch {
            true => self.lineage.next_epoch(&plan_hash, samples),
            false => self.lineage.state_averaged(&plan_hash),
        };
        if next.hash != after {
            return Err(format!("the round that follows {} leads elsewhere than it says", self.lineage));
        }
        self.adopt_lineage(self.lineage, now);
        self.retry = None;
        if ends_epoch {
            self.applied = Some(Applied { plan_hash, samples, channel, record: None });
            self.unsettled = true;
        } else {
            self.lineage = next;
            self.state_is_done();
        }
        Ok(if channel == Channel::State { self.agree(vector) } else { vector })
    }

    /// If the round failed in company, nothing of it was applied.
    pub(crate) fn round_void(&mut self) -> bool {
        let void = std::mem::take(&mut self.void);
        self.unsettled = false;
        if void {
            self.settle_factors(false);
        }
        void
    }

    /// What was handed to the program to be applied was not, or only in part: nothing waits for it any more, the samples behind
    /// it are gone, and so are those of parameters that nobody knows. Whether there was anything.
    pub(crate) fn abandon(&mut self) -> bool {
        // Its average is there a moment before it can be asked for. Whether it was then, the session knows.
        let is_coming =
            self.config.policy == PolicyKind::DelayedGradient && self.background == Background::Running;
        if !self.unsettled || is_coming {
            return false;
        }
        self.settle_factors(false);
        self.own.discard();
        self.applied = None;
        self.void = false;
        self.gradients_are_applied();
        if self.lineage.epoch == 0 && self.lineage.samples == 0 {
            // Its history may be that of the start again, with which nothing has been agreed on.
            self.agreed = None;
            self.outer.iter_mut().for_each(|outer| outer.velocity.clear());
        }
        // Nothing can be made up for until it is known what the parameters are.
        (self.unsettled, self.abandoned) = (true, true);
        self.given_up += 1;
        true
    }

    /// After [`abandon`](Self::abandon): a history of this peer's own, which gives way to that of the epoch's start.
    pub(super) fn own_alone(&mut self) {
        if std::mem::take(&mut self.abandoned) {
            self.lineage = self.lineage.spoiled(&self.alone_hash());
            self.unsettled = false;
            self.behind.suspect();
        }
    }

    /// An average that the others have applied while this peer still waited for it: it loads or makes up for what they have.
    pub(crate) fn forget_background(&mut self) {
        self.background = Background::Idle;
        self.own.end_epoch();
    }
}

/// Beyond so many rounds a state is the shorter way.
const MISSED_MAX: u64 = 64;
