//! Invariant 6. Nobody is blamed to whom nothing happened, and a fault never names the peer itself. That somebody left a
//! round, or that its values are missing, is no blame but must be true: it has no result of that round, or somebody in
//! the round was broken, or the epoch was made again, of which it may have another round's result. (That injected faults do appear is checked by the
//! scenarios, which know what they hit.)

use crate::record::Entry;
use potluck_net::{FaultKind, PeerId};
use std::collections::BTreeSet;

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    let hit: BTreeSet<PeerId> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Injected { peer, .. } => Some(*peer),
            _ => None,
        })
        .collect();
    let finished: BTreeSet<(PeerId, u64, &[PeerId])> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Round { peer, epoch, averaged, .. } if !averaged.alone => {
                Some((*peer, *epoch, &averaged.members[..]))
            }
            _ => None,
        })
        .collect();
    let again = super::made_again(entries);
    let mut found = Vec::new();
    for entry in entries {
        let Entry::Round { peer, epoch, faults, averaged } = entry else { continue };
        for fault in faults {
            let left = fault.kind == FaultKind::Left;
            // A broken member that reduced may have missed what a healthy one sent; all see that it is missing.
            let missing = fault.kind == FaultKind::Missing;
            let twice = again.contains(epoch);
            if missing && (twice || averaged.members.iter().any(|member| hit.contains(member))) {
                continue;
            }
            if left && (twice || !finished.contains(&(fault.peer, *epoch, &averaged.members[..]))) {
                continue;
            }
            // Its own values may be bad, or not have arrived, and then it says so.
            let of_itself =
                fault.peer == *peer && !matches!(fault.kind, FaultKind::Missing | FaultKind::NotFinite);
            // What a broken peer says about others while it is cut off is not evidence.
            if of_itself || (!hit.contains(&fault.peer) && !hit.contains(peer)) {
                found.push(format!("epoch {epoch}: peer {} blames {fault}", peer.short()));
            }
        }
    }
    found
}
