//! Random runs: everything follows from a seed. Peers train, faults strike, everything heals, and all must agree, with
//! every invariant kept and a lower loss. A failure prints the line that reproduces it.

use crate::harness::{PeerPlan, RunSpec, World};
use crate::hub::Hub;
use crate::invariants::{self, Violation};
use crate::models::Model;
use crate::record::Entry;
use crate::reference::test_loss;
use potluck_collab::{Policy, PolicyKind, PowerSgd, Scheme, StateEvery};
use potluck_net::PeerId;
use potluck_net_sim::{FaultRates, NatClass, PeerSpec, SimTransport, TraceName};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::Duration;

/// Epochs of an explored run.
const EPOCHS: u64 = 12;
/// Peers of an explored run, at least and at most.
const PEERS: (u64, u64) = (2, 7);
/// After everything has healed, all agree within this.
const AGREE_MAX: Duration = Duration::from_secs(240);

/// A loss below this has converged, even if the initial parameters happened to be good.
const LOSS_FLOOR: f32 = 0.03;

/// Whether the run uses the real protocol or the ideal one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Over the simulated network.
    Native,
    /// Over the hub: only crashes are meaningful.
    Ideal,
}

/// What one explored run gave.
#[derive(Debug, Clone)]
pub struct Explored {
    /// What was tried, for people.
    pub story: Vec<String>,
    /// What was wrong.
    pub violations: Vec<Violation>,
}

/// Explore one seed; over the network twice, the second time with clocks that agree.
pub fn explore(seed: u64, protocol: Protocol) -> Explored {
    let (mut explored, apart) = explore_once(seed, protocol, true);
    if protocol == Protocol::Native {
        let (_, together) = explore_once(seed, protocol, false);
        explored.violations.extend(invariants::check_clocks(&apart, &together));
    }
    explored
}

fn explore_once(seed: u64, protocol: Protocol, clocks_apart: bool) -> (Explored, TraceName) {
    potluck_net_sim::run(seed, async |net| {
        let mut rng = StdRng::seed_from_u64(seed);
        let spec = spec(seed, &mut rng);
        let mut story = vec![format!("{spec:?}")];
        let mut world = match protocol {
            Protocol::Native => World::new(net, spec.clone()),
            Protocol::Ideal => World::with_hub(net, spec.clone(), Hub::default()),
        };
        let _relay = net_relay(&world);
        let peers = PEERS.0 + below(&mut rng, PEERS.1 - PEERS.0 + 1);
        // Drawn apart, so that a seed's other faults are what they were.
        let mut clumsy = StdRng::seed_from_u64(!seed);
        let fumbling = below(&mut clumsy, 4) == 0;
        let mut fumbles = || if fumbling { below(&mut clumsy, 40) } else { 0 };
        let ids: Vec<PeerId> = (0..peers)
            .map(|_| {
                let mut plan = PeerPlan { fumbles: fumbles(), ..plan(&mut rng, protocol) };
                plan.machine.clock_skew *= i64::from(clocks_apart);
                world.start(plan)
            })
            .collect();
        for id in &ids {
            story.push(format!("peer {}", id.short()));
        }
        let strikes = below(&mut rng, 5);
        for _ in 0..strikes {
            pause(&mut rng, 4000).await;
            strike(&mut world, &ids, &mut rng, protocol, &mut story).await;
        }
        world.heal_partitions();
        world.healed();
        let mut violations = conclude(&world, &spec, &ids).await;
        let net = world.net.clone();
        let (record, streams) = world.finish().await;
        violations.extend(invariants::check_end(if protocol == Protocol::Native { streams } else { 0 }));
        violations.extend(record.with(|entries| invariants::check(entries, is_exact(&spec))));
        if !violations.is_empty() {
            story.extend(record.with(lines));
        }
        (Explored { story, violations }, net.trace_name())
    })
}

async fn conclude(world: &World, spec: &RunSpec, ids: &[PeerId]) -> Vec<Violation> {
    let mut violations = Vec::new();
    if let Err(found) = world.until_agreed(spec.epochs, AGREE_MAX).await {
        violations.push(Violation { invariant: "after faults heal, all agree", found });
    }
    let before = test_loss(spec.model, &spec.model.initial(spec.seed));
    for (id, loss) in ids.iter().filter_map(|id| Some((id, world.loss(*id)?))) {
        if !loss.is_finite() || loss > LOSS_FLOOR.max(0.7 * before) {
            let found = format!("peer {}: loss {before} -> {loss}", id.short());
            violations.push(Violation { invariant: "training lowers the loss", found });
        }
    }
    violations
}

/// Through which peers behind NAT meet.
fn net_relay(world: &World) -> Arc<SimTransport> {
    world.net.add_peer(PeerSpec { relay: true, name: "relay".to_owned(), ..PeerSpec::default() })
}

fn is_exact(spec: &RunSpec) -> bool {
    spec.compression == Policy::default() && spec.powersgd.is_none()
}

fn spec(seed: u64, rng: &mut StdRng) -> RunSpec {
    let policies = [
        PolicyKind::Synchronous,
        PolicyKind::Synchronous,
        PolicyKind::DelayedGradient,
        PolicyKind::DelayedOptimizer,
        PolicyKind::DelayedState,
        PolicyKind::LocalUpdates,
        PolicyKind::DiLoCo { inner_steps: 6, outer_lr: 0.7, outer_momentum: 0.5 },
    ];
    let schemes = [Scheme::None, Scheme::None, Scheme::Float16, Scheme::Uniform8Bit, Scheme::Blockwise8Bit];
    let state = [StateEvery::Never, StateEvery::Never, StateEvery::Epochs(3), StateEvery::Drift(0.05)];
    let policy = pick(rng, &policies);
    let low_rank = policy == PolicyKind::Synchronous && below(rng, 4) == 0;
    RunSpec {
        powersgd: low_rank.then_some(PowerSgd { rank: 1, min_compression_ratio: 0.0 }),
        model: pick(rng, &[Model::LeastSquares, Model::Perceptron]),
        policy,
        state_every: match policy {
            PolicyKind::DelayedState => StateEvery::Epochs(2),
            _ => pick(rng, &state),
        },
        compression: Policy::Fixed(pick(rng, &schemes)),
        target: pick(rng, &[32, 64, 128]),
        epochs: EPOCHS,
        ..RunSpec::new(seed)
    }
}

fn plan(rng: &mut StdRng, protocol: Protocol) -> PeerPlan {
    let rates = [1.25e6, 5e6, 100e6];
    let nats =
        [NatClass::Open, NatClass::Open, NatClass::FullCone, NatClass::PortRestricted, NatClass::Symmetric];
    let faults = match (protocol, below(rng, 6)) {
        (Protocol::Native, 0) => FaultRates { delay: 0.02, ..FaultRates::default() },
        (Protocol::Native, 1) => FaultRates { reset: 0.01, refuse_open: 0.05, ..FaultRates::default() },
        _ => FaultRates::default(),
    };
    PeerPlan {
        machine: PeerSpec {
            up_bytes_per_second: pick(rng, &rates),
            down_bytes_per_second: pick(rng, &rates),
            latency: Duration::from_millis(1 + below(rng, 80)),
            jitter: Duration::from_millis(below(rng, 5)),
            nat: pick(rng, &nats),
            clock_skew: below(rng, 7200) as i64 - 3600,
            faults,
            ..PeerSpec::default()
        },
        batch: pick(rng, &[4, 8, 16]),
        step_time: Duration::from_millis(50 + below(rng, 400)),
        ..PeerPlan::default()
    }
}

/// Something breaks, and most of the time it comes back after a while.
async fn strike(
    world: &mut World,
    ids: &[PeerId],
    rng: &mut StdRng,
    protocol: Protocol,
    story: &mut Vec<String>,
) {
    let victim = pick(rng, ids);
    let kind = if protocol == Protocol::Ideal { 0 } else { below(rng, 4) };
    let alive = world.live().contains(&victim);
    let mut tell = |what: &str| story.push(format!("{:?}: {what} {}", world_time(world), victim.short()));
    match kind {
        _ if !alive => {}
        0 | 1 => {
            tell(if kind == 0 { "crash" } else { "vanish" });
            if kind == 0 {
                world.crash(victim)
            } else {
                world.vanish(victim)
            }
            pause(rng, 8000).await;
            story.push(format!("{:?}: restart {}", world_time(world), victim.short()));
            world.restart(victim);
        }
        2 => {
            tell("freeze");
            world.freeze(victim);
            pause(rng, 8000).await;
            story.push(format!("{:?}: thaw {}", world_time(world), victim.short()));
            world.thaw(victim);
        }
        _ => {
            let one_way = below(rng, 3) == 0;
            let count = 1 + below(rng, ids.len() as u64 / 2) as usize;
            tell(&format!("partition of {count} (one way: {one_way}) around"));
            let start = ids.iter().position(|id| *id == victim).unwrap_or(0);
            let some: Vec<PeerId> = (0..count).map(|i| ids[(start + i) % ids.len()]).collect();
            world.partition(&some, one_way);
            pause(rng, 10_000).await;
            story.push(format!("{:?}: the partition ends", world_time(world)));
            world.heal_partitions();
        }
    }
}

fn world_time(world: &World) -> Duration {
    world.net.elapsed()
}

async fn pause(rng: &mut StdRng, milliseconds_max: u64) {
    tokio::time::sleep(Duration::from_millis(below(rng, milliseconds_max))).await;
}

fn below(rng: &mut StdRng, limit: u64) -> u64 {
    rng.next_u64() % limit.max(1)
}

fn pick<T: Clone>(rng: &mut StdRng, choices: &[T]) -> T {
    choices[below(rng, choices.len() as u64) as usize].clone()
}

/// The report of a failed seed: what was tried, what was wrong, what reproduces it.
pub fn report(seed: u64, explored: &Explored) -> String {
    let mut lines = explored.story.clone();
    lines
        .extend(explored.violations.iter().take(10).map(|v| format!("BROKEN: {}: {}", v.invariant, v.found)));
    lines.push(format!("reproduce with: make sim SEED={seed}"));
    lines.join("\n")
}

/// Lines of a record that a report shows at most: the last ones.
const LINES_MAX: usize = 200;

/// The entries of a record as lines, for looking into a failure.
pub fn lines(entries: &[Entry]) -> Vec<String> {
    let begun = entries.iter().find_map(|entry| match entry {
        Entry::Event { at, .. } | Entry::Injected { at, .. } => Some(*at),
        _ => None,
    });
    let seconds = |at: &tokio::time::Instant| {
        let since = begun.map_or(Duration::ZERO, |begun| at.duration_since(begun));
        format!("+{:.3}", since.as_secs_f64())
    };
    let lines: Vec<String> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Event { peer, event, at } => Some(format!("{} {}: {event}", seconds(at), peer.short())),
            Entry::Injected { peer, what, at } => {
                Some(format!("{} {}: INJECTED {what}", seconds(at), peer.short()))
            }
            Entry::JoinFailed { peer, reason } => Some(format!("{}: join failed: {reason}", peer.short())),
            Entry::GaveUp { peer, epoch } => Some(format!("{}: gave up epoch {epoch}", peer.short())),
            Entry::Loaded { peer, from, to } => Some(format!("{}: loaded {from} -> {to}", peer.short())),
            _ => None,
        })
        .collect();
    lines[lines.len().saturating_sub(LINES_MAX)..].to_vec()
}
