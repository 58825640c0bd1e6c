//! Sans-I/O. Whom a peer keeps control streams to: to whom it opens them, which it lets go, and how a newcomer learns of
//! everybody.

use super::{Action, FANOUT, Membership, RETRY};
use crate::detector::HEARTBEAT;
use crate::wire::{News, Pulse, Standing};
use potluck_net::{PeerId, Reachability};
use std::time::Duration;
use tokio::time::Instant;

/// A link that neither side needs is let go after this long: by then a newcomer has found the peers that it needs.
const NEEDLESS_AFTER: Duration = Duration::from_secs(2);
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

    pub(super) fn connect_missing(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let mut dead_tried = 0;
        for (peer, entry) in &mut self.peers {
            let try_it = match entry.standing {
                Standing::Alive => self.mesh.wants(peer, &entry.place),
                Standing::Dead => {
                    dead_tried += 1;
                    dead_tried <= 16
                }
                Standing::Left => false,
            };
            if try_it && !entry.linked && now >= entry.connect_at {
                entry.connect_at = now + RETRY;
                actions.push(Action::Connect(*peer));
            }
        }
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

    /// Whether a link to this peer is worth looking for, when it is not known to be one of many whom we do not need.
    pub(crate) fn seeks(&self, peer: &PeerId) -> bool {
        let known = self.peers.get(peer).filter(|entry| entry.standing == Standing::Alive);
        known.is_none_or(|entry| !entry.linked && self.mesh.wants(peer, &entry.place))
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
            entry.standing == Standing::Alive && since.is_none_or(|since| entry.alive_at >= since)
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
