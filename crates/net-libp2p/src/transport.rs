//! The real network as a [`Transport`].

use crate::bootstrap::BootstrapAttempt;
use crate::config::Config;
use crate::convert;
use crate::driver::{Command, Driver};
use crate::kept::{self, Lease, With};
use crate::router;
use crate::shared::{Link, OUTBOUND_PER_PEER_MAX, Shared, lock};
use crate::streams::{OpenFailure, OpenRequest};
use crate::traffic::Traffic;
use futures::FutureExt;
use futures::future::BoxFuture;
use libp2p::Multiaddr;
use potluck_net::{
    AcceptError, Env, Identity, Incoming, OpenError, Path, PeerId, Protocol, Reachability, Stream, Tasks,
    Transport,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// Memory of received frames that is kept for the next ones.
const RECEIVED_BYTES_KEPT: usize = 32 << 20;
/// An open ends within this, dialing included.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// A peer with whom we have exchanged so much is worth a second connection.
pub(crate) const BULK_BYTES_MIN: u64 = 4 << 20;
/// Commands that may wait for the swarm's task.
const COMMANDS_WAITING_MAX: usize = 1024;
/// Links that are tried before a peer counts as unreachable: one may have died unnoticed, its successor too.
const LINKS_TRIED_MAX: usize = 3;

/// Why the transport did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// An address cannot be used.
    #[error("{field} address {address:?} cannot be used: {detail}")]
    Address {
        /// `listen`, `announce` or `bootstrap`.
        field: &'static str,
        /// As given.
        address: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The address may be fine, but we cannot listen there.
    #[error("cannot listen on {address}: {detail}")]
    Listen {
        /// As given.
        address: String,
        /// What the system says.
        detail: String,
    },
    /// The system refused something else.
    #[error("cannot start the network: {0}")]
    Io(#[from] std::io::Error),
}

/// A peer of the real network: TCP and QUIC, relays and hole punching, peer routing. See [`Transport`].
///
/// Dropping it aborts everything at once; [`Transport::close`] says goodbye first.
pub struct Libp2pTransport {
    identity: Identity,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    tasks: Tasks,
}

impl Libp2pTransport {
    /// Start. Returns as soon as the addresses are bound; the bootstrap peers are dialed in the background, for ever.
    ///
    /// # Errors
    /// [`StartError`], naming the address that cannot be used.
    pub async fn start(config: Config, env: Env) -> Result<Arc<Self>, StartError> {
        let shared = Arc::new(Shared::default());
        shared.buffers.keep(RECEIVED_BYTES_KEPT);
        let (commands, waiting) = mpsc::channel(COMMANDS_WAITING_MAX);
        let identity = config.identity.clone();
        let driver = Driver::start(config, env, shared.clone(), waiting).await?;
        let tasks = Tasks::new();
        let ends = Ends(shared.clone());
        tasks.spawn(async move {
            let _ends = ends;
            driver.run().await;
        });
        tasks.spawn(kept::care(shared.clone()));
        Ok(Arc::new(Self { identity, shared, commands, tasks }))
    }

    /// How far each bootstrap address got, in the order in which they were given.
    pub fn bootstrap_report(&self) -> Vec<BootstrapAttempt> {
        lock(&self.shared.bootstrap).attempts.clone()
    }

    /// The peers behind the bootstrap addresses.
    pub fn bootstrap_peers(&self) -> Vec<PeerId> {
        lock(&self.shared.bootstrap).peers.clone()
    }

    /// As which address each of the first peers saw us. Behind a NAT that has one mapping for everybody they agree.
    pub fn observed(&self) -> Vec<(PeerId, String)> {
        let own = lock(&self.shared.own);
        own.observed.iter().map(|(peer, address)| (*peer, address.to_string())).collect()
    }

    /// Wait until one bootstrap peer is connected and has said that it speaks our version; that one.
    ///
    /// # Errors
    /// How far each address got, if none is connected at the deadline. Dialing goes on all the same.
    pub async fn wait_bootstrapped(&self, deadline: Instant) -> Result<PeerId, Vec<BootstrapAttempt>> {
        loop {
            let changed = self.shared.bootstrap_changed.notified();
            tokio::pin!(changed);
            // Listening before looking: a change in between is not missed.
            changed.as_mut().enable();
            if let Some(peer) = lock(&self.shared.bootstrap).joined.first() {
                return Ok(*peer);
            }
            let report = self.bootstrap_report();
            if report.is_empty() || tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(self.bootstrap_report());
            }
        }
    }

    /// Wait until the router at home has given this peer its ports, so that [`Transport::addresses`] has addresses that work
    /// from elsewhere; at most three seconds after the start, and not at all where nothing is asked of a router.
    pub async fn wait_mapped(&self) {
        router::answered(&self.shared).await;
    }

    /// Wait until this transport does nothing any more: after [`Transport::close`], or because of an error of ours. In the
    /// second case the process lives on and hears nobody; whoever runs it ends it with an error.
    pub async fn ended(&self) {
        self.commands.closed().await;
    }

    /// Bytes sent and received so far.
    pub fn traffic(&self) -> Traffic {
        self.shared.traffic.snapshot()
    }

    /// End at once and without a goodbye, as a killed process would. For tests; [`Transport::close`] is the polite way.
    pub fn abort(&self) {
        self.shared.registry.close();
        self.tasks.abort_all();
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    async fn open_now(&self, peer: PeerId, protocol: Protocol) -> Result<Stream, OpenError> {
        if peer == self.identity.peer_id() {
            let attempts = vec!["that is this peer itself".to_owned()];
            return Err(OpenError::Unreachable { peer, attempts });
        }
        let mut last = String::from("the connection broke");
        let mut failed = Vec::new();
        // Each may need a dial first.
        for _ in 0..2 * LINKS_TRIED_MAX {
            let Some((link, places)) = self.shared.peers.best_but(peer, &failed) else {
                self.dial(peer).await?;
                continue;
            };
            if failed.len() == LINKS_TRIED_MAX {
                break;
            }
            if link.quic && link.path == Path::Direct && self.shared.traffic.with(peer) >= BULK_BYTES_MIN {
                self.upgrade(peer);
            }
            let Ok(place) = places.try_acquire_owned() else {
                return Err(OpenError::TooMany { peer, max: OUTBOUND_PER_PEER_MAX });
            };
            let bytes = match kept::begin_again(&self.shared.kept, peer, &protocol, link.id).await {
                Some(bytes) => Ok(bytes),
                None => ask(&link, &protocol).await,
            };
            match bytes {
                Ok(bytes) => {
                    let meter = self.shared.traffic.meter(peer, link.path, Some(place));
                    let (path, opened_on, usage) = (link.path, Some(link.id), link.usage);
                    let with = With { peer, protocol, path, opened_on, usage };
                    return Ok(Lease::new(self.shared.clone(), meter, with).stream(bytes));
                }
                Err(OpenFailure::UnknownProtocol) => {
                    return Err(OpenError::UnknownProtocol { peer, protocol });
                }
                Err(OpenFailure::Busy) => return Err(OpenError::Busy { peer, protocol }),
                Err(OpenFailure::TimedOut) => return Err(OpenError::TimedOut { peer }),
                Err(OpenFailure::Broken(reason)) => last = reason,
            }
            if self.commands.is_closed() {
                return Err(OpenError::Closed);
            }
            // Its end may not have been noticed everywhere yet; then the next look must not find it again.
            failed.push(link.id);
            if link.opens.is_closed() {
                self.shared.peers.remove(peer, link.id);
            }
        }
        Err(OpenError::Unreachable { peer, attempts: vec![last] })
    }

    /// A dial takes the first connection that comes about, which over a distance is QUIC; it pays to have TCP as well.
    fn upgrade(&self, peer: PeerId) {
        if self.shared.peers.may_upgrade(peer) {
            // Where there is no room for the command, there is more important work.
            let _busy = self.commands.try_send(Command::Upgrade { peer });
        }
    }

    async fn dial(&self, peer: PeerId) -> Result<(), OpenError> {
        let (reply, answer) = oneshot::channel();
        let dial = Command::Dial { peer, reply };
        self.commands.send(dial).await.map_err(|_| OpenError::Closed)?;
        match answer.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(attempts)) => Err(OpenError::Unreachable { peer, attempts }),
            Err(_) => Err(OpenError::Closed),
        }
    }
}

/// When the driver has ended, for whatever reason, acceptors must not wait for ever.
struct Ends(Arc<Shared>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.registry.close();
    }
}

/// Ask a connection for a stream.
async fn ask(link: &Link, protocol: &Protocol) -> Result<libp2p::Stream, OpenFailure> {
    let broken = || OpenFailure::Broken("the connection broke".into());
    let (reply, answer) = oneshot::channel();
    let request = OpenRequest { protocol: protocol.clone(), reply };
    link.opens.send(request).await.map_err(|_| broken())?;
    answer.await.map_err(|_| broken())?
}

impl Transport for Libp2pTransport {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, peer: PeerId, protocol: Protocol) -> BoxFuture<'_, Result<Stream, OpenError>> {
        async move {
            match tokio::time::timeout(OPEN_TIMEOUT, self.open_now(peer, protocol)).await {
                Ok(result) => result,
                Err(_) => Err(OpenError::TimedOut { peer }),
            }
        }
        .boxed()
    }

    fn accept(&self, protocol: Protocol, backlog: usize) -> Result<Incoming, AcceptError> {
        struct Registration(Arc<Shared>, Protocol);
        impl Drop for Registration {
            fn drop(&mut self) {
                self.0.registry.remove(&self.1);
            }
        }
        let (queue, streams) = mpsc::channel(backlog.max(1));
        self.shared.registry.add(&protocol, queue)?;
        Ok(Incoming::new(streams, Registration(self.shared.clone(), protocol)))
    }

    fn add_addresses(&self, peer: PeerId, addresses: &[String]) {
        let parsed = addresses.iter().filter_map(|text| text.parse::<Multiaddr>().ok());
        self.shared.book.add(peer, parsed);
    }

    fn addresses(&self) -> Vec<String> {
        let own = lock(&self.shared.own);
        let id = convert::to_libp2p(self.identity.peer_id());
        let found: Vec<&Multiaddr> = if own.announced.is_empty() {
            own.external.iter().chain(&own.listening).collect()
        } else {
            let relayed = own.listening.iter().filter(|address| convert::is_relayed(address));
            own.announced.iter().chain(relayed).collect()
        };
        // This machine's own loopback means something to others only if there is nothing else.
        let only_loopback = found.iter().all(|address| convert::is_loopback(address));
        let mut addresses: Vec<String> = Vec::new();
        for address in found {
            if !convert::is_usable(address) || (convert::is_loopback(address) && !only_loopback) {
                continue;
            }
            if let Some(full) = convert::with_target(address.clone(), id) {
                let text = full.to_string();
                if !addresses.contains(&text) {
                    addresses.push(text);
                }
            }
        }
        addresses.sort_by_key(|text| text.contains("/p2p-circuit"));
        addresses
    }

    fn path(&self, peer: PeerId) -> Option<Path> {
        self.shared.peers.path(peer)
    }

    fn connected(&self) -> Vec<PeerId> {
        self.shared.peers.connected()
    }

    fn reachability(&self) -> Reachability {
        lock(&self.shared.own).reachability
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            self.shared.registry.close();
            let (reply, closed) = oneshot::channel();
            if self.commands.send(Command::Close { reply }).await.is_ok() {
                // An error means that the task had ended already.
                let _ended = closed.await;
            }
            self.tasks.shutdown().await;
            self.shared.kept.close();
        }
        .boxed()
    }
}

impl std::fmt::Debug for Libp2pTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Libp2pTransport({:?})", self.identity.peer_id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::Usage;

    async fn start(seed: u8) -> Arc<Libp2pTransport> {
        let mut config = Config::loopback(Identity::from_seed(&[seed; 32]));
        config.listen = vec!["/ip4/127.0.0.1/tcp/0".to_owned()];
        Libp2pTransport::start(config, Env::real()).await.unwrap()
    }

    #[tokio::test]
    async fn the_end_of_the_driver_is_seen_by_whoever_waits() {
        let peer = start(1).await;
        let mut incoming = peer.accept(Protocol::new("/test/1"), 1).unwrap();
        assert!(peer.ended().now_or_never().is_none());
        // The driver runs now.
        tokio::task::yield_now().await;
        // As after a panic: nobody has closed anything.
        peer.tasks.abort_all();
        peer.ended().await;
        assert!(incoming.next().await.is_none());
        let somebody = Identity::from_seed(&[2; 32]).peer_id();
        assert_eq!(peer.open(somebody, Protocol::new("/test/1")).await.unwrap_err(), OpenError::Closed);
    }

    #[tokio::test]
    async fn a_bootstrap_peer_whose_connection_has_ended_without_a_word_is_dialed_again() {
        let first = start(1).await;
        let mut config = Config::loopback(Identity::from_seed(&[2; 32]));
        config.bootstrap = first.addresses();
        let peer = Libp2pTransport::start(config, Env::real()).await.unwrap();
        let connected = async || {
            let connects = async {
                while peer.path(first.local_peer()).is_none() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), connects).await.expect("it is dialed");
        };
        connected().await;
        // As after a panic of its task: the swarm still counts it.
        let (link, _) = peer.shared.peers.best(first.local_peer()).unwrap();
        peer.shared.peers.remove(first.local_peer(), link.id);
        connected().await;
    }

    #[tokio::test]
    async fn a_peer_of_whom_only_dead_connections_are_left_is_dialed_and_asked() {
        let (one, other) = (start(1).await, start(2).await);
        let (peer, protocol) = (other.local_peer(), Protocol::new("/test/1"));
        let _incoming = other.accept(protocol.clone(), 4).unwrap();
        one.add_addresses(peer, &other.addresses());
        for number in 1..LINKS_TRIED_MAX {
            let (id, usage) = (libp2p::swarm::ConnectionId::new_unchecked(1000 + number), Usage::new());
            let (opens, _) = mpsc::channel(1);
            let link = Link { id, path: Path::Direct, quic: false, heard: Instant::now(), opens, usage };
            one.shared.peers.add(peer, link, false);
        }
        one.open(peer, protocol).await.expect("it is there");
    }

    #[tokio::test]
    async fn too_many_streams_of_our_own_are_nobodys_fault() {
        let (one, other) = (start(1).await, start(2).await);
        let (peer, protocol) = (other.local_peer(), Protocol::new("/test/1"));
        let mut incoming = other.accept(protocol.clone(), 4).unwrap();
        one.add_addresses(peer, &other.addresses());
        let ours = one.open(peer, protocol.clone()).await.unwrap();
        let _theirs = incoming.next().await.unwrap();
        let (_, places) = one.shared.peers.best(peer).unwrap();
        let rest = places.try_acquire_many(OUTBOUND_PER_PEER_MAX as u32 - 1).expect("one is taken");
        let refused = one.open(peer, protocol.clone()).await.unwrap_err();
        assert_eq!(refused, OpenError::TooMany { peer, max: OUTBOUND_PER_PEER_MAX });
        let fault = potluck_net::rpc::open_fault(peer, refused);
        assert_eq!(fault.kind, potluck_net::FaultKind::Busy, "as that of a busy peer, it gives nobody up");
        drop(rest);
        one.open(peer, protocol).await.expect("there is room again");
        drop(ours);
    }
}
