//! A program of somebody else's making that keeps to libp2p and not to potluck's limits, from its transport upwards.

use futures::future::{Either, select};
use futures::{AsyncReadExt, AsyncWriteExt, FutureExt};
use libp2p::core::Endpoint;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::transport::{Boxed, DialOpts, PortUse, Transport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{Multiaddr, noise, quic, tcp, tls, yamux};
use potluck_net::FRAME_BYTES_MAX;
use potluck_net_libp2p::Security;
use std::future::poll_fn;
use std::io;
use std::task::{Poll, ready};

/// Open two streams of this protocol, send the header of a frame that is one byte too long on the second, and send back what
/// comes on the first. Only an error ends it.
pub(crate) async fn send_oversize(address: &Multiaddr, protocol: &str, security: Security) -> io::Error {
    let mut transport = transport(address, security);
    let options = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
    let dial = match transport.dial(address.clone(), options) {
        Ok(dial) => dial,
        Err(error) => return io::Error::other(error.to_string()),
    };
    let mut connection = match dial.await {
        Ok((_, connection)) => connection,
        Err(error) => return error,
    };
    let mut streams = Vec::new();
    for _ in 0..2 {
        let opened = poll_fn(|cx| {
            if let Poll::Ready(Err(error)) = connection.poll_unpin(cx) {
                return Poll::Ready(Err(error));
            }
            connection.poll_outbound_unpin(cx)
        });
        match opened.await {
            Ok(stream) => streams.push(stream),
            Err(error) => return error,
        }
    }
    let broken = poll_fn(|cx| {
        loop {
            if let Err(error) = ready!(connection.poll_unpin(cx)) {
                return Poll::Ready(error);
            }
        }
    });
    let misbehaves = async {
        match misbehave(streams, protocol).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    };
    match select(misbehaves.boxed(), broken).await {
        Either::Left((error, _)) | Either::Right((error, _)) => error,
    }
}

fn transport(address: &Multiaddr, security: Security) -> Boxed<(libp2p::PeerId, StreamMuxerBox)> {
    let key = Keypair::generate_ed25519();
    if address.iter().any(|part| part == libp2p::multiaddr::Protocol::QuicV1) {
        let transport = quic::tokio::Transport::new(quic::Config::new(&key));
        return transport.map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection))).boxed();
    }
    let tcp = tcp::tokio::Transport::new(tcp::Config::default()).upgrade(Version::V1);
    if security == Security::NoiseOnly {
        let noise = noise::Config::new(&key).expect("noise needs nothing");
        return tcp.authenticate(noise).multiplex(yamux::Config::default()).boxed();
    }
    let tls = tls::Config::new(&key).expect("a certificate can be made");
    tcp.authenticate(tls).multiplex(yamux::Config::default()).boxed()
}

/// The names are agreed on (multistream-select), the other side says that it has taken the stream, and then this.
async fn misbehave(mut streams: Vec<SubstreamBox>, protocol: &str) -> io::Result<std::convert::Infallible> {
    for stream in &mut streams {
        let names = [line("/multistream/1.0.0"), line(protocol)].concat();
        stream.write_all(&names).await?;
        stream.flush().await?;
        let mut answer = vec![0; names.len() + 1];
        stream.read_exact(&mut answer).await?;
        assert_eq!(answer, [&names[..], &[1]].concat(), "agreed on, and taken");
    }
    let [sound, broken] = &mut streams[..] else { return Err(io::Error::other("two streams were opened")) };
    let header = u32::try_from(FRAME_BYTES_MAX + 1).expect("four bytes").to_be_bytes();
    broken.write_all(&header).await?;
    broken.flush().await?;
    let mut bytes = vec![0; 1024];
    loop {
        match sound.read(&mut bytes).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => sound.write_all(&bytes[..count]).await?,
        }
        sound.flush().await?;
    }
}

/// One message of multistream-select: its length, its text, and the end of its line.
fn line(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len() + 1).expect("a short text");
    [&[length], text.as_bytes(), b"\n"].concat()
}
