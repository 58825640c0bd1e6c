//! Invariant 8. No call blocks without end: `step` takes no time, and a round or a download ends by itself.

use crate::record::Entry;
use std::time::Duration;

/// Far above what any round of a toy model needs, far below "for ever".
const ROUND_MAX: Duration = Duration::from_secs(60);
/// The harness configures downloads to end after 60 s.
const LOAD_MAX: Duration = Duration::from_secs(75);

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in entries {
        let Entry::Call { peer, call, took } = entry else { continue };
        let limit = match *call {
            "step" => Duration::ZERO,
            "load_state" => LOAD_MAX,
            _ => ROUND_MAX,
        };
        if *took > limit {
            found.push(format!("peer {}: {call} took {took:?} of virtual time", peer.short()));
        }
    }
    found
}
