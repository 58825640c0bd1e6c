//! A member that says that it is far ahead, and is not: the others give its state up soon, and train on.

use potluck_collab::{Event, PolicyKind, Session, Snapshot};
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimTransport, run};
use potluck_tests::harness::{PeerPlan, RunSpec, World};
use potluck_tests::invariants;
use potluck_tests::record::Entry;
use std::sync::Arc;
use std::time::Duration;

const CLAIMED: u64 = 1000;

/// Ends when it is closed.
struct Liar {
    session: Session,
    transport: Arc<SimTransport>,
}

impl Liar {
    /// A member of the run whose epochs are its own invention. It offers this state for them, if it offers any.
    async fn joins(world: &World, spec: &RunSpec, state: Option<Snapshot>) -> Self {
        let transport = world.net.add_peer(PeerSpec::default());
        let env = world.net.env(transport.local_peer());
        let session =
            Session::join(transport.clone(), env, spec.config(world.live())).await.expect("it is a member");
        (0..CLAIMED).for_each(|_| session.epoch_done(None));
        if let Some(state) = state {
            session.publish(state);
        }
        assert_eq!(session.epoch(), CLAIMED);
        Self { session, transport }
    }

    async fn leaves(self) {
        self.session.leave().await;
        self.transport.close().await;
    }
}

/// Why each peer gave a state up, in order.
fn given_up(world: &World, peer: PeerId) -> Vec<String> {
    world.record.with(|entries| {
        let reasons = entries.iter().filter_map(|entry| match entry {
            Entry::Event { peer: whose, event: Event::StateFailed { reason }, .. } if *whose == peer => {
                Some(reason.clone())
            }
            _ => None,
        });
        reasons.collect()
    })
}

/// Epochs go on to the end although the liar is there all the time, and everybody says why nothing was loaded.
fn trains_on(honest: usize, policy: PolicyKind, state: Option<Snapshot>, says: &'static str) {
    run(1, async |net| {
        let spec = RunSpec { policy, target: 24 * honest as u64, epochs: 20, ..RunSpec::new(1) };
        let mut world = World::new(net, spec.clone());
        let plan = || PeerPlan { step_time: Duration::from_millis(500), ..PeerPlan::default() };
        let peers: Vec<PeerId> = (0..honest).map(|_| world.start(plan())).collect();
        world.until_agreed(3, Duration::from_secs(60)).await.expect("they train");
        let liar = Liar::joins(&world, &spec, state).await;
        let agreed = world.until_agreed(spec.epochs, Duration::from_secs(150)).await;
        let record = world.record.clone();
        let lines = || record.with(potluck_tests::explore::lines).join("\n");
        assert!(agreed.is_ok(), "{agreed:?}\n{}", lines());
        for peer in &peers {
            let reasons = given_up(&world, *peer);
            assert!(reasons.iter().any(|reason| reason.contains(says)), "{reasons:?}\n{}", lines());
        }
        // A newcomer gets the state of the honest.
        let newcomer = world.start(plan());
        let agreed = world.until_agreed(spec.epochs, Duration::from_secs(60)).await;
        assert!(agreed.is_ok(), "the newcomer {}: {agreed:?}\n{}", newcomer.short(), lines());
        liar.leaves().await;
        let (record, streams) = world.finish().await;
        let mut found = record.with(|entries| invariants::check(entries, true));
        found.extend(invariants::check_end(streams));
        assert!(found.is_empty(), "{found:#?}");
    });
}

const DILOCO: PolicyKind = PolicyKind::DiLoCo { inner_steps: 3, outer_lr: 0.7, outer_momentum: 0.9 };

#[test]
fn a_claimed_epoch_whose_state_nobody_has_is_given_up() {
    for honest in [1, 4] {
        trains_on(honest, PolicyKind::Synchronous, None, "says that it is there");
        trains_on(honest, DILOCO, None, "says that it is there");
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_the_own_one_kept() {
    let mut nonsense = Snapshot::default();
    nonsense.blobs.insert("params".to_owned(), vec![0; 4].into());
    for honest in [1, 4] {
        trains_on(honest, PolicyKind::Synchronous, Some(nonsense.clone()), "of another model");
        trains_on(honest, DILOCO, Some(nonsense.clone()), "of another model");
    }
}
