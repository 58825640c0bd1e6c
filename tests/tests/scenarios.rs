//! Named scenarios over the simulated network: what users of such systems run into, scripted.

use potluck_collab::{Policy, PolicyKind, Scheme};
use potluck_net::{FaultKind, PeerId};
use potluck_net_sim::{NatClass, PeerSpec, run};
use potluck_tests::harness::{PeerPlan, RunSpec, World};
use potluck_tests::invariants;
use potluck_tests::record::{Entry, Record};
use potluck_tests::reference::{single_process, test_loss};
use potluck_tests::trainer::Mischief;
use std::time::Duration;

const AGREE_MAX: Duration = Duration::from_secs(240);

fn plan(step_milliseconds: u64) -> PeerPlan {
    PeerPlan { step_time: Duration::from_millis(step_milliseconds), ..PeerPlan::default() }
}

/// All invariants, at the end of a scenario.
async fn conclude(world: World, exact: bool) -> Record {
    let (record, streams) = world.finish().await;
    let mut found = record.with(|entries| invariants::check(entries, exact));
    found.extend(invariants::check_end(streams));
    assert!(found.is_empty(), "{found:#?}\n{}", record.with(potluck_tests::explore::lines).join("\n"));
    record
}

async fn agree(world: &World, epoch: u64) -> Duration {
    match world.until_agreed(epoch, AGREE_MAX).await {
        Ok(took) => took,
        Err(reason) => {
            let lines = world.record.with(potluck_tests::explore::lines).join("\n");
            panic!("not agreed on epoch {epoch}: {reason}\n{lines}")
        }
    }
}

/// Members of the last finished round.
fn last_members(record: &Record) -> Vec<PeerId> {
    record.with(|entries| {
        let mut rounds = entries.iter().rev().filter_map(|entry| match entry {
            Entry::Round { averaged, .. } => Some(averaged.members.clone()),
            _ => None,
        });
        rounds.next().unwrap_or_default()
    })
}

#[test]
fn one_peer_alone_equals_plain_training_bit_for_bit() {
    run(1, async |net| {
        let spec = RunSpec::new(1);
        let mut world = World::new(net, spec.clone());
        let peer = world.start(plan(50));
        agree(&world, spec.epochs).await;
        let plain = single_process(spec.model, spec.seed, spec.target, 8, spec.epochs);
        assert_eq!(world.record.latest()[&peer].2, plain);
        conclude(world, true).await;
    });
}

#[test]
fn a_killed_peer_costs_a_moment_and_a_newcomer_catches_up() {
    run(2, async |net| {
        let mut world = World::new(net, RunSpec { epochs: 20, ..RunSpec::new(2) });
        let peers: Vec<PeerId> = (0..4).map(|_| world.start(plan(100))).collect();
        tokio::time::sleep(Duration::from_secs(3)).await;
        world.crash(peers[1]);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let newcomer = world.start(plan(100));
        agree(&world, 20).await;
        let record = conclude(world, true).await;
        assert!(last_members(&record).contains(&newcomer));
    });
}

#[test]
fn a_split_swarm_heals_to_one_history() {
    run(3, async |net| {
        let mut world = World::new(net, RunSpec { epochs: 40, ..RunSpec::new(3) });
        let peers: Vec<PeerId> = (0..4).map(|_| world.start(plan(100))).collect();
        tokio::time::sleep(Duration::from_secs(3)).await;
        world.partition(&peers[..2], false);
        tokio::time::sleep(Duration::from_secs(8)).await;
        world.heal_partitions();
        world.healed();
        agree(&world, 40).await;
        let record = conclude(world, true).await;
        assert_eq!(last_members(&record).len(), 4, "all of them average together again");
    });
}

#[test]
fn clocks_an_hour_apart_change_nothing() {
    let histories = [0, 3600].map(|skew| {
        run(4, async |net| {
            let mut world = World::new(net, RunSpec::new(4));
            for (index, sign) in [1, -1, 1].into_iter().enumerate() {
                let machine = PeerSpec { clock_skew: sign * skew * index as i64, ..PeerSpec::default() };
                world.start(PeerPlan { machine, ..plan(100) });
            }
            agree(&world, 10).await;
            let record = conclude(world, true).await;
            record.latest().into_values().map(|(lineage, params, _)| (lineage, params)).collect::<Vec<_>>()
        })
    });
    assert_eq!(histories[0], histories[1]);
}

#[test]
fn a_poisoner_is_named_and_its_values_never_count() {
    for (mischief, kind) in [
        (Mischief::NotANumber, FaultKind::NotFinite),
        (Mischief::Infinite, FaultKind::NotFinite),
        (Mischief::Huge, FaultKind::Implausible),
    ] {
        run(5, async |net| {
            let mut world = World::new(net, RunSpec::new(5));
            (0..3).for_each(|_| _ = world.start(plan(100)));
            let poisoner = world.start(PeerPlan { mischief, ..plan(100) });
            agree(&world, 10).await;
            let found = world.record.faults();
            assert!(found.iter().any(|(_, fault)| fault.peer == poisoner && fault.kind == kind), "{found:?}");
            let loss = world.loss(poisoner).expect("the poisoner holds the same parameters as everybody");
            assert!(loss < 0.1, "{mischief:?}: loss {loss}");
            world.finish().await;
        });
    }
}

#[test]
fn everyone_behind_nat_trains_through_one_relay() {
    run(6, async |net| {
        let relay = PeerSpec { relay: true, ..PeerSpec::default() };
        let _relay = net.add_peer(relay);
        let mut world = World::new(net, RunSpec::new(6));
        for nat in [NatClass::Symmetric, NatClass::PortRestricted, NatClass::OutboundOnly] {
            world.start(PeerPlan { machine: PeerSpec { nat, ..PeerSpec::default() }, ..plan(100) });
        }
        agree(&world, 10).await;
        let record = conclude(world, true).await;
        assert_eq!(last_members(&record).len(), 3);
    });
}

#[test]
fn a_peer_twenty_times_slower_holds_nobody_up() {
    run(7, async |net| {
        let mut world = World::new(net, RunSpec { epochs: 20, ..RunSpec::new(7) });
        (0..2).for_each(|_| _ = world.start(plan(100)));
        world.start(plan(2000));
        let took = agree(&world, 20).await;
        // Two fast peers fill an epoch in 400 ms; waiting for the slow one at each epoch would cost 2 s each.
        assert!(took < Duration::from_secs(60), "{took:?}");
        conclude(world, true).await;
    });
}

#[test]
fn every_compression_gives_everybody_the_same_bits() {
    for scheme in Scheme::ALL {
        run(8, async |net| {
            let compression = Policy::Fixed(*scheme);
            let mut world = World::new(net, RunSpec { compression, ..RunSpec::new(8) });
            (0..3).for_each(|_| _ = world.start(plan(100)));
            agree(&world, 10).await;
            conclude(world, false).await;
        });
    }
}

#[test]
fn every_policy_trains() {
    let diloco = PolicyKind::DiLoCo { inner_steps: 4, outer_lr: 0.7, outer_momentum: 0.5 };
    for policy in
        [PolicyKind::DelayedGradient, PolicyKind::DelayedOptimizer, PolicyKind::LocalUpdates, diloco]
    {
        run(9, async |net| {
            let mut world = World::new(net, RunSpec { policy, ..RunSpec::new(9) });
            let first = world.start(plan(100));
            world.start(plan(130));
            agree(&world, 10).await;
            let loss = world.loss(first).expect("it has parameters");
            let before = test_loss(RunSpec::new(9).model, &RunSpec::new(9).model.initial(9));
            assert!(loss < 0.5 * before, "{policy:?}: {before} -> {loss}");
            conclude(world, true).await;
        });
    }
}

#[test]
fn thirty_percent_killed_a_hundred_times() {
    run(10, async |net| {
        // Far more epochs than the run lasts through the kills: nobody is done before they end.
        let spec = RunSpec { target: 256, epochs: 250, ..RunSpec::new(10) };
        let mut world = World::new(net, spec.clone());
        let peers: Vec<PeerId> = (0..7).map(|_| world.start(plan(150))).collect();
        for round in 0..100 {
            tokio::time::sleep(Duration::from_millis(900)).await;
            let victims = [peers[round % 7], peers[(round + 3) % 7]];
            victims.iter().for_each(|victim| world.crash(*victim));
            tokio::time::sleep(Duration::from_millis(700)).await;
            victims.iter().for_each(|victim| world.restart(*victim));
        }
        world.healed();
        let latest = world.record.latest().into_values().map(|(lineage, ..)| lineage.epoch).max();
        assert!(latest.is_some_and(|epoch| (50..spec.epochs).contains(&epoch)), "{latest:?}");
        agree(&world, spec.epochs).await;
        conclude(world, true).await;
    });
}

#[test]
fn sixty_four_peers_are_one_group() {
    run(11, async |net| {
        let spec = RunSpec { target: 1024, epochs: 4, ..RunSpec::new(11) };
        let mut world = World::new(net, spec.clone());
        (0..64).for_each(|_| _ = world.start(plan(500)));
        agree(&world, spec.epochs).await;
        let record = conclude(world, true).await;
        assert_eq!(last_members(&record).len(), 64);
        assert!(record.faults().is_empty(), "{:?}", record.faults());
    });
}

/// `make sim` has a thousand.
#[test]
fn a_hundred_and_fifty_peers_average_in_groups() {
    let (measured, holds) = potluck_tests::properties::in_groups(150, 4).expect("all of them join");
    assert!(holds, "{measured}");
}
