//! Invariant 5. Within one life of a session, its history only moves forward.

use crate::record::Entry;
use potluck_collab::Lineage;
use potluck_net::PeerId;
use std::collections::BTreeMap;

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    let mut last: BTreeMap<PeerId, Lineage> = BTreeMap::new();
    let mut found = Vec::new();
    for entry in entries {
        match entry {
            Entry::Started { peer } => {
                last.remove(peer);
            }
            Entry::Epoch { peer, lineage, .. } => {
                if let Some(before) =
                    last.insert(*peer, *lineage).filter(|before| before.epoch > lineage.epoch)
                {
                    found.push(format!("peer {} went from {before} to {lineage}", peer.short()));
                }
            }
            Entry::Loaded { peer, from, to } if to < from => {
                found.push(format!("peer {} loaded epoch {to} at epoch {from}", peer.short()));
            }
            _ => {}
        }
    }
    found
}
