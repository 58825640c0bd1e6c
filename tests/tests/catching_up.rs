//! Whoever is a few rounds behind applies the averages that it missed, and has the bits of the others.

use potluck_collab::{Event, Policy, PolicyKind, PowerSgd, Scheme, StateEvery};
use potluck_net::PeerId;
use potluck_net_sim::{PeerSpec, run};
use potluck_tests::harness::{PeerPlan, RunSpec, World};
use potluck_tests::invariants;
use potluck_tests::models::Model;
use potluck_tests::record::{Entry, Record};
use std::time::Duration;
use tokio::time::Instant;

const AGREE_MAX: Duration = Duration::from_secs(240);

/// Two seconds of an epoch for four peers: 24 samples each in steps of half a second.
fn spec(seed: u64) -> RunSpec {
    RunSpec { target: 96, epochs: 20, ..RunSpec::new(seed) }
}

fn plan(machine: PeerSpec) -> PeerPlan {
    PeerPlan { machine, step_time: Duration::from_millis(500), ..PeerPlan::default() }
}

/// The same with one step per epoch: a large model takes real time for each.
fn large_steps(machine: PeerSpec) -> PeerPlan {
    PeerPlan { batch: 24, step_time: Duration::from_secs(2), ..plan(machine) }
}

/// Everybody agrees at the end, and no invariant is hurt: among them, that one history means the same bits.
async fn conclude(world: World, spec: &RunSpec) -> Record {
    let agreed = world.until_agreed(spec.epochs, AGREE_MAX).await;
    let lines = |record: &Record| record.with(potluck_tests::explore::lines).join("\n");
    assert!(agreed.is_ok(), "{agreed:?}\n{}", lines(&world.record));
    let (record, streams) = world.finish().await;
    let exact = spec.compression == Policy::default() && spec.powersgd.is_none();
    let mut found = record.with(|entries| invariants::check(entries, exact));
    found.extend(invariants::check_end(streams));
    let found: Vec<String> = found.iter().map(|one| format!("{one:?}").chars().take(400).collect()).collect();
    assert!(found.is_empty(), "{found:#?}\n{}", lines(&record));
    record
}

/// Rounds that a peer made up for, and states that it loaded after `since`.
fn caught_up(record: &Record, who: PeerId, since: Instant) -> (usize, usize) {
    record.with(|entries| {
        let count = |is_it: fn(&Event) -> bool| {
            let events = entries.iter().filter(|entry| {
                matches!(entry, Entry::Event { peer, event, at } if *peer == who && *at >= since && is_it(event))
            });
            events.count()
        };
        (
            count(|event| matches!(event, Event::MadeUp { .. })),
            count(|event| matches!(event, Event::StateLoaded { .. })),
        )
    })
}

/// When the first round with this member was over.
fn first_round_with(record: &Record, who: PeerId) -> Option<Instant> {
    record.with(|entries| {
        entries.iter().find_map(|entry| match entry {
            Entry::Event { event: Event::Round(round), at, .. } if round.members.contains(&who) => Some(*at),
            _ => None,
        })
    })
}

/// The state takes longer than two epochs to load. Whoever could only load states would find the others two epochs
/// further each time, and never contribute.
#[test]
fn a_newcomer_whose_state_takes_longer_than_an_epoch_takes_part() {
    run(1, async |net| {
        let compression = Policy::Fixed(Scheme::Uniform8Bit);
        let spec = RunSpec { model: Model::Broad, compression, epochs: 12, ..spec(1) };
        let mut world = World::new(net, spec.clone());
        (0..4).for_each(|_| _ = world.start(large_steps(PeerSpec::default())));
        tokio::time::sleep(Duration::from_secs(9)).await;
        // Parameters and momentum are 4.8 MB, an average 0.6 MB.
        let slow = PeerSpec { down_bytes_per_second: 5e5, ..PeerSpec::default() };
        let (began, newcomer) = (Instant::now(), world.start(large_steps(slow)));
        let record = conclude(world, &spec).await;
        let (made_up, loaded) = caught_up(&record, newcomer, began);
        assert!(made_up >= 2 && loaded == 1, "made up for {made_up} rounds, loaded {loaded} states");
        // 9.6 s for the state, and what it missed meanwhile is made up for in 1.2 s each; 1.3 times that, and one round.
        let took = first_round_with(&record, newcomer).expect("it took part").duration_since(began);
        let ideal = 9.6 + 1.2 * made_up as f64;
        assert!(took.as_secs_f64() < 1.3 * ideal + 3.0, "{took:?} for {made_up} rounds");
    });
}

/// Its network is gone for the end of one epoch.
fn missed_a_round(spec: RunSpec) -> (usize, usize) {
    run(2, async |net| {
        let mut world = World::new(net, spec.clone());
        let peers: Vec<PeerId> = (0..4).map(|_| world.start(plan(PeerSpec::default()))).collect();
        tokio::time::sleep(Duration::from_secs(11)).await;
        world.freeze(peers[2]);
        tokio::time::sleep(Duration::from_secs(8)).await;
        let back = Instant::now();
        world.thaw(peers[2]);
        world.healed();
        let record = conclude(world, &spec).await;
        caught_up(&record, peers[2], back)
    })
}

#[test]
fn a_missed_round_is_made_up_for_without_loading_a_state() {
    let spec = RunSpec { target: 384, epochs: 8, ..spec(2) };
    let (made_up, loaded) = missed_a_round(spec.clone());
    assert!(made_up >= 1 && loaded == 0, "made up for {made_up} rounds, loaded {loaded} states");
    let powersgd = Some(PowerSgd { rank: 1, min_compression_ratio: 0.5 });
    let (made_up, loaded) = missed_a_round(RunSpec { model: Model::Perceptron, powersgd, ..spec.clone() });
    assert!(made_up >= 1 && loaded == 0, "PowerSGD: {made_up} rounds, {loaded} states");
    for policy in [
        PolicyKind::DelayedGradient,
        PolicyKind::DelayedOptimizer,
        PolicyKind::DelayedState,
        // DiLoCo ends its epochs alone when it is cut off, and so has a history of its own.
        PolicyKind::LocalUpdates,
    ] {
        let (made_up, loaded) =
            missed_a_round(RunSpec { policy, state_every: StateEvery::Epochs(1), ..spec.clone() });
        assert!(made_up >= 1 && loaded == 0, "{policy:?}: made up for {made_up}, loaded {loaded} states");
    }
}

/// One peer has the state, and a thin line: eight that come at once give one another what they have of it, although none of
/// them has the epoch.
#[test]
fn newcomers_feed_one_another() {
    run(5, async |net| {
        let spec = RunSpec { model: Model::Broad, target: 24, epochs: 3, ..spec(5) };
        let mut world = World::new(net, spec.clone());
        let seed = world.start(large_steps(PeerSpec { up_bytes_per_second: 1e6, ..PeerSpec::default() }));
        world.until_agreed(spec.epochs, Duration::from_secs(60)).await.expect("it trains alone");
        let (before, began) = (world.net.traffic(seed).up_bytes, Instant::now());
        for _ in 0..8 {
            world.start(large_steps(PeerSpec::default()));
        }
        world.until_agreed(spec.epochs, Duration::from_secs(60)).await.expect("they load its state");
        // Parameters and momentum.
        let copies = (world.net.traffic(seed).up_bytes - before) as f64 / 4.8e6;
        assert!(copies < 6.5, "{copies:.1} copies in {:?} for eight newcomers", began.elapsed());
        conclude(world, &spec).await;
    });
}
