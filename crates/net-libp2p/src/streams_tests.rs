//! Tests of connections that are there for something else than streams.

use super::Behaviour;
use crate::convert::to_libp2p;
use crate::shared::Shared;
use crate::{Config, Libp2pTransport};
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use potluck_net::{Env, Identity, Protocol, Reachability, Transport};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

const NAME: &str = "/test/streams/1";
const PATIENCE: Duration = Duration::from_secs(60);

async fn start(seed: u8, listen: &str, bootstrap: Vec<String>) -> Arc<Libp2pTransport> {
    let mut config = Config::loopback(Identity::from_seed(&[seed; 32]));
    (config.listen, config.bootstrap) = (vec![listen.to_owned()], bootstrap);
    Libp2pTransport::start(config, Env::real()).await.unwrap()
}

/// Whoever is asked whether a peer can be reached dials it from a new port. That connection holds a socket and memory, and
/// there is another one: it goes at once, and whoever opens streams meanwhile notices nothing.
async fn a_probe_leaves_nothing(listen: &str) {
    let asked = start(1, listen, Vec::new()).await;
    let asks = start(2, listen, asked.addresses()).await;
    let mut incoming = asked.accept(Protocol::new(NAME), 16).unwrap();
    // Each asks the other, at almost the same time; a request on a probe that closes comes again much later.
    let known = || [&asked, &asks].iter().any(|peer| peer.reachability() == Reachability::Public);
    let open_until_known = async {
        while !known() {
            let mut ours = asks.open(asked.local_peer(), Protocol::new(NAME)).await.unwrap();
            let mut theirs = incoming.next().await.unwrap();
            let (sent, got) = tokio::join!(ours.send(vec![1].into()), theirs.recv());
            assert!(sent.is_ok() && got.unwrap().is_some());
        }
    };
    timeout(PATIENCE, open_until_known).await.expect("one of them is told that it can be reached");
    let links = || {
        let of =
            |peer: &Libp2pTransport, other: &Libp2pTransport| peer.shared().peers.links(other.local_peer());
        (of(&asked, &asks), of(&asks, &asked))
    };
    let closed = async {
        while links() != (1, 1) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, closed).await.unwrap_or_else(|_| panic!("one connection is enough, not {:?}", links()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_over_tcp_leaves_nothing() {
    a_probe_leaves_nothing("/ip4/127.0.0.1/tcp/0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_over_quic_leaves_nothing() {
    a_probe_leaves_nothing("/ip4/127.0.0.1/udp/0/quic-v1").await;
}

/// The swarm lets a connection's task run before it tells of the connection: whoever has a stream by then asks for the peer.
#[test]
fn a_connection_is_in_the_table_before_its_task_runs() {
    let shared = Arc::new(Shared::default());
    let peer = Identity::from_seed(&[3; 32]).peer_id();
    let (local, remote) = ("/ip4/127.0.0.1/tcp/1".parse().unwrap(), "/ip4/127.0.0.1/tcp/2".parse().unwrap());
    let mut behaviour = Behaviour::new(shared.clone());
    let id = ConnectionId::new_unchecked(1);
    let handler = behaviour.handle_established_inbound_connection(id, to_libp2p(peer), &local, &remote);
    assert!(handler.is_ok());
    assert_eq!((shared.peers.connected(), shared.peers.links(peer)), (vec![peer], 1));
}
