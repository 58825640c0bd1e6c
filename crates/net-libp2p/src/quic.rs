//! QUIC from two ports: the one that listens, and another one for dials that must not come from it.
//!
//! Whoever is asked whether others can reach a peer dials it from a port that its router has never seen (AutoNAT). For each
//! such dial libp2p's QUIC takes a socket with three megabytes of buffers, so that a peer's memory grew to the most dials
//! that had ever coincided. One port is enough: a router that lets its packets in would let in anybody's.

use libp2p::core::Endpoint;
use libp2p::core::transport::{DialOpts, ListenerId, PortUse, TransportError, TransportEvent};
use libp2p::{Multiaddr, Transport, quic};
use std::pin::Pin;
use std::task::{Context, Poll};

type Inner = quic::tokio::Transport;

/// Inbound streams of a connection that only shows that it can be made. QUIC reserves room for each of them when it dials.
const PROBE_STREAMS_MAX: u32 = 16;

/// See the module.
pub(crate) struct Quic {
    listening: Inner,
    probing: Inner,
}

impl Quic {
    pub(crate) fn new(config: quic::Config) -> Self {
        let mut probing = config.clone();
        probing.max_concurrent_stream_limit = PROBE_STREAMS_MAX;
        Self { listening: Inner::new(config), probing: Inner::new(probing) }
    }
}

impl Transport for Quic {
    type Output = <Inner as Transport>::Output;
    type Error = <Inner as Transport>::Error;
    type ListenerUpgrade = <Inner as Transport>::ListenerUpgrade;
    type Dial = <Inner as Transport>::Dial;

    fn listen_on(&mut self, id: ListenerId, address: Multiaddr) -> Result<(), TransportError<Self::Error>> {
        self.listening.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.listening.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        opts: DialOpts,
    ) -> Result<Self::Dial, TransportError<Self::Error>> {
        match (opts.role, opts.port_use) {
            // It listens nowhere, so what it uses again is the port of its own earlier dials.
            (Endpoint::Dialer, PortUse::New) => {
                self.probing.dial(address, DialOpts { port_use: PortUse::Reuse, ..opts })
            }
            _ => self.listening.dial(address, opts),
        }
    }

    fn poll(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Self::Error>> {
        Pin::new(&mut self.get_mut().listening).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use libp2p::core::transport::Boxed;
    use libp2p::identity::Keypair;

    fn listening() -> Boxed<<Inner as Transport>::Output> {
        let mut quic = Quic::new(quic::Config::new(&Keypair::generate_ed25519()));
        quic.listen_on(ListenerId::next(), "/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap()).unwrap();
        quic.boxed()
    }

    async fn address(transport: &mut Boxed<<Inner as Transport>::Output>) -> Multiaddr {
        loop {
            if let Some(TransportEvent::NewAddress { listen_addr, .. }) = transport.next().await {
                return listen_addr;
            }
        }
    }

    /// As which address `to` sees a dial of `from`.
    async fn seen_as(
        from: &mut Boxed<<Inner as Transport>::Output>,
        to: &mut Boxed<<Inner as Transport>::Output>,
        at: &Multiaddr,
        port_use: PortUse,
    ) -> Multiaddr {
        let dial = from.dial(at.clone(), DialOpts { role: Endpoint::Dialer, port_use }).unwrap();
        let accepted = async {
            loop {
                if let Some(TransportEvent::Incoming { upgrade, send_back_addr, .. }) = to.next().await {
                    break (upgrade.await.unwrap(), send_back_addr);
                }
            }
        };
        let (dialed, (_accepted, seen)) = tokio::join!(dial, accepted);
        dialed.unwrap();
        seen
    }

    #[tokio::test]
    async fn whatever_must_not_come_from_the_listening_port_comes_from_one_other_port() {
        let (mut one, mut other) = (listening(), listening());
        let (own, at) = (address(&mut one).await, address(&mut other).await);
        let usual = seen_as(&mut one, &mut other, &at, PortUse::Reuse).await;
        let probe = seen_as(&mut one, &mut other, &at, PortUse::New).await;
        assert_eq!(usual, own);
        assert_ne!(probe, own);
        for _ in 0..3 {
            assert_eq!(seen_as(&mut one, &mut other, &at, PortUse::New).await, probe);
        }
    }
}
