//! TLS 1.3 as libp2p specifies it, with AES-GCM first where the processor has AES instructions.
//!
//! `libp2p-tls` offers ChaCha20 first and has no knob for it; on machines with AES that doubles the processor time per
//! byte. The handshake, the certificate and what is checked of it are those of the specification
//! (<https://github.com/libp2p/specs/blob/master/tls/tls.md>) and of `libp2p-tls`, whose certificate code is used here;
//! any libp2p peer can talk to this.

use futures::{AsyncRead, AsyncWrite};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::PeerId;
use libp2p::identity::Keypair;
use libp2p::tls::certificate;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// The protocol name of libp2p's TLS.
pub(crate) const NAME: &str = "/tls/1.0.0";
const ALPN: &[u8] = b"libp2p";

/// Both roles' configuration, made once per process.
#[derive(Clone)]
pub(crate) struct Tls {
    client: TlsConnector,
    server: TlsAcceptor,
}

impl Tls {
    /// A configuration that proves `keypair` to the other side.
    pub(crate) fn new(keypair: &Keypair) -> io::Result<Self> {
        Self::with(keypair, has_aes())
    }

    /// As on a machine with or without AES.
    fn with(keypair: &Keypair, aes: bool) -> io::Result<Self> {
        let (certificate, key) = certificate::generate(keypair).map_err(io::Error::other)?;
        let provider = Arc::new(provider(aes));
        // Not the builders' own way: they refuse the critical extension that libp2p puts into its certificates.
        let signing = provider.key_provider.load_private_key(key).map_err(io::Error::other)?;
        let own = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], signing)));
        let versions = &[&rustls::version::TLS13];
        let verifier = Arc::new(Verifier);

        let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(own.clone());
        client.alpn_protocols = vec![ALPN.to_vec()];
        // The specification forbids to name the server.
        client.enable_sni = false;
        // Every connection proves its identities anew, so what would be kept of the last 256 sessions serves nobody.
        client.resumption = Resumption::disabled();

        let mut server = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(io::Error::other)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(own);
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        // Each side lists what is cheap for it; whoever lacks AES decides, because it would pay the most.
        server.ignore_client_order = !aes;
        Ok(Self { client: Arc::new(client).into(), server: Arc::new(server).into() })
    }

    /// Prove and check identities as the side that accepted.
    pub(crate) async fn accept<C>(self, socket: C) -> io::Result<(PeerId, TlsStream<C>)>
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self.server.accept(socket).await?;
        Ok((peer(stream.get_ref().1)?, stream.into()))
    }

    /// Prove and check identities as the side that dialed. The swarm compares the peer with the wanted one.
    pub(crate) async fn connect<C>(self, socket: C) -> io::Result<(PeerId, TlsStream<C>)>
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        let nobody = ServerName::IpAddress(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
        let stream = self.client.connect(nobody, socket).await?;
        Ok((peer(stream.get_ref().1)?, stream.into()))
    }
}

fn peer(session: &CommonState) -> io::Result<PeerId> {
    let Some([only]) = session.peer_certificates() else {
        return Err(io::Error::other("the peer must show exactly one certificate"));
    };
    Ok(certificate::parse(only).map_err(io::Error::other)?.peer_id())
}

/// Whether AES-GCM runs on instructions of its own here.
fn has_aes() -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

fn provider(aes: bool) -> CryptoProvider {
    use aws_lc_rs::cipher_suite as suite;
    let mut cipher_suites = vec![suite::TLS13_AES_128_GCM_SHA256, suite::TLS13_AES_256_GCM_SHA384];
    cipher_suites.insert(if aes { 2 } else { 0 }, suite::TLS13_CHACHA20_POLY1305_SHA256);
    CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() }
}

/// Checks what the specification asks for: one certificate, self-signed, with the peer's key and its signature.
#[derive(Debug)]
struct Verifier;

fn check(certificate: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
    if !rest.is_empty() {
        return Err(rustls::Error::General("the peer must show exactly one certificate".into()));
    }
    parse(certificate).map(|_| ())
}

fn parse<'a>(certificate: &'a CertificateDer<'a>) -> Result<certificate::P2pCertificate<'a>, rustls::Error> {
    certificate::parse(certificate)
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
}

fn check_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    parse(certificate)?
        .verify_signature(signed.scheme, message, signed.signature())
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadSignature))?;
    Ok(HandshakeSignatureValid::assertion())
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("only TLS 1.3 is spoken here".into())
}

fn schemes() -> Vec<SignatureScheme> {
    vec![
        SignatureScheme::ECDSA_NISTP384_SHA384,
        SignatureScheme::ECDSA_NISTP256_SHA256,
        SignatureScheme::ED25519,
        SignatureScheme::RSA_PSS_SHA512,
        SignatureScheme::RSA_PSS_SHA384,
        SignatureScheme::RSA_PSS_SHA256,
        SignatureScheme::RSA_PKCS1_SHA512,
        SignatureScheme::RSA_PKCS1_SHA384,
        SignatureScheme::RSA_PKCS1_SHA256,
    ]
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        check(certificate, rest).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        check(certificate, rest).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipe::Pipe;
    use futures::{AsyncReadExt, AsyncWriteExt};
    use rustls::{CipherSuite, HandshakeKind};

    /// What a machine that dials, with AES or without, and one that accepts agree on.
    async fn agreed(dialer: bool, acceptor: bool) -> CipherSuite {
        let tls = |aes| Tls::with(&Keypair::generate_ed25519(), aes).unwrap();
        let (one, other) = tokio::io::duplex(64 << 10);
        let (dialed, accepted) =
            tokio::join!(tls(dialer).connect(Pipe(one)), tls(acceptor).accept(Pipe(other)));
        let suite = |stream: TlsStream<_>| stream.get_ref().1.negotiated_cipher_suite().unwrap().suite();
        let (dialed, accepted) = (suite(dialed.unwrap().1), suite(accepted.unwrap().1));
        assert_eq!(dialed, accepted);
        dialed
    }

    #[tokio::test]
    async fn aes_is_taken_where_both_have_it_and_never_where_it_costs_one_the_most() {
        assert_eq!(agreed(true, true).await, CipherSuite::TLS13_AES_128_GCM_SHA256);
        for (dialer, acceptor) in [(true, false), (false, true), (false, false)] {
            assert_eq!(agreed(dialer, acceptor).await, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
        }
    }

    #[tokio::test]
    async fn each_connection_proves_its_identities_anew() {
        let [one, other] = [(); 2].map(|()| Tls::new(&Keypair::generate_ed25519()).unwrap());
        for _ in 0..2 {
            let (near, far) = tokio::io::duplex(64 << 10);
            let (dialed, accepted) =
                tokio::join!(one.clone().connect(Pipe(near)), other.clone().accept(Pipe(far)));
            let (mut dialed, mut accepted) = (dialed.unwrap().1, accepted.unwrap().1);
            // With the first bytes would come what is needed to resume the session.
            accepted.write_all(b"x").await.unwrap();
            accepted.flush().await.unwrap();
            dialed.read_exact(&mut [0]).await.unwrap();
            assert_eq!(dialed.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        }
    }
}
