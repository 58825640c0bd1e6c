//! Rounds in which something goes wrong: peers die, freeze, lie, leave, and streams break.

mod support;

use bytes::Bytes;
use potluck_averaging::{Averager, AveragerConfig, Progress, RoundRequest, Swarm, SwarmConfig};
use potluck_compression::Scheme;
use potluck_net::{FaultKind, PeerId, Transport};
use potluck_net_sim::{FaultRates, FrameInfo, Mangle, Mangler, PeerSpec, SimNet, Verdict, run};
use std::time::Duration;
use support::*;

/// Links slow enough that a round of `LEN` values takes seconds.
fn slow() -> PeerSpec {
    PeerSpec { up_bytes_per_second: 1e6, down_bytes_per_second: 1e6, ..PeerSpec::default() }
}

const LEN: usize = 400_000;

/// Step all peers; at `after` do `harm`; results of all but the peer at `victim`.
async fn step_with(
    peers: &[Peer],
    epoch: u64,
    victim: usize,
    after: Duration,
    harm: impl FnOnce(PeerId),
) -> Vec<Stepped> {
    let harm = async {
        tokio::time::sleep(after).await;
        harm(peers[victim].id);
        std::future::pending::<()>().await;
    };
    let survivors = peers.iter().enumerate().filter(|(at, _)| *at != victim);
    let steps = survivors.map(|(at, peer)| peer.averager.step(request(epoch, values(at, LEN), 1.0)));
    let lost = peers[victim].averager.step(request(epoch, values(victim, LEN), 1.0));
    let lost = async {
        let _whatever = lost.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        results = futures::future::join_all(steps) => results,
        () = harm => unreachable!(),
        () = lost => unreachable!(),
    }
}

async fn next_epoch(peers: &[Peer], epoch: u64) {
    for peer in peers {
        peer.swarm.report(Progress { epoch, ..Progress::default() });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[test]
fn a_peer_lost_in_mid_round_costs_its_own_contribution_only() {
    for fault in [SimNet::crash, SimNet::freeze, SimNet::vanish] {
        for after in [50, 400, 900, 1500] {
            run(after, async |net| {
                let peers = peers(&net, 4, slow(), &config(LEN, Scheme::None)).await;
                let victim = 1;
                let after = Duration::from_millis(after);
                let results = step_with(&peers, 0, victim, after, |peer| fault(&net, peer)).await;
                let round = agreed(&results);
                // Every value is the mean over a set of senders that holds at least the survivors.
                let (with, without) = (mean(&[0, 1, 2, 3], LEN), mean(&[0, 2, 3], LEN));
                for (at, value) in round.vector.iter().enumerate() {
                    let fits = (value - with[at]).abs() < 1e-5 || (value - without[at]).abs() < 1e-5;
                    assert!(fits, "value {at}: {value}, {} or {} expected", with[at], without[at]);
                }
                let rest: Vec<Peer> =
                    peers.into_iter().enumerate().filter(|(at, _)| *at != victim).map(|(_, p)| p).collect();
                next_epoch(&rest, 1).await;
                let again = step_all(&rest, 1, LEN).await;
                assert_eq!(agreed(&again).members.len(), 3);
                assert!(again.iter().all(|result| result.as_ref().unwrap().faults.is_empty()));
            });
        }
    }
}

#[test]
fn a_reducer_is_replaced_although_streams_break_meanwhile() {
    for seed in 0..10 {
        run(seed, async |net| {
            let spec = PeerSpec { faults: FaultRates { reset: 0.02, ..FaultRates::default() }, ..slow() };
            let peers = peers(&net, 4, spec, &config(LEN, Scheme::None)).await;
            let results = step_with(&peers, 0, 2, Duration::from_millis(700), |peer| net.crash(peer)).await;
            assert_eq!(agreed(&results).members.len(), 4);
        });
    }
}

#[test]
fn a_coordinator_that_dies_while_gathering_is_replaced() {
    for victim in 0..3 {
        run(20 + victim as u64, async |net| {
            let peers = peers(&net, 3, PeerSpec::default(), &config(3000, Scheme::None)).await;
            net.freeze(peers[victim].id);
            let rest: Vec<Peer> =
                peers.into_iter().enumerate().filter(|(at, _)| *at != victim).map(|(_, p)| p).collect();
            let before = net.elapsed();
            let results = step_all(&rest, 0, 3000).await;
            assert_eq!(agreed(&results).members.len(), 2);
            assert!(net.elapsed() - before < Duration::from_secs(6));
        });
    }
}

/// Two of three step, and the third is here and silent, be it the coordinator, the next in order or the last.
#[test]
fn whoever_waits_longer_for_a_silent_peer_is_not_taken_for_silent() {
    for silent in 0..3 {
        for (hasty, longest) in [(1, 5), (2, 5), (1, 20), (2, 20)] {
            run(30, async |net| {
                let peers = peers(&net, 3, PeerSpec::default(), &config(3000, Scheme::None)).await;
                let steps = [1, 2].map(|turn| {
                    let patience = Duration::from_secs(if turn == hasty { 2 } else { longest });
                    let at = (silent + turn) % 3;
                    peers[at].averager.step(RoundRequest {
                        gather_timeout: Some(patience),
                        ..request(0, values(at, 3000), 1.0)
                    })
                });
                let results = futures::future::join_all(steps).await;
                assert_eq!(
                    agreed(&results).members.len(),
                    2,
                    "{silent} is silent, {hasty} after it is hasty"
                );
            });
        }
    }
}

/// A silent peer turns up while the others gather and may be the one to coordinate: that costs nobody's contribution.
#[test]
fn a_silent_peer_that_turns_up_in_the_middle_splits_nobody() {
    let ms = |count| tokio::time::sleep(Duration::from_millis(count));
    for (silent, first) in (0..3).flat_map(|silent| [(silent, 1), (silent, 2)]) {
        run(40, async |net| {
            let peers = peers(&net, 3, PeerSpec::default(), &config(3000, Scheme::None)).await;
            let report = |at: usize| peers[at].swarm.report(Progress { epoch: 1, ..Progress::default() });
            report((silent + 1) % 3);
            report((silent + 2) % 3);
            ms(200).await;
            let steps = [1, 2].map(|turn| {
                let at = (silent + turn) % 3;
                let step = peers[at].averager.step(request(1, values(at, 3000), 1.0));
                async move {
                    ms(if turn == first { 0 } else { 100 }).await;
                    step.await
                }
            });
            let turns_up = async {
                ms(50).await;
                report(silent);
            };
            let (results, ()) = futures::future::join(futures::future::join_all(steps), turns_up).await;
            assert_eq!(agreed(&results).members.len(), 2, "{silent} silent, {first} after it first");
        });
    }
}

#[test]
fn rounds_are_complete_while_frames_stall_and_streams_break() {
    for seed in 0..10 {
        run(seed, async |net| {
            let faults = FaultRates {
                delay: 0.1,
                delay_max: Duration::from_millis(100),
                reset: 0.02,
                ..FaultRates::default()
            };
            let spec = PeerSpec { faults, ..PeerSpec::default() };
            let peers = peers(&net, 4, spec, &config(LEN, Scheme::Float16)).await;
            for epoch in 0..3 {
                next_epoch(&peers, epoch).await;
                let results = step_all(&peers, epoch, LEN).await;
                let round = agreed(&results);
                assert_eq!(round.members.len(), 4);
                assert_eq!(round.full_contributors, 0b1111, "seed {seed}, epoch {epoch}");
                assert!(distance(&round.vector, &mean(&[0, 1, 2, 3], LEN)) < 1e-2);
            }
        });
    }
}

#[test]
fn bad_values_are_left_out_and_their_sender_is_named() {
    for (bad, kind) in [
        (f32::NAN, FaultKind::NotFinite),
        (f32::INFINITY, FaultKind::NotFinite),
        (1e9, FaultKind::Implausible),
    ] {
        for check_own in [true, false] {
            run(30, async |net| {
                let config = AveragerConfig { check_own, ..config(10_000, Scheme::None) };
                let peers = peers(&net, 3, PeerSpec::default(), &config).await;
                let steps = peers.iter().enumerate().map(|(at, peer)| {
                    let mut vector = values(at, 10_000);
                    if at == 2 {
                        vector.fill(bad);
                    }
                    peer.averager.step(request(0, vector, 1.0))
                });
                let results = futures::future::join_all(steps).await;
                let round = agreed(&results);
                assert!(distance(&round.vector, &mean(&[0, 1], 10_000)) < 1e-5, "{bad} {check_own}");
                let named = results.iter().flat_map(|result| &result.as_ref().unwrap().faults);
                let named: Vec<_> = named.filter(|fault| fault.kind == kind).collect();
                assert!(
                    !named.is_empty() && named.iter().all(|fault| fault.peer == peers[2].id),
                    "{named:?}"
                );
            });
        }
    }
}

#[test]
fn a_peer_with_other_tensors_is_not_averaged_with() {
    run(40, async |net| {
        let first = peer(&net, PeerSpec::default(), vec![], config(1000, Scheme::None)).await;
        let second = peer(&net, PeerSpec::default(), vec![first.id], config(1000, Scheme::None)).await;
        let third = peer(&net, PeerSpec::default(), vec![first.id], config(999, Scheme::None)).await;
        let peers = [first, second, third];
        all_see(&peers, 3).await;
        let good =
            peers[..2].iter().enumerate().map(|(at, p)| p.averager.step(request(0, values(at, 1000), 1.0)));
        let other = peers[2].averager.step(request(0, values(2, 999), 1.0));
        let (good, _other) = tokio::join!(futures::future::join_all(good), other);
        assert_eq!(agreed(&good).members.len(), 2);
    });
}

#[test]
fn a_dropped_step_does_not_hold_up_the_others() {
    run(50, async |net| {
        let peers = peers(&net, 3, slow(), &config(LEN, Scheme::None)).await;
        let impatient = tokio::time::timeout(
            Duration::from_millis(600),
            peers[2].averager.step(request(0, values(2, LEN), 1.0)),
        );
        let rest =
            peers[..2].iter().enumerate().map(|(at, p)| p.averager.step(request(0, values(at, LEN), 1.0)));
        let (dropped, results) = tokio::join!(impatient, futures::future::join_all(rest));
        assert!(dropped.is_err());
        agreed(&results);
    });
}

#[test]
fn a_newcomer_that_was_not_waited_for_is_told_to_catch_up() {
    run(60, async |net| {
        let config = config(LEN, Scheme::None);
        let mut peers = peers(&net, 2, slow(), &config).await;
        let late = join(net.add_peer(slow()), SwarmConfig::new("test", vec![peers[0].id]), config).await;
        late.swarm.report(Progress { epoch: 7, ..Progress::default() });
        peers.push(late);
        all_see(&peers, 3).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let late = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            peers[2].averager.step(request(0, values(2, LEN), 1.0)).await
        };
        let rest =
            peers[..2].iter().enumerate().map(|(at, p)| p.averager.step(request(0, values(at, LEN), 1.0)));
        let (late, results) = tokio::join!(late, futures::future::join_all(rest));
        assert_eq!(agreed(&results).members.len(), 2);
        assert!(matches!(late.unwrap_err().kind, potluck_averaging::RoundErrorKind::LeftOut));
    });
}

#[test]
fn replayed_and_foreign_frames_change_nothing() {
    run(70, async |net| {
        let peers = peers(&net, 2, PeerSpec::default(), &config(5000, Scheme::None)).await;
        let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::<FrameInfo>::new()));
        let log = seen.clone();
        let rule = net.set_rule(move |frame| {
            log.lock().unwrap().push(frame.clone());
            Verdict::Pass
        });
        agreed(&step_all(&peers, 0, 5000).await);
        drop(rule);
        next_epoch(&peers, 1).await;
        for frame in seen.lock().unwrap().iter().take(20) {
            net.inject_frame(
                frame.from,
                frame.to,
                &frame.protocol,
                bytes::Bytes::from_static(&[1, 0, 0, 9, 9, 9, 9, 1]),
            );
        }
        let results = step_all(&peers, 1, 5000).await;
        assert!(distance(&agreed(&results).vector, &mean(&[0, 1], 5000)) < 1e-6);
    });
}

#[test]
fn two_channels_share_a_swarm() {
    run(80, async |net| {
        let peers = peers(&net, 2, PeerSpec::default(), &config(1000, Scheme::None)).await;
        let state: Vec<Averager> = peers
            .iter()
            .map(|peer| Averager::new(&peer.swarm, "state", config(500, Scheme::Float16)))
            .collect();
        let grads = step_all(&peers, 0, 1000);
        let states =
            state.iter().enumerate().map(|(at, channel)| channel.step(request(0, values(at, 500), 1.0)));
        let (grads, states) = tokio::join!(grads, futures::future::join_all(states));
        assert_eq!(agreed(&grads).vector.len(), 1000);
        assert_eq!(agreed(&states).vector.len(), 500);
    });
}

/// One more peer, whose frames in rounds are mangled.
async fn join_mangled(net: &SimNet, all: &mut Vec<Peer>, mangle: Mangle, config: AveragerConfig) -> PeerId {
    let below = net.add_peer(PeerSpec::default());
    let (id, env) = (below.local_peer(), below.env());
    let transport = std::sync::Arc::new(Mangler::new(below, "/round/", mangle));
    let joined = Swarm::join(transport, env, SwarmConfig::new("test", vec![all[0].id])).await;
    let swarm = joined.expect("its control streams are sound");
    let averager = Averager::new(&swarm, "grad", config);
    all.push(Peer { swarm, averager, id });
    all_see(all, all.len()).await;
    id
}

#[test]
fn replayed_contributions_count_once_or_not_at_all() {
    run(71, async |net| {
        let config = config(30_000, Scheme::None);
        let mut all = peers(&net, 3, PeerSpec::default(), &config).await;
        let said = std::sync::Mutex::new(Vec::<Bytes>::new());
        let replays = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = replays.clone();
        let mangle: Mangle = std::sync::Arc::new(move |frame: Bytes| {
            let mut said = said.lock().unwrap();
            counted.fetch_add(1 + said.len(), std::sync::atomic::Ordering::Relaxed);
            let frames = [frame.clone(), frame.clone()].into_iter().chain(said.iter().cloned()).collect();
            said.push(frame);
            frames
        });
        let replayer = join_mangled(&net, &mut all, mangle, config).await;
        for epoch in 0..4 {
            next_epoch(&all, epoch).await;
            let results = step_all(&all, epoch, 30_000).await;
            let round = agreed(&results);
            let faults: Vec<_> = results.iter().flat_map(|result| &result.as_ref().unwrap().faults).collect();
            assert!(faults.iter().all(|fault| fault.peer == replayer), "epoch {epoch}: {faults:?}");
            // When chunks are longer or shorter than in an earlier round, what is left of that one does not fit.
            let (with, without) = (mean(&[0, 1, 2, 3], 30_000), mean(&[0, 1, 2], 30_000));
            for (at, value) in round.vector.iter().enumerate() {
                let excluded = !faults.is_empty() && (value - without[at]).abs() < 1e-5;
                assert!((value - with[at]).abs() < 1e-5 || excluded, "epoch {epoch}, value {at}: {value}");
            }
        }
        assert!(replays.load(std::sync::atomic::Ordering::Relaxed) > 100);
    });
}

#[test]
fn truncated_and_malformed_frames_of_a_member_harm_nobody_and_name_it() {
    let mangles: [fn(Bytes) -> Bytes; 4] = [
        |frame| frame.slice(..frame.len().min(3)),
        |_| Bytes::new(),
        |frame| [&[99], frame.as_ref()].concat().into(),
        // Right up to its values, of which the last is cut off.
        |frame| frame.slice(..frame.len().saturating_sub(2)),
    ];
    for (seed, mangle) in mangles.into_iter().enumerate() {
        run(90 + seed as u64, async |net| {
            let config = config(30_000, Scheme::None);
            let mut all = peers(&net, 3, PeerSpec::default(), &config).await;
            let mangle: Mangle = std::sync::Arc::new(move |frame| vec![mangle(frame)]);
            let id = join_mangled(&net, &mut all, mangle, config).await;
            let results = step_all(&all, 0, 30_000).await;
            let round = agreed(&results[..3]);
            // Nothing of it is in the mean, or what it said before is, for whole chunks.
            let (with, without) = (mean(&[0, 1, 2, 3], 30_000), mean(&[0, 1, 2], 30_000));
            for (at, value) in round.vector.iter().enumerate() {
                let fits = (value - with[at]).abs() < 1e-5 || (value - without[at]).abs() < 1e-5;
                assert!(fits, "seed {seed}, value {at}: {value}");
            }
            for result in &results[..3] {
                let named = &result.as_ref().unwrap().faults;
                assert!(
                    named.iter().any(|fault| fault.peer == id && fault.kind == FaultKind::Malformed),
                    "seed {seed}: {named:?}"
                );
                assert!(named.iter().all(|fault| fault.peer == id), "seed {seed}: {named:?}");
            }
        });
    }
}
