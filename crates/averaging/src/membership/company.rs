//! Sans-I/O. Whom a peer keeps control streams to: to whom it opens them, which it lets go, and how a newcomer learns of
//! everybody.

use super::{Action, FANOUT, GONE_FOR, GONE_MAX, Membership, RETRY};
use crate::detector::HEARTBEAT;
use crate::wire::{News, Pulse, Standing};
use potluck_net::{PeerId, Reachability};
use std::time::Duration;
use tokio::time::Instant;

/// A link that neither side needs is let go after this long: by then a newcomer has found the peers that it needs.
const NEEDLESS_AFTER: Duration = Duration::from_secs(2);
/// Peers that were given up and are looked for in one second.
const SOUGHT_AT_ONCE_MAX: usize = 4;
/// Peers in one message to a newcomer.
const INTRODUCED_MAX: usize = 256;

impl Membership {
    /// Connect to those whom a message made known, as far as we need them: how many we need follows from how many there
    /// are, and so from the whole message.
    pub(crate) fn meet_newcomers(&mut self, now: Instant, actions: &mut Vec<Action>) {
        for peer in std::mem::take(&mut self.newcomers) {
            let opens = self.opens(&peer);
            let Some(entry) = self.peers.get_mut(&peer).filter(|entry| entry.standing == Standing::Alive)
            else {
                continue;
            };
            if entry.linked || !self.mesh.wants(&peer, &entry.place) {
                continue;
            }
            if opens {
                actions.push(Action::Connect(peer));
            } else {
                entry.connect_at = now + HEARTBEAT / 2;
            }
        }
    }

    /// Whether it is for us to open the stream to a peer of which both of us have just heard. In a large swarm two for
    /// each pair would double what heartbeats cost; in a small one nobody waits for the other.
    fn opens(&self, peer: &PeerId) -> bool {
        let hidden = |pulse: &Pulse| pulse.client || pulse.reachability == Reachability::Private;
        let there = self.peers.get(peer).is_some_and(|entry| hidden(&entry.pulse));
        match (hidden(&self.pulse), there) {
            _ if !self.mesh.is_large() => true,
            (true, false) => true,
            (false, true) => false,
            _ => self.me < *peer,
        }
    }

    /// Look for those to whom a link is missing, of the living and of the gone; in one walk over all, of whom there may be many.
    pub(super) fn connect_missing(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let mut gone = Vec::new();
        for (peer, entry) in self.peers.iter_mut().filter(|(_, entry)| !entry.linked) {
            if entry.standing != Standing::Alive {
                gone.push((entry.since, *peer));
            } else if now >= entry.connect_at && self.mesh.wants(peer, &entry.place) {
                entry.connect_at = now + RETRY;
                actions.push(Action::Connect(*peer));
            }
        }
        self.look_for_the_gone(now, gone, actions);
    }

    /// Those who were given up are looked for as long as we remember them: partitions heal, and one peer of the other side
    /// is enough to hear of all. Each of them soon, because a link is often there again in a moment; then one after the
    /// other, because a dial to nobody costs handshakes that wait for an answer; but all we can while we are alone.
    fn look_for_the_gone(
        &mut self,
        now: Instant,
        mut gone: Vec<(Instant, PeerId)>,
        actions: &mut Vec<Action>,
    ) {
        if gone.len() > GONE_MAX {
            gone.sort_unstable();
            let long_gone = gone.partition_point(|(since, _)| now >= *since + GONE_FOR);
            for (_, peer) in gone.drain(..long_gone.min(gone.len() - GONE_MAX)) {
                self.peers.remove(&peer);
                self.fresh.remove(&peer);
            }
        }
        self.gone = gone.len();
        let alone = self.mesh.alive() == 0;
        let mut due: Vec<(bool, Instant, PeerId)> = gone
            .into_iter()
            .filter_map(|(_, peer)| {
                let entry = self.peers.get(&peer)?;
                let due = entry.standing == Standing::Dead && now >= entry.connect_at;
                due.then_some((entry.sought && !alone, entry.connect_at, peer))
            })
            .collect();
        due.sort_unstable();
        for (again, _, peer) in due.into_iter().take(SOUGHT_AT_ONCE_MAX) {
            if again {
                if now < self.next_search {
                    break;
                }
                self.next_search = now + RETRY;
            }
            let Some(entry) = self.peers.get_mut(&peer) else { continue };
            (entry.connect_at, entry.sought) = (now + RETRY, true);
            actions.push(Action::Connect(peer));
        }
    }

    /// News of somebody who is gone and whom we do not remember, or no more: with all that we remember already, the next
    /// one who remembers others would tell us of those for ever.
    pub(super) fn is_past(&self, news: &News) -> bool {
        news.standing != Standing::Alive && self.gone >= GONE_MAX && !self.peers.contains_key(&news.peer)
    }

    /// Let links go that neither side needs: to those who joined through us, and from when the swarm was smaller.
    pub(super) fn release_needless(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let links = self.peers.values().filter(|entry| entry.linked).count();
        if !self.mesh.is_large() || links <= FANOUT {
            return;
        }
        for (peer, entry) in self.peers.iter_mut().filter(|(_, entry)| entry.linked) {
            if now >= entry.linked_at + NEEDLESS_AFTER && !self.mesh.keeps(peer, &entry.place) {
                (entry.linked, entry.linked_at, entry.pulse_at) = (false, now, now);
                self.changed.insert(*peer);
                actions.push(Action::Release(*peer));
            }
        }
    }

    /// Whether to look for a link to this peer at once. We do not need all of many, and those whom we remember as dead are
    /// looked for in turn already: what a directory says of them is older than what we know.
    pub(crate) fn seeks(&self, peer: &PeerId) -> bool {
        self.peers.get(peer).is_none_or(|entry| {
            entry.standing == Standing::Alive && !entry.linked && self.mesh.wants(peer, &entry.place)
        })
    }

    /// Others whom we know to be alive.
    pub(crate) fn alive(&self) -> usize {
        self.mesh.alive()
    }

    /// Who joins at the same time hears of nobody through links that it does not have yet: whoever introduced the others
    /// to it goes on until it has them.
    pub(super) fn introduce_more(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.introduced.retain(|peer, (first, last)| {
            actions.push(Action::Introduce(*peer, Some(*last)));
            *last = now;
            now < *first + NEEDLESS_AFTER
        });
    }

    /// Everybody whom we got to know since then, for a newcomer.
    pub(crate) fn introductions(&self, since: Option<Instant>) -> Vec<Vec<News>> {
        let alive = self.peers.iter().filter(|(_, entry)| {
            entry.standing == Standing::Alive && since.is_none_or(|since| entry.since >= since)
        });
        let all: Vec<News> = alive.filter_map(|(peer, _)| self.news_of(*peer, true)).collect();
        all.chunks(INTRODUCED_MAX).map(<[News]>::to_vec).collect()
    }

    pub(super) fn news_of(&self, peer: PeerId, in_full: bool) -> Option<News> {
        let entry = self.peers.get(&peer).filter(|entry| entry.incarnation > 0)?;
        Some(News {
            peer,
            incarnation: entry.incarnation,
            standing: entry.standing,
            addresses: if in_full { entry.addresses.clone() } else { Vec::new() },
            beat: (entry.standing == Standing::Alive).then(|| entry.pulse.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn peer(number: u16) -> PeerId {
        let mut seed = [3; 32];
        seed[..2].copy_from_slice(&number.to_le_bytes());
        potluck_net::Identity::from_seed(&seed).peer_id()
    }

    fn news(number: u16, standing: Standing) -> News {
        News { peer: peer(number), incarnation: 1, standing, addresses: Vec::new(), beat: None }
    }

    /// A peer that knows others, of which so many are alive and so many have been.
    fn table(now: Instant, alive: u16, dead: u16) -> Membership {
        let mut table = Membership::new(peer(u16::MAX), Pulse::default(), 64, now);
        for number in 0..alive + dead {
            table.news(now, news(number, Standing::Alive), true, &mut Vec::new());
        }
        for number in alive..alive + dead {
            table.news(now, news(number, Standing::Dead), true, &mut Vec::new());
        }
        table
    }

    /// Whom it looks for in so many seconds, and how often. The alive ones say every second that they are.
    fn sought(
        table: &mut Membership,
        now: &mut Instant,
        alive: u16,
        seconds: u64,
    ) -> BTreeMap<PeerId, usize> {
        let mut sought = BTreeMap::new();
        for _ in 0..seconds {
            *now += HEARTBEAT;
            let mut actions = Vec::new();
            for number in 0..alive {
                table.linked(*now, peer(number), hello(), &mut Vec::new());
            }
            table.tick(*now, &mut actions);
            for action in actions {
                if let Action::Connect(peer) = action {
                    *sought.entry(peer).or_default() += 1;
                }
            }
        }
        sought
    }

    fn hello() -> crate::wire::Hello {
        crate::wire::Hello {
            version: 1,
            run: String::new(),
            manifest: BTreeMap::new(),
            invite: None,
            incarnation: 1,
            addresses: Vec::new(),
            pulse: Pulse::default(),
            peers: 1,
        }
    }

    #[test]
    fn those_who_are_gone_are_looked_for_soon_and_then_in_turn() {
        let mut now = Instant::now();
        let mut table = table(now, 2, 40);
        let first = sought(&mut table, &mut now, 2, 20);
        assert_eq!(first.len(), 40, "each once, before anybody twice");
        let later = sought(&mut table, &mut now, 2, 400);
        assert_eq!(later.len(), 40, "nobody is forgotten");
        assert!(later.values().all(|times| (1..=3).contains(times)), "{later:?}");
        let dials: usize = later.values().sum();
        assert!((70..=90).contains(&dials), "one in five seconds, not {dials} in 400");
    }

    #[test]
    fn whoever_is_alone_looks_for_everybody_all_the_time() {
        let mut now = Instant::now();
        let mut table = table(now, 0, 10);
        let sought = sought(&mut table, &mut now, 0, 60);
        assert_eq!(sought.len(), 10);
        assert!(sought.values().all(|times| *times >= 10), "{sought:?}");
    }

    #[test]
    fn of_those_who_are_gone_the_last_ones_are_remembered_and_for_a_while_all() {
        let (mut now, count) = (Instant::now(), GONE_MAX as u16);
        let mut many = table(now, 1, 2 * count);
        many.tick(now + GONE_FOR / 2, &mut Vec::new());
        assert_eq!(many.peers.len(), 1 + 2 * GONE_MAX, "somebody may still believe them alive");
        let mut table = table(now, 1, 0);
        for number in 1..2 * count {
            now += 4 * HEARTBEAT;
            table.linked(now, peer(0), hello(), &mut Vec::new());
            for standing in [Standing::Alive, if number % 2 == 0 { Standing::Dead } else { Standing::Left }] {
                table.news(now, news(number, standing), true, &mut Vec::new());
            }
            table.tick(now, &mut Vec::new());
        }
        assert_eq!(table.peers.len(), 1 + GONE_MAX);
        assert!(table.peers.contains_key(&peer(0)) && table.peers.contains_key(&peer(2 * count - 1)));
        // Others may remember others: they are not told on from one to the next for ever.
        table.news(now, news(1, Standing::Dead), true, &mut Vec::new());
        assert!(!table.peers.contains_key(&peer(1)));
        // Whoever comes back is known.
        table.news(now, news(1, Standing::Alive), true, &mut Vec::new());
        assert!(table.peers.contains_key(&peer(1)));
    }
}
