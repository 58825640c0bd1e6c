//! The trait that a network implements: open a stream to a peer, accept streams from peers.

use crate::{Identity, PeerId, Stream};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use tokio::sync::mpsc;

/// The name of a protocol, such as `/potluck/dht/1`. Starts with a slash; compared byte by byte.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(Arc<str>);

impl Protocol {
    /// A protocol name.
    ///
    /// # Panics
    /// If the name does not start with `/` or is longer than 140 bytes: names are chosen by us, never by peers.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        let name = name.into();
        assert!(
            name.starts_with('/') && name.len() <= 140,
            "protocol name {name:?} needs '/' and <= 140 bytes"
        );
        Self(name)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why no stream came about. The caller counts it as a fault of the peer, or tries later.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No connection: every address failed, one line each with the stage that failed.
    #[error("peer {} is unreachable: {}", peer.short(), attempts.join("; "))]
    Unreachable {
        /// Who.
        peer: PeerId,
        /// One line per address that was tried.
        attempts: Vec<String>,
    },
    /// Connected, but the peer does not speak this protocol (another version, or another run).
    #[error("peer {} does not speak {protocol}", peer.short())]
    UnknownProtocol {
        /// Who.
        peer: PeerId,
        /// What was asked for.
        protocol: Protocol,
    },
    /// The peer has too many streams waiting to be accepted. Try again later.
    #[error("peer {} is busy: its backlog for {protocol} is full", peer.short())]
    Busy {
        /// Who.
        peer: PeerId,
        /// What was asked for.
        protocol: Protocol,
    },
    /// This side has opened as many streams to the peer as it may. Close some first. Nobody is to blame.
    #[error("{max} streams to peer {} are open already", peer.short())]
    TooMany {
        /// To whom.
        peer: PeerId,
        /// The most that may be open at a time.
        max: usize,
    },
    /// The peer was reached but did not agree in time.
    #[error("peer {} did not answer in time", peer.short())]
    TimedOut {
        /// Who.
        peer: PeerId,
    },
    /// This side is shutting down.
    #[error("the transport is closed")]
    Closed,
}

/// Why a protocol cannot be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// Somebody in this process accepts this protocol already: one owner per protocol.
    #[error("{protocol} already has an owner in this process")]
    Taken {
        /// Which one.
        protocol: Protocol,
    },
    /// This side is shutting down.
    #[error("the transport is closed")]
    Closed,
}

/// Streams that peers opened under one protocol. The queue is bounded; when it is full the opener gets
/// [`OpenError::Busy`], see [`Transport::open`]. Dropping it un-registers the protocol.
pub struct Incoming {
    streams: mpsc::Receiver<Stream>,
    _registration: Box<dyn Send + Sync>,
}

impl Incoming {
    /// For transports: the receiving end of the bounded queue, and a guard that un-registers the protocol on drop.
    pub fn new(streams: mpsc::Receiver<Stream>, registration: impl Send + Sync + 'static) -> Self {
        Self { streams, _registration: Box::new(registration) }
    }

    /// The next stream, or `None` when the transport has closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Incoming")
    }
}

/// How we are connected to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Path {
    /// One side dialed the other.
    Direct,
    /// Direct after hole punching through NATs.
    HolePunched,
    /// Through a relay.
    Relayed,
}

/// Whether others can dial this peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reachability {
    /// Not known yet.
    #[default]
    Unknown,
    /// Others can dial us.
    Public,
    /// We can only dial out; others reach us through a relay, a hole punch, or connections that we opened.
    Private,
}

/// A network. All methods may be called from any task; none blocks.
pub trait Transport: Send + Sync + 'static {
    /// Who we are.
    fn local_peer(&self) -> PeerId {
        self.identity().peer_id()
    }

    /// Our key pair, to sign records and invites with.
    fn identity(&self) -> &Identity;

    /// Open a stream: dials if needed (own deadline of at most 15 s, so that it ends even if the caller has none).
    /// Dropping the future gives up.
    ///
    /// A new stream resolves once the remote agreed to speak `protocol`. Where an ended one of the same protocol is used
    /// again, that costs a round trip too many: it resolves at once, and a remote that is busy or no longer speaks `protocol`
    /// says so as [`StreamError::Refused`](crate::StreamError::Refused), which the first call gets that learns of it. Either
    /// way nothing of a refused stream was read, so that it can be opened again.
    fn open(&self, peer: PeerId, protocol: Protocol) -> BoxFuture<'_, Result<Stream, OpenError>>;

    /// Accept streams under `protocol`, at most `backlog` of them waiting. One owner per protocol.
    ///
    /// # Errors
    /// [`AcceptError::Taken`] if the protocol has an owner already.
    fn accept(&self, protocol: Protocol, backlog: usize) -> Result<Incoming, AcceptError>;

    /// Addresses (multiaddr text) under which `peer` may be reached, as told by others. Bounded; bad ones are ignored.
    fn add_addresses(&self, peer: PeerId, addresses: &[String]);

    /// Addresses under which others may reach us, as multiaddr text with the `/p2p/` suffix, best first.
    fn addresses(&self) -> Vec<String>;

    /// How we are connected to `peer`, or `None` if we are not.
    fn path(&self, peer: PeerId) -> Option<Path>;

    /// Peers that we hold a connection to.
    fn connected(&self) -> Vec<PeerId>;

    /// Whether others can dial us.
    fn reachability(&self) -> Reachability;

    /// Close every connection and refuse everything from now on. Idempotent; resolves when the sockets are closed.
    fn close(&self) -> BoxFuture<'_, ()>;
}
