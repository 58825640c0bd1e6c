//! Gradients as low-rank factors, over the simulated network: the same bits everywhere, few bytes, nothing lost, and
//! survivors that stay equal.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_collab::{
    Averaged, Loaded, PowerSgd, Session, SessionConfig, Snapshot, Step, TensorInfo, TensorRole,
};
use potluck_net::{FaultKind, Outcome, PeerId, Transport};
use potluck_net_sim::{FaultGuard, PeerSpec, SimNet, Verdict, run};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

const ROWS: usize = 96;
const COLUMNS: usize = 160;
const LEN: usize = ROWS * COLUMNS + 7;

fn config(bootstrap: Vec<PeerId>, rank: Option<usize>) -> SessionConfig {
    let matrix = TensorInfo { key: "w".into(), shape: vec![ROWS, COLUMNS], role: TensorRole::Gradient };
    let bias = TensorInfo::vector("b", 7, TensorRole::Gradient);
    let mut config = SessionConfig::new("run", 1, vec![matrix, bias]);
    config.powersgd = rank.map(|rank| PowerSgd { rank, min_compression_ratio: 0.5 });
    config.bootstrap = bootstrap;
    config
}

/// A gradient with a few strong directions that all peers share, and noise of its own.
fn gradient(peer: usize, epoch: u64) -> Vec<f32> {
    let mut bits = (peer as u64 * 7919 + epoch + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = move || {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let value = |at: usize| {
        let (row, column) = ((at / COLUMNS) as f32, (at % COLUMNS) as f32);
        (row * 0.1).sin() * (column * 0.07).cos() + 0.5 * (row * 0.31).cos()
    };
    (0..LEN).map(|at| value(at) + 0.05 * noise()).collect()
}

struct Peer {
    id: PeerId,
    session: Session,
    /// The sum of all averages stands for the parameters.
    sum: Vec<f32>,
    /// Rounds of others that it applied afterwards.
    made_up: u32,
}

async fn join(net: &SimNet, known: &[Peer], rank: Option<usize>) -> Peer {
    let transport = net.add_peer(PeerSpec::default());
    let (id, env) = (transport.local_peer(), transport.env());
    let bootstrap = known.iter().map(|peer| peer.id).collect();
    let session = Session::join(transport, env, config(bootstrap, rank)).await.unwrap();
    let peer = Peer { id, session, sum: vec![0.0; LEN], made_up: 0 };
    peer.session.publish(peer.snapshot());
    peer
}

async fn join_all(net: &SimNet, count: usize, rank: Option<usize>) -> Vec<Peer> {
    let mut peers = Vec::new();
    for _ in 0..count {
        peers.push(join(net, &peers, rank).await);
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    peers
}

impl Peer {
    fn snapshot(&self) -> Snapshot {
        let bytes: Vec<u8> = self.sum.iter().flat_map(|value| value.to_le_bytes()).collect();
        Snapshot { blobs: BTreeMap::from([("sum".to_owned(), bytes.into())]), ..Snapshot::default() }
    }

    async fn catch_up(&mut self) {
        while self.session.step(0) == Step::LoadState {
            match self.session.load_state().await.value {
                Loaded::State(snapshot) => {
                    let words = snapshot.blobs["sum"].as_chunks::<4>().0;
                    self.sum = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
                }
                Loaded::Gradients(average) => {
                    self.apply(&average);
                    self.made_up += 1;
                    self.session.epoch_done(None);
                }
                other => assert_eq!(other, Loaded::Nothing),
            }
        }
    }

    async fn epoch(&mut self, gradient: Vec<f32>) -> Outcome<Averaged> {
        self.session.step(1);
        let averaged = self.session.average_gradients(gradient, 1.0).await;
        if !averaged.value.missed {
            self.apply(&averaged.value.vector);
            self.session.epoch_done(Some(self.snapshot()));
        }
        averaged
    }

    fn apply(&mut self, average: &[f32]) {
        self.sum.iter_mut().zip(average).for_each(|(sum, value)| *sum += value);
    }
}

async fn epoch_of_all(peers: &mut [Peer], epoch: u64) -> Vec<Outcome<Averaged>> {
    let steps = peers.iter_mut().enumerate().map(|(at, peer)| peer.epoch(gradient(at, epoch)));
    futures::future::join_all(steps).await
}

fn same_bits(results: &[Outcome<Averaged>], members: usize) {
    for result in results {
        assert_eq!(result.value.members.len(), members);
        let mut pairs = result.value.vector.iter().zip(&results[0].value.vector);
        assert!(pairs.all(|(a, b)| a.to_bits() == b.to_bits()), "members hold different bits");
    }
}

fn of_one_history(peers: &[Peer]) {
    assert!(peers.iter().all(|peer| peer.session.lineage() == peers[0].session.lineage()));
    assert!(peers.iter().all(|peer| peer.sum == peers[0].sum));
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn all_peers_hold_the_same_bits_for_a_fraction_of_the_bytes() {
    let bytes = [None, Some(4)].map(|rank| {
        run(1, async |net| {
            let mut peers = join_all(&net, 3, rank).await;
            let mut sent = 0;
            for epoch in 0..3 {
                let results = epoch_of_all(&mut peers, epoch).await;
                same_bits(&results, 3);
                sent += results.iter().map(|result| result.value.stats.bytes_sent).sum::<u64>();
            }
            of_one_history(&peers);
            sent
        })
    });
    // (96 + 160) * 4 values instead of 96 * 160: a fifteenth, and the bias.
    assert!(bytes[1] * 10 < bytes[0], "{bytes:?}");
}

#[test]
fn what_the_factors_lose_is_sent_later() {
    run(2, async |net| {
        let mut peers = join_all(&net, 3, Some(4)).await;
        let mut meant = vec![0.0_f32; LEN];
        for epoch in 0..100 {
            for at in 0..3 {
                meant.iter_mut().zip(gradient(at, epoch)).for_each(|(sum, value)| *sum += value / 3.0);
            }
            same_bits(&epoch_of_all(&mut peers, epoch).await, 3);
        }
        let missing = norm(meant.iter().zip(&peers[0].sum).map(|(a, b)| a - b));
        let all = norm(meant.iter().copied());
        assert!(missing < 0.02 * all, "{missing} of {all}");
    });
}

/// Tells when `victim` hands over the frame `nth` of its streams of the second phase.
fn second_phase(net: &SimNet, victim: PeerId, nth: usize, reached: Arc<Notify>) -> FaultGuard {
    let mut streams = BTreeMap::<PeerId, Vec<u64>>::new();
    let mut frames = 0;
    net.set_rule(move |frame| {
        if frame.from != victim || !format!("{:?}", frame.protocol).contains("/round/") {
            return Verdict::Pass;
        }
        let with = streams.entry(frame.to).or_default();
        if !with.contains(&frame.stream) {
            with.push(frame.stream);
        }
        if with.len() == 2 {
            if frames == nth {
                reached.notify_one();
            }
            frames += 1;
        }
        Verdict::Pass
    })
}

#[test]
fn a_peer_lost_between_or_in_the_phases_leaves_the_others_equal() {
    for nth in 0..4 {
        run(3 + nth as u64, async |net| {
            let mut peers = join_all(&net, 4, Some(4)).await;
            same_bits(&epoch_of_all(&mut peers, 0).await, 4);
            let mut victim = peers.pop().unwrap();
            let (id, reached) = (victim.id, Arc::new(Notify::new()));
            let _guard = second_phase(&net, id, nth, reached.clone());
            let dying = async {
                tokio::select! {
                    biased;
                    () = reached.notified() => net.crash(id),
                    _ = victim.epoch(gradient(3, 1)) => panic!("it was to die in the second phase"),
                }
                std::future::pending::<()>().await;
            };
            let results = tokio::select! {
                biased;
                results = epoch_of_all(&mut peers, 1) => results,
                () = dying => unreachable!(),
            };
            same_bits(&results, 4);
            of_one_history(&peers);
            for epoch in 2..5 {
                same_bits(&epoch_of_all(&mut peers, epoch).await, 3);
                of_one_history(&peers);
            }
        });
    }
}

#[test]
fn a_late_joiner_gets_q_and_the_same_results() {
    run(8, async |net| {
        let mut peers = join_all(&net, 2, Some(4)).await;
        for epoch in 0..3 {
            same_bits(&epoch_of_all(&mut peers, epoch).await, 2);
        }
        let mut late = join(&net, &peers, Some(4)).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        late.catch_up().await;
        assert_eq!(late.session.epoch(), 3);
        peers.push(late);
        for epoch in 3..6 {
            same_bits(&epoch_of_all(&mut peers, epoch).await, 3);
            of_one_history(&peers);
        }
    });
}

#[test]
fn values_that_are_not_finite_are_left_out_and_named() {
    run(9, async |net| {
        let mut peers = join_all(&net, 3, Some(4)).await;
        for epoch in 0..3 {
            let steps = peers.iter_mut().enumerate().map(|(at, peer)| {
                let mut gradient = gradient(at, epoch);
                if at == 2 && epoch == 1 {
                    gradient[5] = f32::NAN;
                }
                peer.epoch(gradient)
            });
            let results = futures::future::join_all(steps).await;
            same_bits(&results, 3);
            let named = results[2].faults.iter().any(|fault| fault.kind == FaultKind::NotFinite);
            assert_eq!(named, epoch == 1);
        }
        of_one_history(&peers);
    });
}
