//! Every number of a `Status` against a count that was made elsewhere: by the training programs of a simulated run, and
//! by the simulated network itself.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_collab::{
    Policy, Scheme, Session, SessionConfig, Snapshot, Status, Step, TensorInfo, TensorRole,
};
use potluck_net::{PeerId, Tasks, Transport};
use potluck_net_sim::{PeerSpec, SimNet, Verdict, run};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const VALUES: usize = 200_000;
const TARGET: u64 = 120;
const EPOCHS: u64 = 4;
const STEP: Duration = Duration::from_millis(500);

/// What one peer's program has counted by itself.
#[derive(Debug, Clone, Default)]
struct Count {
    /// Samples of this epoch, and of those that are over.
    samples: u64,
    contributed: u64,
    rounds: u64,
    rounds_failed: u64,
    faults: BTreeMap<String, u64>,
    loss: f32,
    last_seconds: f64,
}

#[derive(Default)]
struct Book {
    counts: BTreeMap<PeerId, Count>,
    /// Samples that all peers brought to the round of an epoch.
    brought: BTreeMap<u64, u64>,
    /// Bytes of frames of rounds, by sender and by receiver.
    sent: BTreeMap<PeerId, u64>,
    received: BTreeMap<PeerId, u64>,
}

type Ledger = Arc<Mutex<Book>>;

struct Peer {
    id: PeerId,
    session: Session,
    batch: u64,
    tasks: Tasks,
}

async fn join(net: &SimNet, known: &[Peer], batch: u64) -> Peer {
    let transport = net.add_peer(PeerSpec::default());
    let (id, env) = (transport.local_peer(), transport.env());
    let tensor = TensorInfo::vector("w", VALUES, TensorRole::Gradient);
    let mut config = SessionConfig::new("run", TARGET, vec![tensor]);
    config.grad_compression = Policy::Fixed(Scheme::Float16);
    config.bootstrap = known.iter().map(|peer| peer.id).collect();
    let session = Session::join(transport, env, config).await.unwrap();
    session.publish(Snapshot::default());
    Peer { id, session, batch, tasks: Tasks::new() }
}

/// What a user's loop does, until `epochs` are done or `samples` are in.
async fn train(id: PeerId, session: Session, batch: u64, ledger: Ledger) {
    let count = |change: &mut dyn FnMut(&mut Count)| {
        change(ledger.lock().unwrap().counts.entry(id).or_default());
    };
    let mut samples = 0;
    while session.epoch() < EPOCHS {
        match session.step(std::mem::take(&mut samples)) {
            Step::Accumulate => {
                tokio::time::sleep(STEP).await;
                samples = batch;
                let loss = batch as f32 + session.epoch() as f32;
                session.report_loss(loss);
                count(&mut |count| (count.samples, count.loss) = (count.samples + batch, loss));
            }
            Step::Average => {
                let (epoch, begun) = (session.epoch(), Instant::now());
                let weight = ledger.lock().unwrap().counts[&id].samples;
                *ledger.lock().unwrap().brought.entry(epoch).or_default() += weight;
                let outcome = session.average_gradients(vec![0.25; VALUES], weight as f64).await;
                session.epoch_done(Some(Snapshot::default()));
                count(&mut |count| {
                    count.rounds += u64::from(!outcome.value.alone);
                    count.rounds_failed += u64::from(outcome.value.alone);
                    count.contributed += std::mem::take(&mut count.samples);
                    count.last_seconds = begun.elapsed().as_secs_f64();
                    for fault in &outcome.faults {
                        *count.faults.entry(fault.kind.to_string()).or_default() += 1;
                    }
                });
            }
            step => panic!("nobody is ahead and there is no state to average: {step:?}"),
        }
    }
}

/// Three peers of different speed, trained to the end of the last epoch; the network counts the rounds' frames.
async fn trained(net: &SimNet, ledger: &Ledger) -> Vec<Peer> {
    let mut peers: Vec<Peer> = Vec::new();
    for batch in [2, 4, 6] {
        peers.push(join(net, &peers, batch).await);
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    for peer in &peers {
        peer.tasks.spawn(train(peer.id, peer.session.clone(), peer.batch, ledger.clone()));
    }
    while peers.iter().any(|peer| peer.session.epoch() < EPOCHS) {
        tokio::time::sleep(STEP).await;
    }
    peers
}

fn near(shown: f64, counted: f64, tolerance: f64, what: &str) {
    assert!((shown - counted).abs() <= tolerance * counted.abs(), "{what}: shown {shown}, counted {counted}");
}

#[test]
fn every_number_of_a_healthy_run_is_what_the_programs_and_the_network_counted() {
    run(11, async |net| {
        let ledger = Ledger::default();
        let book = ledger.clone();
        let _tap = net.set_rule(move |frame| {
            if frame.protocol.to_string().contains("/round/") {
                let mut book = book.lock().unwrap();
                *book.sent.entry(frame.from).or_default() += frame.bytes as u64;
                *book.received.entry(frame.to).or_default() += frame.bytes as u64;
            }
            Verdict::Pass
        });
        let peers = trained(&net, &ledger).await;
        // Half an epoch more, by hand.
        for at in 0..10 {
            tokio::time::sleep(STEP).await;
            for peer in peers.iter().filter(|_| at < 5) {
                assert_eq!(peer.session.step(peer.batch), Step::Accumulate);
                ledger.lock().unwrap().counts.get_mut(&peer.id).unwrap().samples += peer.batch;
            }
        }
        let book = ledger.lock().unwrap();
        for peer in &peers {
            let status = peer.session.status().borrow().clone();
            check_run(&status, &book, peer.id);
            check_peers(&status, &book, &peers);
            check_traffic(&status, &book, peer.id);
        }
    });
}

fn check_run(status: &Status, book: &Book, me: PeerId) {
    let own = &book.counts[&me];
    assert_eq!((status.epoch, status.target_batch_size, status.alone), (EPOCHS, TARGET, false));
    assert_eq!((status.rounds, status.rounds_failed), (own.rounds, own.rounds_failed));
    assert_eq!((own.rounds, own.rounds_failed), (EPOCHS, 0), "the run was healthy");
    assert_eq!(status.faults, own.faults);
    let samples: u64 = book.counts.values().map(|count| count.samples).sum();
    assert_eq!(samples, 60);
    assert_eq!(status.samples, samples);
    let brought: u64 = book.brought.values().sum();
    assert_eq!(status.lineage.unwrap().samples, brought, "samples in the history of the parameters");
    let left = (TARGET - samples) as f32 / status.samples_per_second;
    near(f64::from(status.eta_seconds.unwrap()), f64::from(left), 0.01, "seconds left");
    let round = status.last_round.as_ref().unwrap();
    assert_eq!(round.epoch, EPOCHS - 1);
    assert_eq!(round.weight_total, book.brought[&(EPOCHS - 1)] as f64);
    let (mut members, all): (_, Vec<PeerId>) = (round.members.clone(), book.counts.keys().copied().collect());
    members.sort_unstable();
    assert_eq!((members, round.faults.len()), (all, 0));
    near(round.stats.seconds, own.last_seconds, 0.05, "seconds of the last round");
}

fn check_peers(status: &Status, book: &Book, peers: &[Peer]) {
    assert_eq!(status.peers.len(), peers.len());
    let total: u64 = book.counts.values().map(|count| count.samples).sum();
    let mut speed = 0.0;
    for shown in &status.peers {
        let counted = &book.counts[&shown.peer];
        assert_eq!(shown.is_me, shown.peer.to_string() == status.peer);
        assert_eq!((shown.epoch, shown.samples), (EPOCHS, counted.samples), "{shown:?}");
        assert_eq!(shown.contributed, counted.contributed, "{shown:?}");
        assert_eq!(shown.loss, Some(counted.loss), "{shown:?}");
        near(f64::from(shown.share), counted.samples as f64 / total as f64, 1e-6, "share");
        let batch = peers.iter().find(|peer| peer.id == shown.peer).unwrap().batch;
        // Two steps a second. What a peer does beside its steps, such as averaging, does not count.
        near(f64::from(shown.samples_per_second), batch as f64 * 2.0, 0.1, "samples per second of a peer");
        speed += f64::from(shown.samples_per_second);
    }
    near(f64::from(status.samples_per_second), speed, 1e-4, "samples per second of all");
}

fn check_traffic(status: &Status, book: &Book, me: PeerId) {
    near(status.bytes_sent as f64, book.sent[&me] as f64, 0.01, "bytes sent");
    near(status.bytes_received as f64, book.received[&me] as f64, 0.01, "bytes received");
    // Two thirds of a vector of two bytes a value, there and back, in each epoch.
    let least = (EPOCHS * VALUES as u64 * 2 * 2 * 2 / 3) as f64;
    near(status.bytes_sent as f64, least, 0.05, "bytes of an all-reduce");
    near(f64::from(status.compression_ratio), 2.0, 0.01, "compression of float16");
}

#[test]
fn failures_are_counted_as_the_programs_met_them() {
    run(12, async |net| {
        let ledger = Ledger::default();
        let mut peers: Vec<Peer> = Vec::new();
        for batch in [2, 4, 6] {
            peers.push(join(&net, &peers, batch).await);
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        for peer in &peers {
            peer.tasks.spawn(train(peer.id, peer.session.clone(), peer.batch, ledger.clone()));
        }
        // The round of the second epoch meets a peer that is gone.
        while peers[0].session.epoch() < 1 || peers[0].session.status().borrow().samples < TARGET - 12 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let _stuck = net.set_rule({
            let dead = peers[2].id;
            move |frame| {
                if frame.from == dead && frame.protocol.to_string().contains("/round/") {
                    Verdict::Reset
                } else {
                    Verdict::Pass
                }
            }
        });
        tokio::time::sleep(Duration::from_secs(4)).await;
        let dead = peers.pop().unwrap();
        net.crash(dead.id);
        drop(dead);
        while peers.iter().any(|peer| peer.session.epoch() < EPOCHS) {
            tokio::time::sleep(STEP).await;
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        let book = ledger.lock().unwrap();
        for peer in &peers {
            let (status, counted) = (peer.session.status().borrow().clone(), &book.counts[&peer.id]);
            assert_eq!((status.rounds, status.rounds_failed), (counted.rounds, counted.rounds_failed));
            assert_eq!(status.faults, counted.faults);
            assert_eq!(status.peers.len(), 2, "the dead are not counted");
        }
        let faults: u64 = book.counts.values().flat_map(|count| count.faults.values()).sum();
        assert!(faults > 0, "nobody met the fault, so nothing was compared");
    });
}
