//! Every number of a `Status` against a count that was made elsewhere: by the training programs of a simulated run, and
//! by the simulated network itself.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use bytes::Bytes;
use potluck_collab::{
    Channel, LeftPeer, Policy, PolicyKind, Scheme, Session, SessionConfig, Snapshot, StateEvery, Status,
    Step, TensorInfo, TensorRole,
};
use potluck_net::{PeerId, Tasks, Transport};
use potluck_net_sim::{PeerSpec, SimNet, Verdict, run};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
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
    /// The last round: its length, when its first chunk left or came, and bytes of all rounds before it.
    last_seconds: f64,
    gather_seconds: f64,
    before_last: (u64, u64),
    /// Bytes of this program's states that somebody still holds.
    held: Arc<AtomicU64>,
}

/// A part of a state that tells how long it is held.
struct Counted(Vec<u8>, Arc<AtomicU64>);

impl Counted {
    fn state(bytes: usize, held: &Arc<AtomicU64>) -> Snapshot {
        held.fetch_add(bytes as u64, Ordering::Relaxed);
        let blob = Bytes::from_owner(Self(vec![7; bytes], held.clone()));
        Snapshot { blobs: BTreeMap::from([("param".to_owned(), blob)]), ..Snapshot::default() }
    }
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(self.0.len() as u64, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Book {
    counts: BTreeMap<PeerId, Count>,
    /// Samples that all peers brought to the round of an epoch.
    brought: BTreeMap<u64, u64>,
    /// Bytes of frames of rounds, by sender and by receiver.
    sent: BTreeMap<PeerId, u64>,
    received: BTreeMap<PeerId, u64>,
    /// When the first chunk of a round left a peer, since the peer forgot it.
    first_chunk: BTreeMap<PeerId, Instant>,
}

impl Book {
    fn traffic(&self, peer: PeerId) -> (u64, u64) {
        let of = |bytes: &BTreeMap<PeerId, u64>| bytes.get(&peer).copied().unwrap_or(0);
        (of(&self.sent), of(&self.received))
    }
}

type Ledger = Arc<Mutex<Book>>;

struct Peer {
    id: PeerId,
    session: Session,
    batch: u64,
    tasks: Tasks,
}

async fn join(net: &SimNet, known: &[Peer], batch: u64) -> Peer {
    join_over(PeerSpec::default(), net, known, batch, VALUES).await
}

async fn join_over(link: PeerSpec, net: &SimNet, known: &[Peer], batch: u64, values: usize) -> Peer {
    let transport = net.add_peer(link);
    let (id, env) = (transport.local_peer(), transport.env());
    let tensor = TensorInfo::vector("w", values, TensorRole::Gradient);
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
    // The state grows, so that states of different epochs are told apart.
    let held = Arc::new(AtomicU64::new(0));
    let state = |epoch: u64| Some(Counted::state(100_000 + 1000 * epoch as usize, &held));
    count(&mut |count| count.held = held.clone());
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
                let before_last = ledger.lock().unwrap().traffic(id);
                ledger.lock().unwrap().first_chunk.remove(&id);
                let outcome = session.average_gradients(vec![0.25; VALUES], weight as f64).await;
                session.epoch_done(state(epoch));
                let first_chunk = ledger.lock().unwrap().first_chunk.get(&id).copied();
                count(&mut |count| {
                    count.before_last = before_last;
                    count.gather_seconds = first_chunk.map_or(0.0, |at| (at - begun).as_secs_f64());
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
                if frame.bytes > 10_000 {
                    book.first_chunk.entry(frame.from).or_insert_with(Instant::now);
                }
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
            let held = book.counts[&peer.id].held.load(Ordering::Relaxed);
            // Nobody has downloaded anything, so only the newest state is kept.
            assert_eq!(held, 100_000 + 1000 * (EPOCHS - 1));
            // And one average, in 16 bits, for whoever missed it.
            let past = 2 * VALUES as u64;
            let expected = [("past_rounds".to_owned(), past), ("snapshot".to_owned(), held)];
            assert_eq!(status.memory, BTreeMap::from(expected));
        }
    });
}

fn check_run(status: &Status, book: &Book, me: PeerId) {
    let own = &book.counts[&me];
    assert_eq!((status.epoch, status.target_batch_size, status.alone), (EPOCHS, TARGET, false));
    assert_eq!((status.rounds, status.rounds_failed), (own.rounds, own.rounds_failed));
    assert_eq!(status.rounds_unchanged, 0, "there is no state to be averaged");
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
    let gather = (round.stats.gather_seconds, own.gather_seconds);
    assert!(
        (gather.0 - gather.1).abs() < 0.05 && gather.0 < round.stats.seconds,
        "until it was gathered: {gather:?}"
    );
    assert_eq!((round.stats.attempts, round.stats.saturated, round.unchanged), (1, 0, false));
    let (all, before) = (book.traffic(me), own.before_last);
    near(round.stats.bytes_sent as f64, (all.0 - before.0) as f64, 0.02, "bytes sent in the last round");
    near(round.stats.bytes_received as f64, (all.1 - before.1) as f64, 0.02, "bytes received in it");
    assert_eq!(status.left, []);
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
        let first_epoch = ledger.lock().unwrap().counts[&peers[2].id].contributed;
        assert!(first_epoch > 0);
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
        let dead_id = dead.id;
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
            // What it gave before the round that failed is in the parameters.
            let gave = LeftPeer { peer: dead_id, epoch: 1, contributed: first_epoch };
            assert_eq!(status.left, [gave]);
            let live: u64 = status.peers.iter().map(|peer| peer.contributed).sum();
            let contributed = |id: &PeerId| book.counts[id].contributed;
            assert_eq!(live, peers.iter().map(|peer| contributed(&peer.id)).sum::<u64>());
        }
        let faults: u64 = book.counts.values().flat_map(|count| count.faults.values()).sum();
        assert!(faults > 0, "nobody met the fault, so nothing was compared");
    });
}

/// Two peers that average gradients and, after each epoch, their state, which is `state` at this one; until a round of
/// the state was shown.
async fn average_both(session: Session, gradient: Vec<f32>, state: f32) -> Status {
    let mut samples = 0;
    loop {
        match session.step(std::mem::take(&mut samples)) {
            Step::Accumulate => {
                tokio::time::sleep(STEP).await;
                samples = 20;
            }
            Step::Average => {
                let averaged = session.average_gradients(gradient.clone(), 20.0).await.value;
                assert!(!averaged.alone);
                let huge = gradient.iter().filter(|value| value.abs() > 65504.0).count() as u64;
                session.epoch_done(Some(Snapshot::default()));
                let shown = session.status().borrow().last_round.clone().unwrap();
                assert_eq!(shown.stats.saturated, huge, "values that float16 does not have");
            }
            Step::AverageState => {
                let averaged = session.average_state(vec![state; 500]).await;
                assert_eq!(averaged.faults, []);
                session.publish(Snapshot::default());
                // Shown with the next look.
                session.step(0);
                return session.status().borrow().clone();
            }
            step => panic!("nobody is ahead: {step:?}"),
        }
    }
}

#[test]
fn values_that_are_clamped_and_states_that_are_equal_are_shown_as_the_programs_gave_them() {
    for (seed, states) in [(13, [0.5, 0.5]), (14, [0.5, 0.75])] {
        run(seed, async move |net| {
            let mut gradient = vec![0.25; 1000];
            [3, 400, 420, 800, 999].iter().for_each(|&at: &usize| gradient[at] = 1e6);
            let mut sessions: Vec<Session> = Vec::new();
            for _ in states {
                let transport = net.add_peer(PeerSpec::default());
                let env = transport.env();
                let mut config = SessionConfig::new(
                    "run",
                    TARGET,
                    vec![TensorInfo::vector("w", 1000, TensorRole::Gradient)],
                );
                config.grad_compression = Policy::Fixed(Scheme::Float16);
                config.average_state_every = StateEvery::Epochs(1);
                config.state_tensors = vec![TensorInfo::vector("w", 500, TensorRole::Parameter)];
                config.bootstrap = sessions.iter().map(Session::local_peer).collect();
                let session = Session::join(transport, env, config).await.unwrap();
                session.publish(Snapshot::default());
                sessions.push(session);
            }
            all_here(&sessions).await;
            let [one, two] =
                [0, 1].map(|at| average_both(sessions[at].clone(), gradient.clone(), states[at]));
            let (one, two) = futures::join!(one, two);
            for status in [one, two] {
                let equal = states[0] == states[1];
                assert_eq!((status.rounds, status.rounds_unchanged), (2, u64::from(equal)));
                // Shown is the round that did something.
                let round = status.last_round.clone().unwrap();
                let did = if equal { (Channel::Gradients, 4000) } else { (Channel::State, 2000) };
                assert_eq!((round.channel, round.stats.bytes_plain), did, "{round:?}");
                // What was agreed on is the start of the next movement; where all are equal it need not be kept.
                let kept = (!equal).then_some(2000);
                assert_eq!(status.memory.get("agreed").copied(), kept, "{:?}", status.memory);
            }
        });
    }
}

/// Resolves when each of these sees all of them.
async fn all_here(sessions: &[Session]) {
    for session in sessions {
        let mut status = session.status();
        status.wait_for(|status| status.peers.len() == sessions.len()).await.unwrap();
    }
}

/// One shared step of DiLoCo: its outer optimizer keeps as many values as the parameters have, and so does what was agreed.
async fn outer_step(session: Session, state: f32) -> Status {
    loop {
        match session.step(1) {
            Step::Accumulate => tokio::time::sleep(STEP).await,
            Step::AverageState => {
                let averaged = session.average_state(vec![state; 500]).await;
                assert!(!averaged.value.alone, "{:?}", averaged.faults);
                session.epoch_done(Some(Snapshot::default()));
                session.step(0);
                return session.status().borrow().clone();
            }
            step => panic!("nobody is ahead: {step:?}"),
        }
    }
}

#[test]
fn the_memory_of_an_outer_optimizer_is_shown() {
    run(15, async |net| {
        let mut sessions: Vec<Session> = Vec::new();
        for _ in 0..2 {
            let transport = net.add_peer(PeerSpec::default());
            let env = transport.env();
            let mut config = SessionConfig::new("run", TARGET, Vec::new());
            config.policy = PolicyKind::DiLoCo { inner_steps: 2, outer_lr: 0.7, outer_momentum: 0.9 };
            config.average_state_every = StateEvery::Never;
            config.state_tensors = vec![TensorInfo::vector("w", 500, TensorRole::Parameter)];
            config.bootstrap = sessions.iter().map(Session::local_peer).collect();
            let session = Session::join(transport, env, config).await.unwrap();
            session.publish(Snapshot::default());
            assert_eq!(session.status().borrow().memory.get("velocity"), None);
            sessions.push(session);
        }
        all_here(&sessions).await;
        for epoch in 1..=2 {
            let [one, two] =
                [0, 1].map(|at| outer_step(sessions[at].clone(), 0.5 + 0.25 * at as f32 + epoch as f32));
            let (one, two) = futures::join!(one, two);
            for status in [one, two] {
                let memory = |name| status.memory.get(name).copied();
                assert_eq!((memory("agreed"), status.epoch), (Some(2000), epoch), "{:?}", status.memory);
                if epoch == 2 {
                    assert_eq!(memory("velocity"), Some(2000), "{:?}", status.memory);
                }
            }
        }
    });
}

/// So many values that a part does not find room in the buffers of a connection.
const MANY: usize = 5 * VALUES;

/// Gradient rounds of one peer, until so many are done.
async fn rounds(session: Session, epochs: u64) {
    while session.epoch() < epochs {
        let samples = if session.status().borrow().peers[0].samples == 0 { TARGET / 3 } else { 0 };
        match session.step(samples) {
            Step::Accumulate => session.changed().await,
            Step::Average => {
                let averaged = session.average_gradients(vec![0.5; MANY], 40.0).await;
                assert!(!averaged.value.alone, "{:?}", averaged.faults);
                session.epoch_done(Some(Snapshot::default()));
            }
            step => panic!("nobody is ahead: {step:?}"),
        }
    }
}

#[test]
fn the_rates_of_a_peer_are_those_of_its_link_and_everybody_shows_them() {
    // The fastest waits for the others, and what it could send meanwhile does not show: how much that is depends on who
    // coordinates, which the seed decides.
    let found: Vec<[(f64, f64); 3]> = (16..24).map(rates_shown).collect();
    for rates in &found {
        near(rates[0].0, LINKS[0].0, 0.05, "bytes per second up");
        near(rates[2].0, LINKS[2].0, 0.05, "bytes per second up");
    }
    let fastest = found.iter().map(|rates| rates[1].0).sum::<f64>() / found.len() as f64;
    near(fastest, LINKS[1].0, 0.2, "bytes per second up of the fastest");
    for ((_, seen), (_, down)) in found[0].into_iter().zip(LINKS) {
        assert!((0.3 * down..1.1 * down).contains(&seen), "of {down} bytes per second down {seen}");
    }
}

/// Bytes per second up and down of three peers.
const LINKS: [(f64, f64); 3] = [(150e3, 600e3), (300e3, 1200e3), (200e3, 500e3)];

/// These peers make rounds: the rates up and down that all of them show of each.
fn rates_shown(seed: u64) -> [(f64, f64); 3] {
    run(seed, async |net| {
        let mut peers: Vec<Peer> = Vec::new();
        for (up_bytes_per_second, down_bytes_per_second) in LINKS {
            let link = PeerSpec { up_bytes_per_second, down_bytes_per_second, ..PeerSpec::default() };
            let peer = join_over(link, &net, &peers, TARGET / 3, MANY).await;
            peers.push(peer);
        }
        let sessions: Vec<Session> = peers.iter().map(|peer| peer.session.clone()).collect();
        all_here(&sessions).await;
        let measured = |status: &Status| {
            let mut shown: Vec<_> = status.peers.iter().map(|peer| (peer.peer, peer.rates)).collect();
            shown.sort_unstable_by_key(|(peer, _)| *peer);
            shown
        };
        assert!(
            measured(&sessions[0].status().borrow()).iter().all(|(_, r)| r.up_bytes_per_second.is_none())
        );
        futures::future::join_all(sessions.iter().map(|session| rounds(session.clone(), 4))).await;
        // Each knows its own; heartbeats tell the others, until everybody shows the same.
        let told = async {
            loop {
                let all: Vec<_> =
                    sessions.iter().map(|session| measured(&session.status().borrow())).collect();
                let known = all[0].iter().all(|(_, rates)| rates.up_bytes_per_second.is_some());
                if known && all.iter().all(|shown| *shown == all[0]) {
                    break all[0].clone();
                }
                tokio::time::sleep(STEP).await;
            }
        };
        let shown = tokio::time::timeout(60 * STEP, told).await.expect("everybody shows the same");
        [0, 1, 2].map(|at: usize| {
            let rates = shown.iter().find(|(id, _)| *id == peers[at].id).unwrap().1;
            let shown = |rate: Option<f32>| f64::from(rate.unwrap());
            (shown(rates.up_bytes_per_second), shown(rates.down_bytes_per_second))
        })
    })
}
