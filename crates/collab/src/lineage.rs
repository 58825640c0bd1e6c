//! Sans-I/O. Which history a peer's parameters have: a hash chain over the rounds that made them.
//!
//! Two peers with equal lineage hold the same parameters. When a split swarm meets again, every peer compares
//! lineages and the same one wins everywhere: the higher epoch, then more samples, then more averages of the state, then the
//! smaller hash. Who missed an average of the state so gives way to those who made it, and not they to it.

use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::fmt;

/// A state of a later epoch is none: no run gets there in 30 years of a thousand epochs a second, a stranger's number does,
/// and to count on from the largest one would begin again at 0.
pub(crate) const EPOCH_MAX: u64 = 999_999_999_999;

/// The history of one peer's parameters.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Shared optimizer steps so far.
    pub epoch: u64,
    /// Samples that went into them.
    pub samples: u64,
    /// Averages of the parameters themselves so far.
    pub state_averages: u64,
    /// The hash chain over run, rounds and their members.
    pub hash: [u8; 32],
}

impl Lineage {
    /// The start of a run: equal for all peers with the same run id and manifest.
    pub fn genesis(run_id: &str, manifest_hash: &[u8; 32]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("potluck lineage genesis v1");
        hasher.update(&(run_id.len() as u64).to_le_bytes());
        hasher.update(run_id.as_bytes());
        hasher.update(manifest_hash);
        Self { epoch: 0, samples: 0, state_averages: 0, hash: *hasher.finalize().as_bytes() }
    }

    /// The lineage after one more epoch that averaged under the plan with this hash.
    #[must_use]
    pub fn next_epoch(&self, plan_hash: &[u8; 32], samples: u64) -> Self {
        Self {
            epoch: self.epoch + 1,
            samples: self.samples.saturating_add(samples),
            hash: self.chain("potluck lineage epoch v1", plan_hash),
            ..*self
        }
    }

    /// The lineage after the parameters themselves were averaged, which does not end an epoch.
    #[must_use]
    pub fn state_averaged(&self, plan_hash: &[u8; 32]) -> Self {
        let state_averages = self.state_averages.saturating_add(1);
        Self { hash: self.chain("potluck lineage state v1", plan_hash), state_averages, ..*self }
    }

    /// The lineage after this peer alone changed its parameters in the middle of an epoch, because a round failed. One
    /// sample less than the others: whoever still has the history of the epoch's start wins, so nobody chases this one.
    #[must_use]
    pub fn spoiled(&self, nonce: &[u8; 32]) -> Self {
        let samples = self.samples.saturating_sub(1);
        Self { hash: self.chain("potluck lineage spoiled v1", nonce), samples, ..*self }
    }

    /// The history of a state that a session has published.
    pub fn of(snapshot: &crate::Snapshot) -> Option<Self> {
        if snapshot.epoch > EPOCH_MAX {
            return None;
        }
        let number = |name: &str| snapshot.meta.get(name)?.parse().ok();
        let samples = number(crate::core::SAMPLES_META)?;
        let state_averages = number(crate::core::STATE_AVERAGES_META)?;
        Some(Self { epoch: snapshot.epoch, samples, state_averages, hash: snapshot.lineage })
    }

    /// Whether this history replaces `other` when both meet.
    pub fn beats(&self, other: &Self) -> bool {
        self.rank(other) == Ordering::Greater
    }

    fn rank(&self, other: &Self) -> Ordering {
        self.epoch
            .cmp(&other.epoch)
            .then(self.samples.cmp(&other.samples))
            .then(self.state_averages.cmp(&other.state_averages))
            .then_with(|| other.hash.cmp(&self.hash))
    }

    fn chain(&self, domain: &str, plan_hash: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(domain);
        hasher.update(&self.hash);
        hasher.update(&self.epoch.to_le_bytes());
        hasher.update(plan_hash);
        *hasher.finalize().as_bytes()
    }

    /// The first 8 hex digits of the hash: enough for a log line, never for a decision.
    pub fn short(&self) -> String {
        self.hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (epoch {}, {} samples)", self.short(), self.epoch, self.samples)
    }
}

impl fmt::Debug for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lineage({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_an_epoch_that_no_run_reaches_has_no_history() {
        let number = |name: &str| (name.to_owned(), "7".to_owned());
        let meta = [crate::core::SAMPLES_META, crate::core::STATE_AVERAGES_META].map(number).into();
        let mut snapshot = crate::Snapshot { epoch: EPOCH_MAX, meta, ..crate::Snapshot::default() };
        assert_eq!(Lineage::of(&snapshot).map(|lineage| lineage.epoch), Some(EPOCH_MAX));
        for epoch in [EPOCH_MAX + 1, u64::MAX] {
            snapshot.epoch = epoch;
            assert_eq!(Lineage::of(&snapshot), None);
        }
    }

    #[test]
    fn exactly_one_of_two_different_histories_wins() {
        let start = Lineage::genesis("run", &[0; 32]);
        let (a, b) = (start.next_epoch(&[1; 32], 64), start.next_epoch(&[2; 32], 64));
        assert_ne!(a, b);
        assert_ne!(a.beats(&b), b.beats(&a));
        assert!(!a.beats(&a), "an equal history does not make anybody reload");
        assert!(a.next_epoch(&[9; 32], 1).beats(&b), "the higher epoch wins");
        let more = start.next_epoch(&[2; 32], 65);
        assert!(more.beats(&a), "then more samples");
        let averaged = a.state_averaged(&[3; 32]);
        assert!(averaged.beats(&a) && averaged.beats(&b), "then more averages of the state");
        let small = if a.hash < b.hash { a } else { b };
        assert!(small.beats(if small == a { &b } else { &a }), "then the smaller hash");
    }

    #[test]
    fn the_same_rounds_give_the_same_history_and_another_run_another() {
        let one = Lineage::genesis("run", &[0; 32]).next_epoch(&[1; 32], 3).state_averaged(&[2; 32]);
        let two = Lineage::genesis("run", &[0; 32]).next_epoch(&[1; 32], 3).state_averaged(&[2; 32]);
        assert_eq!(one, two);
        assert_ne!(Lineage::genesis("run", &[0; 32]).hash, Lineage::genesis("ruN", &[0; 32]).hash);
        assert_ne!(Lineage::genesis("run", &[0; 32]).hash, Lineage::genesis("run", &[1; 32]).hash);
    }
}
