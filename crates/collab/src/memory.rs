//! Sans-I/O. What memory is held for: a fixed list of purposes, and a ledger that whoever holds memory enters itself in for as
//! long as it does. The status shows the sums; nobody has to remember to correct them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why memory is held; the names under which the status shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// The parameters that all peers agreed on last, from which state rounds count movements.
    Agreed,
    /// What low-rank compression owes the next round, and the same again for the round in flight.
    ErrorFeedback,
    /// The thin factors of low-rank compression.
    Factors,
    /// Gradients that gather until the epoch is full.
    Gathering,
    /// The vector that gradient rounds read.
    Gradients,
    /// The parameters that an offloaded optimizer steps, copied to host memory.
    Offloaded,
    /// The averages of the last rounds as they travelled, for peers that missed them.
    PastRounds,
    /// Vectors in a round, averages that are being applied, and their memory while it waits for the next round.
    Rounds,
    /// States that newcomers may load.
    Snapshot,
    /// The vector that state rounds read: parameters, optimizer statistics, extra tensors.
    State,
    /// Copies of tensors that an averager works on.
    Tensors,
    /// The momentum of DiLoCo's outer step.
    Velocity,
}

impl Purpose {
    /// Every purpose, in the order of the names.
    pub const ALL: [Self; 12] = [
        Self::Agreed,
        Self::ErrorFeedback,
        Self::Factors,
        Self::Gathering,
        Self::Gradients,
        Self::Offloaded,
        Self::PastRounds,
        Self::Rounds,
        Self::Snapshot,
        Self::State,
        Self::Tensors,
        Self::Velocity,
    ];

    /// As the status shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agreed => "agreed",
            Self::ErrorFeedback => "error_feedback",
            Self::Factors => "factors",
            Self::Gathering => "gathering",
            Self::Gradients => "gradients",
            Self::Offloaded => "offloaded",
            Self::PastRounds => "past_rounds",
            Self::Rounds => "rounds",
            Self::Snapshot => "snapshot",
            Self::State => "state",
            Self::Tensors => "tensors",
            Self::Velocity => "velocity",
        }
    }

    /// The purpose of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.name() == name)
    }
}

/// Bytes held now, by purpose. Clones are the same ledger.
#[derive(Debug, Clone, Default)]
pub struct Ledger(Arc<[AtomicU64; Purpose::ALL.len()]>);

impl Ledger {
    /// Bytes are held for this purpose until what is returned goes.
    pub fn hold(&self, purpose: Purpose, bytes: u64) -> Held {
        self.of(purpose).fetch_add(bytes, Ordering::Relaxed);
        Held { ledger: self.clone(), purpose, bytes }
    }

    /// Bytes by purpose.
    pub(crate) fn sums(&self) -> impl Iterator<Item = (Purpose, u64)> {
        Purpose::ALL.into_iter().map(|purpose| (purpose, self.of(purpose).load(Ordering::Relaxed)))
    }

    fn of(&self, purpose: Purpose) -> &AtomicU64 {
        &self.0[purpose as usize]
    }
}

/// Memory that a ledger counts. Keep it beside the memory.
#[derive(Debug)]
#[must_use = "what is dropped is held no more"]
pub struct Held {
    ledger: Ledger,
    purpose: Purpose,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.ledger.of(self.purpose).fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Sums by name, without those of nothing.
pub(crate) fn by_name(held: impl IntoIterator<Item = (Purpose, u64)>) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (purpose, bytes) in held.into_iter().filter(|(_, bytes)| *bytes > 0) {
        *sums.entry(purpose.name().to_owned()).or_default() += bytes;
    }
    sums
}

/// Bytes of so many f32.
pub(crate) fn bytes_of(values: &[f32]) -> u64 {
    size_of_val(values) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_sorted_and_found_again() {
        let names = Purpose::ALL.map(Purpose::name);
        assert!(names.is_sorted_by(|one, next| one < next), "{names:?}");
        let mut places: Vec<usize> = Purpose::ALL.iter().map(|purpose| *purpose as usize).collect();
        places.sort_unstable();
        assert!(places.into_iter().eq(0..Purpose::ALL.len()), "each has a place in the ledger");
        for purpose in Purpose::ALL {
            assert_eq!(Purpose::from_name(purpose.name()), Some(purpose));
        }
        assert_eq!(Purpose::from_name("lunch"), None);
    }

    #[test]
    fn memory_is_counted_exactly_as_long_as_it_is_held() {
        let ledger = Ledger::default();
        let shown = || by_name(ledger.clone().sums().chain([(Purpose::State, 1)]));
        let first = ledger.hold(Purpose::State, 40);
        let second = ledger.clone().hold(Purpose::State, 2);
        let other = ledger.hold(Purpose::Rounds, 7);
        assert_eq!(shown(), BTreeMap::from([("rounds".to_owned(), 7), ("state".to_owned(), 43)]));
        drop((first, other));
        assert_eq!(shown(), BTreeMap::from([("state".to_owned(), 3)]));
        drop(second);
        assert_eq!(by_name(ledger.sums()), BTreeMap::new());
    }
}
