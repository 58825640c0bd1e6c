//! Sans-I/O. What a group agrees on when its members hold different averages.

use crate::station::Agreed;
use potluck_net::PeerId;
use std::collections::BTreeMap;

/// For each part the digest that most members hold, and one of them; ties go to `me`.
pub(crate) fn majority(me: PeerId, done: &BTreeMap<PeerId, Vec<[u8; 32]>>) -> Agreed {
    // Auxiliary members hold no averages and send no digests.
    let parts = done.values().map(Vec::len).max().unwrap_or(0);
    let mut agreed = Agreed { digests: Vec::new(), holders: Vec::new() };
    for part in 0..parts {
        let mut votes: BTreeMap<[u8; 32], Vec<PeerId>> = BTreeMap::new();
        for (peer, digests) in done {
            if let Some(digest) = digests.get(part) {
                votes.entry(*digest).or_default().push(*peer);
            }
        }
        let best = votes.into_iter().max_by_key(|(_, peers)| (peers.len(), peers.contains(&me)));
        let (digest, peers) = best.expect("whoever has the longest list voted for every part");
        agreed.digests.push(digest);
        agreed.holders.push(if peers.contains(&me) { me } else { peers[0] });
    }
    agreed
}
