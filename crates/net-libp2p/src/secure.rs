//! The security upgrade of a TCP or relayed connection: TLS or Noise, whichever the configuration allows.

use crate::config::Security;
use crate::read_ahead::ReadAhead;
use crate::shared::lock;
use crate::tls::{self, Tls};
use futures::future::{BoxFuture, Either};
use futures::{AsyncRead, AsyncWrite, FutureExt};
use futures_rustls::TlsStream;
use libp2p::core::UpgradeInfo;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use libp2p::identity::Keypair;
use libp2p::{PeerId, noise};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const NOISE: &str = "/noise";
/// Handshakes remembered until their muxer has asked.
const HANDSHAKES_MAX: usize = 1024;

/// TLS first: with AES it costs half the processor time of Noise, whose cipher is fixed.
#[derive(Clone)]
pub(crate) struct Secure {
    allowed: Security,
    tls: Tls,
    noise: noise::Config,
    handshakes: Handshakes,
}

/// What the latest handshake with each peer took, a round trip and the cryptography: between the encryption and the muxer,
/// which wants to know, libp2p passes nothing on but the peer's id.
#[derive(Clone, Default)]
pub(crate) struct Handshakes(Arc<Mutex<BTreeMap<PeerId, Duration>>>);

impl Handshakes {
    fn note(&self, peer: PeerId, start: Instant) {
        let mut took = lock(&self.0);
        if took.len() >= HANDSHAKES_MAX {
            // Of connections that failed in between.
            took.clear();
        }
        took.insert(peer, start.elapsed());
    }

    /// Of a handshake that was forgotten nothing is known: it may have been a long one.
    pub(crate) fn take(&self, peer: &PeerId) -> Duration {
        lock(&self.0).remove(peer).unwrap_or(Duration::MAX)
    }
}

/// An encrypted byte stream.
pub(crate) type Encrypted<C> = Either<TlsStream<ReadAhead<C>>, noise::Output<ReadAhead<C>>>;

impl Secure {
    pub(crate) fn new(keypair: &Keypair, allowed: Security) -> io::Result<Self> {
        let noise = noise::Config::new(keypair).map_err(io::Error::other)?;
        Ok(Self { allowed, tls: Tls::new(keypair)?, noise, handshakes: Handshakes::default() })
    }

    pub(crate) fn handshakes(&self) -> Handshakes {
        self.handshakes.clone()
    }
}

impl UpgradeInfo for Secure {
    type Info = &'static str;
    type InfoIter = std::vec::IntoIter<&'static str>;

    fn protocol_info(&self) -> Self::InfoIter {
        let names = match self.allowed {
            Security::TlsOrNoise => vec![tls::NAME, NOISE],
            Security::TlsOnly => vec![tls::NAME],
            Security::NoiseOnly => vec![NOISE],
        };
        names.into_iter()
    }
}

impl<C> InboundConnectionUpgrade<C> for Secure
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = (PeerId, Encrypted<C>);
    type Error = io::Error;
    type Future = BoxFuture<'static, Result<Self::Output, io::Error>>;

    fn upgrade_inbound(self, socket: C, name: &'static str) -> Self::Future {
        let (socket, start) = (ReadAhead::new(socket), Instant::now());
        async move {
            let (peer, stream) = if name == tls::NAME {
                let (peer, stream) = self.tls.accept(socket).await?;
                (peer, Either::Left(stream))
            } else {
                let upgraded = self.noise.upgrade_inbound(socket, name).await;
                let (peer, stream) = upgraded.map_err(io::Error::other)?;
                (peer, Either::Right(stream))
            };
            self.handshakes.note(peer, start);
            Ok((peer, stream))
        }
        .boxed()
    }
}

impl<C> OutboundConnectionUpgrade<C> for Secure
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = (PeerId, Encrypted<C>);
    type Error = io::Error;
    type Future = BoxFuture<'static, Result<Self::Output, io::Error>>;

    fn upgrade_outbound(self, socket: C, name: &'static str) -> Self::Future {
        let (socket, start) = (ReadAhead::new(socket), Instant::now());
        async move {
            let (peer, stream) = if name == tls::NAME {
                let (peer, stream) = self.tls.connect(socket).await?;
                (peer, Either::Left(stream))
            } else {
                let upgraded = self.noise.upgrade_outbound(socket, name).await;
                let (peer, stream) = upgraded.map_err(io::Error::other)?;
                (peer, Either::Right(stream))
            };
            self.handshakes.note(peer, start);
            Ok((peer, stream))
        }
        .boxed()
    }
}
