//! Sans-I/O. What those have contributed who are here no more: the samples stay in the parameters, so the credit stays too.
//!
//! Peers tell what they contributed since they joined. Whoever restarts begins at 0, so what it had before is added here.

use crate::status::LeftPeer;
use crate::wire::Note;
use potluck_net::PeerId;
use std::collections::BTreeMap;

/// Peers of which more is known than they tell themselves. Beyond it, those who gave least are forgotten.
const KEPT_MAX: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Gone {
    records: BTreeMap<PeerId, Record>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Record {
    /// Of the sessions before the present one.
    earlier: u64,
    /// What the last session had told when it ended; `None` while the peer is here.
    last: Option<u64>,
    /// The epoch it was at.
    epoch: u64,
}

impl Record {
    fn total(&self) -> u64 {
        self.earlier.saturating_add(self.last.unwrap_or(0))
    }
}

/// What a peer says that it has contributed since it joined, if it says anything yet.
pub(crate) fn told(note: &[u8]) -> Option<u64> {
    Note::decode(note).map(|note| note.contributed)
}

impl Gone {
    /// A peer is no longer here. Whoever gave nothing is not remembered.
    pub(crate) fn lost(&mut self, peer: PeerId, epoch: u64, told: Option<u64>) {
        let known = self.records.get(&peer).copied().unwrap_or_default();
        let record = Record { earlier: known.earlier, last: told.or(known.last), epoch };
        if record.total() > 0 {
            self.records.insert(peer, record);
            self.forget();
        }
    }

    /// A peer has come. One that tells less than when it was lost has begun anew.
    pub(crate) fn came(&mut self, peer: PeerId, told: Option<u64>) {
        let (Some(told), Some(record)) = (told, self.records.get_mut(&peer)) else { return };
        if let Some(last) = record.last.take().filter(|last| told < *last) {
            record.earlier = record.earlier.saturating_add(last);
        }
        if record.earlier == 0 {
            self.records.remove(&peer);
        }
    }

    /// A peer that is here has told something else. It may have restarted without being missed.
    pub(crate) fn changed(&mut self, peer: PeerId, epoch: u64, before: Option<u64>, now: Option<u64>) {
        match (before, now) {
            (Some(before), Some(now)) if now < before => {
                self.lost(peer, epoch, Some(before));
                self.came(peer, Some(now));
            }
            (None, now) => self.came(peer, now),
            _ => {}
        }
    }

    /// What a peer that is here had contributed before its present session.
    pub(crate) fn earlier(&self, peer: &PeerId) -> u64 {
        self.records.get(peer).map_or(0, |record| record.earlier)
    }

    /// Those who are not here, whoever gave most first.
    pub(crate) fn left(&self, is_here: impl Fn(&PeerId) -> bool) -> Vec<LeftPeer> {
        // Who has come and said nothing yet is here all the same.
        let gone = self.records.iter().filter(|(peer, record)| record.last.is_some() && !is_here(peer));
        let mut left: Vec<LeftPeer> = gone
            .map(|(peer, record)| LeftPeer { peer: *peer, epoch: record.epoch, contributed: record.total() })
            .collect();
        left.sort_by_key(|peer| (std::cmp::Reverse(peer.contributed), peer.peer));
        left
    }

    fn forget(&mut self) {
        while self.records.len() > KEPT_MAX {
            let least = self.records.iter().min_by_key(|(_, record)| (record.last.is_none(), record.total()));
            let Some(peer) = least.map(|(peer, _)| *peer) else { return };
            self.records.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(seed: u16) -> PeerId {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&seed.to_le_bytes());
        PeerId::from_ed25519(&key)
    }

    fn left(gone: &Gone) -> Vec<(PeerId, u64)> {
        gone.left(|_| false).iter().map(|left| (left.peer, left.contributed)).collect()
    }

    #[test]
    fn what_was_given_stays_with_its_giver_who_may_come_back() {
        let mut gone = Gone::default();
        gone.lost(peer(1), 7, Some(30));
        gone.lost(peer(2), 7, Some(0));
        gone.lost(peer(3), 9, Some(50));
        assert_eq!(left(&gone), [(peer(3), 50), (peer(1), 30)], "who gave nothing is not listed");
        // The network was away; the session is the same.
        gone.came(peer(3), Some(50));
        assert_eq!((gone.earlier(&peer(3)), left(&gone)), (0, vec![(peer(1), 30)]));
        // Restarted, it counts from 0 again; before its first report it has only come.
        gone.came(peer(1), None);
        assert_eq!((gone.earlier(&peer(1)), gone.left(|_| true)), (0, vec![]));
        gone.came(peer(1), Some(0));
        assert_eq!((gone.earlier(&peer(1)), left(&gone)), (30, vec![]));
        gone.lost(peer(1), 12, Some(40));
        assert_eq!(left(&gone), [(peer(1), 70)]);
        gone.came(peer(1), Some(40));
        assert_eq!(gone.earlier(&peer(1)), 30, "back from a network that was away: 40 are its own to tell");
        gone.changed(peer(1), 13, Some(44), Some(2));
        assert_eq!(gone.earlier(&peer(1)), 74, "restarted so fast that nobody missed it");
        gone.changed(peer(1), 13, Some(2), Some(5));
        assert_eq!((gone.earlier(&peer(1)), left(&gone)), (74, vec![]));
    }

    #[test]
    fn memory_is_bounded_and_who_gave_most_is_kept() {
        let mut gone = Gone::default();
        for seed in 1..2000 {
            gone.lost(peer(seed), 1, Some(u64::from(seed)));
        }
        let left = left(&gone);
        assert_eq!((left.len(), left[0], left[KEPT_MAX - 1].1), (KEPT_MAX, (peer(1999), 1999), 1744));
    }
}
