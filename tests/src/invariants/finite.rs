//! Invariant 11. What is not finite never reaches an average.

use crate::record::Entry;

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in entries {
        if let Entry::Round { peer, epoch, averaged, .. } = entry
            && !averaged.alone
            && averaged.vector.iter().any(|value| !value.is_finite())
        {
            found.push(format!("epoch {epoch}: the average of peer {} is not finite", peer.short()));
        }
    }
    found
}
