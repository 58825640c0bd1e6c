//! The libp2p transport on loopback sockets: the conformance suite over TCP and over QUIC, and what only real sockets
//! have: bootstrap reports, routing by peer id, relays, and ends that leave nothing behind.

mod stranger;

use potluck_net::{Env, Identity, OpenError, Path, PeerId, Protocol, Tasks, Transport, Watermarks};
use potluck_net_conformance::{self as conformance, Network};
use potluck_net_libp2p::{Config, Libp2pTransport, Security, Stage, StartError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const TCP: &str = "/ip4/127.0.0.1/tcp/0";
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

fn identity(env: &Env) -> Identity {
    Identity::from_seed(&env.random_bytes())
}

async fn peer_on(listen: &[&str], change: impl FnOnce(&mut Config)) -> Arc<Libp2pTransport> {
    let env = Env::real();
    let mut config = Config::loopback(identity(&env));
    config.listen = listen.iter().map(|&text| text.to_owned()).collect();
    change(&mut config);
    Libp2pTransport::start(config, env).await.expect("loopback can be listened on")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Until the bootstrap peer has identified the callee it cannot know it; each refusal is a full lookup, not a poll.
async fn found_by_id(caller: &Arc<Libp2pTransport>, callee: &Arc<Libp2pTransport>, protocol: &Protocol) {
    let opened = async {
        loop {
            match caller.open(callee.local_peer(), protocol.clone()).await {
                Ok(_) => return,
                Err(OpenError::Unreachable { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout_at(soon(), opened).await.expect("routing finds the callee");
}

/// Until a peer tells others of a way through a relay at one of these addresses.
async fn reserved(hidden: &Arc<Libp2pTransport>, relay: &[String]) {
    let through = |address: &String| relay.iter().any(|at| address.starts_with(&format!("{at}/p2p-circuit")));
    let reserved = tokio::time::timeout_at(soon(), async {
        while !hidden.addresses().iter().any(through) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(reserved.await.is_ok(), "{:?} instead of {relay:?}", hidden.addresses());
}

struct Loopback {
    listen: &'static str,
    security: Security,
    alive: Mutex<BTreeMap<PeerId, Arc<Libp2pTransport>>>,
}

impl Loopback {
    fn new(listen: &'static str, security: Security) -> Self {
        Self { listen, security, alive: Mutex::default() }
    }
}

impl Network for Loopback {
    async fn two_peers(&self) -> (Arc<dyn Transport>, Arc<dyn Transport>) {
        let first = peer_on(&[self.listen], |config| config.security = self.security).await;
        let second = peer_on(&[self.listen], |config| config.security = self.security).await;
        first.add_addresses(second.local_peer(), &second.addresses());
        second.add_addresses(first.local_peer(), &first.addresses());
        let mut alive = self.alive.lock().expect("no test thread has panicked");
        alive.insert(first.local_peer(), first.clone());
        alive.insert(second.local_peer(), second.clone());
        (first, second)
    }

    async fn kill(&self, peer: PeerId) {
        self.alive
            .lock()
            .expect("no test thread has panicked")
            .remove(&peer)
            .expect("a peer of this network")
            .abort();
    }

    async fn send_oversize(&self, to: Arc<dyn Transport>, protocol: Protocol) -> String {
        let address = to.addresses()[0].parse().expect("a peer's own address");
        stranger::send_oversize(&address, protocol.as_str(), self.security).await.to_string()
    }

    fn ahead_bytes_max(&self) -> usize {
        // QUIC's stream window and both sides' buffers; yamux's windows grow with what is read, so they stay small.
        64 << 20
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_with_tls_conforms() {
    conformance::run_all(&Loopback::new(TCP, Security::TlsOnly)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_with_noise_conforms() {
    conformance::run_all(&Loopback::new(TCP, Security::NoiseOnly)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_conforms() {
    conformance::run_all(&Loopback::new(QUIC, Security::TlsOrNoise)).await;
}

#[tokio::test]
async fn bootstrap_says_for_each_address_how_far_it_got() {
    let env = Env::real();
    let server = peer_on(&[TCP], |_| {}).await;
    let address = server.addresses().remove(0);
    let bare = address.split("/p2p/").next().unwrap().to_owned();
    let somebody = identity(&env).peer_id();
    // A port that was free a moment ago refuses; one that listens without accepting is as silent as a black hole.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    let joiner = peer_on(&[TCP], |config| {
        config.bootstrap = vec![
            format!("{bare}/p2p/{somebody}"),
            format!("/ip4/127.0.0.1/tcp/{free}/p2p/{somebody}"),
            format!("/ip4/127.0.0.1/tcp/{silent_port}/p2p/{somebody}"),
            format!("/dns4/no-such-host.invalid/tcp/1/p2p/{somebody}"),
            address.clone(),
        ];
    })
    .await;
    assert_eq!(joiner.wait_bootstrapped(soon()).await.unwrap(), server.local_peer());
    let expected = [Stage::WrongIdentity, Stage::Connect, Stage::Handshake, Stage::Dns, Stage::Connected];
    tokio::time::timeout_at(soon(), async {
        loop {
            let stages: Vec<Stage> = joiner.bootstrap_report().iter().map(|line| line.stage).collect();
            if stages == expected {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("expected {expected:?}, got {:#?}", joiner.bootstrap_report()));
    let text = joiner.bootstrap_report().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(text.contains("failed at wrong identity: the peer there is 12D3KooW"), "{text}");
    assert!(text.contains("failed at connect: Connection refused"), "{text}");
    assert!(text.lines().last().unwrap().ends_with(": connected"), "{text}");
    joiner.close().await;
    server.close().await;
}

type Foreign = libp2p::Swarm<libp2p::identify::Behaviour>;

/// Somebody else's program: encryption, multiplexing and identify are those of every libp2p peer, potluck it is not.
fn foreign_swarm(security: Security) -> Foreign {
    let builder = libp2p::SwarmBuilder::with_new_identity().with_tokio();
    let (tcp, mux) = (libp2p::tcp::Config::default(), libp2p::yamux::Config::default);
    let behaviour = |key: &libp2p::identity::Keypair| {
        let config = libp2p::identify::Config::new("/elsewhere/7".into(), key.public());
        libp2p::identify::Behaviour::new(config.with_agent_version("kitchen/7".into()))
    };
    if security == Security::NoiseOnly {
        let builder = builder.with_tcp(tcp, libp2p::noise::Config::new, mux).expect("noise needs nothing");
        return builder.with_behaviour(behaviour).expect("identify needs nothing").build();
    }
    let builder = builder.with_tcp(tcp, libp2p::tls::Config::new, mux).expect("a certificate can be made");
    builder.with_behaviour(behaviour).expect("identify needs nothing").build()
}

/// Let it run, and where it listens.
async fn serve(mut foreign: Foreign) -> (Tasks, String) {
    let loopback = TCP.parse().expect("an address");
    foreign.listen_on(loopback).expect("loopback can be listened on");
    let (told, address) = tokio::sync::oneshot::channel();
    let id = *foreign.local_peer_id();
    let serving = Tasks::new();
    serving.spawn(async move {
        let mut told = Some(told);
        loop {
            let event = futures::StreamExt::select_next_some(&mut foreign).await;
            if let libp2p::swarm::SwarmEvent::NewListenAddr { address, .. } = event
                && let Some(told) = told.take()
            {
                told.send(format!("{address}/p2p/{id}")).expect("somebody waits for it");
            }
        }
    });
    (serving, address.await.expect("it listens"))
}

#[tokio::test]
async fn a_bootstrap_peer_that_speaks_something_else_has_failed_at_version() {
    // What is asked at this stage is asked over the encrypted connection: libp2p's own TLS understands ours.
    for security in [Security::NoiseOnly, Security::TlsOnly] {
        let (_serving, address) = serve(foreign_swarm(security)).await;
        let joiner = peer_on(&[TCP], |config| {
            config.bootstrap = vec![address.clone()];
            config.security = security;
        })
        .await;
        let report = joiner.wait_bootstrapped(Instant::now() + Duration::from_secs(3)).await.unwrap_err();
        let expected = format!(
            "{address}: failed at version: the peer there speaks \"/elsewhere/7\" (kitchen/7), not \"/potluck/1\""
        );
        assert_eq!(report[0].to_string(), expected);
        joiner.close().await;
    }
}

#[tokio::test]
async fn libp2ps_own_tls_dials_ours() {
    let server = peer_on(&[TCP], |config| config.security = Security::TlsOnly).await;
    let mut foreign = foreign_swarm(Security::TlsOnly);
    let address: libp2p::Multiaddr = server.addresses()[0].parse().unwrap();
    foreign.dial(address).unwrap();
    let met = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            let event = futures::StreamExt::select_next_some(&mut foreign).await;
            if let libp2p::swarm::SwarmEvent::ConnectionEstablished { peer_id, .. } = event {
                return peer_id;
            }
            assert!(!matches!(event, libp2p::swarm::SwarmEvent::OutgoingConnectionError { .. }), "{event:?}");
        }
    });
    assert_eq!(met.await.unwrap().to_string(), server.local_peer().to_string());
    server.close().await;
}

#[tokio::test]
async fn a_bootstrap_peer_that_comes_late_is_found() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let seed = [7; 32];
    let id = Identity::from_seed(&seed).peer_id();
    let address = format!("/ip4/127.0.0.1/tcp/{port}");
    let joiner = peer_on(&[TCP], |config| config.bootstrap = vec![format!("{address}/p2p/{id}")]).await;
    let early = joiner.wait_bootstrapped(Instant::now() + Duration::from_millis(300)).await.unwrap_err();
    assert!(!early[0].ok);
    let server = peer_on(&[&address], |config| config.identity = Identity::from_seed(&seed)).await;
    assert_eq!(joiner.wait_bootstrapped(soon()).await.unwrap(), id);
    joiner.close().await;
    server.close().await;
}

/// What a peer tells others right after its start is what it would tell them later: a token made with loopback alone, as it
/// is found first, would lead nobody here. Many start at once, so that the system's list of interfaces comes late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_started_peer_knows_its_addresses() {
    let starts = (0..30).map(|_| async {
        let peer = peer_on(&["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1"], |_| {}).await;
        let told = peer.addresses();
        (peer, told)
    });
    let started = futures::future::join_all(starts).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    for (peer, told) in started {
        assert_eq!(told, peer.addresses());
        peer.abort();
    }
}

#[tokio::test]
async fn addresses_that_cannot_be_used_are_refused_at_the_start() {
    let env = Env::real();
    let mut config = Config::loopback(identity(&env));
    config.bootstrap = vec!["/ip4/127.0.0.1/tcp/4001".into()];
    let error = Libp2pTransport::start(config, env.clone()).await.unwrap_err();
    assert!(error.to_string().contains("/p2p/<peer id>"), "{error}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = Config::loopback(identity(&env));
    config.listen = vec![format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().unwrap().port())];
    let error = Libp2pTransport::start(config, env).await.unwrap_err();
    assert!(matches!(error, StartError::Listen { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_found_by_its_id_through_the_bootstrap_peer() {
    let protocol = Protocol::new("/test/hello/1");
    let server = peer_on(&[TCP, QUIC], |_| {}).await;
    let known = server.addresses();
    let alice = peer_on(&[TCP, QUIC], |config| config.bootstrap = known.clone()).await;
    let bob = peer_on(&[TCP, QUIC], |config| config.bootstrap = known.clone()).await;
    alice.wait_bootstrapped(soon()).await.unwrap();
    bob.wait_bootstrapped(soon()).await.unwrap();
    let mut incoming = bob.accept(protocol.clone(), 4).unwrap();
    found_by_id(&alice, &bob, &protocol).await;
    let theirs = incoming.next().await.expect("Bob is told");
    assert_eq!(theirs.peer(), alice.local_peer());
    assert_eq!(alice.path(bob.local_peer()), Some(Path::Direct));
    for peer in [alice, bob, server] {
        peer.close().await;
        assert!(peer.connected().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_found_by_its_id_by_one_that_has_only_just_started() {
    let protocol = Protocol::new("/test/hello/1");
    let server = peer_on(&[TCP, QUIC], |_| {}).await;
    let known = server.addresses();
    let bob = peer_on(&[TCP], |config| config.bootstrap = known.clone()).await;
    let _incoming = bob.accept(protocol.clone(), 4).unwrap();
    bob.wait_bootstrapped(soon()).await.unwrap();
    let first = peer_on(&[TCP], |config| config.bootstrap = known.clone()).await;
    found_by_id(&first, &bob, &protocol).await;
    // Nothing is awaited: neither the bootstrap peer's connection nor what it says of itself.
    let alice = peer_on(&[TCP], |config| config.bootstrap = known.clone()).await;
    alice.open(bob.local_peer(), protocol.clone()).await.expect("the caller waits until it knows enough");
    // A peer that nobody knows is given up without waiting for the deadline of an open.
    let nobody = identity(&Env::real()).peer_id();
    let refused = alice.open(nobody, protocol).await.unwrap_err();
    assert!(matches!(refused, OpenError::Unreachable { .. }), "{refused}");
    for peer in [alice, first, bob, server] {
        peer.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_listens_nowhere_is_reached_through_a_relay() {
    let protocol = Protocol::new("/test/hello/1");
    let relay = peer_on(&[TCP], |config| {
        config.relay_server = true;
        config.announce = Vec::new();
    })
    .await;
    let hidden = peer_on(&[], |config| config.bootstrap = relay.addresses()).await;
    let mut incoming = hidden.accept(protocol.clone(), 4).unwrap();
    reserved(&hidden, &relay.addresses()).await;
    // By its id alone, and before the relay has said that it is one.
    let caller = peer_on(&[TCP], |config| config.bootstrap = relay.addresses()).await;
    let mut stream = caller.open(hidden.local_peer(), protocol).await.unwrap();
    assert_eq!(caller.path(hidden.local_peer()), Some(Path::Relayed));
    let mut theirs = incoming.next().await.unwrap();
    let send = async {
        stream.send(vec![7; 1 << 20].into()).await.unwrap();
        stream.finish().await.unwrap();
    };
    let receive = async {
        assert_eq!(theirs.recv().await.unwrap().unwrap().len(), 1 << 20);
        assert_eq!(theirs.recv().await, Ok(None));
    };
    tokio::join!(send, receive);
    let traffic = caller.traffic();
    assert!(traffic.relayed_bytes > 1 << 20, "{traffic:?}");
    for peer in [hidden, caller, relay] {
        peer.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_are_told_where_a_relay_is_now_and_not_where_it_was() {
    let seed = Env::real().random_bytes();
    let relay = async |listen| {
        let serve = |config: &mut Config| {
            config.relay_server = true;
            config.identity = Identity::from_seed(&seed);
        };
        peer_on(&[listen], serve).await
    };
    let first = relay(TCP).await;
    let hidden = peer_on(&[], |config| config.bootstrap = first.addresses()).await;
    reserved(&hidden, &first.addresses()).await;
    first.close().await;
    let second = relay(QUIC).await;
    hidden.add_addresses(second.local_peer(), &second.addresses());
    // It serves nothing: an answer, whatever it says, means that both are connected.
    let refused = hidden.open(second.local_peer(), Protocol::new("/test/hello/1")).await;
    assert!(matches!(refused, Err(OpenError::UnknownProtocol { .. })), "{refused:?}");
    reserved(&hidden, &second.addresses()).await;
    for peer in [hidden, second] {
        peer.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_too_many_connections_those_go_that_nobody_needs() {
    let protocol = Protocol::new("/test/hello/1");
    let node = peer_on(&[TCP], |config| {
        config.relay_server = true;
        config.connections = Watermarks { high: 4, low: 2, idle_min: Duration::ZERO };
    })
    .await;
    let mut incoming = node.accept(protocol.clone(), 8).unwrap();
    let hidden = peer_on(&[], |config| config.bootstrap = node.addresses()).await;
    reserved(&hidden, &node.addresses()).await;
    let mut others = Vec::new();
    for _ in 0..7 {
        // Whoever knows its address needs no place at a relay.
        let other = peer_on(&[TCP], |config| config.announce = vec!["/ip4/127.0.0.1/tcp/9".into()]).await;
        other.add_addresses(node.local_peer(), &node.addresses());
        others.push(other);
    }
    let mut talk = others[0].open(node.local_peer(), protocol.clone()).await.unwrap();
    let mut theirs = incoming.next().await.unwrap();
    for other in &others[1..] {
        drop(other.open(node.local_peer(), protocol.clone()).await.unwrap());
        drop(incoming.next().await.unwrap());
    }
    // A relay keeps every connection for 10 s. Routing may dial some again.
    let mut gone = BTreeSet::new();
    let given_up = tokio::time::timeout_at(soon(), async {
        while gone.len() < 4 {
            let left = node.connected();
            // The longest unused one is that of the hidden peer, which is reached over it.
            assert!(left.contains(&hidden.local_peer()), "its place at the relay keeps the connection");
            assert!(left.contains(&others[0].local_peer()), "a stream runs on this one");
            let ids = others.iter().map(|other| other.local_peer());
            gone.extend(ids.filter(|other| !left.contains(other)));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(given_up.await.is_ok(), "{gone:?}");
    talk.send("still here".into()).await.unwrap();
    assert_eq!(theirs.recv().await.unwrap().unwrap(), "still here");
    let again = others.iter().find(|other| gone.contains(&other.local_peer())).unwrap();
    again.open(node.local_peer(), protocol).await.expect("whoever needs one again gets it");
    for peer in others.into_iter().chain([hidden, node]) {
        peer.close().await;
    }
}
