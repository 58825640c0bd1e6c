//! Sans-I/O. Groups in a large swarm: a grid in which rounds alternate between rows and columns (Moshpit,
//! <https://arxiv.org/abs/2103.03239>), so that everybody's values reach everybody in two rounds.
//!
//! A peer's row and column are hashes of its id, so that a peer that comes or goes moves nobody else.

use potluck_net::PeerId;

/// Links to peers outside of the own row and column: they carry gossip between the cells.
const EXTRA_LINKS: usize = 3;

/// Number of rows, and of columns, for a swarm of this size: a power of two, so that it changes rarely.
fn lines(peers: usize, group_max: usize) -> u64 {
    if peers <= group_max {
        return 1;
    }
    // Hashing fills lines unevenly; aiming at half of the maximum keeps nearly all of them within it.
    let wanted = peers.div_ceil((group_max / 2).max(1));
    wanted.next_power_of_two() as u64
}

fn line(peer: PeerId, dimension: u64, lines: u64) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("potluck grid 1");
    hasher.update(&dimension.to_le_bytes());
    hasher.update(peer.as_bytes());
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word) % lines.max(1)
}

/// The peers that average with `me` in this round, `me` included, sorted; at most `group_max`.
pub(crate) fn group(me: PeerId, alive: &[PeerId], round: u64, group_max: usize) -> Vec<PeerId> {
    let lines = lines(alive.len(), group_max);
    let dimension = round % 2;
    let mine = line(me, dimension, lines);
    let mut group: Vec<PeerId> =
        alive.iter().copied().filter(|peer| *peer == me || line(*peer, dimension, lines) == mine).collect();
    group.sort_unstable();
    group.truncate(group_max.max(1));
    group
}

/// The peers to keep a link to, sorted.
pub(crate) fn neighbours(me: PeerId, alive: &[PeerId], group_max: usize) -> Vec<PeerId> {
    let mut chosen = group(me, alive, 0, group_max);
    chosen.extend(group(me, alive, 1, group_max));
    let mut ring: Vec<PeerId> = alive.to_vec();
    ring.sort_unstable_by_key(|peer| (line(*peer, 2, u64::MAX), *peer));
    let at = ring.partition_point(|peer| (line(*peer, 2, u64::MAX), *peer) <= (line(me, 2, u64::MAX), me));
    chosen.extend(ring.iter().cycle().skip(at).take(EXTRA_LINKS.min(ring.len())));
    chosen.sort_unstable();
    chosen.dedup();
    chosen.retain(|peer| *peer != me);
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_peers_have_bounded_groups_and_links() {
        let peers: Vec<PeerId> = (0..1000_u16)
            .map(|number| {
                let mut seed = [7; 32];
                seed[..2].copy_from_slice(&number.to_le_bytes());
                potluck_net::Identity::from_seed(&seed).peer_id()
            })
            .collect();
        for me in peers.iter().step_by(50) {
            for round in 0..2 {
                let group = group(*me, &peers, round, 64);
                assert!(group.contains(me) && (2..=64).contains(&group.len()), "{}", group.len());
                let other = group[0];
                assert_eq!(super::group(other, &peers, round, 64), group);
            }
            assert!(neighbours(*me, &peers, 64).len() <= 131);
        }
    }
}
