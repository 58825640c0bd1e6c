//! Sans-I/O. Groups in a large swarm: a grid in which rounds alternate between rows and columns (Moshpit,
//! <https://arxiv.org/abs/2103.03239>), so that everybody's values reach everybody in two rounds.
//!
//! A peer's row and column are hashes of its id, so that a peer that comes or goes moves nobody else.

use potluck_net::PeerId;

/// Links in each direction of the ring, to peers outside of the own row and column: they carry gossip between the cells.
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

fn line(peer: PeerId, dimension: u64) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("potluck grid 1");
    hasher.update(&dimension.to_le_bytes());
    hasher.update(peer.as_bytes());
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word)
}

/// Where a peer is: hashed once, compared often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    /// For row and column.
    lines: [u64; 2],
    ring: u64,
}

impl Place {
    pub(crate) fn of(peer: PeerId) -> Self {
        Self { lines: [line(peer, 0), line(peer, 1)], ring: line(peer, 2) }
    }

    /// Whether two peers average together in this round of a swarm with so many lines.
    fn meets(&self, other: &Self, round: u64, lines: u64) -> bool {
        let at = (round % 2) as usize;
        self.lines[at] % lines == other.lines[at] % lines
    }
}

/// The peers that average with `me` in this round, `me` included, sorted; at most `group_max`.
pub(crate) fn group<'a>(
    me: PeerId,
    alive: impl ExactSizeIterator<Item = (&'a PeerId, &'a Place)>,
    round: u64,
    group_max: usize,
) -> Vec<PeerId> {
    let lines = lines(alive.len(), group_max);
    let mine = Place::of(me);
    let meets = |peer: &PeerId, place: &Place| lines == 1 || *peer == me || place.meets(&mine, round, lines);
    let mut group: Vec<PeerId> =
        alive.filter(|(peer, place)| meets(peer, place)).map(|(peer, _)| *peer).collect();
    group.sort_unstable();
    group.truncate(group_max.max(1));
    group
}

/// Whom a peer keeps a link to: everybody, or in a large swarm those of its row and its column and its neighbours on the
/// ring. It is the same from both sides.
#[derive(Debug, Default)]
pub(crate) struct Mesh {
    me: Place,
    /// Live peers from which on it is a large one.
    large_from: usize,
    alive: usize,
    lines: u64,
    /// The neighbours on the ring.
    ring: Vec<PeerId>,
    /// Somebody came or went since `ring` was made.
    stale: bool,
    /// Peers have come into our lines that were there all the time.
    shifted: bool,
}

impl Mesh {
    pub(crate) fn new(me: PeerId, large_from: usize) -> Self {
        Self { me: Place::of(me), large_from, lines: 1, ..Self::default() }
    }

    /// So many others are alive now.
    pub(crate) fn count(&mut self, alive: usize) {
        let (before, was_large) = (self.lines, self.is_large());
        (self.alive, self.lines, self.stale) = (alive, lines(alive, self.large_from), true);
        self.shifted |= (before, was_large) != (self.lines, self.is_large());
    }

    /// Whether peers may have come into our lines, since this was last asked, that were there before.
    pub(crate) fn take_shift(&mut self) -> bool {
        std::mem::take(&mut self.shifted)
    }

    /// Our own.
    pub(crate) fn place(&self) -> Place {
        self.me
    }

    pub(crate) fn alive(&self) -> usize {
        self.alive
    }

    pub(crate) fn is_large(&self) -> bool {
        self.alive >= self.large_from
    }

    pub(crate) fn wants(&self, peer: &PeerId, place: &Place) -> bool {
        !self.is_large()
            || (0..2).any(|round| self.me.meets(place, round, self.lines))
            || self.ring.contains(peer)
    }

    /// Whether a link that stands is kept: not at once when the number of lines doubles, which it may do again and again
    /// while peers come and go.
    pub(crate) fn keeps(&self, peer: &PeerId, place: &Place) -> bool {
        let lines = lines(self.alive - self.alive / 8, self.large_from);
        self.wants(peer, place) || (0..2).any(|round| self.me.meets(place, round, lines))
    }

    /// Whether a peer averages with us in this round.
    pub(crate) fn meets(&self, place: &Place, round: u64) -> bool {
        !self.is_large() || self.me.meets(place, round, self.lines)
    }

    /// Look who is next on the ring, if that may have changed.
    pub(crate) fn renew<'a>(&mut self, alive: impl Iterator<Item = (&'a PeerId, &'a Place)>) {
        if !self.is_large() || !std::mem::take(&mut self.stale) {
            return;
        }
        // How far ahead of us.
        let mut ahead: Vec<(u64, PeerId)> =
            alive.map(|(peer, place)| (place.ring.wrapping_sub(self.me.ring), *peer)).collect();
        if ahead.len() > 2 * EXTRA_LINKS {
            let (_, _, others) = ahead.select_nth_unstable(EXTRA_LINKS - 1);
            let last = others.len() - EXTRA_LINKS;
            others.select_nth_unstable(last);
            ahead.drain(EXTRA_LINKS..ahead.len() - EXTRA_LINKS);
        }
        self.ring = ahead.into_iter().map(|(_, peer)| peer).collect();
    }
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
        let places: Vec<Place> = peers.iter().map(|peer| Place::of(*peer)).collect();
        let group = |me, round| group(me, peers.iter().zip(&places), round, 64);
        let mesh_of = |me: PeerId| {
            let mut mesh = Mesh::new(me, 64);
            mesh.count(peers.len() - 1);
            mesh.renew(peers.iter().zip(&places).filter(|(peer, _)| **peer != me));
            mesh
        };
        for me in peers.iter().step_by(50) {
            for round in 0..2 {
                let found = group(*me, round);
                assert!(found.contains(me) && (2..=64).contains(&found.len()), "{}", found.len());
                assert_eq!(group(found[0], round), found);
            }
            let mesh = mesh_of(*me);
            let wanted: Vec<&PeerId> = peers
                .iter()
                .zip(&places)
                .filter(|(peer, place)| mesh.wants(peer, place))
                .map(|(peer, _)| peer)
                .collect();
            assert!((7..=134).contains(&wanted.len()), "{}", wanted.len());
            for other in wanted {
                assert!(mesh_of(*other).wants(me, &Place::of(*me)), "wanted from one side only");
            }
        }
    }
}
