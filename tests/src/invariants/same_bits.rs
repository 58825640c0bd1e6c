//! Invariant 2. Peers with the same history hold the same parameters, and members of one round got the same average, bit
//! for bit, under every compression. A peer that was cut off may finish a plan with fewer senders than the others; it
//! then has another history, and only that is asked of it.

use crate::record::{Entry, hash_of};
use potluck_net::PeerId;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    let mut params: BTreeMap<(u64, [u8; 32]), (PeerId, u64)> = BTreeMap::new();
    let mut averages: BTreeMap<(u64, &[PeerId], u64), (PeerId, u64)> = BTreeMap::new();
    let cut_off: BTreeSet<PeerId> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Injected { peer, .. } => Some(*peer),
            _ => None,
        })
        .collect();
    let again = super::made_again(entries);
    let mut found = Vec::new();
    for entry in entries {
        match entry {
            Entry::Epoch { peer, lineage, params: hash, .. } => {
                let (first, expected) = params.entry((lineage.epoch, lineage.hash)).or_insert((*peer, *hash));
                if expected != hash {
                    found.push(format!(
                        "parameters of {lineage}: peer {} has {hash:016x}, peer {} {expected:016x}",
                        peer.short(),
                        first.short()
                    ));
                }
            }
            Entry::Round { peer, epoch, averaged, .. }
                if !averaged.alone && !cut_off.contains(peer) && !again.contains(epoch) =>
            {
                let hash = hash_of(&averaged.vector);
                let key = (*epoch, &averaged.members[..], averaged.weight_total.to_bits());
                let (first, expected) = averages.entry(key).or_insert((*peer, hash));
                if *expected != hash {
                    found.push(format!(
                        "average of epoch {epoch}: peer {} has {hash:016x}, peer {} {expected:016x}",
                        peer.short(),
                        first.short()
                    ));
                }
            }
            _ => {}
        }
    }
    found
}
