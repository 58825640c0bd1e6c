//! What the swarm's task, the connections' tasks and the callers look at together. Every lock here is held for a few
//! instructions and never across an await.

use crate::convert;
use crate::kept::Kept;
use crate::router::Router;
use crate::streams::OpenRequest;
use crate::traffic::TrafficTable;
use crate::usage::{Usage, Use};
use libp2p::Multiaddr;
use libp2p::swarm::ConnectionId;
use potluck_net::{AcceptError, BufferPool, Path, PeerId, Protocol, Reachability, Stream};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;

/// Streams that we open on one peer and that live at the same time; see [`crate::swarm`] for what a connection carries.
pub(crate) const OUTBOUND_PER_PEER_MAX: usize = 1536;
/// Streams that one peer has opened and ended, and on which it may begin another.
const WAITING_PER_PEER_MAX: usize = 64;
/// A connection that lives answers within this: pings go out every 10 s.
const ANSWERS_WITHIN: Duration = Duration::from_secs(13);
/// Addresses kept per peer.
const ADDRESSES_PER_PEER_MAX: usize = 12;
/// Peers whose addresses are kept.
const PEERS_IN_BOOK_MAX: usize = 4096;

/// Peers whose sight of us is remembered.
const OBSERVERS_MAX: usize = 32;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything shared.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) registry: Registry,
    pub(crate) peers: Peers,
    pub(crate) book: AddressBook,
    pub(crate) traffic: Arc<TrafficTable>,
    pub(crate) kept: Kept,
    /// Memory of large frames that arrive.
    pub(crate) buffers: Arc<BufferPool>,
    pub(crate) own: Mutex<Own>,
    pub(crate) bootstrap: Mutex<crate::bootstrap::Report>,
    /// Rung when the bootstrap report changes.
    pub(crate) bootstrap_changed: Notify,
    pub(crate) router: watch::Sender<Router>,
}

impl Shared {
    /// How a peer sees us. A relayed connection shows the relay's address and says nothing about ours.
    pub(crate) fn note_observed(&self, peer: PeerId, address: Multiaddr) {
        let relayed = address.iter().any(|part| matches!(part, libp2p::multiaddr::Protocol::P2pCircuit));
        let mut own = lock(&self.own);
        if !relayed && (own.observed.len() < OBSERVERS_MAX || own.observed.contains_key(&peer)) {
            own.observed.insert(peer, address);
        }
    }
}

impl Own {
    /// Whether others see us under another address than the ones that our interfaces have; yes until somebody says so.
    pub(crate) fn is_behind_nat(&self) -> bool {
        let seen_as = self.observed.values().filter_map(convert::ip);
        let mut seen_as = seen_as.filter(|ip| !ip.is_loopback()).peekable();
        seen_as.peek().is_none() || {
            let own: Vec<_> = self.listening.iter().filter_map(convert::ip).collect();
            seen_as.any(|ip| !own.contains(&ip))
        }
    }
}

/// What is known about ourselves.
#[derive(Default)]
pub(crate) struct Own {
    pub(crate) announced: Vec<Multiaddr>,
    pub(crate) listening: Vec<Multiaddr>,
    pub(crate) external: Vec<Multiaddr>,
    pub(crate) reachability: Reachability,
    /// As which address each peer sees us; of few peers, that is enough to tell kinds of NAT apart.
    pub(crate) observed: BTreeMap<PeerId, Multiaddr>,
}

/// The protocols that this process accepts.
pub(crate) struct Registry {
    inner: RwLock<Accepting>,
}

struct Accepting {
    closed: bool,
    queues: BTreeMap<Protocol, mpsc::Sender<Stream>>,
    names: Arc<[Protocol]>,
}

impl Default for Registry {
    fn default() -> Self {
        let inner = Accepting { closed: false, queues: BTreeMap::new(), names: Arc::new([]) };
        Self { inner: RwLock::new(inner) }
    }
}

impl Registry {
    fn change<T>(&self, change: impl FnOnce(&mut Accepting) -> T) -> T {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut inner);
        inner.names = inner.queues.keys().cloned().collect();
        result
    }

    pub(crate) fn add(&self, protocol: &Protocol, queue: mpsc::Sender<Stream>) -> Result<(), AcceptError> {
        self.change(|inner| {
            if inner.closed {
                return Err(AcceptError::Closed);
            }
            if inner.queues.contains_key(protocol) {
                return Err(AcceptError::Taken { protocol: protocol.clone() });
            }
            inner.queues.insert(protocol.clone(), queue);
            Ok(())
        })
    }

    pub(crate) fn remove(&self, protocol: &Protocol) {
        self.change(|inner| inner.queues.remove(protocol));
    }

    /// Refuse everything from now on; acceptors see the end of their queue.
    pub(crate) fn close(&self) {
        self.change(|inner| {
            inner.closed = true;
            inner.queues.clear();
        });
    }

    pub(crate) fn names(&self) -> Arc<[Protocol]> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).names.clone()
    }

    /// A place in the acceptor's backlog.
    pub(crate) fn reserve(&self, protocol: &Protocol) -> Result<mpsc::OwnedPermit<Stream>, NoPlace> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let queue = inner.queues.get(protocol).cloned().ok_or(NoPlace::Unknown)?;
        queue.try_reserve_owned().map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => NoPlace::Busy,
            mpsc::error::TrySendError::Closed(_) => NoPlace::Unknown,
        })
    }
}

/// Why a stream cannot be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPlace {
    /// The backlog is full.
    Busy,
    /// Nobody accepts the protocol.
    Unknown,
}

/// One connection.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) id: ConnectionId,
    pub(crate) path: Path,
    pub(crate) quic: bool,
    /// When the other side last answered a ping.
    pub(crate) heard: Instant,
    pub(crate) opens: mpsc::Sender<OpenRequest>,
    pub(crate) usage: Arc<Usage>,
}

/// The connections, by peer.
#[derive(Default)]
pub(crate) struct Peers {
    inner: Mutex<BTreeMap<PeerId, Connected>>,
}

struct Connected {
    links: Vec<Link>,
    outbound: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    upgraded: bool,
}

impl Peers {
    /// A direct connection that comes while there is a relayed one was punched through a NAT, if there is one (`behind_nat`).
    pub(crate) fn add(&self, peer: PeerId, mut link: Link, behind_nat: bool) {
        let mut peers = lock(&self.inner);
        let connected = peers.entry(peer).or_insert_with(|| Connected {
            links: Vec::new(),
            outbound: Arc::new(Semaphore::new(OUTBOUND_PER_PEER_MAX)),
            waiting: Arc::new(Semaphore::new(WAITING_PER_PEER_MAX)),
            upgraded: false,
        });
        let relayed = connected.links.iter().any(|link| link.path == Path::Relayed);
        if relayed && behind_nat && link.path == Path::Direct {
            link.path = Path::HolePunched;
        }
        connected.links.push(link);
    }

    /// Forget connections whose tasks have ended without a word, as those do that panic.
    pub(crate) fn forget_ended(&self) {
        lock(&self.inner).retain(|_, connected| {
            connected.links.retain(|link| !link.opens.is_closed());
            !connected.links.is_empty()
        });
    }

    pub(crate) fn remove(&self, peer: PeerId, id: ConnectionId) {
        let mut peers = lock(&self.inner);
        if let Some(connected) = peers.get_mut(&peer) {
            connected.links.retain(|link| link.id != id);
            if connected.links.is_empty() {
                peers.remove(&peer);
            }
        }
    }

    /// The best connection to a peer, and the bound on streams opened on that peer. Those that answer come before those that
    /// may have died; then the most direct; then TCP, which moves several times as many bytes as QUIC for the same work (see
    /// docs/performance.md); then the newest, or of relayed ones the oldest, because the others may be probes for hole punching.
    pub(crate) fn best(&self, peer: PeerId) -> Option<(Link, Arc<Semaphore>)> {
        self.best_but(peer, &[])
    }

    /// The best connection but those that have just failed, unless there is no other.
    pub(crate) fn best_but(&self, peer: PeerId, failed: &[ConnectionId]) -> Option<(Link, Arc<Semaphore>)> {
        let peers = lock(&self.inner);
        let connected = peers.get(&peer)?;
        let by_age =
            |a: &Link, b: &Link| if a.path == Path::Relayed { a.id.cmp(&b.id) } else { b.id.cmp(&a.id) };
        let now = Instant::now();
        let rank = |link: &Link| {
            (failed.contains(&link.id), now > link.heard + ANSWERS_WITHIN, link.path, link.quic)
        };
        let best = connected.links.iter().min_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| by_age(a, b)))?;
        Some((best.clone(), connected.outbound.clone()))
    }

    /// A place for an ended stream that `peer` had opened, if there is one.
    pub(crate) fn place_to_wait(&self, peer: PeerId) -> Option<OwnedSemaphorePermit> {
        lock(&self.inner).get(&peer)?.waiting.clone().try_acquire_owned().ok()
    }

    pub(crate) fn heard(&self, peer: PeerId, id: ConnectionId) {
        let mut peers = lock(&self.inner);
        let links = peers.get_mut(&peer).map(|connected| connected.links.iter_mut());
        if let Some(link) = links.and_then(|mut links| links.find(|link| link.id == id)) {
            link.heard = Instant::now();
        }
    }

    /// Whether nobody has asked this since the peer connected.
    pub(crate) fn may_upgrade(&self, peer: PeerId) -> bool {
        let mut peers = lock(&self.inner);
        peers.get_mut(&peer).is_some_and(|connected| !std::mem::replace(&mut connected.upgraded, true))
    }

    #[cfg(test)]
    pub(crate) fn links(&self, peer: PeerId) -> usize {
        lock(&self.inner).get(&peer).map_or(0, |connected| connected.links.len())
    }

    /// The use of the most used connection to each peer.
    pub(crate) fn uses(&self) -> Vec<(PeerId, Use)> {
        let most = |connected: &Connected| connected.links.iter().map(|link| link.usage.now()).max();
        lock(&self.inner).iter().filter_map(|(peer, connected)| Some((*peer, most(connected)?))).collect()
    }

    pub(crate) fn give_up(&self, peers: impl IntoIterator<Item = PeerId>) {
        let inner = lock(&self.inner);
        let connected = peers.into_iter().filter_map(|peer| inner.get(&peer));
        let links = connected.flat_map(|connected| &connected.links);
        links.for_each(|link| link.usage.give_up());
    }

    pub(crate) fn path(&self, peer: PeerId) -> Option<Path> {
        self.best(peer).map(|(link, _)| link.path)
    }

    pub(crate) fn connected(&self) -> Vec<PeerId> {
        lock(&self.inner).keys().copied().collect()
    }
}

/// Addresses of peers, as told by others.
#[derive(Default)]
pub(crate) struct AddressBook {
    inner: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    /// With the time of the last word about each peer, which is a count of words.
    peers: BTreeMap<PeerId, (u64, Vec<Multiaddr>)>,
    by_age: BTreeMap<u64, PeerId>,
    words: u64,
}

impl Book {
    /// What is known of a peer that somebody tells of now. Too many, and whoever was not told of for the longest time goes.
    fn entry(&mut self, peer: PeerId) -> &mut Vec<Multiaddr> {
        self.words += 1;
        if let Some((before, _)) = self.peers.get(&peer) {
            self.by_age.remove(before);
        } else if self.peers.len() >= PEERS_IN_BOOK_MAX
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.peers.remove(&oldest);
        }
        self.by_age.insert(self.words, peer);
        let (word, addresses) = self.peers.entry(peer).or_default();
        *word = self.words;
        addresses
    }

    fn remove(&mut self, peer: &PeerId) {
        if let Some((word, _)) = self.peers.remove(peer) {
            self.by_age.remove(&word);
        }
    }
}

impl AddressBook {
    /// Remember addresses, the newest first; the oldest fall out. Those that lead to somebody else are ignored.
    pub(crate) fn add(&self, peer: PeerId, addresses: impl IntoIterator<Item = Multiaddr>) {
        let id = convert::to_libp2p(peer);
        let mut book = lock(&self.inner);
        let known = book.entry(peer);
        for address in addresses.into_iter().take(ADDRESSES_PER_PEER_MAX) {
            let Some(address) = convert::with_target(address, id) else { continue };
            if convert::is_usable(&address) && !known.contains(&address) {
                known.insert(0, address);
            }
        }
        known.truncate(ADDRESSES_PER_PEER_MAX);
        if known.is_empty() {
            book.remove(&peer);
        }
    }

    /// Direct addresses first.
    pub(crate) fn get(&self, peer: PeerId) -> Vec<Multiaddr> {
        let mut addresses =
            lock(&self.inner).peers.get(&peer).map(|(_, known)| known.clone()).unwrap_or_default();
        addresses.sort_by_key(convert::is_relayed);
        addresses
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_net::Watermarks;

    fn peer(n: u32) -> PeerId {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        PeerId::from_ed25519(&key)
    }

    #[test]
    fn the_address_book_is_bounded_and_keeps_the_newest() {
        let book = AddressBook::default();
        let address = |port: u16| format!("/ip4/10.0.0.1/tcp/{port}").parse::<Multiaddr>().unwrap();
        for port in 1..100 {
            book.add(peer(1), [address(port)]);
        }
        let kept = book.get(peer(1));
        assert_eq!(kept.len(), ADDRESSES_PER_PEER_MAX);
        assert!(kept[0].to_string().contains("/tcp/99/p2p/"));
        for n in 0..5000 {
            book.add(peer(n), [address(1)]);
            // Somebody tells of this one again and again.
            book.add(peer(7), [address(1)]);
        }
        let known = |n: u32| !book.get(peer(n)).is_empty();
        assert!(known(7) && known(4999) && !known(0));
        let (inner, oldest) = (lock(&book.inner), 5000 - PEERS_IN_BOOK_MAX as u32 + 1);
        assert_eq!((inner.peers.len(), inner.by_age.len()), (PEERS_IN_BOOK_MAX, PEERS_IN_BOOK_MAX));
        drop(inner);
        assert!(known(oldest) && !known(oldest - 1));
    }

    #[tokio::test]
    async fn a_connection_whose_task_has_panicked_is_forgotten() {
        let peers = Peers::default();
        let mut tasks = Vec::new();
        for n in [1, 2, 2] {
            let (opens, requests) = mpsc::channel(1);
            let id = ConnectionId::new_unchecked(tasks.len());
            let (path, quic, heard, usage) = (Path::Direct, false, Instant::now(), Usage::new());
            peers.add(peer(n), Link { id, path, quic, heard, opens, usage }, false);
            tasks.push(requests);
        }
        tasks.truncate(2);
        tasks.remove(0);
        peers.forget_ended();
        assert_eq!((peers.links(peer(1)), peers.links(peer(2))), (0, 1));
        assert_eq!(peers.connected(), [peer(2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_best_connection_answers_is_direct_and_moves_bytes_cheaply() {
        let peers = Peers::default();
        let (opens, _requests) = mpsc::channel(1);
        let add = |number: usize, path: Path, quic: bool| {
            let id = ConnectionId::new_unchecked(number);
            let (heard, opens, usage) = (Instant::now(), opens.clone(), Usage::new());
            peers.add(peer(1), Link { id, path, quic, heard, opens, usage }, false);
            id
        };
        let best = || peers.best(peer(1)).unwrap().0.id;
        let relayed = add(1, Path::Relayed, false);
        assert_eq!(best(), relayed);
        let quic = add(2, Path::Direct, true);
        assert_eq!(best(), quic);
        let tcp = add(3, Path::Direct, false);
        add(4, Path::Direct, true);
        assert_eq!(best(), tcp);
        let newest = add(5, Path::Direct, false);
        assert_eq!(best(), newest);
        let best_but = |failed: &[ConnectionId]| peers.best_but(peer(1), failed).unwrap().0.id;
        assert_eq!(best_but(&[newest]), tcp, "the next best");
        let all: Vec<ConnectionId> = (1..=5).map(ConnectionId::new_unchecked).collect();
        assert_eq!(best_but(&all), newest, "there is no other");
        // Only one of them still answers.
        tokio::time::advance(ANSWERS_WITHIN + Duration::from_millis(1)).await;
        peers.heard(peer(1), quic);
        assert_eq!(best(), quic);
        assert!(peers.may_upgrade(peer(1)) && !peers.may_upgrade(peer(1)) && !peers.may_upgrade(peer(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn of_too_many_connections_unused_ones_are_given_up_unless_we_seek_them() {
        let peers = Peers::default();
        let (opens, _requests) = mpsc::channel(1);
        let mut running = Vec::new();
        for n in 1..=8 {
            let (id, opens, usage) = (ConnectionId::new_unchecked(n as usize), opens.clone(), Usage::new());
            running.extend((n == 2).then(|| usage.begin()));
            let (path, quic, heard) = (Path::Direct, false, Instant::now());
            peers.add(peer(n), Link { id, path, quic, heard, opens, usage }, false);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let marks = Watermarks { high: 6, low: 5, idle_min: Duration::from_secs(2) };
        let given_up = || -> Vec<PeerId> {
            peers.uses().into_iter().filter(|(_, all)| *all == Use::GivenUp).map(|(peer, _)| peer).collect()
        };
        let mut expected = vec![peer(3), peer(4), peer(5)];
        expected.sort();
        for _ in 0..2 {
            peers.give_up_surplus(Instant::now(), &marks, |sought| *sought == peer(1));
            assert_eq!(given_up(), expected, "the first is sought, the second in use; once is enough");
        }
        let (link, _) = peers.best(peer(4)).unwrap();
        drop(link.usage.begin());
        expected.retain(|other| *other != peer(4));
        assert_eq!(given_up(), expected, "used again");
    }

    #[test]
    fn useless_addresses_are_ignored() {
        let book = AddressBook::default();
        let other = convert::to_libp2p(peer(2));
        let foreign = format!("/ip4/10.0.0.1/tcp/1/p2p/{other}");
        for text in [foreign.as_str(), "/ip4/0.0.0.0/tcp/1", "/ip6/fe80::1/tcp/1"] {
            book.add(peer(1), [text.parse().unwrap()]);
        }
        assert_eq!(book.get(peer(1)), Vec::<Multiaddr>::new());
    }
}
