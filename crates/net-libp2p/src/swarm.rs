//! The libp2p side: transports and behaviours with their limits, put together. Nothing here decides anything later.

use crate::bootstrap::PROTOCOL_VERSION;
use crate::config::Config;
use crate::doorman;
use crate::mux::Mux;
use crate::quic::Quic;
use crate::secure::Secure;
use crate::shared::Shared;
use crate::stage::{Stage, StageError};
use crate::streams;
use futures::FutureExt;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, OrTransport, timeout::TransportTimeout};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::kad::store::MemoryStore;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::{Executor, NetworkBehaviour};
use libp2p::{
    PeerId, StreamProtocol, Swarm, Transport, autonat, connection_limits, dcutr, dns, identify, kad, ping,
    quic, relay, tcp, upnp,
};
use potluck_net::Tasks;
use std::io;
use std::num::NonZeroU32;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// Streams of both sides on one connection. Above it the muxer gives up the whole connection, hence the margin over
/// twice what [`crate::shared`] lets one side open.
const STREAMS_PER_CONNECTION_MAX: usize = 4096;
/// Inbound streams of one QUIC connection; more wait to be opened, so that the margin over what one side opens may be
/// small. It has to be: QUIC reserves room for each of them when it dials, whether somebody answers or not.
const QUIC_STREAMS_MAX: u32 = 1600;
/// Inbound streams of one connection under negotiation. Above it they are lost, so a side may negotiate all that it may open.
const NEGOTIATING_MAX: usize = 1600;
/// A TCP connection has this long to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection has this long for everything: TCP, encryption, multiplexing, through a relay if need be.
const ESTABLISH_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that no protocol needs any more ([`crate::usage`]) may still be needed after all.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// QUIC's receive windows: 100 MB/s at 100 ms need 10 MB in flight, and twice that to ride out a loss.
const QUIC_STREAM_WINDOW_BYTES: u32 = 32 << 20;
const QUIC_CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Bytes that the kernel holds of one TCP connection beyond those on their way. What a muxer must say soon, above all how much
/// more it can take, waits behind them: without a limit they are megabytes, and the other side of a busy pair stands still.
const UNSENT_BYTES_MAX: u32 = 128 << 10;
/// A connection whose bytes nobody acknowledges for so long is dead. Pings see to it that something is always on its way;
/// without this limit the kernel repeats it for a quarter of an hour.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(25);
/// Connections in all, and with one peer (TCP, QUIC, relayed, and the other side's dials of the same).
const CONNECTIONS_MAX: u32 = 4096;
const CONNECTIONS_PER_PEER_MAX: u32 = 8;
/// A relay's limits. A circuit must carry gradients for hours where no hole can be punched.
const RELAY_CIRCUIT_BYTES_MAX: u64 = 1 << 40;
const RELAY_CIRCUIT_DURATION: Duration = Duration::from_secs(24 * 3600);

type Output = (PeerId, StreamMuxerBox);

/// All protocols of one peer.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    doorman: doorman::Behaviour,
    limits: connection_limits::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub(crate) kad: kad::Behaviour<MemoryStore>,
    autonat: autonat::Behaviour,
    relay_client: relay::client::Behaviour,
    relay: Toggle<relay::Behaviour>,
    dcutr: Toggle<dcutr::Behaviour>,
    upnp: Toggle<upnp::tokio::Behaviour>,
    /// The last one: see there.
    pub(crate) streams: streams::Behaviour,
}

/// A swarm that does nothing yet.
pub(crate) fn build(config: &Config, shared: &Arc<Shared>) -> io::Result<Swarm<Behaviour>> {
    let keypair = Keypair::ed25519_from_bytes(config.identity.seed()).map_err(io::Error::other)?;
    let local = keypair.public().to_peer_id();
    let (relay_transport, relay_client) = relay::client::new(local);
    let transport = transport(&keypair, config, relay_transport)?;
    let behaviour = behaviour(&keypair, config, shared, relay_client);
    // The swarm owns its connections' tasks: they end with it.
    let settings = libp2p::swarm::Config::with_executor(Connections(Tasks::new()))
        .with_idle_connection_timeout(IDLE_TIMEOUT)
        .with_max_negotiating_inbound_streams(NEGOTIATING_MAX);
    Ok(Swarm::new(transport, behaviour, local, settings))
}

/// The tasks of connections. One that panics closes its connection, because it drops it, and no other; without the catch
/// the panic would go on in the driver, and end all of them.
struct Connections(Tasks);

impl Executor for Connections {
    fn exec(&self, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let task = AssertUnwindSafe(task).catch_unwind();
        self.0.spawn(async move {
            if let Err(panic) = task.await {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let reason = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason");
                tracing::error!(target: "potluck::net", reason, "a connection's task has panicked");
            }
        });
    }
}

fn transport(
    keypair: &Keypair,
    config: &Config,
    relayed: relay::client::Transport,
) -> io::Result<Boxed<Output>> {
    let secure = Secure::new(keypair, config.security)?;
    let handshakes = secure.handshakes();
    let mux = move |peer: &PeerId, _: &_| Mux::new(STREAMS_PER_CONNECTION_MAX, handshakes.take(peer));

    let relayed = relayed
        .map_err(StageError::at(Stage::Connect))
        .upgrade(Version::V1Lazy)
        .authenticate(secure.clone())
        .multiplex_ext(mux.clone())
        .timeout(ESTABLISH_TIMEOUT)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
        .boxed();
    let direct = || {
        let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
        let tcp = tcp.map(|stream, _| {
            limit(&stream.0);
            stream
        });
        let tcp = TransportTimeout::with_outgoing_timeout(tcp, CONNECT_TIMEOUT)
            .map_err(StageError::at(Stage::Connect))
            .upgrade(Version::V1Lazy)
            .authenticate(secure.clone())
            .multiplex_ext(mux.clone())
            .timeout(ESTABLISH_TIMEOUT)
            .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
            .boxed();
        let quic = Quic::new(quic_config(keypair))
            .map_err(quic_error)
            .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
            .boxed();
        either(tcp, quic)
    };
    let direct = match dns::tokio::Transport::system(direct()) {
        Ok(resolving) => resolving.map_err(StageError::from_dns).boxed(),
        Err(error) => {
            // Numeric addresses still work on a machine without a resolver configuration.
            tracing::warn!(target: "potluck::net", %error, "no DNS resolver: names in addresses cannot be used");
            direct()
        }
    };
    Ok(either(relayed, direct))
}

/// Where the system has no such limits, connections work all the same.
fn limit(stream: &tokio::net::TcpStream) {
    #[cfg(any(target_os = "android", target_os = "linux"))]
    {
        let socket = socket2::SockRef::from(stream);
        if let Err(error) = socket.set_tcp_notsent_lowat(UNSENT_BYTES_MAX) {
            tracing::debug!(target: "potluck::net", %error, "no limit on unsent bytes");
        }
        if let Err(error) = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX)) {
            tracing::debug!(target: "potluck::net", %error, "no limit on unacknowledged bytes");
        }
    }
    #[cfg(not(any(target_os = "android", target_os = "linux")))]
    let _unlimited = (stream, UNSENT_BYTES_MAX, UNACKNOWLEDGED_MAX);
}

fn either(first: Boxed<Output>, second: Boxed<Output>) -> Boxed<Output> {
    OrTransport::new(first, second)
        .map_err(|error| {
            error.either(|inner| StageError::from_boxed(&inner), |inner| StageError::from_boxed(&inner))
        })
        .map(|output, _| output.into_inner())
        .boxed()
}

fn quic_config(keypair: &Keypair) -> quic::Config {
    let mut config = quic::Config::new(keypair);
    config.max_concurrent_stream_limit = QUIC_STREAMS_MAX;
    config.max_stream_data = QUIC_STREAM_WINDOW_BYTES;
    config.max_connection_data = QUIC_CONNECTION_WINDOW_BYTES;
    config
}

/// Silence looks like a handshake that timed out: on UDP there is no connection before it.
fn quic_error(error: quic::Error) -> StageError {
    match &error {
        quic::Error::Connection(_) => StageError::new(Stage::Handshake, &error),
        quic::Error::HandshakeTimedOut => {
            StageError { stage: Stage::Connect, detail: "no answer in time".into() }
        }
        _ => StageError::new(Stage::Connect, &error),
    }
}

fn behaviour(
    keypair: &Keypair,
    config: &Config,
    shared: &Arc<Shared>,
    relay_client: relay::client::Behaviour,
) -> Behaviour {
    let local = keypair.public().to_peer_id();
    let reachable = !config.client_mode;
    let limits = connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(doorman::PENDING_MAX as u32))
        .with_max_established(Some(CONNECTIONS_MAX))
        .with_max_established_per_peer(Some(CONNECTIONS_PER_PEER_MAX));
    // No signed peer record: go-libp2p peers log an error for each of rust-libp2p's.
    let identify = identify::Config::new(PROTOCOL_VERSION.into(), keypair.public())
        .with_agent_version(concat!("potluck/", env!("CARGO_PKG_VERSION")).into())
        .with_push_listen_addr_updates(true);
    let ping =
        ping::Config::new().with_interval(Duration::from_secs(10)).with_timeout(Duration::from_secs(15));
    Behaviour {
        doorman: doorman::Behaviour::new(CONNECTIONS_MAX as usize),
        limits: connection_limits::Behaviour::new(limits),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping),
        kad: kad(local, reachable),
        autonat: autonat::Behaviour::new(local, autonat_config()),
        relay_client,
        relay: Toggle::from(config.relay_server.then(|| relay::Behaviour::new(local, relay_config()))),
        dcutr: Toggle::from(reachable.then(|| dcutr::Behaviour::new(local))),
        upnp: Toggle::from((config.port_mapping && reachable).then(upnp::tokio::Behaviour::default)),
        streams: streams::Behaviour::new(shared.clone()),
    }
}

/// Peer routing only: nobody stores records here (potluck's own DHT does).
fn kad(local: PeerId, reachable: bool) -> kad::Behaviour<MemoryStore> {
    let mut config = kad::Config::new(StreamProtocol::new("/potluck/kad/1"));
    config
        .set_query_timeout(Duration::from_secs(8))
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_publication_interval(None)
        .set_replication_interval(None)
        .set_provider_publication_interval(None);
    let mut kad = kad::Behaviour::with_config(local, MemoryStore::new(local), config);
    kad.set_mode(Some(if reachable { kad::Mode::Server } else { kad::Mode::Client }));
    kad
}

/// Quick to a first answer, and for private networks too: a laboratory's machines probe one another.
fn autonat_config() -> autonat::Config {
    autonat::Config {
        boot_delay: Duration::from_secs(2),
        retry_interval: Duration::from_secs(20),
        refresh_interval: Duration::from_secs(5 * 60),
        throttle_server_period: Duration::from_secs(5),
        confidence_max: 2,
        only_global_ips: false,
        ..autonat::Config::default()
    }
}

fn relay_config() -> relay::Config {
    let rate = |limit| NonZeroU32::new(limit).unwrap_or(NonZeroU32::MIN);
    let unlimited = relay::Config {
        max_reservations: 1024,
        max_reservations_per_peer: 4,
        reservation_duration: Duration::from_secs(3600),
        reservation_rate_limiters: Vec::new(),
        max_circuits: 1024,
        max_circuits_per_peer: 64,
        max_circuit_duration: RELAY_CIRCUIT_DURATION,
        max_circuit_bytes: RELAY_CIRCUIT_BYTES_MAX,
        circuit_src_rate_limiters: Vec::new(),
    };
    // By address generously: a whole laboratory may sit behind one.
    unlimited
        .reservation_rate_per_peer(rate(30), Duration::from_secs(120))
        .reservation_rate_per_ip(rate(600), Duration::from_secs(60))
        .circuit_src_per_peer(rate(120), Duration::from_secs(60))
        .circuit_src_per_ip(rate(1200), Duration::from_secs(60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_kernel_gives_up_a_connection_that_nobody_acknowledges() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        limit(&stream);
        let socket = socket2::SockRef::from(&stream);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(UNACKNOWLEDGED_MAX));
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), UNSENT_BYTES_MAX);
    }

    #[tokio::test]
    async fn a_panic_of_one_connection_ends_no_other() {
        let connections = Connections(Tasks::new());
        let (alive, mut ended) = tokio::sync::mpsc::channel::<()>(1);
        connections.exec(Box::pin(async move {
            let _dropped_with_the_connection = alive;
            panic!("of one connection");
        }));
        assert_eq!(ended.recv().await, None);
        // Here ended tasks are reaped, and a panic of one would go on.
        let (tell, told) = tokio::sync::oneshot::channel();
        connections.exec(Box::pin(async { tell.send(()).unwrap() }));
        told.await.unwrap();
        assert_eq!(connections.0.len(), 1, "the first one was reaped");
    }
}
