//! The security upgrade of a TCP or relayed connection: TLS or Noise, whichever the configuration allows.

use crate::config::Security;
use crate::read_ahead::ReadAhead;
use crate::tls::{self, Tls};
use futures::future::{BoxFuture, Either};
use futures::{AsyncRead, AsyncWrite, FutureExt};
use futures_rustls::TlsStream;
use libp2p::core::UpgradeInfo;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use libp2p::identity::Keypair;
use libp2p::{PeerId, noise};
use std::io;

const NOISE: &str = "/noise";

/// TLS first: with AES it costs half the processor time of Noise, whose cipher is fixed.
#[derive(Clone)]
pub(crate) struct Secure {
    allowed: Security,
    tls: Tls,
    noise: noise::Config,
}

/// An encrypted byte stream.
pub(crate) type Encrypted<C> = Either<TlsStream<ReadAhead<C>>, noise::Output<ReadAhead<C>>>;

impl Secure {
    pub(crate) fn new(keypair: &Keypair, allowed: Security) -> io::Result<Self> {
        let noise = noise::Config::new(keypair).map_err(io::Error::other)?;
        Ok(Self { allowed, tls: Tls::new(keypair)?, noise })
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
        let socket = ReadAhead::new(socket);
        async move {
            if name == tls::NAME {
                let (peer, stream) = self.tls.accept(socket).await?;
                return Ok((peer, Either::Left(stream)));
            }
            let (peer, stream) = self.noise.upgrade_inbound(socket, name).await.map_err(io::Error::other)?;
            Ok((peer, Either::Right(stream)))
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
        let socket = ReadAhead::new(socket);
        async move {
            if name == tls::NAME {
                let (peer, stream) = self.tls.connect(socket).await?;
                return Ok((peer, Either::Left(stream)));
            }
            let (peer, stream) = self.noise.upgrade_outbound(socket, name).await.map_err(io::Error::other)?;
            Ok((peer, Either::Right(stream)))
        }
        .boxed()
    }
}
