//! Streams that have ended and on which another may begin without a round trip, as the real network keeps them.

use crate::flow::StreamState;
use crate::trace::What;
use crate::world::{Event, Life, Node, World};
use potluck_net::Protocol;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// For how long, and how many for one opener, acceptor and protocol.
const KEPT_FOR: Duration = Duration::from_secs(120);
const KEPT_MAX: usize = 4;

/// By opener and acceptor: when the opener has heard that the acceptor is ready.
#[derive(Default)]
pub(crate) struct Kept(BTreeMap<(Node, Node), BTreeMap<Protocol, Vec<Instant>>>);

impl Kept {
    fn add(&mut self, (opener, acceptor): (Node, Node), protocol: Protocol, ready: Instant) {
        let of = self.0.entry((opener, acceptor)).or_default().entry(protocol).or_default();
        if of.len() >= KEPT_MAX {
            of.remove(0);
        }
        of.push(ready);
    }

    fn take(&mut self, opener: Node, acceptor: Node, protocol: &Protocol, now: Instant) -> bool {
        let of = self.0.get_mut(&(opener, acceptor)).and_then(|by_protocol| by_protocol.get_mut(protocol));
        let Some(of) = of else { return false };
        of.retain(|ready| now < *ready + KEPT_FOR);
        let last = of.iter().rposition(|ready| *ready <= now);
        last.map(|at| of.remove(at)).is_some()
    }

    /// Their connection is gone.
    pub(crate) fn forget(&mut self, a: Node, b: Node) {
        self.0.remove(&(a, b));
        self.0.remove(&(b, a));
    }
}

impl World {
    /// A stream has ended on both sides, at `last` the later. Whatever broke it or is still on its way spoils it.
    pub(crate) fn keep(&mut self, state: StreamState, last: u8) {
        let [opener, acceptor] = state.ends;
        if state.spoiled
            || !state.flows.iter().all(|flow| flow.is_quiet())
            || self.conn(opener, acceptor).is_none()
        {
            return;
        }
        // The acceptor must hear of the opener's end, and the opener of its readiness.
        let trips = if last == 0 { 2 } else { 1 };
        let ready = self.now + state.flows[1].latency() * trips;
        self.kept.add((opener, acceptor), state.protocol, ready);
    }

    /// Begin a stream on one that was kept, if there is one: it is open here at once, and there after the latency.
    pub(crate) fn begin_again(&mut self, from: Node, to: Node, protocol: &Protocol) -> Option<u64> {
        let relay = self.conn(from, to)?.relay;
        if !self.kept.take(from, to, protocol, self.now) {
            return None;
        }
        let stream = self.create_stream([from, to], protocol, relay);
        let trip = self.streams.get(stream)?.flows[0].latency();
        self.schedule(self.now + trip, Event::BeginArrive(stream));
        Some(stream)
    }

    pub(crate) fn begin_arrives(&mut self, stream: u64) {
        let Some(state) = self.streams.get(stream) else { return };
        let ([from, to], relay, protocol) = (state.ends, state.relay, state.protocol.clone());
        if self.route_cut(from, to, relay) || self.peer(to).frozen {
            self.parked.push(Event::BeginArrive(stream));
            return;
        }
        let refused = self.peer(to).life != Life::Up || self.strikes(self.peer(to).spec.faults.refuse_open);
        let queue = self.peer(to).accepts.get(&protocol).map(|(_, queue)| queue.clone());
        let place = queue.as_ref().filter(|_| !refused).and_then(|queue| queue.try_reserve().ok());
        let (Some(place), Some(inner)) = (place, self.inner.upgrade()) else {
            self.note(from, to, Some(&protocol), 0, What::Refused);
            self.spoil(stream);
            self.drop_sender(stream, 1);
            self.drop_receiver(stream, 1);
            return;
        };
        let opener = self.peer_id(from);
        place.send(crate::stream::assemble(inner, stream, 1, opener, protocol.clone()));
        self.note(from, to, Some(&protocol), 0, What::Opened);
    }

    /// Nothing may begin on this stream when it has ended.
    pub(crate) fn spoil(&mut self, stream: u64) {
        if let Some(state) = self.streams.get_mut(stream) {
            state.spoiled = true;
        }
    }
}
