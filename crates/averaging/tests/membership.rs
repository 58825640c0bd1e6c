//! Membership on the simulated network: joining, losing, refusing and healing.

use futures::FutureExt;
use futures::future::BoxFuture;
use potluck_averaging::{Directory, JoinError, Progress, Swarm, SwarmConfig};
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimNet, run};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

async fn join(net: &SimNet, transport: &Arc<potluck_net_sim::SimTransport>, bootstrap: Vec<PeerId>) -> Swarm {
    let config = SwarmConfig::new("test", bootstrap);
    Swarm::join(transport.clone(), net.env(transport.local_peer()), config)
        .await
        .expect("the simulated network lets everybody join")
}

async fn swarm(net: &SimNet, peers: usize) -> Vec<Swarm> {
    let mut swarms: Vec<Swarm> = Vec::new();
    for _ in 0..peers {
        let transport = net.add_peer(PeerSpec::default());
        let bootstrap = swarms.first().map(Swarm::local_peer).into_iter().collect();
        swarms.push(join(net, &transport, bootstrap).await);
    }
    swarms
}

/// Wait until the view of each has this many members.
async fn all_see(swarms: &[Swarm], count: usize) {
    for swarm in swarms {
        let mut members = swarm.members();
        members.wait_for(|view| view.members.len() == count).await.expect("the swarm lives");
    }
}

#[test]
fn peers_that_know_one_bootstrap_peer_find_all_others() {
    run(1, async |net| {
        let swarms = swarm(&net, 8).await;
        all_see(&swarms, 8).await;
        assert!(net.elapsed() < Duration::from_secs(5), "{:?}", net.elapsed());
    });
}

#[test]
fn killed_frozen_and_vanished_peers_are_out_of_every_view_within_three_seconds() {
    for fault in [SimNet::crash, SimNet::freeze, SimNet::vanish] {
        run(2, async |net| {
            let swarms = swarm(&net, 5).await;
            all_see(&swarms, 5).await;
            tokio::time::sleep(Duration::from_millis(700)).await;
            let before = net.elapsed();
            fault(&net, swarms[4].local_peer());
            all_see(&swarms[..4], 4).await;
            let took = net.elapsed() - before;
            assert!(took < Duration::from_secs(3), "{took:?}");
        });
    }
}

#[test]
fn a_healthy_swarm_with_faulty_streams_buries_nobody() {
    run(3, async |net| {
        let mut swarms: Vec<Swarm> = Vec::new();
        for _ in 0..4 {
            let mut spec = PeerSpec::default();
            spec.faults.reset = 0.01;
            spec.faults.delay = 0.01;
            spec.faults.delay_max = Duration::from_millis(500);
            let transport = net.add_peer(spec);
            let bootstrap = swarms.first().map(Swarm::local_peer).into_iter().collect();
            swarms.push(join(&net, &transport, bootstrap).await);
        }
        all_see(&swarms, 4).await;
        let mut members = swarms[0].members();
        let watch = async {
            loop {
                members.changed().await.unwrap();
                let view = members.borrow_and_update().clone();
                assert_eq!(view.members.len(), 4, "somebody was given up at {:?}", net.elapsed());
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(600), watch).await.is_err());
    });
}

#[test]
fn a_partition_heals_to_one_view() {
    run(4, async |net| {
        let swarms = swarm(&net, 4).await;
        all_see(&swarms, 4).await;
        let ids: Vec<PeerId> = swarms.iter().map(Swarm::local_peer).collect();
        let split = net.partition(&ids[..2], &ids[2..], false);
        all_see(&swarms, 2).await;
        drop(split);
        all_see(&swarms, 4).await;
    });
}

#[test]
fn a_partition_heals_among_many_who_are_gone_for_good() {
    run(15, async |net| {
        let mut swarms = swarm(&net, 30).await;
        all_see(&swarms, 30).await;
        for dead in swarms.split_off(6) {
            net.crash(dead.local_peer());
        }
        all_see(&swarms, 6).await;
        let ids: Vec<PeerId> = swarms.iter().map(Swarm::local_peer).collect();
        let split = net.partition(&ids[..3], &ids[3..], false);
        all_see(&swarms, 3).await;
        // Five minutes of simulated time, the length of the outage; by then each has looked for everybody once.
        tokio::time::sleep(Duration::from_secs(300)).await;
        drop(split);
        let before = net.elapsed();
        all_see(&swarms, 6).await;
        let took = net.elapsed() - before;
        assert!(took < Duration::from_secs(30), "{took:?}");
    });
}

/// A directory from which nobody's name goes.
struct Names(Vec<PeerId>);

impl Directory for Names {
    fn announce<'a>(&'a self, _run: &'a str, _ttl: Duration) -> BoxFuture<'a, ()> {
        async {}.boxed()
    }

    fn lookup<'a>(&'a self, _run: &'a str) -> BoxFuture<'a, Vec<(PeerId, Vec<String>)>> {
        async { self.0.iter().map(|peer| (*peer, Vec::new())).collect() }.boxed()
    }
}

#[test]
fn those_who_are_gone_are_not_dialled_whenever_a_directory_still_names_them() {
    run(16, async |net| {
        let transports: Vec<_> = (0..14).map(|_| net.add_peer(PeerSpec::default())).collect();
        let ids: Vec<PeerId> = transports.iter().map(|transport| transport.local_peer()).collect();
        let mut swarms = Vec::new();
        for transport in &transports {
            let mut config = SwarmConfig::new("test", vec![]);
            config.directory = Some(Arc::new(Names(ids.clone())));
            swarms
                .push(Swarm::join(transport.clone(), net.env(transport.local_peer()), config).await.unwrap());
        }
        all_see(&swarms, 14).await;
        swarms[13].leave().await;
        for dead in swarms.split_off(2) {
            net.crash(dead.local_peer());
        }
        all_see(&swarms, 2).await;
        // By then each has been looked for once.
        tokio::time::sleep(Duration::from_secs(20)).await;
        let (dials, gone) = (Arc::new(AtomicUsize::new(0)), ids[2..].to_vec());
        let count = dials.clone();
        let _counting = net.refuse_opens(move |open| {
            count.fetch_add(usize::from(gone.contains(&open.to)), Ordering::Relaxed);
            false
        });
        tokio::time::sleep(Duration::from_secs(200)).await;
        // Of each of the two: one in five seconds, and the one who left whenever the directory is asked.
        let dials = dials.load(Ordering::Relaxed);
        assert!((80..=105).contains(&dials), "{dials} dials of twelve peers who are gone");
    });
}

#[test]
fn whoever_joins_knows_at_once_how_far_the_others_are() {
    run(14, async |net| {
        let near = PeerSpec { latency: Duration::from_millis(1), ..PeerSpec::default() };
        let (first, second) = (net.add_peer(near.clone()), net.add_peer(near));
        let host =
            Swarm::join(first.clone(), first.env(), SwarmConfig::new("test", Vec::new())).await.unwrap();
        // The newcomer is here before the first heartbeat.
        host.report(Progress { epoch: 7, samples: 3, ..Progress::default() });
        let config = SwarmConfig::new("test", vec![host.local_peer()]);
        let newcomer = Swarm::join(second.clone(), second.env(), config).await.unwrap();
        let view = newcomer.view();
        let seen = view.members.get(&host.local_peer()).unwrap();
        assert_eq!((seen.epoch, seen.samples), (7, 3));
    });
}

#[test]
fn a_peer_with_another_manifest_is_told_which_field_differs() {
    run(5, async |net| {
        let (first, second) = (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()));
        let mut config = SwarmConfig::new("test", Vec::new());
        config.manifest.insert("target_batch_size".into(), "256".into());
        let host = Swarm::join(first.clone(), first.env(), config.clone()).await.unwrap();
        config.bootstrap = vec![host.local_peer()];
        let right = config.clone();
        config.manifest.insert("target_batch_size".into(), "512".into());
        for _ in 0..2 {
            let refusal = Swarm::join(second.clone(), second.env(), config.clone()).await.err().unwrap();
            let field = "target_batch_size";
            assert!(
                matches!(&refusal, JoinError::Refused { reason, .. } if reason.contains(field)),
                "{refusal}"
            );
        }
        // At once, on the same transport: nothing of the refused one is left.
        assert!(Swarm::join(second.clone(), second.env(), right).await.is_ok());
    });
}

#[test]
fn a_peer_that_leaves_is_gone_at_once() {
    run(6, async |net| {
        let mut swarms = swarm(&net, 3).await;
        all_see(&swarms, 3).await;
        let before = net.elapsed();
        swarms.pop().unwrap().leave().await;
        all_see(&swarms, 2).await;
        assert!(net.elapsed() - before < Duration::from_secs(1));
    });
}

#[test]
fn a_peer_that_leaves_does_not_contradict_those_who_say_so() {
    for (seed, millis) in (6..).zip([0, 1, 2, 3, 5, 8]) {
        run(seed, async |net| {
            let mut swarms: Vec<Swarm> = Vec::new();
            for _ in 0..4 {
                let latency = Duration::from_millis(millis);
                let transport = net.add_peer(PeerSpec { latency, ..PeerSpec::default() });
                let bootstrap = swarms.first().map(Swarm::local_peer).into_iter().collect();
                swarms.push(join(&net, &transport, bootstrap).await);
            }
            all_see(&swarms, 4).await;
            // Long enough after the last heartbeats that the next ones may go at once.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let leaver = swarms.pop().unwrap();
            let gone = leaver.local_peer();
            let mut views: Vec<_> = swarms.iter().map(Swarm::members).collect();
            leaver.leave().await;
            for view in &mut views {
                view.wait_for(|view| !view.members.contains_key(&gone)).await.unwrap();
            }
            let back = futures::future::select_all(views.iter_mut().map(|view| {
                Box::pin(async move { view.wait_for(|view| view.members.contains_key(&gone)).await.is_ok() })
            }));
            let rumour = tokio::time::timeout(Duration::from_secs(10), back).await;
            assert!(rumour.is_err(), "it is alive again with {millis} ms between the peers");
        });
    }
}

#[test]
fn a_peer_that_was_cut_off_buries_nobody_when_it_is_back() {
    run(7, async |net| {
        let swarms = swarm(&net, 5).await;
        all_see(&swarms, 5).await;
        let sick = swarms[4].local_peer();
        net.freeze(sick);
        all_see(&swarms[..4], 4).await;
        // By now it believes that all others are dead.
        all_see(&swarms[4..], 1).await;
        let mut members = swarms[0].members();
        net.thaw(sick);
        let watch = async {
            loop {
                members.changed().await.expect("the swarm lives");
                let view = members.borrow_and_update().clone();
                let healthy = swarms[..4].iter().filter(|s| view.members.contains_key(&s.local_peer()));
                assert_eq!(healthy.count(), 4, "a healthy peer was given up at {:?}", net.elapsed());
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(15), watch).await.is_err());
        all_see(&swarms, 5).await;
    });
}

#[test]
fn a_peer_that_restarts_unnoticed_is_heard_although_it_counts_its_lives_anew() {
    run(8, async |net| {
        let mut swarms = swarm(&net, 3).await;
        all_see(&swarms, 3).await;
        let id = swarms[2].local_peer();
        let progress = |epoch| potluck_averaging::Progress { epoch, ..Default::default() };
        // It is given up once and comes back, in its second life as the others count.
        net.freeze(id);
        all_see(&swarms[..2], 2).await;
        net.thaw(id);
        all_see(&swarms, 3).await;
        swarms[2].report(progress(5));
        let epoch_of = |swarm: &Swarm| swarm.view().members.get(&id).map(|member| member.epoch);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(epoch_of(&swarms[0]), Some(5));
        // Its process restarts faster than anybody can miss it, and knows nothing of that.
        net.crash(id);
        drop(swarms.pop());
        let transport = net.restart(id);
        let again = join(&net, &transport, vec![swarms[0].local_peer()]).await;
        again.report(progress(2));
        tokio::time::sleep(Duration::from_secs(3)).await;
        for swarm in &swarms {
            assert_eq!(epoch_of(swarm), Some(2), "its predecessor's epoch is still believed");
        }
    });
}

#[test]
fn two_halves_that_never_met_find_each_other_through_bootstrap_peers() {
    run(9, async |net| {
        let transports: Vec<_> = (0..4).map(|_| net.add_peer(PeerSpec::default())).collect();
        let ids: Vec<PeerId> = transports.iter().map(|transport| transport.local_peer()).collect();
        let split = net.partition(&ids[..2], &ids[2..], false);
        let mut swarms = Vec::new();
        for (at, transport) in transports.iter().enumerate() {
            // Whoever joins knows everybody before it; the first answer of its own half is enough to begin.
            let bootstrap = if at == 2 { Vec::new() } else { ids[..at].to_vec() };
            swarms.push(join(&net, transport, bootstrap).await);
        }
        all_see(&swarms, 2).await;
        drop(split);
        all_see(&swarms, 4).await;
    });
}

#[test]
fn whoever_looks_at_a_large_swarm_sees_the_reports_of_those_whom_it_never_averages_with() {
    run(10, async |net| {
        const PEERS: usize = 150;
        let swarms = swarm(&net, PEERS).await;
        all_see(&swarms, PEERS).await;
        let id = swarms[7].local_peer();
        swarms[7].report(Progress { epoch: 5, samples: 12, ..Progress::default() });
        for swarm in &swarms {
            let shows = |swarm: &Swarm| {
                swarm.look(|view| view.members.get(&id).map(|member| (member.epoch, member.samples)))
            };
            let told = async {
                loop {
                    let changed = swarm.changed();
                    if shows(swarm) == Some((5, 12)) {
                        break;
                    }
                    changed.await;
                }
            };
            let late = format!("{} does not show it", swarm.local_peer());
            tokio::time::timeout(Duration::from_secs(20), told).await.expect(&late);
            assert_eq!(swarm.view().members[&id].epoch, 5);
            assert!(swarm.roll().contains(&id));
        }
        let (one, roll) = (swarms[0].local_peer(), swarms[0].roll());
        assert!(roll.contains(&one));
        drop(swarms);
        let gone = async {
            while roll.contains(&one) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let held = "whoever can ask keeps nobody in the run";
        tokio::time::timeout(Duration::from_secs(20), gone).await.expect(held);
    });
}
