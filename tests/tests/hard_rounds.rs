//! Named scenarios below the session: reducers and senders that are lost after a given number of bytes, and newcomers
//! whose donor is killed.

use potluck_averaging::{Averager, AveragerConfig, Round, RoundRequest, Swarm, SwarmConfig};
use potluck_compression::{Policy, Scheme, TensorInfo, TensorRole};
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimNet, Verdict, run};
use potluck_transfer::{CHUNK_BYTES, Exchange, Snapshot};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Values of a vector; links are slow enough that a round of them takes seconds.
const LEN: usize = 400_000;
const VICTIM: usize = 1;

struct Member {
    swarm: Swarm,
    averager: Averager,
    id: PeerId,
}

async fn group(net: &SimNet, count: usize) -> Vec<Member> {
    let machine = PeerSpec { up_bytes_per_second: 1e6, down_bytes_per_second: 1e6, ..PeerSpec::default() };
    let mut group: Vec<Member> = Vec::new();
    for _ in 0..count {
        let transport = net.add_peer(machine.clone());
        let (id, env) = (transport.local_peer(), transport.env());
        let bootstrap = group.first().map(|first| first.id).into_iter().collect();
        let swarm = Swarm::join(transport, env, SwarmConfig::new("hard", bootstrap))
            .await
            .expect("the bootstrap peer is up");
        let tensors = vec![TensorInfo::vector("all", LEN, TensorRole::Gradient)];
        let config =
            AveragerConfig { check_own: false, ..AveragerConfig::new(tensors, Policy::Fixed(Scheme::None)) };
        group.push(Member { averager: Averager::new(&swarm, "grad", config), swarm, id });
    }
    for member in &group {
        let mut view = member.swarm.members();
        view.wait_for(|view| view.members.len() == count).await.expect("the swarm lives");
    }
    group
}

fn value(peer: usize, at: usize) -> f32 {
    ((at * 7 + peer * 13) % 101) as f32 / 50.0 - 1.0
}

async fn step(member: &Member, peer: usize, epoch: u64) -> Round {
    let vector = (0..LEN).map(|at| value(peer, at)).collect();
    let request =
        RoundRequest { timeout: Duration::from_secs(60), ..RoundRequest::new(Some(epoch), vector, 1.0) };
    member.averager.step(request).await.expect("the survivors finish the round").value
}

/// Every value is the mean over everybody or over everybody but the victim, and all rounds hold the same bits.
fn check(rounds: &[Round], peers: usize) {
    let all: Vec<usize> = (0..peers).collect();
    let rest: Vec<usize> = all.iter().copied().filter(|peer| *peer != VICTIM).collect();
    let mean = |of: &[usize], at| of.iter().map(|peer| value(*peer, at)).sum::<f32>() / of.len() as f32;
    for round in rounds {
        assert_eq!(round.members.len(), peers);
        assert_eq!(round.result_hash, rounds[0].result_hash);
        for (at, found) in round.vector.iter().enumerate() {
            let fits = [&all, &rest].iter().any(|of| (found - mean(of, at)).abs() < 1e-5);
            assert!(fits, "value {at}: {found}");
            assert_eq!(found.to_bits(), rounds[0].vector[at].to_bits());
        }
    }
}

/// All step; `fault` strikes the victim when it has sent `bytes` in frames of a round. The survivors' rounds.
async fn lose_at(net: &SimNet, group: &[Member], bytes: u64, fault: fn(&SimNet, PeerId)) -> Vec<Round> {
    let (victim, sent) = (group[VICTIM].id, Arc::new(AtomicU64::new(0)));
    let counted = sent.clone();
    let _rule = net.set_rule(move |frame| {
        if frame.from == victim {
            counted.fetch_add(frame.bytes as u64, Ordering::Relaxed);
        }
        Verdict::Pass
    });
    let struck = AtomicBool::new(false);
    let strike = async {
        while sent.load(Ordering::Relaxed) < bytes {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        fault(net, victim);
        struck.store(true, Ordering::Relaxed);
        std::future::pending::<()>().await;
    };
    let lost = async {
        let vector = (0..LEN).map(|at| value(VICTIM, at)).collect();
        let _whatever = group[VICTIM].averager.step(RoundRequest::new(Some(0), vector, 1.0)).await;
        std::future::pending::<()>().await;
    };
    let survivors = group.iter().enumerate().filter(|(at, _)| *at != VICTIM);
    let rounds = tokio::select! {
        biased;
        rounds = futures::future::join_all(survivors.map(|(at, member)| step(member, at, 0))) => rounds,
        () = strike => unreachable!(),
        () = lost => unreachable!(),
    };
    assert!(struck.load(Ordering::Relaxed), "the round was over before its victim had sent {bytes} bytes");
    rounds
}

/// Of four peers each reduces a quarter: it sends three foreign quarters, then its own quarter's average three times.
const QUARTER: u64 = LEN as u64;

#[test]
fn a_reducer_dies_after_half_of_its_results() {
    for fault in [SimNet::crash, SimNet::vanish] {
        run(1, async |net| {
            let group = group(&net, 4).await;
            check(&lose_at(&net, &group, 3 * QUARTER + 3 * QUARTER / 2, fault).await, 4);
        });
    }
}

#[test]
fn a_sender_freezes_in_its_third_part() {
    run(2, async |net| {
        let group = group(&net, 4).await;
        check(&lose_at(&net, &group, 2 * QUARTER + QUARTER / 2, SimNet::freeze).await, 4);
    });
}

#[test]
fn twenty_join_at_once_and_a_donor_is_killed_half_way() {
    run(3, async |net| {
        let peer = |rate: f64| {
            let spec =
                PeerSpec { up_bytes_per_second: rate, down_bytes_per_second: rate, ..PeerSpec::default() };
            let transport = net.add_peer(spec);
            let id = transport.local_peer();
            (id, Exchange::start(transport, net.env(id), "hard").unwrap())
        };
        let bytes: Vec<u8> = (0..20 * CHUNK_BYTES).map(|at| (at * 31 + at / 251) as u8).collect();
        let blobs = BTreeMap::from([("weights".to_owned(), bytes.into())]);
        let state = Arc::new(Snapshot { epoch: 3, lineage: [3; 32], meta: BTreeMap::new(), blobs });
        let donors = [peer(6e6), peer(6e6)];
        donors.iter().for_each(|(_, donor)| donor.publish(state.clone()));
        let joiners: Vec<_> = (0..20).map(|_| peer(20e6)).collect();
        let ids: Vec<PeerId> = joiners.iter().chain(&donors).map(|(id, _)| *id).collect();
        let downloads = joiners.iter().map(|(_, joiner)| joiner.download(&ids, 3, Duration::from_secs(300)));
        let half = state.bytes() / 2;
        let kill = async {
            while net.traffic(donors[0].0).up_bytes < half {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            net.crash(donors[0].0);
        };
        let (outcomes, ()) = tokio::join!(futures::future::join_all(downloads), kill);
        for outcome in outcomes {
            let outcome = outcome.unwrap();
            assert_eq!(outcome.value, *state);
            assert!(outcome.faults.iter().all(|fault| fault.peer == donors[0].0), "{:?}", outcome.faults);
        }
    });
}
