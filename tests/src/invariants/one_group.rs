//! Invariant 3. In one round of an epoch a peer is in at most one group, and the members agree on who the members are.

use crate::record::Entry;
use potluck_net::{PeerFault, PeerId};
use std::collections::BTreeMap;

/// The group of a result, and whom it names as lost.
type Group<'a> = (&'a [PeerId], &'a [PeerFault]);

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    // A peer may reload an epoch after a split and average it again with others: what counts is the group in which it
    // got a result, and that nobody else's list for the same sum names it beside other peers. (A member that was
    // lost on the way is listed, because it was in the plan, and named as lost.)
    let mut results: BTreeMap<(u64, PeerId), Group> = BTreeMap::new();
    let mut found = Vec::new();
    for entry in entries {
        let Entry::Round { peer, epoch, averaged, faults } = entry else { continue };
        if averaged.alone {
            continue;
        }
        if !averaged.members.contains(peer) {
            found.push(format!("epoch {epoch}: peer {} got the average of a group without it", peer.short()));
        }
        let mut sorted = averaged.members.clone();
        sorted.sort();
        sorted.dedup();
        if sorted.len() != averaged.members.len() {
            found.push(format!("epoch {epoch}: a member is listed twice: {:?}", averaged.members));
        }
        results.insert((*epoch, *peer), (&averaged.members, faults));
    }
    let names = |faults: &[PeerFault], peer: &PeerId| faults.iter().any(|fault| fault.peer == *peer);
    let again = super::made_again(entries);
    for ((epoch, peer), (members, faults)) in results.iter().filter(|((epoch, _), _)| !again.contains(epoch))
    {
        for other in members.iter().filter(|other| *other != peer) {
            if let Some((theirs, their_faults)) = results.get(&(*epoch, *other))
                && theirs != members
                && theirs.contains(peer)
                && !(names(faults, other) && names(their_faults, peer))
            {
                found.push(format!(
                    "epoch {epoch}: peer {} counts {members:?}, peer {} counts {theirs:?}",
                    peer.short(),
                    other.short()
                ));
            }
        }
    }
    found
}
