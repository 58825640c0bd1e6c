//! Streams that have ended and on which another may begin without a round trip, as the real network keeps them.

use crate::flow::StreamState;
use crate::trace::What;
use crate::world::{Event, Life, Node, World};
use potluck_net::{OpenError, Protocol, StreamError};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
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
        let broken = self.peer(to).life != Life::Up || self.strikes(self.peer(to).spec.faults.refuse_open);
        let Some(inner) = self.inner.upgrade().filter(|_| !broken) else {
            self.note(from, to, Some(&protocol), 0, What::Refused);
            self.spoil(stream);
            self.drop_sender(stream, 1);
            self.drop_receiver(stream, 1);
            return;
        };
        let queue = self.peer(to).accepts.get(&protocol).map(|(_, queue)| queue.clone());
        let place = queue.as_ref().ok_or(TrySendError::Closed(())).and_then(|queue| queue.try_reserve());
        let peer = self.peer_id(to);
        match place {
            Ok(place) => {
                let opener = self.peer_id(from);
                place.send(crate::stream::assemble(inner, stream, 1, opener, protocol.clone()));
                self.note(from, to, Some(&protocol), 0, What::Opened);
            }
            Err(TrySendError::Full(())) => {
                self.note(from, to, Some(&protocol), 0, What::Busy);
                self.refuse(stream, OpenError::Busy { peer, protocol });
            }
            Err(TrySendError::Closed(())) => {
                self.note(from, to, Some(&protocol), 0, What::Unknown);
                self.refuse(stream, OpenError::UnknownProtocol { peer, protocol });
            }
        }
    }

    /// These streams are broken. Those of them that have not arrived never will, so nobody holds their other end.
    pub(crate) fn forget_begun(&mut self, streams: &[u64]) {
        let begun =
            |event: &mut Event| matches!(event, Event::BeginArrive(stream) if streams.contains(stream));
        let lost: Vec<Event> = self.parked.extract_if(.., begun).collect();
        for event in lost {
            let Event::BeginArrive(stream) = event else { continue };
            self.drop_sender(stream, 1);
            self.drop_receiver(stream, 1);
        }
    }

    /// The acceptor does not take a stream that was begun again. The opener learns why after the latency.
    fn refuse(&mut self, stream: u64, refusal: OpenError) {
        self.spoil(stream);
        let Some(state) = self.streams.get_mut(stream) else { return };
        state.flows[1].break_sender("this side refused it");
        state.flows[0].break_receiver("this side refused it");
        let at = self.now + state.flows[1].latency();
        self.schedule(at, Event::BeginRefused(stream, Box::new(refusal)));
        self.drop_sender(stream, 1);
        self.drop_receiver(stream, 1);
    }

    pub(crate) fn refusal_arrives(&mut self, stream: u64, refusal: OpenError) {
        let Some(state) = self.streams.get(stream) else { return };
        let ([from, to], relay) = (state.ends, state.relay);
        if self.route_cut(to, from, relay) || self.peer(from).frozen {
            self.parked.push(Event::BeginRefused(stream, Box::new(refusal)));
            return;
        }
        let Some(state) = self.streams.get_mut(stream) else { return };
        let [own, other] = &mut state.flows;
        own.stop_sender(StreamError::Refused(refusal.clone()));
        other.stop_receiver(StreamError::Refused(refusal));
    }

    /// Nothing may begin on this stream when it has ended.
    pub(crate) fn spoil(&mut self, stream: u64) {
        if let Some(state) = self.streams.get_mut(stream) {
            state.spoiled = true;
        }
    }
}
