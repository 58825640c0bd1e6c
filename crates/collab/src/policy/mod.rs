//! Sans-I/O. When peers average and what the average does: one file per policy.
//!
//! A policy sees a [`Situation`] and answers a [`Step`]; it holds no clock, no network and no tensors. Only DiLoCo
//! has numbers of its own (its outer optimizer), in its own file.

mod delayed_gradient;
mod delayed_optimizer;
mod delayed_state;
pub(crate) mod diloco;
mod local_updates;
mod synchronous;

use crate::PolicyKind;
use serde::{Deserialize, Serialize};

/// What the training program does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Compute more samples. (Local updates and DiLoCo: and apply them with the local optimizer.)
    Accumulate,
    /// Average the gradients now: `average_gradients`, or `start_gradients` under a delayed policy.
    Average,
    /// Average the parameters now: `average_state`, or `start_state` under a delayed policy.
    AverageState,
    /// What was started before is ready: `take_started`, apply it, then `epoch_done` if it was of gradients.
    Apply,
    /// Others are ahead, or another history won: `load_state`.
    LoadState,
}

/// Something that runs beside the accumulation of samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Background {
    Idle,
    Running,
    Ready,
}

/// Everything that a policy decides by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Situation {
    /// Samples of this epoch over all live peers, without those whose round is already under way.
    pub(crate) samples_total: u64,
    pub(crate) target: u64,
    /// Calls of `step` with samples since the last epoch.
    pub(crate) local_steps: u32,
    /// Somebody waits for us in the gradient round of this epoch.
    pub(crate) gradients_open: bool,
    /// Somebody waits for us in the state round of this epoch.
    pub(crate) state_open: bool,
    /// Parameters are to be averaged before this epoch goes on.
    pub(crate) state_due: bool,
    pub(crate) background: Background,
    /// An epoch has ended since the background work was started.
    pub(crate) background_due: bool,
}

impl Situation {
    fn epoch_full(&self) -> bool {
        self.samples_total >= self.target || self.gradients_open
    }
}

/// What to do next under a policy.
pub(crate) fn next(kind: PolicyKind, now: &Situation) -> Step {
    match kind {
        PolicyKind::Synchronous => synchronous::next(now),
        PolicyKind::DelayedGradient => delayed_gradient::next(now),
        PolicyKind::DelayedOptimizer => delayed_optimizer::next(now),
        PolicyKind::DelayedState => delayed_state::next(now),
        PolicyKind::LocalUpdates => local_updates::next(now),
        PolicyKind::DiLoCo { inner_steps, .. } => diloco::next(now, inner_steps),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const IDLE: Situation = Situation {
        samples_total: 0,
        target: 64,
        local_steps: 0,
        gradients_open: false,
        state_open: false,
        state_due: false,
        background: Background::Idle,
        background_due: false,
    };

    const KINDS: [PolicyKind; 6] = [
        PolicyKind::Synchronous,
        PolicyKind::DelayedGradient,
        PolicyKind::DelayedOptimizer,
        PolicyKind::DelayedState,
        PolicyKind::LocalUpdates,
        PolicyKind::DiLoCo { inner_steps: 8, outer_lr: 0.7, outer_momentum: 0.9 },
    ];

    #[test]
    fn nothing_is_averaged_before_there_is_anything() {
        for kind in KINDS {
            assert_eq!(next(kind, &IDLE), Step::Accumulate, "{kind:?}");
        }
    }

    #[test]
    fn a_full_epoch_is_averaged_under_every_policy() {
        for kind in KINDS {
            let full = Situation { samples_total: 64, local_steps: 8, ..IDLE };
            assert!(matches!(next(kind, &full), Step::Average | Step::AverageState), "{kind:?}");
        }
    }

    #[test]
    fn nobody_lets_a_group_wait() {
        for kind in KINDS {
            let called = Situation { gradients_open: true, state_open: true, ..IDLE };
            assert!(matches!(next(kind, &called), Step::Average | Step::AverageState), "{kind:?}");
        }
    }
}
