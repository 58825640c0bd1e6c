//! Invariant 6. Nobody is blamed to whom nothing happened, and a fault never names the peer itself. (That injected faults
//! do appear is checked by the scenarios, which know what they hit.)

use crate::record::Entry;
use potluck_net::PeerId;
use std::collections::BTreeSet;

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    let hit: BTreeSet<PeerId> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Injected { peer, .. } => Some(*peer),
            _ => None,
        })
        .collect();
    let mut found = Vec::new();
    for entry in entries {
        let Entry::Round { peer, epoch, faults, .. } = entry else { continue };
        for fault in faults {
            // What a broken peer says about others while it is cut off is not evidence.
            if fault.peer == *peer || (!hit.contains(&fault.peer) && !hit.contains(peer)) {
                found.push(format!("epoch {epoch}: peer {} blames {fault}", peer.short()));
            }
        }
    }
    found
}
