//! The facade as other crates use it: joining, owner tags, clients, rendezvous, the end.

use bytes::Bytes;
use potluck_dht::{Dht, DhtConfig, Found, StoreProblem, owner_tag, rendezvous};
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimNet, run};
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

async fn node(net: &SimNet, spec: PeerSpec, initial_peers: Vec<PeerId>, client_mode: bool) -> Dht {
    let transport = net.add_peer(spec);
    let env = net.env(transport.local_peer());
    let config = DhtConfig { initial_peers, client_mode, ..DhtConfig::default() };
    Dht::start(transport, env, config).await.expect("the settings are valid")
}

async fn swarm(net: &SimNet, count: usize) -> Vec<Dht> {
    let mut nodes: Vec<Dht> = Vec::new();
    for _ in 0..count {
        let initial_peers = nodes.first().map(Dht::local_peer).into_iter().collect();
        nodes.push(node(net, PeerSpec::default(), initial_peers, false).await);
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    nodes
}

fn text(found: Option<Found>) -> String {
    match found {
        Some(Found::Regular(value, _)) => String::from_utf8(value.to_vec()).expect("text was stored"),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_record_is_found_until_it_expires_and_never_after() {
    run(1, async |net| {
        let nodes = swarm(&net, 8).await;
        let stored = nodes[1].store(b"key", None, "value".into(), MINUTE).await;
        assert_eq!((stored.value.replicas, stored.value.accepted), (5, 5));
        tokio::time::sleep(MINUTE - Duration::from_secs(1)).await;
        assert_eq!(text(nodes[7].get(b"key", true).await.value), "value");
        // Copies that were handed on may be late by what the way took.
        tokio::time::sleep(Duration::from_secs(4)).await;
        for node in &nodes {
            assert_eq!(node.get(b"key", true).await.value, None);
        }
    });
}

#[test]
fn the_later_store_of_an_owner_wins_even_after_a_restart_with_a_clock_set_back() {
    run(2, async |net| {
        let nodes = swarm(&net, 8).await;
        let spec = |name: &str, clock_skew| PeerSpec { name: name.into(), clock_skew, ..PeerSpec::default() };
        let initial = vec![nodes[0].local_peer()];
        let alice = node(&net, spec("alice", 3600), initial.clone(), true).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let subkey = owner_tag(alice.local_peer());
        let first = alice.store(b"run", Some(subkey.as_bytes()), "one".into(), MINUTE).await;
        assert_eq!(first.value.accepted, 5);
        // The same identity in a new process whose versions would start lower.
        let tasks = alice.transport().clone();
        alice.shutdown().await;
        let env = potluck_net::Env::simulated(1, Duration::ZERO);
        let config = DhtConfig { initial_peers: initial, client_mode: true, ..DhtConfig::default() };
        let again = Dht::start(tasks, env, config).await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let second = again.store(b"run", Some(subkey.as_bytes()), "two".into(), MINUTE / 2).await;
        assert_eq!(second.value.accepted, 5);
        let Some(Found::Dictionary(items)) = nodes[3].get(b"run", true).await.value else { panic!() };
        assert_eq!(items[subkey.as_bytes()].0, Bytes::from_static(b"two"));
        let stolen = nodes[3].store(b"run", Some(subkey.as_bytes()), "three".into(), 2 * MINUTE).await;
        assert_eq!(stolen.value.problem, Some(StoreProblem::Invalid));
    });
}

#[test]
fn a_client_is_in_nobodys_table_and_a_late_bootstrap_is_found() {
    run(3, async |net| {
        let (late, early) = (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()));
        let config = |client_mode| DhtConfig {
            initial_peers: vec![late.local_peer()],
            client_mode,
            ..DhtConfig::default()
        };
        let client = Dht::start(early.clone(), net.env(early.local_peer()), config(true)).await.unwrap();
        let alone = client.store(b"key", None, "value".into(), MINUTE).await;
        assert_eq!((alone.value.replicas, alone.value.accepted), (0, 0), "a client is no replica");
        let server = Dht::start(late.clone(), net.env(late.local_peer()), config(false)).await.unwrap();
        tokio::time::sleep(MINUTE).await;
        assert_eq!((client.routing_table_len(), server.routing_table_len()), (1, 0));
        assert_eq!(client.store(b"key", None, "value".into(), MINUTE).await.value.accepted, 1);
        assert_eq!(text(server.get(b"key", false).await.value), "value");
    });
}

#[test]
fn peers_of_a_run_find_each_other_and_see_who_left() {
    run(4, async |net| {
        let nodes = swarm(&net, 12).await;
        for node in &nodes[2..6] {
            assert!(rendezvous::announce(node, b"run", b"hello").await.value.accepted >= 1);
        }
        let mut expected: Vec<PeerId> = nodes[2..6].iter().map(Dht::local_peer).collect();
        expected.sort();
        let seen = rendezvous::lookup(&nodes[0], b"run").await.value;
        assert_eq!(seen.iter().map(|peer| peer.peer).collect::<Vec<_>>(), expected);
        assert!(seen.iter().all(|peer| &peer.payload[..] == b"hello"));
        let _ = rendezvous::withdraw(&nodes[3], b"run").await;
        let seen = rendezvous::lookup(&nodes[0], b"run").await.value;
        assert_eq!(seen.len(), 3);
        assert!(seen.iter().all(|peer| peer.peer != nodes[3].local_peer()));
    });
}

#[test]
fn the_last_clone_takes_the_node_with_it() {
    run(5, async |net| {
        let transport = net.add_peer(PeerSpec::default());
        let env = net.env(transport.local_peer());
        let start = || Dht::start(transport.clone(), env.clone(), DhtConfig::default());
        let first = start().await.unwrap();
        assert!(start().await.is_err(), "one owner per protocol");
        let clone = first.clone();
        drop(first);
        assert!(start().await.is_err(), "a clone keeps it alive");
        drop(clone);
        tokio::time::sleep(Duration::from_millis(10)).await;
        start().await.unwrap().shutdown().await;
        assert!(start().await.is_ok());
    });
}
