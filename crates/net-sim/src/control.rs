//! Everything but frames: connections, opens, resets, crashes, freezes, partitions.

use crate::flow::{Flow, Hop, StreamState, WINDOW_BYTES};
use crate::nat;
use crate::trace::What;
use crate::world::{Event, Life, Node, World};
use potluck_net::{OpenError, Path, Protocol};
use std::collections::VecDeque;
use std::task::Waker;
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;

/// How long an open waits for an answer.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// After this long without anything from the other side, a connection counts as broken (keep-alives are not drawn).
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A connection between two peers (the lower index first).
pub(crate) struct Conn {
    pub(crate) path: Path,
    pub(crate) relay: Option<Node>,
    /// Since when nothing gets through in at least one direction.
    pub(crate) silent_since: Option<Instant>,
    /// Tells it from an earlier one between the same two.
    pub(crate) id: u64,
    /// That run on it now.
    pub(crate) streams: usize,
    /// Since when there are none.
    pub(crate) idle_since: Instant,
}

/// An open on its way.
pub(crate) struct Pending {
    pub(crate) from: Node,
    pub(crate) to: Node,
    pub(crate) protocol: Protocol,
    pub(crate) path: Path,
    pub(crate) relay: Option<Node>,
    pub(crate) result: Option<Result<u64, OpenError>>,
    pub(crate) waker: Option<Waker>,
}

pub(crate) fn key(a: Node, b: Node) -> (Node, Node) {
    (a.min(b), a.max(b))
}

impl World {
    // ---- connections ------------------------------------------------------------------------------------------

    pub(crate) fn conn(&self, a: Node, b: Node) -> Option<&Conn> {
        self.conns.get(&key(a, b))
    }

    /// How `from` gets to `to`: over the connection that exists, or over a new one.
    pub(crate) fn route(&self, from: Node, to: Node) -> Result<(Path, Option<Node>), Vec<String>> {
        if let Some(conn) = self.conn(from, to) {
            return Ok((conn.path, conn.relay));
        }
        if from == to {
            return Err(vec!["a peer cannot dial itself".to_owned()]);
        }
        let (dialer, target) = (self.peer(from).spec.nat, self.peer(to).spec.nat);
        let path = nat::way(dialer, target);
        if !nat::needs_relay(path) {
            return Ok((path, None));
        }
        let Some(relay) = self.best_relay(from, to) else {
            return Err(vec![
                format!("direct: {target:?} lets nothing in"),
                format!("{path:?}: no relay is reachable for both sides"),
            ]);
        };
        Ok((path, (path == Path::Relayed).then_some(relay)))
    }

    /// The relay that carries the fewest connections and is the nearest: peers spread over relays by themselves.
    fn best_relay(&self, from: Node, to: Node) -> Option<Node> {
        let usable = |node: Node| {
            let peer = self.peer(node);
            let apart = node != from && node != to;
            let linked = [from, to].iter().all(|&end| !self.cut(end, node) && !self.cut(node, end));
            let offers = peer.spec.relay && peer.spec.nat == crate::NatClass::Open;
            offers && peer.life == Life::Up && !peer.frozen && apart && linked
        };
        let carried = |node: Node| self.conns.values().filter(|conn| conn.relay == Some(node)).count();
        let nodes = 0..self.peers.len() as Node;
        nodes
            .filter(|&node| usable(node))
            .min_by_key(|&node| (carried(node), self.peer(node).spec.latency, node))
    }

    fn latency(&self, from: Node, to: Node, relay: Option<Node>) -> Duration {
        let middle = relay.map_or(Duration::ZERO, |relay| self.peer(relay).spec.latency * 2);
        self.peer(from).spec.latency + middle + self.peer(to).spec.latency
    }

    /// Whether nothing gets from one peer to the other on their route.
    pub(crate) fn route_cut(&self, from: Node, to: Node, relay: Option<Node>) -> bool {
        match relay {
            None => self.cut(from, to),
            Some(relay) => self.cut(from, relay) || self.cut(relay, to),
        }
    }

    fn connect(&mut self, from: Node, to: Node, path: Path, relay: Option<Node>) {
        if self.conns.contains_key(&key(from, to)) {
            return;
        }
        let (id, idle_since) = (self.fresh_id(), self.now);
        let conn = Conn { path, relay, silent_since: None, id, streams: 0, idle_since };
        self.conns.insert(key(from, to), conn);
        self.peer_mut(from).neighbours.insert(to);
        self.peer_mut(to).neighbours.insert(from);
        self.trim_later([from, to]);
    }

    pub(crate) fn disconnect(&mut self, a: Node, b: Node) {
        self.conns.remove(&key(a, b));
        self.kept.forget(a, b);
        self.peer_mut(a).neighbours.remove(&b);
        self.peer_mut(b).neighbours.remove(&a);
    }

    /// Break a connection at those ends that still live.
    fn break_conn(&mut self, a: Node, b: Node, reason: &'static str) {
        self.disconnect(a, b);
        let shared: Vec<u64> = self.peer(a).streams.intersection(&self.peer(b).streams).copied().collect();
        for &stream in &shared {
            for end in [0, 1] {
                self.reset_arrives(stream, end, true, reason);
            }
        }
        self.forget_begun(&shared);
        self.note(a, b, None, 0, What::TimedOut);
    }

    // ---- opens ------------------------------------------------------------------------------------------------

    /// Send an open on its way; the answer wakes the opener.
    pub(crate) fn start_open(
        &mut self,
        from: Node,
        to: Node,
        protocol: Protocol,
    ) -> Result<u64, Vec<String>> {
        let (path, relay) = self.route(from, to)?;
        if let Some(stream) = self.begin_again(from, to, &protocol) {
            let open = self.fresh_id();
            let result = Some(Ok(stream));
            self.pending.insert(open, Pending { from, to, protocol, path, relay, result, waker: None });
            return Ok(open);
        }
        let trip = self.latency(from, to, relay);
        // What the handshakes cost: TCP and the secure channel; with a relay, the circuit and the punch as well.
        let dial = match (self.conn(from, to), path) {
            (Some(_), _) => Duration::ZERO,
            (None, Path::Direct) => trip * 4,
            (None, _) => trip * 6,
        };
        let open = self.fresh_id();
        let pending = Pending { from, to, protocol, path, relay, result: None, waker: None };
        self.pending.insert(open, pending);
        self.schedule(self.now + dial + trip, Event::OpenArrive(open));
        Ok(open)
    }

    pub(crate) fn open_arrives(&mut self, open: u64) {
        let Some(Pending { from, to, protocol, path, relay, .. }) = self.pending.get(&open) else { return };
        let (from, to, protocol, path, relay) = (*from, *to, protocol.clone(), *path, *relay);
        let cut = self.route_cut(from, to, relay) || self.route_cut(to, from, relay);
        if cut || self.peer(from).frozen || self.peer(to).frozen {
            self.parked.push(Event::OpenArrive(open));
            return;
        }
        let peer = self.peer_id(to);
        let refused =
            |attempt: &str| Err(OpenError::Unreachable { peer, attempts: vec![attempt.to_owned()] });
        let (result, what) = if self.peer(to).life != Life::Up {
            (refused("connection refused: nobody listens"), What::Refused)
        } else if self.strikes(self.peer(to).spec.faults.refuse_open) {
            (refused("connection refused: injected fault"), What::Refused)
        } else {
            self.connect(from, to, path, relay);
            self.answer_open(from, to, &protocol, relay)
        };
        self.note(from, to, Some(&protocol), 0, what);
        let back = self.now + self.latency(to, from, relay);
        self.schedule(back, Event::OpenAnswer(open, Box::new(result)));
    }

    fn answer_open(
        &mut self,
        from: Node,
        to: Node,
        protocol: &Protocol,
        relay: Option<Node>,
    ) -> (Result<u64, OpenError>, What) {
        let peer = self.peer_id(to);
        let unknown = OpenError::UnknownProtocol { peer, protocol: protocol.clone() };
        let accepts = self.peer(to).accepts.get(protocol).map(|(_, streams)| streams.clone());
        let Some(streams) = accepts else { return (Err(unknown), What::Unknown) };
        let Some(inner) = self.inner.upgrade() else { return (Err(OpenError::Closed), What::Refused) };
        match streams.try_reserve() {
            Err(TrySendError::Full(())) => {
                (Err(OpenError::Busy { peer, protocol: protocol.clone() }), What::Busy)
            }
            Err(TrySendError::Closed(())) => (Err(unknown), What::Unknown),
            Ok(permit) => {
                let stream = self.create_stream([from, to], protocol, relay);
                let opener = self.peer_id(from);
                permit.send(crate::stream::assemble(inner, stream, 1, opener, protocol.clone()));
                (Ok(stream), What::Opened)
            }
        }
    }

    pub(crate) fn create_stream(&mut self, ends: [Node; 2], protocol: &Protocol, relay: Option<Node>) -> u64 {
        let stream = self.fresh_id();
        let flows = [self.flow(ends[0], ends[1], relay), self.flow(ends[1], ends[0], relay)];
        let protocol = protocol.clone();
        let conn = self.stream_begins(ends);
        let state = StreamState { ends, conn, relay, protocol, flows, halves: 4, spoiled: false };
        self.streams.push(stream, state);
        for end in ends {
            self.peer_mut(end).streams.insert(stream);
            self.peer_mut(end).traffic.streams += 1;
        }
        stream
    }

    fn flow(&self, from: Node, to: Node, relay: Option<Node>) -> Flow {
        let hop = |pipe: usize, from: Node, to: Node| Hop {
            pipe,
            from,
            to,
            latency: if from == to { Duration::ZERO } else { self.latency(from, to, None) },
            queue: VecDeque::new(),
            queued: false,
            held: VecDeque::new(),
            not_before: None,
        };
        let up = |node: Node| node as usize * 2;
        let down = |node: Node| node as usize * 2 + 1;
        let mut hops = vec![hop(up(from), from, from)];
        match relay {
            None => hops.push(hop(down(to), from, to)),
            Some(relay) => hops.extend([
                hop(down(relay), from, relay),
                hop(up(relay), relay, relay),
                hop(down(to), relay, to),
            ]),
        }
        let rate = self.peer(from).spec.up_bytes_per_second.min(self.peer(to).spec.down_bytes_per_second);
        // Twice the bandwidth-delay product, as a well-tuned stack would have; a floor and a ceiling as real ones have.
        let product = 4.0 * rate * self.latency(from, to, relay).as_secs_f64();
        Flow::new(hops, product.clamp(WINDOW_BYTES.0, WINDOW_BYTES.1) as u64)
    }

    pub(crate) fn open_answered(&mut self, open: u64, result: Result<u64, OpenError>) {
        match self.pending.get_mut(&open) {
            Some(pending) if self.peers[pending.from as usize].frozen => {
                self.parked.push(Event::OpenAnswer(open, Box::new(result)));
            }
            Some(pending) => {
                pending.result = Some(result);
                if let Some(waker) = pending.waker.take() {
                    waker.wake();
                }
            }
            // The opener has given up; the other side learns it as a reset.
            None => {
                if let Ok(stream) = result {
                    self.drop_sender(stream, 0);
                    self.drop_receiver(stream, 0);
                }
            }
        }
    }

    /// The opener has its answer or has given up.
    pub(crate) fn forget_open(&mut self, open: u64) {
        let taken = self.pending.remove(&open);
        if let Some(Pending { result: Some(Ok(stream)), .. }) = taken {
            self.drop_sender(stream, 0);
            self.drop_receiver(stream, 0);
        }
    }

    // ---- ends of streams --------------------------------------------------------------------------------------

    /// The sending half at `end` is gone; without a finish, that resets the stream.
    pub(crate) fn drop_sender(&mut self, stream: u64, end: u8) {
        let Some(state) = self.streams.get(stream) else { return };
        let flow = &state.flows[usize::from(end)];
        if !flow.finish_sent && flow.send_error.is_none() {
            self.reset(stream, end, true);
        }
        self.drop_half(stream, end);
    }

    /// The receiving half at `end` is gone. If the other side has not finished, it must stop sending; what this side
    /// has already sent and finished still arrives.
    pub(crate) fn drop_receiver(&mut self, stream: u64, end: u8) {
        let Some(state) = self.streams.get(stream) else { return };
        let (own, other) = (&state.flows[usize::from(end)], &state.flows[usize::from(1 - end)]);
        if !other.finish_arrived && other.recv_error.is_none() {
            let whole = !own.finish_sent && own.send_error.is_none();
            self.reset(stream, end, whole);
        }
        self.drop_half(stream, end);
    }

    fn drop_half(&mut self, stream: u64, end: u8) {
        let Some(state) = self.streams.get_mut(stream) else { return };
        state.halves -= 1;
        if state.halves == 0 {
            let ends = state.ends;
            for end in ends {
                self.peer_mut(end).streams.remove(&stream);
            }
            if let Some(state) = self.streams.remove(stream) {
                let conn = state.conn;
                self.keep(*state, end);
                self.stream_ended(ends, conn);
            }
        }
    }

    /// `end` gives up the stream, or (not `whole`) only what it receives; the other side learns after the latency.
    pub(crate) fn reset(&mut self, stream: u64, end: u8, whole: bool) {
        let reason = DROPPED;
        let Some(state) = self.streams.get_mut(stream) else { return };
        let (own, other) = (usize::from(end), usize::from(1 - end));
        if whole {
            state.flows[own].break_sender("this side dropped it");
        }
        state.flows[other].break_receiver("this side dropped it");
        let at = self.now + state.flows[own].latency();
        let (from, to, protocol) = (state.ends[own], state.ends[other], state.protocol.clone());
        self.note(from, to, Some(&protocol), 0, What::Reset);
        self.schedule(at, Event::Reset { stream, end: 1 - end, whole, reason });
    }

    pub(crate) fn reset_arrives(&mut self, stream: u64, end: u8, whole: bool, reason: &'static str) {
        let Some(state) = self.streams.get(stream) else { return };
        let (own, other) = (usize::from(end), usize::from(1 - end));
        if reason != TIMED_OUT && self.route_cut(state.ends[other], state.ends[own], state.relay) {
            self.parked.push(Event::Reset { stream, end, whole, reason });
            return;
        }
        let Some(state) = self.streams.get_mut(stream) else { return };
        state.spoiled |= reason != DROPPED;
        state.flows[own].break_sender(reason);
        if whole {
            state.flows[other].break_receiver(reason);
        }
    }

    // ---- peers that fail --------------------------------------------------------------------------------------

    /// The peer's process ends. `silent`: its host vanishes with it, and nobody is told.
    pub(crate) fn stop(&mut self, node: Node, silent: bool) {
        if self.peer(node).life != Life::Up {
            return;
        }
        let peer = self.peer_mut(node);
        peer.life = if silent { Life::Vanished } else { Life::Down };
        peer.frozen = false;
        peer.accepts.clear();
        let streams: Vec<u64> = peer.streams.iter().copied().collect();
        self.note(node, node, None, 0, if silent { What::Vanished } else { What::Crashed });
        for stream in streams {
            self.stop_stream(stream, node, silent);
        }
        for pending in self.pending.values_mut().filter(|pending| pending.from == node) {
            pending.result.get_or_insert(Err(OpenError::Closed));
            if let Some(waker) = pending.waker.take() {
                waker.wake();
            }
        }
        if silent {
            self.topology_changed();
            return;
        }
        let neighbours: Vec<Node> = self.peer(node).neighbours.iter().copied().collect();
        for other in neighbours {
            self.disconnect(node, other);
        }
        self.break_relayed(node);
    }

    fn stop_stream(&mut self, stream: u64, node: Node, silent: bool) {
        let Some(state) = self.streams.get_mut(stream) else { return };
        let own = usize::from(state.ends[1] == node);
        state.spoiled = true;
        state.flows[own].break_sender("this side is closed");
        state.flows[1 - own].break_receiver("this side is closed");
        if !silent {
            let at = self.now + state.flows[own].latency();
            let (end, reason) = (1 - own as u8, "connection reset by peer");
            self.schedule(at, Event::Reset { stream, end, whole: true, reason });
        }
    }

    /// Connections through a relay end with it.
    fn break_relayed(&mut self, relay: Node) {
        let through = |conn: &Conn| conn.relay == Some(relay);
        let lost: Vec<(Node, Node)> =
            self.conns.iter().filter(|(_, conn)| through(conn)).map(|(&key, _)| key).collect();
        for (a, b) in lost {
            self.break_conn(a, b, "the relay is gone");
        }
    }

    /// The peer runs again under the same identity; whatever belonged to its former life is reset.
    pub(crate) fn restart(&mut self, node: Node) {
        self.stop(node, false);
        let peer = self.peer_mut(node);
        peer.life = Life::Up;
        peer.incarnation += 1;
        self.note(node, node, None, 0, What::Restarted);
        let neighbours: Vec<Node> = self.peer(node).neighbours.iter().copied().collect();
        for other in neighbours {
            self.break_conn(node, other, "connection reset by peer");
        }
        self.break_relayed(node);
        self.topology_changed();
    }

    pub(crate) fn set_frozen(&mut self, node: Node, frozen: bool) {
        self.peer_mut(node).frozen = frozen;
        self.note(node, node, None, 0, if frozen { What::Frozen } else { What::Thawed });
        let streams: Vec<u64> = self.peer(node).streams.iter().copied().collect();
        for stream in streams {
            let Some(state) = self.streams.get_mut(stream) else { continue };
            for flow in &mut state.flows {
                flow.wake_sender();
                flow.wake_receiver();
            }
        }
        self.topology_changed();
    }

    /// Something was cut or healed: start or stop the clocks of silent connections, let go what may move.
    pub(crate) fn topology_changed(&mut self) {
        let keys: Vec<(Node, Node)> = self.conns.keys().copied().collect();
        for (a, b) in keys {
            let relay = self.conns.get(&(a, b)).and_then(|conn| conn.relay);
            let silent = self.route_cut(a, b, relay)
                || self.route_cut(b, a, relay)
                || [Some(a), Some(b), relay].iter().flatten().any(|&node| self.peer(node).frozen);
            let now = self.now;
            let Some(conn) = self.conns.get_mut(&(a, b)) else { continue };
            match (silent, conn.silent_since) {
                (true, None) => {
                    conn.silent_since = Some(now);
                    self.schedule(now + SILENCE_MAX, Event::Silence((a, b), now));
                }
                (false, Some(_)) => conn.silent_since = None,
                _ => {}
            }
        }
        for event in std::mem::take(&mut self.parked) {
            self.schedule(self.now, event);
        }
        self.release_held();
    }

    pub(crate) fn silence(&mut self, key: (Node, Node), since: Instant) {
        if self.conns.get(&key).is_some_and(|conn| conn.silent_since == Some(since)) {
            self.break_conn(key.0, key.1, TIMED_OUT);
        }
    }
}

/// The one reason that needs no message to get through.
const TIMED_OUT: &str = "connection timed out";
/// The one reason that leaves the connection as it is.
const DROPPED: &str = "the other side dropped it";
