//! One peer's door to the simulated network.

use crate::control::OPEN_TIMEOUT;
use crate::rule::OpenInfo;
use crate::sim::Inner;
use crate::world::{Life, Node, World};
use crate::{NatClass, SimNet};
use futures::future::{BoxFuture, poll_fn};
use potluck_net::{
    AcceptError, Env, Identity, Incoming, OpenError, Path, PeerId, Protocol, Reachability, Stream, Transport,
};
use std::sync::{Arc, Weak};
use std::task::Poll;
use tokio::sync::mpsc;

/// A [`Transport`] in memory, made by [`SimNet::add_peer`]. Every peer of the network can be dialed without knowing its
/// addresses, as if peer routing always worked.
pub struct SimTransport {
    inner: Arc<Inner>,
    node: Node,
    incarnation: u64,
    identity: Identity,
    env: Env,
}

impl SimTransport {
    pub(crate) fn new(inner: Arc<Inner>, node: Node) -> Self {
        let world = inner.lock();
        let peer = world.peer(node);
        let (incarnation, identity, env) = (peer.incarnation, peer.identity.clone(), peer.env.clone());
        drop(world);
        Self { inner, node, incarnation, identity, env }
    }

    /// The peer's own clock and randomness; the same as [`SimNet::env`].
    pub fn env(&self) -> Env {
        self.env.clone()
    }

    /// The network that this peer is part of.
    pub fn net(&self) -> SimNet {
        SimNet { inner: self.inner.clone() }
    }

    fn is_open(&self, world: &World) -> bool {
        let peer = world.peer(self.node);
        peer.life == Life::Up && peer.incarnation == self.incarnation
    }

    fn begin(&self, peer: PeerId, protocol: &Protocol) -> Result<u64, OpenError> {
        let unreachable = |attempts| OpenError::Unreachable { peer, attempts };
        let world = self.inner.lock();
        if !self.is_open(&world) {
            return Err(OpenError::Closed);
        }
        let Some(&to) = world.by_id.get(&peer) else {
            return Err(unreachable(vec!["no address is known for it".to_owned()]));
        };
        let info = OpenInfo {
            at: world.elapsed(),
            from: self.identity.peer_id(),
            to: peer,
            protocol: protocol.clone(),
        };
        drop(world);
        if self.inner.refuses(&info) {
            return Err(unreachable(vec!["connection refused: injected fault".to_owned()]));
        }
        self.inner.lock().start_open(self.node, to, protocol.clone()).map_err(unreachable)
    }

    async fn open_stream(&self, peer: PeerId, protocol: Protocol) -> Result<Stream, OpenError> {
        let open = OpenGuard { inner: &self.inner, open: self.begin(peer, &protocol)? };
        let answer = poll_fn(|cx| {
            let mut world = self.inner.lock();
            let Some(pending) = world.pending.get_mut(&open.open) else {
                return Poll::Ready(Err(OpenError::Closed));
            };
            let Some(result) = pending.result.take() else {
                pending.waker = Some(cx.waker().clone());
                return Poll::Pending;
            };
            Poll::Ready(result)
        });
        let Ok(answer) = tokio::time::timeout(OPEN_TIMEOUT, answer).await else {
            let attempts = vec![format!("no answer within {} s", OPEN_TIMEOUT.as_secs())];
            return Err(match self.path(peer) {
                Some(_) => OpenError::TimedOut { peer },
                None => OpenError::Unreachable { peer, attempts },
            });
        };
        let stream = answer?;
        Ok(crate::stream::assemble(self.inner.clone(), stream, 0, peer, protocol))
    }
}

/// Takes an open back when its future is dropped.
struct OpenGuard<'a> {
    inner: &'a Inner,
    open: u64,
}

impl Drop for OpenGuard<'_> {
    fn drop(&mut self) {
        self.inner.lock().forget_open(self.open);
    }
}

/// Un-registers a protocol when its [`Incoming`] is dropped.
struct Registration {
    inner: Weak<Inner>,
    node: Node,
    protocol: Protocol,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let mut world = inner.lock();
        let accepts = &mut world.peer_mut(self.node).accepts;
        if accepts.get(&self.protocol).is_some_and(|(id, _)| *id == self.id) {
            accepts.remove(&self.protocol);
        }
    }
}

impl Transport for SimTransport {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, peer: PeerId, protocol: Protocol) -> BoxFuture<'_, Result<Stream, OpenError>> {
        Box::pin(self.open_stream(peer, protocol))
    }

    fn accept(&self, protocol: Protocol, backlog: usize) -> Result<Incoming, AcceptError> {
        let mut world = self.inner.lock();
        if !self.is_open(&world) {
            return Err(AcceptError::Closed);
        }
        let id = world.fresh_id();
        let accepts = &mut world.peer_mut(self.node).accepts;
        if accepts.contains_key(&protocol) {
            return Err(AcceptError::Taken { protocol });
        }
        let (sender, receiver) = mpsc::channel(backlog.max(1));
        accepts.insert(protocol.clone(), (id, sender));
        let inner = Arc::downgrade(&self.inner);
        Ok(Incoming::new(receiver, Registration { inner, node: self.node, protocol, id }))
    }

    /// Nothing to remember: every peer of the network is known.
    fn add_addresses(&self, _peer: PeerId, _addresses: &[String]) {}

    fn addresses(&self) -> Vec<String> {
        let [_, a, b, c] = self.node.to_be_bytes();
        vec![format!("/ip4/10.{a}.{b}.{c}/tcp/4001/p2p/{}", self.identity.peer_id())]
    }

    fn path(&self, peer: PeerId) -> Option<Path> {
        let world = self.inner.lock();
        let other = *world.by_id.get(&peer)?;
        world.conn(self.node, other).filter(|_| self.is_open(&world)).map(|conn| conn.path)
    }

    fn connected(&self) -> Vec<PeerId> {
        let world = self.inner.lock();
        if !self.is_open(&world) {
            return Vec::new();
        }
        world.peer(self.node).neighbours.iter().map(|&node| world.peer_id(node)).collect()
    }

    fn reachability(&self) -> Reachability {
        match self.inner.lock().peer(self.node).spec.nat {
            NatClass::Open | NatClass::FullCone => Reachability::Public,
            _ => Reachability::Private,
        }
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let mut world = self.inner.lock();
            if self.is_open(&world) {
                world.stop(self.node, false);
            }
        })
    }
}

impl std::fmt::Debug for SimTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SimTransport({:?})", self.identity.peer_id())
    }
}
