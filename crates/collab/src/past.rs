//! Sans-I/O. Which epochs a peer's parameters went through: enough of the past to tell, when another history wins, whether
//! it goes on from ours or is another one, so that work is lost.
//!
//! The newest epochs are remembered one by one, older ones ever more thinly, always the multiples of a power of two: two
//! peers that remember different lengths still remember the same epochs of what they share.

use crate::Lineage;
use std::collections::BTreeMap;

/// Epochs of one age group, roughly; the newest are all remembered.
const FINE: u64 = 32;
/// More marks than any past has: 32 for each doubling of its length.
const MARKS_MAX: usize = 2048;

/// The start of the hash of a history at the start of an epoch.
type Mark = [u8; 8];

/// The past of one peer's parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Past {
    marks: BTreeMap<u64, Mark>,
}

impl Past {
    /// An epoch begins with this history.
    pub(crate) fn note(&mut self, lineage: &Lineage) {
        let now = lineage.epoch;
        if let Some(mark) = lineage.hash.first_chunk() {
            self.marks.insert(now, *mark);
        }
        self.marks.retain(|epoch, _| {
            let age = now.saturating_sub(*epoch);
            epoch.is_multiple_of((age / FINE).next_power_of_two())
        });
    }

    /// Whether these parameters went through an epoch that those of `other` went through differently.
    pub(crate) fn differs_from(&self, other: &Self) -> bool {
        let mut shared = self.marks.iter().filter_map(|(epoch, mark)| Some((mark, other.marks.get(epoch)?)));
        shared.any(|(ours, theirs)| ours != theirs)
    }

    pub(crate) fn to_text(&self) -> String {
        let hex = |mark: &Mark| mark.map(|byte| format!("{byte:02x}")).concat();
        let words: Vec<String> =
            self.marks.iter().map(|(epoch, mark)| format!("{epoch}:{}", hex(mark))).collect();
        words.join(" ")
    }

    /// `None` if a stranger's text is no past.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let mut marks = BTreeMap::new();
        for word in text.split_ascii_whitespace().take(MARKS_MAX) {
            let (epoch, mark) = word.split_once(':')?;
            let mark = u64::from_str_radix(mark, 16).ok()?.to_be_bytes();
            marks.insert(epoch.parse().ok()?, mark);
        }
        Some(Self { marks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `epochs` epochs; from `fork` on under other plans.
    fn past(epochs: u64, fork: u64) -> Past {
        let (mut past, mut lineage) = (Past::default(), Lineage::genesis("run", &[0; 32]));
        for epoch in 1..=epochs {
            lineage = lineage.next_epoch(&[u8::from(epoch > fork); 32], 1);
            past.note(&lineage);
        }
        past
    }

    #[test]
    fn what_goes_on_from_ours_is_told_from_what_does_not() {
        let ours = past(1000, u64::MAX);
        for ahead in [1, 7, 500, 100_000] {
            assert!(!ours.differs_from(&past(1000 + ahead, u64::MAX)), "{ahead} epochs ahead");
        }
        for (split, ahead) in [(1, 1), (3, 20), (40, 100), (500, 5000)] {
            assert!(ours.differs_from(&past(1000 + ahead, 1000 - split)), "split {split}, {ahead} ahead");
        }
        assert!(!Past::default().differs_from(&ours), "a newcomer loses nothing");
    }

    #[test]
    fn a_long_past_is_short_and_survives_the_wire() {
        let long = past(100_000, u64::MAX);
        assert!(long.marks.len() < 500, "{}", long.marks.len());
        assert_eq!(Past::from_text(&long.to_text()), Some(long));
        assert_eq!(Past::from_text(""), Some(Past::default()));
        for odd in ["1", "1:xyz", "a:00", "1:1123456789abcdef0"] {
            assert_eq!(Past::from_text(odd), None, "{odd}");
        }
    }
}
