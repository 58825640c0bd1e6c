//! Streams of the application on libp2p connections: many at once in both directions, refused by name, never lost.
//!
//! After the protocol was negotiated, the accepting side answers with one byte: taken, or busy. So an opener learns at
//! once when the other side's backlog is full, and a stream that was opened is in the hands of its acceptor.
//! Open requests go straight to the connection's task; the swarm's own task is not on the way.

use crate::convert;
use crate::kept::{Lease, With};
use crate::shared::{Link, Shared, lock};
use crate::usage::Usage;
use futures::future::BoxFuture;
use futures::{AsyncReadExt, AsyncWriteExt, FutureExt};
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, OutboundUpgrade};
use libp2p::core::{Endpoint, Multiaddr, UpgradeInfo};
use libp2p::swarm::handler::{ConnectionEvent, FullyNegotiatedOutbound, StreamUpgradeError};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
    SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use potluck_net::{Path, PeerId, Protocol};
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// The acceptor's answer: the stream is in its backlog.
const TAKEN: u8 = 1;
/// The acceptor's answer: its backlog is full.
const BUSY: u8 = 2;
/// Open requests that may wait for one connection's task.
const OPENS_WAITING_MAX: usize = 64;

/// Why a connection gave no stream.
#[derive(Debug)]
pub(crate) enum OpenFailure {
    UnknownProtocol,
    Busy,
    TimedOut,
    Broken(String),
}

/// One wish for a stream. Dropping the receiver of `reply` withdraws it.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    pub(crate) protocol: Protocol,
    pub(crate) reply: oneshot::Sender<Result<libp2p::Stream, OpenFailure>>,
}

/// A protocol name as the negotiation wants it.
#[derive(Clone, Debug)]
pub(crate) struct Name(Protocol);

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        self.0.as_str()
    }
}

/// The names on offer. Shared, because a connection asks for them at every wake-up.
pub(crate) struct Names {
    names: Arc<[Protocol]>,
    next: usize,
}

impl Iterator for Names {
    type Item = Name;

    fn next(&mut self) -> Option<Name> {
        let name = self.names.get(self.next)?.clone();
        self.next += 1;
        Some(Name(name))
    }
}

/// Answers inbound streams.
pub(crate) struct Accept {
    shared: Arc<Shared>,
    peer: PeerId,
    path: Path,
    usage: Arc<Usage>,
    names: Arc<[Protocol]>,
    probe: bool,
}

impl UpgradeInfo for Accept {
    type Info = Name;
    type InfoIter = Names;

    fn protocol_info(&self) -> Names {
        Names { names: self.names.clone(), next: 0 }
    }
}

impl InboundUpgrade<libp2p::Stream> for Accept {
    type Output = ();
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<()>>;

    fn upgrade_inbound(self, mut stream: libp2p::Stream, Name(protocol): Name) -> Self::Future {
        async move {
            stream.ignore_for_keep_alive();
            if self.probe {
                // Without an answer, the opener takes another connection.
                return Err(io::Error::other("this connection is a probe and closes"));
            }
            let Ok(place) = self.shared.registry.reserve(&protocol) else {
                // Between its negotiation and here the protocol can only have lost its owner: whoever tries again learns that.
                stream.write_all(&[BUSY]).await?;
                return stream.close().await;
            };
            stream.write_all(&[TAKEN]).await?;
            stream.flush().await?;
            let Accept { shared, peer, path, usage, .. } = self;
            let meter = shared.traffic.meter(peer, path, None);
            let with = With { peer, protocol, path, opened_on: None, usage };
            place.send(Lease::new(shared, meter, with).stream(stream));
            Ok(())
        }
        .boxed()
    }
}

/// Opens one outbound stream and waits for the acceptor's answer.
pub(crate) struct Open(Name);

impl UpgradeInfo for Open {
    type Info = Name;
    type InfoIter = std::iter::Once<Name>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(self.0.clone())
    }
}

impl OutboundUpgrade<libp2p::Stream> for Open {
    type Output = libp2p::Stream;
    type Error = OpenFailure;
    type Future = BoxFuture<'static, Result<libp2p::Stream, OpenFailure>>;

    fn upgrade_outbound(self, mut stream: libp2p::Stream, _: Name) -> Self::Future {
        async move {
            let mut answer = [0];
            stream.read_exact(&mut answer).await.map_err(|error| OpenFailure::Broken(error.to_string()))?;
            match answer {
                [TAKEN] => {
                    // Whether the connection is needed follows from what runs on the stream, not from that it is kept.
                    stream.ignore_for_keep_alive();
                    Ok(stream)
                }
                [BUSY] => Err(OpenFailure::Busy),
                [other] => Err(OpenFailure::Broken(format!("answered {other} instead of 1 or 2"))),
            }
        }
        .boxed()
    }
}

/// One connection's part.
pub(crate) struct Handler {
    shared: Arc<Shared>,
    peer: PeerId,
    path: Path,
    usage: Arc<Usage>,
    opens: mpsc::Receiver<OpenRequest>,
    /// See [`is_probe`].
    probe: bool,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Accept;
    type OutboundProtocol = Open;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = OpenRequest;

    fn listen_protocol(&self) -> SubstreamProtocol<Accept> {
        let accept = Accept {
            shared: self.shared.clone(),
            peer: self.peer,
            path: self.path,
            usage: self.usage.clone(),
            names: self.shared.registry.names(),
            probe: self.probe,
        };
        SubstreamProtocol::new(accept, ())
    }

    fn connection_keep_alive(&self) -> bool {
        self.usage.keeps_alive()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<Open, OpenRequest, Infallible>> {
        self.usage.look(cx);
        while let Poll::Ready(Some(request)) = self.opens.poll_recv(cx) {
            if !request.reply.is_closed() {
                let open = Open(Name(request.protocol.clone()));
                let protocol = SubstreamProtocol::new(open, request);
                return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
            }
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Infallible) {
        match event {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<'_, Accept, Open, (), OpenRequest>) {
        match event {
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info }) => {
                // An opener that gave up has dropped its end: the stream is then dropped here, which resets it.
                let _gave_up = info.reply.send(Ok(protocol));
            }
            ConnectionEvent::DialUpgradeError(failed) => {
                let failure = match failed.error {
                    StreamUpgradeError::NegotiationFailed => OpenFailure::UnknownProtocol,
                    StreamUpgradeError::Timeout => OpenFailure::TimedOut,
                    StreamUpgradeError::Apply(failure) => failure,
                    StreamUpgradeError::Io(error) => OpenFailure::Broken(error.to_string()),
                };
                let _gave_up = failed.info.reply.send(Err(failure));
            }
            _ => {}
        }
    }
}

/// Whether a connection that we have dialed only tells a peer whether it can be reached (AutoNAT): nothing else dials from a
/// new port. It closes as soon as it stands: it would only be a second connection of the same pair, for nothing.
pub(crate) fn is_probe(port: PortUse) -> bool {
    port == PortUse::New
}

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
#[error("peer {0} has a key that is neither Ed25519 nor RSA")]
struct UnknownKey(libp2p::PeerId);

/// Keeps the table of connections in [`Shared`] and makes their handlers.
///
/// A connection is in the table before its task runs: whoever takes a stream finds the peer there. So this must be the last
/// behaviour of the swarm, as one that came after it could still refuse the connection.
pub(crate) struct Behaviour {
    shared: Arc<Shared>,
}

impl Behaviour {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn handler(
        &self,
        id: ConnectionId,
        peer: libp2p::PeerId,
        (relayed, quic): (bool, bool),
        probe: bool,
    ) -> Result<Handler, ConnectionDenied> {
        let Some(peer) = convert::from_libp2p(&peer) else {
            return Err(ConnectionDenied::new(UnknownKey(peer)));
        };
        let (sender, opens) = mpsc::channel(OPENS_WAITING_MAX);
        let usage = Usage::new();
        let path = if relayed { Path::Relayed } else { Path::Direct };
        if probe {
            usage.give_up();
        } else {
            let behind_nat = lock(&self.shared.own).is_behind_nat();
            let heard = Instant::now();
            let link = Link { id, path, quic, heard, opens: sender, usage: usage.clone() };
            self.shared.peers.add(peer, link, behind_nat);
        }
        Ok(Handler { shared: self.shared.clone(), peer, path, usage, opens, probe })
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: libp2p::PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handler(id, peer, (convert::is_relayed(local), convert::is_quic(remote)), false)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: libp2p::PeerId,
        address: &Multiaddr,
        _role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handler(id, peer, (convert::is_relayed(address), convert::is_quic(address)), is_probe(port))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ConnectionClosed(closed) = event
            && let Some(peer) = convert::from_libp2p(&closed.peer_id)
        {
            self.shared.peers.remove(peer, closed.connection_id);
        }
    }

    fn on_connection_handler_event(
        &mut self,
        _peer: libp2p::PeerId,
        _id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;
