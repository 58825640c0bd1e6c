//! Peers that flood, fall silent, invent nodes or send noise, at a living node: it says no and goes on serving others.

use bytes::Bytes;
use potluck_dht::wire::{
    Answer, Ask, PROTOCOL, RECORDS_MAX, Refusal, Reply, Request, WireContact, WireRecord,
};
use potluck_dht::{Dht, DhtConfig, DhtId, Found, Verdict};
use potluck_net::{FaultKind, PeerId, Protocol, Tasks, Transport, rpc};
use potluck_net_sim::{PeerSpec, SimNet, SimTransport, run};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

const HOUR: Duration = Duration::from_secs(3600);

async fn node_with(net: &SimNet, config: DhtConfig) -> Dht {
    let transport = net.add_peer(PeerSpec::default());
    let env = net.env(transport.local_peer());
    Dht::start(transport, env, config).await.expect("the settings are valid")
}

async fn node(net: &SimNet, initial_peers: Vec<PeerId>) -> Dht {
    node_with(net, DhtConfig { initial_peers, ..DhtConfig::default() }).await
}

async fn swarm(net: &SimNet, count: usize) -> Vec<Dht> {
    let mut nodes: Vec<Dht> = Vec::new();
    for _ in 0..count {
        nodes.push(node(net, nodes.first().map(Dht::local_peer).into_iter().collect()).await);
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    nodes
}

/// Whatever bytes a peer may send, and what comes back.
async fn send(from: &SimTransport, to: PeerId, request: Bytes) -> Reply {
    let deadline = Instant::now() + Duration::from_secs(3);
    let answer = rpc::call(from, to, &Protocol::new(PROTOCOL), request, deadline).await;
    Answer::decode(answer.expect("a living node answers")).expect("in the right form").reply
}

async fn ask(from: &SimTransport, to: PeerId, ask: Ask) -> Reply {
    send(from, to, Request { sender: None, ask }.encode()).await
}

/// Records under keys of their own.
fn records(numbers: std::ops::Range<usize>) -> Ask {
    let record = |number: usize| WireRecord {
        key: Bytes::from(format!("key {number}")),
        subkey: None,
        value: Bytes::from_static(b"v"),
        left: HOUR,
    };
    Ask::Store { handed_on: false, records: numbers.map(record).collect() }
}

/// Answer as a node does that stores nothing: with `contacts` to every find, each after its time.
fn serve(
    transport: &SimTransport,
    tasks: &Tasks,
    answer_after: Duration,
    contacts: Vec<WireContact>,
    stores: Arc<Open>,
) {
    let incoming = transport.accept(Protocol::new(PROTOCOL), 256).expect("free");
    rpc::serve(incoming, tasks, rpc::Places { total: 256, per_peer: 64 }, move |_, request| {
        let (contacts, stores) = (contacts.clone(), stores.clone());
        async move {
            let reply = match Request::decode(request).ok()?.ask {
                Ask::Ping => Reply::Pong,
                Ask::Find { .. } => {
                    tokio::time::sleep(answer_after).await;
                    Reply::Found { entry: None, contacts }
                }
                Ask::Store { records, .. } => {
                    stores.most.fetch_max(stores.now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                    stores.all.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(answer_after).await;
                    stores.now.fetch_sub(1, Ordering::Relaxed);
                    Reply::Stored(vec![Verdict::Same; records.len()])
                }
            };
            Some(Answer { addresses: Arc::new([]), reply }.encode())
        }
    });
}

/// Stores that are being answered now, at most, and in all.
#[derive(Default)]
struct Open {
    now: AtomicUsize,
    most: AtomicUsize,
    all: AtomicUsize,
}

/// Get into the table of `node`.
async fn introduce(transport: &SimTransport, node: &Dht) {
    let request = Request { sender: Some(transport.addresses().into()), ask: Ask::Ping };
    assert_eq!(send(transport, node.local_peer(), request.encode()).await, Reply::Pong);
}

fn nearest_first(mut peers: Vec<PeerId>, key: &[u8]) -> Vec<PeerId> {
    let target = DhtId::of_key(key);
    peers.sort_by_key(|peer| DhtId::of_peer(*peer).distance(&target));
    peers
}

#[test]
fn noise_is_refused_by_name_and_an_honest_question_answered_after_it() {
    run(1, async |net| {
        let (dht, stranger) = (node(&net, Vec::new()).await, net.add_peer(PeerSpec::default()));
        let noise = Bytes::from_static(b"\x01\xff\xfenoise");
        assert_eq!(send(&stranger, dht.local_peer(), noise).await, Reply::Refused(Refusal::Malformed));
        assert_eq!((dht.stats().malformed, dht.stats().answered), (1, 0));
        assert_eq!(ask(&stranger, dht.local_peer(), Ask::Ping).await, Reply::Pong);
        assert_eq!((dht.stats().malformed, dht.stats().answered), (1, 1));
    });
}

#[test]
fn a_flood_of_records_is_refused_by_what_it_costs_and_others_are_served() {
    run(2, async |net| {
        let dht = node(&net, Vec::new()).await;
        let (flooder, honest) = (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()));
        let too_many = ask(&flooder, dht.local_peer(), records(0..RECORDS_MAX + 1)).await;
        assert_eq!(too_many, Reply::Refused(Refusal::Malformed));

        let begun = Instant::now();
        let mut stored = 0;
        for _ in 0..100 {
            match ask(&flooder, dht.local_peer(), records(stored..stored + RECORDS_MAX)).await {
                Reply::Stored(_) => stored += RECORDS_MAX,
                other => {
                    assert_eq!(other, Reply::Refused(Refusal::Rate));
                    break;
                }
            }
        }
        assert_eq!(dht.stats().over_rate, 1);
        // 500 requests at once and 50 a second, of 16 records each; the last one may go into debt.
        let allowed = 16.0 * (500.0 + 50.0 * begun.elapsed().as_secs_f64());
        assert!(stored as f64 <= allowed + RECORDS_MAX as f64, "{stored} records, {allowed} allowed");
        assert_eq!(ask(&honest, dht.local_peer(), Ask::Ping).await, Reply::Pong);
        assert!(matches!(ask(&honest, dht.local_peer(), records(0..9)).await, Reply::Stored(_)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(ask(&flooder, dht.local_peer(), Ask::Ping).await, Reply::Pong, "its debt is paid");
    });
}

#[test]
fn thousands_of_keys_reach_a_newcomer_within_its_rate() {
    run(3, async |net| {
        let old = node(&net, Vec::new()).await;
        for number in 0..5000 {
            let stored = old.store(format!("key {number}").as_bytes(), None, "v".into(), HOUR).await;
            assert_eq!(stored.value.accepted, 1);
        }
        let new = node(&net, vec![old.local_peer()]).await;
        // The hand-over, and the first of the rounds in which the holders look after what they hold.
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(new.stats().keys, 5000);
        assert_eq!((old.stats().over_rate, new.stats().over_rate), (0, 0));
        let first_round = new.stats().answered;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let messages = new.stats().answered - first_round;
        assert!((20..400).contains(&messages), "{messages} messages for one or two rounds of 5000 keys");
        assert_eq!((old.stats().over_rate, new.stats().over_rate), (0, 0));
    });
}

#[test]
fn one_peer_places_so_many_records_and_they_are_handed_on_one_after_the_other() {
    run(4, async |net| {
        let dht = node(&net, Vec::new()).await;
        let (hog, slow) = (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()));
        let (tasks, stores) = (Tasks::new(), Arc::new(Open::default()));
        serve(&slow, &tasks, Duration::from_millis(2900), Vec::new(), stores.clone());
        introduce(&slow, &dht).await;
        let mut full = 0;
        for first in (0..10_000).step_by(RECORDS_MAX) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            match ask(&hog, dht.local_peer(), records(first..first + RECORDS_MAX)).await {
                Reply::Stored(verdicts) => {
                    full += verdicts.iter().filter(|verdict| **verdict == Verdict::Full).count();
                }
                other => panic!("{other:?}"),
            }
        }
        let limit = DhtConfig::default().storage_records_per_peer_max;
        assert_eq!((dht.stats().keys, full), (limit, 40 * RECORDS_MAX - limit));
        tokio::time::sleep(Duration::from_secs(600)).await;
        let (most, all) = (stores.most.load(Ordering::Relaxed), stores.all.load(Ordering::Relaxed));
        assert!(all > 2 * limit / RECORDS_MAX, "{all} messages: it hands on more than once in that time");
        assert_eq!(most, 1, "one round after the other");
    });
}

#[test]
fn a_node_that_invents_nodes_costs_a_search_less_than_two_silences() {
    run(5, async |net| {
        let nodes = swarm(&net, 8).await;
        assert_eq!(nodes[1].store(b"key", None, "value".into(), HOUR).await.value.accepted, 5);
        let silent: Vec<PeerId> = (0..600).map(|_| net.add_peer(PeerSpec::default()).local_peer()).collect();
        silent.iter().for_each(|peer| net.vanish(*peer));
        let named = nearest_first(silent, b"key").into_iter().take(64);
        let named = named.map(|peer| (peer, vec!["/ip4/1.2.3.4".to_owned()].into())).collect();
        let (liar, tasks) = (net.add_peer(PeerSpec::default()), Tasks::new());
        serve(&liar, &tasks, Duration::ZERO, named, Arc::default());
        introduce(&liar, &nodes[7]).await;
        tokio::time::sleep(Duration::from_secs(1)).await;

        let begun = Instant::now();
        let found = nodes[7].get(b"key", true).await;
        assert!(matches!(found.value, Some(Found::Regular(value, _)) if value == "value"));
        let silences = found.faults.iter().filter(|fault| fault.kind == FaultKind::Silent).count();
        assert!(silences >= 5, "the invented nodes were asked: {:?}", found.faults);
        assert!(2 * begun.elapsed() < 3 * DhtConfig::default().rpc_timeout, "{:?}", begun.elapsed());
    });
}

#[test]
fn a_chain_of_late_nodes_ends_a_search_with_what_it_has() {
    run(6, async |net| {
        let nodes = swarm(&net, 8).await;
        assert_eq!(nodes[1].store(b"key", None, "value".into(), HOUR).await.value.accepted, 5);
        let (mut chain, tasks) = (Vec::new(), Tasks::new());
        let late: Vec<Arc<SimTransport>> = (0..40).map(|_| net.add_peer(PeerSpec::default())).collect();
        let mut order = nearest_first(late.iter().map(|peer| peer.local_peer()).collect(), b"key");
        order.reverse();
        for transport in &late {
            let at =
                order.iter().position(|peer| *peer == transport.local_peer()).expect("it is one of them");
            let next = order.get(at + 1).map(|peer| (*peer, vec!["/ip4/1.2.3.4".to_owned()].into()));
            serve(transport, &tasks, Duration::from_millis(2900), next.into_iter().collect(), Arc::default());
            if at == 0 {
                chain.push(transport);
            }
        }
        introduce(chain[0], &nodes[7]).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let begun = Instant::now();
        let found = nodes[7].get(b"key", true).await;
        assert!(matches!(found.value, Some(Found::Regular(value, _)) if value == "value"));
        assert_eq!(begun.elapsed().as_secs(), 30, "the chain would take two minutes");
    });
}

#[test]
fn a_node_that_refuses_keeps_its_place() {
    run(7, async |net| {
        let (dht, busy) = (node(&net, Vec::new()).await, net.add_peer(PeerSpec::default()));
        let (tasks, refusing) = (Tasks::new(), Arc::new(AtomicBool::new(false)));
        let (incoming, refuses) = (busy.accept(Protocol::new(PROTOCOL), 8).expect("free"), refusing.clone());
        rpc::serve(incoming, &tasks, rpc::Places { total: 8, per_peer: 8 }, move |_, request| {
            let reply = match Request::decode(request) {
                Ok(Request { ask: Ask::Find { .. }, .. }) => {
                    Reply::Found { entry: None, contacts: Vec::new() }
                }
                _ => Reply::Pong,
            };
            let answer = Answer { addresses: Arc::new([]), reply }.encode();
            let answer = (!refuses.load(Ordering::Relaxed)).then_some(answer);
            async move { answer }
        });
        introduce(&busy, &dht).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        refusing.store(true, Ordering::Relaxed);
        for _ in 0..4 {
            let faults = dht.get(b"key", true).await.faults;
            assert_eq!(faults.iter().map(|fault| fault.kind).collect::<Vec<_>>(), [FaultKind::Refused]);
        }
        assert_eq!(dht.routing_table_len(), 1);
        refusing.store(false, Ordering::Relaxed);
        assert_eq!(dht.get(b"key", true).await.faults, []);
    });
}

#[test]
fn a_node_is_not_blamed_for_our_own_line() {
    run(9, async |net| {
        let (dht, slow) = (node(&net, Vec::new()).await, net.add_peer(PeerSpec::default()));
        let tasks = Tasks::new();
        serve(&slow, &tasks, Duration::from_millis(2900), Vec::new(), Arc::default());
        introduce(&slow, &dht).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        // It answers sixteen at a time, each within its time: as many wait for their turn, and more for too long.
        let gets = futures::future::join_all((0..40).map(|_| dht.get(b"key", true))).await;
        let faults: Vec<_> = gets.iter().flat_map(|found| &found.faults).collect();
        assert!(faults.iter().all(|fault| fault.kind == FaultKind::Refused), "{faults:?}");
        assert_eq!(faults.len(), 8, "{faults:?}");
        assert_eq!(dht.routing_table_len(), 1);
    });
}

#[test]
fn a_connection_that_breaks_under_many_questions_is_one_failure() {
    run(10, async |net| {
        let nodes = swarm(&net, 2).await;
        let (from, to) = (nodes[0].local_peer(), nodes[1].local_peer());
        for round in 0..2 {
            let rule = net.set_rule(move |frame| {
                let answers = frame.from == to && frame.to == from;
                if answers { potluck_net_sim::Verdict::Reset } else { potluck_net_sim::Verdict::Pass }
            });
            let gets = futures::future::join_all((0..16).map(|_| nodes[0].get(b"key", true))).await;
            let broken = gets.iter().flat_map(|found| &found.faults);
            assert_eq!(broken.filter(|fault| fault.kind == FaultKind::Reset).count(), 16);
            drop(rule);
            assert_eq!(nodes[0].routing_table_len(), 1, "round {round}: once is no reason");
            assert_eq!(nodes[0].get(b"key", true).await.faults, [], "round {round}: it is asked again");
        }
    });
}

#[test]
fn one_broken_stream_costs_a_node_nothing_and_two_its_place() {
    run(8, async |net| {
        let nodes = swarm(&net, 2).await;
        let (from, to) = (nodes[0].local_peer(), nodes[1].local_peer());
        let left = Arc::new(AtomicUsize::new(0));
        let breaks = left.clone();
        let _rule = net.set_rule(move |frame| {
            let is_ours = frame.from == from && frame.to == to;
            let hit = is_ours
                && breaks
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                    .is_ok();
            if hit { potluck_net_sim::Verdict::Reset } else { potluck_net_sim::Verdict::Pass }
        });
        for round in 0..3 {
            left.store(1, Ordering::Relaxed);
            let faults = nodes[0].get(b"key", true).await.faults;
            assert_eq!(faults.iter().map(|fault| fault.kind).collect::<Vec<_>>(), [FaultKind::Reset]);
            assert_eq!(nodes[0].routing_table_len(), 1);
            assert_eq!(nodes[0].get(b"key", true).await.faults, [], "round {round}: it is asked again");
        }
        left.store(2, Ordering::Relaxed);
        for _ in 0..2 {
            assert_eq!(nodes[0].get(b"key", true).await.faults.len(), 1);
        }
        assert_eq!(nodes[0].routing_table_len(), 0);
    });
}
