//! Sans-I/O. What a heartbeat tells of others, and to whom it goes.

use super::{Audience, FANOUT, Membership};
use crate::wire::{News, Pulse};
use potluck_net::PeerId;

/// Fresh news items in one heartbeat.
const NEWS_MAX: usize = 24;
/// Older ones at most, and how often everybody shall hear of each peer that it has no link to, from all its links
/// together: heartbeats on many links need to say little each.
const REPEATED_MAX: usize = 12;
const REPEATED_PER_SECOND: usize = 2;

impl Membership {
    /// The next heartbeat, and which of these many links it goes to.
    pub(crate) fn next_beat(&mut self, links: usize) -> (Pulse, Vec<News>, Audience) {
        self.pulse.sequence += 1;
        let large = self.mesh.is_large();
        let (regular, urgent) = (std::mem::take(&mut self.regular), std::mem::take(&mut self.urgent));
        let news = self.gossip(regular || !large, links);
        let nth = (links / FANOUT).max(1);
        let audience = match (large && !regular, urgent) {
            (false, _) => Audience::Everybody,
            (true, true) => Audience::Round(self.pulse.progress.epoch),
            (true, false) => Audience::EveryNth { nth, first: self.pulse.sequence as usize % nth },
        };
        (self.pulse.clone(), news, audience)
    }

    /// Whether the last heartbeat had no room for some news, which nobody else may tell for us.
    pub(crate) fn has_more_to_tell(&self) -> bool {
        self.mesh.is_large() && !self.fresh.is_empty()
    }

    /// Whether a peer averages with us in this round.
    pub(crate) fn meets(&self, peer: &PeerId, round: u64) -> bool {
        self.peers.get(peer).is_none_or(|entry| self.mesh.meets(&entry.place, round))
    }

    /// The news for one heartbeat: what is fresh, then (in a regular one) the others in turn, of which only the first
    /// comes with its addresses: whoever has a link has them, and the others hear them often enough.
    fn gossip(&mut self, regular: bool, links: usize) -> Vec<News> {
        let mut repeated = Vec::new();
        let chosen: Vec<PeerId> = self.fresh.iter().copied().take(NEWS_MAX).collect();
        for peer in &chosen {
            let left = self.peers.get_mut(peer).map_or(0, |entry| {
                entry.fresh = entry.fresh.saturating_sub(1);
                entry.fresh
            });
            if left == 0 {
                self.fresh.remove(peer);
            }
        }
        if regular {
            let start = self.cursor.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
            let later = self.peers.range((start, std::ops::Bound::Unbounded)).map(|(peer, _)| *peer);
            let count = (REPEATED_PER_SECOND * self.peers.len()).div_ceil(links.max(1));
            let later: Vec<PeerId> = later.take(count.min(REPEATED_MAX)).collect();
            self.cursor = later.last().copied();
            repeated.extend(later.into_iter().filter(|peer| !chosen.contains(peer)));
        }
        let told_in_full = chosen.len() + 1;
        let all = chosen.into_iter().chain(repeated).enumerate();
        all.filter_map(|(at, peer)| self.news_of(peer, at < told_in_full)).collect()
    }
}
