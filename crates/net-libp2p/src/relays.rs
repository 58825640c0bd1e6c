//! The connected peers that relay: which of them hold a place for us, and the ways to others through them.

use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol as Part;
use libp2p::{Multiaddr, PeerId};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// Relays that we hold a reservation with.
const RESERVED_MAX: usize = 2;
/// A relay that refused is asked again after this.
const RETRY: Duration = Duration::from_secs(10);
/// Relays tried on the way to a peer whose own relays are not known. All peers prefer the lowest ids, for their
/// reservations too, so that the first few are the likely ones.
const CIRCUITS_MAX: usize = 8;

struct Relay {
    address: Multiaddr,
    listener: Option<ListenerId>,
    retry_at: Instant,
    /// Reservations that did not come about or have ended. Whoever failed less often is asked first.
    failed: u32,
}

impl Relay {
    fn fail(&mut self, now: Instant) {
        self.retry_at = now + RETRY;
        self.failed = self.failed.saturating_add(1);
    }
}

/// Only connected peers are in it, so that it has no other bound than their number; who returns says anew that it relays.
#[derive(Default)]
pub(crate) struct Relays {
    known: BTreeMap<PeerId, Relay>,
}

impl Relays {
    /// A connected peer relays, and this is a direct way to it.
    pub(crate) fn add(&mut self, id: PeerId, address: Multiaddr, now: Instant) {
        self.known.entry(id).or_insert(Relay { address, listener: None, retry_at: now, failed: 0 });
    }

    pub(crate) fn contains(&self, id: &PeerId) -> bool {
        self.known.contains_key(id)
    }

    /// Its last connection has closed, and with it any reservation.
    pub(crate) fn disconnected(&mut self, id: &PeerId) {
        self.known.remove(id);
    }

    /// Whether a peer is one that holds a place for us.
    pub(crate) fn is_reserved(&self, id: &PeerId) -> bool {
        self.known.get(id).is_some_and(|relay| relay.listener.is_some())
    }

    /// Where to ask for the reservations that are missing; `listen` asks, and `None` means that it could not.
    pub(crate) fn reserve(&mut self, now: Instant, mut listen: impl FnMut(Multiaddr) -> Option<ListenerId>) {
        let reserved = self.known.values().filter(|relay| relay.listener.is_some()).count();
        let free = self.known.values_mut().filter(|relay| relay.listener.is_none() && now >= relay.retry_at);
        let mut free: Vec<&mut Relay> = free.collect();
        free.sort_by_key(|relay| relay.failed);
        let mut missing = RESERVED_MAX.saturating_sub(reserved);
        for relay in free {
            if missing == 0 {
                return;
            }
            relay.listener = listen(relay.address.clone().with(Part::P2pCircuit));
            match relay.listener {
                Some(_) => missing -= 1,
                None => relay.fail(now),
            }
        }
    }

    /// A listener has ended: if it was a reservation, its relay is left in peace for a while.
    pub(crate) fn lost(&mut self, listener: ListenerId, now: Instant) {
        for relay in self.known.values_mut().filter(|relay| relay.listener == Some(listener)) {
            relay.listener = None;
            relay.fail(now);
        }
    }

    /// Give up all reservations; these are their listeners.
    pub(crate) fn release(&mut self) -> Vec<ListenerId> {
        self.known.values_mut().filter_map(|relay| relay.listener.take()).collect()
    }

    /// The ways to a peer through relays that we are connected to: its relay is often ours.
    pub(crate) fn circuits(&self, peer: PeerId) -> Vec<Multiaddr> {
        let others = self.known.iter().filter(|(id, _)| **id != peer);
        others
            .take(CIRCUITS_MAX)
            .map(|(_, relay)| relay.address.clone().with(Part::P2pCircuit).with(Part::P2p(peer)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert;

    fn relay(n: u8) -> (PeerId, Multiaddr) {
        let id = convert::to_libp2p(potluck_net::PeerId::from_ed25519(&[n; 32]));
        (id, format!("/ip4/203.0.113.{n}/tcp/4001/p2p/{id}").parse().unwrap())
    }

    /// `count` relays, and their ids in the order in which they are asked.
    fn known(count: u8, now: Instant) -> (Relays, Vec<PeerId>) {
        let mut relays = Relays::default();
        for (id, address) in (1..=count).map(relay) {
            relays.add(id, address, now);
        }
        let ids = relays.known.keys().copied().collect();
        (relays, ids)
    }

    #[test]
    fn two_relays_hold_a_place_and_the_next_one_follows_who_went() {
        let now = Instant::now();
        let (mut relays, ids) = known(4, now);
        relays.reserve(now, |_| Some(ListenerId::next()));
        let reserved = |relays: &Relays| ids.iter().map(|id| relays.is_reserved(id)).collect::<Vec<_>>();
        assert_eq!(reserved(&relays), [true, true, false, false]);
        relays.reserve(now, |_| panic!("two are enough"));

        relays.disconnected(&ids[0]);
        assert!(!relays.contains(&ids[0]));
        relays.reserve(now, |_| Some(ListenerId::next()));
        assert_eq!(reserved(&relays), [false, true, true, false]);
        assert_eq!(relays.release().len(), 2);
        assert_eq!(reserved(&relays), [false; 4]);
    }

    #[test]
    fn a_relay_that_refused_or_ended_a_reservation_is_asked_again_later() {
        let now = Instant::now();
        let (mut relays, ids) = known(1, now);
        relays.reserve(now, |_| None);
        relays.reserve(now, |_| panic!("too early"));
        let listener = ListenerId::next();
        relays.reserve(now + RETRY, |_| Some(listener));
        relays.lost(ListenerId::next(), now + RETRY);
        assert!(relays.is_reserved(&ids[0]), "that was another listener");
        relays.lost(listener, now + RETRY);
        relays.reserve(now + RETRY, |_| panic!("too early"));
        relays.reserve(now + 2 * RETRY, |_| Some(ListenerId::next()));
        assert!(relays.is_reserved(&ids[0]));
    }

    #[test]
    fn relays_that_stay_silent_do_not_keep_out_the_next_one() {
        let mut now = Instant::now();
        let (mut relays, ids) = known(5, now);
        // A relay that says nothing is given up after longer than others are left in peace for.
        for _ in 0..2 {
            let mut listeners = Vec::new();
            relays.reserve(now, |_| {
                listeners.push(ListenerId::next());
                listeners.last().copied()
            });
            assert_eq!(listeners.len(), RESERVED_MAX);
            now += 6 * RETRY;
            listeners.into_iter().for_each(|listener| relays.lost(listener, now));
        }
        relays.reserve(now, |_| Some(ListenerId::next()));
        assert!(relays.is_reserved(&ids[4]), "the only one that has not failed");
    }

    #[test]
    fn ways_to_a_peer_are_few_and_never_lead_through_itself_or_who_has_gone() {
        let (mut relays, ids) = known(30, Instant::now());
        assert_eq!(relays.circuits(ids[0]).len(), CIRCUITS_MAX);
        for gone in &ids[2..] {
            relays.disconnected(gone);
        }
        let (_, address) = (1..=30).map(relay).find(|(id, _)| *id == ids[1]).unwrap();
        let expected = address.with(Part::P2pCircuit).with(Part::P2p(ids[0]));
        assert_eq!(relays.circuits(ids[0]), [expected]);
    }
}
