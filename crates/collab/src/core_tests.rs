//! What a session decides after rounds that failed or were missed.

use super::*;
use crate::dialect::MissedRound;
use crate::status::Status;
use crate::{Rates, Snapshot};
use bytes::Bytes;

const TARGET: u64 = 64;

/// A session's memory after epoch 1, and another peer of the same history whose samples fill the next one.
fn in_company() -> Core {
    let config = SessionConfig::new("run", TARGET, Vec::new());
    let start = Lineage::genesis("run", &[0; 32]);
    let mut core = Core::new(PeerId::from_ed25519(&[1; 32]), config, start, 7);
    core.adopt_lineage(start.next_epoch(&[1; 32], TARGET), Instant::now());
    core.see(vec![view(2, core.lineage)], BTreeSet::new(), |_| false, &mut Vec::new());
    core
}

fn view(seed: u8, lineage: Lineage) -> PeerView {
    let note = Note { lineage, contributed: 0, loss: None, state_due: None, sketch: None, waiting: None };
    PeerView {
        peer: PeerId::from_ed25519(&[seed; 32]),
        epoch: lineage.epoch,
        samples: TARGET,
        samples_per_second: 1.0,
        path: None,
        rates: Rates::default(),
        auxiliary: false,
        client: false,
        note: note.encode(),
    }
}

#[tokio::test(start_paused = true)]
async fn an_epoch_without_a_history_is_no_company() {
    let mut core = in_company();
    let ours = core.lineage.epoch;
    for (epoch, note, comes) in
        [(ours, Bytes::new(), true), (ours + 9, Bytes::new(), false), (ours + 9, vec![9; 3].into(), false)]
    {
        let other = PeerView { epoch, note, ..view(2, core.lineage) };
        core.see(vec![other], BTreeSet::new(), |_| false, &mut Vec::new());
        assert_eq!(core.in_company(Instant::now()), comes, "epoch {epoch}");
    }
    let ahead = view(2, core.lineage.next_epoch(&[2; 32], TARGET));
    core.see(vec![ahead], BTreeSet::new(), |_| false, &mut Vec::new());
    assert!(core.in_company(Instant::now()));
}

/// A state of epoch 9 that another peer offers.
fn offered(core: &Core) -> Snapshot {
    let ahead = Lineage { epoch: 8, ..core.lineage }.next_epoch(&[9; 32], TARGET);
    let mut donor = Core::new(PeerId::from_ed25519(&[2; 32]), core.config.clone(), core.lineage, 1);
    donor.lineage = ahead;
    donor.seal(Snapshot::default())
}

#[tokio::test(start_paused = true)]
async fn a_state_that_is_refused_changes_nothing_and_nobody_hears_of_it() {
    let mut core = in_company();
    core.own.add(Instant::now(), 24);
    core.agreed = Some(vec![1.0; 3]);
    let (before, told) = (core.lineage, core.report(false));
    let mut snapshot = offered(&core);
    core.adopt(&mut snapshot, PeerId::from_ed25519(&[2; 32]), Instant::now()).unwrap();
    assert_eq!(core.lineage.epoch, 9);
    assert_eq!((core.report(false).epoch, core.report(false).note), (told.epoch, told.note.clone()));
    assert!(core.refuse(Instant::now(), true) && !core.refuse(Instant::now(), true));
    assert_eq!((core.lineage, core.own.samples, core.agreed.as_deref()), (before, 24, Some(&[1.0; 3][..])));
    assert_eq!(core.report(false), told);
}

#[tokio::test(start_paused = true)]
async fn who_failed_over_a_state_has_a_history_of_its_own_that_gives_way() {
    let mut core = in_company();
    let before = core.lineage;
    core.adopt(&mut offered(&core), PeerId::from_ed25519(&[2; 32]), Instant::now()).unwrap();
    assert!(core.refuse(Instant::now(), false));
    assert!(before.beats(&core.lineage) && core.lineage.epoch == before.epoch);
    assert!(core.behind.believes(Instant::now(), &PeerId::from_ed25519(&[2; 32])), "it is not to blame");
}

#[tokio::test(start_paused = true)]
async fn a_state_is_told_and_offered_when_the_program_goes_on_with_it() {
    let mut core = in_company();
    let given = offered(&core);
    core.adopt(&mut given.clone(), PeerId::from_ed25519(&[2; 32]), Instant::now()).unwrap();
    assert_eq!(core.accept(), Some(given));
    assert_eq!((core.report(false).epoch, core.accept()), (9, None));
    assert!(!core.refuse(Instant::now(), true), "too late");
}

#[tokio::test(start_paused = true)]
async fn patience_ends_over_several_calls_and_not_with_those_who_are_busy() {
    let winner = |core: &Core| Winner { peer: PeerId::from_ed25519(&[2; 32]), lineage: core.lineage };
    let tries = |offered: &[Offered], seconds: u64| {
        let mut core = in_company();
        let mut now = Instant::now();
        let mut given_up = Vec::new();
        for offered in offered {
            now += Duration::from_secs(seconds);
            given_up.push(core.not_loaded(now, &winner(&core), *offered));
        }
        given_up
    };
    assert_eq!(tries(&[Offered::No; 4], 7), [false, false, false, true]);
    assert_eq!(tries(&[Offered::No; 4], 30), [false; 4], "each time it is asked anew");
    assert_eq!(tries(&[Offered::Part(0.5); 4], 150), [false, false, true, false]);
    assert_eq!(tries(&[0.2, 0.2, 0.4, 0.4, 0.6, 0.6].map(Offered::Part), 150), [false; 6], "it comes on");
    assert_eq!(tries(&[Offered::Busy; 9], 30), [false; 9]);
}

#[tokio::test(start_paused = true)]
async fn whoever_missed_a_round_computes_on_instead_of_trying_all_the_time() {
    let mut core = in_company();
    let begun = Instant::now();
    let mut failures = 0;
    while Instant::now() < begun + Duration::from_secs(10) {
        core.own.add(Instant::now(), 8);
        match core.next(Instant::now(), |_| false) {
            Step::Average => {
                core.not_averaged(Instant::now(), Channel::Gradients, true, &[]);
                failures += 1;
            }
            step => assert_eq!(step, Step::Accumulate),
        }
        tokio::time::advance(Duration::from_millis(10)).await;
    }
    assert!((5..10).contains(&failures), "{failures} in 10 s");
    // The others have finished: their epoch is loaded, and nothing is held back any more.
    let ahead = core.lineage.next_epoch(&[2; 32], TARGET);
    core.see(vec![view(2, ahead)], BTreeSet::new(), |_| false, &mut Vec::new());
    assert_eq!(core.next(Instant::now(), |_| false), Step::LoadState);
    core.adopt_lineage(ahead, Instant::now());
    assert_eq!(core.next(Instant::now(), |_| false), Step::Average);
}

#[tokio::test(start_paused = true)]
async fn whoever_loaded_a_state_just_before_it_was_averaged_loads_it_again_and_nobody_gives_way_to_it() {
    let mut newcomer = in_company();
    let before = newcomer.lineage;
    let averaged = before.state_averaged(&[9; 32]);
    newcomer.see(vec![view(2, averaged)], BTreeSet::new(), |_| false, &mut Vec::new());
    assert_eq!(newcomer.next(Instant::now(), |_| false), Step::LoadState, "at once");
    let mut other = in_company();
    other.adopt_lineage(averaged, Instant::now());
    other.see(vec![view(1, before)], BTreeSet::new(), |_| false, &mut Vec::new());
    assert_eq!(other.winner(Instant::now()), None);
}

#[test]
fn what_a_peer_gave_is_shown_when_it_is_gone_and_when_it_has_begun_anew() {
    let mut core = in_company();
    let peer = PeerId::from_ed25519(&[2; 32]);
    let mut see = |contributed: Option<u64>| {
        let lineage = core.lineage;
        let told = contributed.map(|contributed| {
            let note =
                Note { lineage, contributed, loss: None, state_due: None, sketch: None, waiting: None };
            PeerView { note: note.encode(), ..view(2, lineage) }
        });
        core.see(told.into_iter().collect(), BTreeSet::new(), |_| false, &mut Vec::new());
        let Status { peers, left, .. } = core.status();
        (peers.get(1).map(|here| here.contributed), left.first().map(|left| (left.peer, left.contributed)))
    };
    assert_eq!(see(Some(40)), (Some(40), None));
    assert_eq!(see(None), (None, Some((peer, 40))));
    assert_eq!(see(Some(0)), (Some(40), None), "restarted");
    assert_eq!(see(Some(8)), (Some(48), None));
    assert_eq!(see(Some(2)), (Some(50), None), "restarted, and nobody had missed it");
    assert_eq!(see(None), (None, Some((peer, 50))));
    assert_eq!(see(Some(2)), (Some(50), None), "only its network was away");
}

#[test]
fn memory_is_that_of_the_vectors_which_the_policy_keeps() {
    let mut config = SessionConfig::new("run", TARGET, Vec::new());
    config.policy = PolicyKind::DiLoCo { inner_steps: 4, outer_lr: 0.7, outer_momentum: 0.9 };
    let start = Lineage::genesis("run", &[0; 32]);
    let mut core = Core::new(PeerId::from_ed25519(&[1; 32]), config, start, 7);
    let held = |core: &Core| crate::memory::by_name(core.memory()).into_iter().collect::<Vec<_>>();
    assert_eq!(held(&core), []);
    core.agree(vec![1.0; 10]);
    assert_eq!(held(&core), [("agreed".to_owned(), 40)]);
    core.agree(vec![0.5; 10]);
    assert_eq!(held(&core), [("agreed".to_owned(), 40), ("velocity".to_owned(), 40)]);
}

/// A peer that was in the round, and one that makes up for it later, go on alike.
#[test]
fn a_round_that_is_made_up_for_leads_to_the_same_history_and_parameters() {
    let member_of = |policy| {
        let mut config = SessionConfig::new("run", TARGET, Vec::new());
        config.policy = policy;
        let start = Lineage::genesis("run", &[0; 32]);
        let mut core = Core::new(PeerId::from_ed25519(&[1; 32]), config, start, 7);
        core.agree(vec![1.0, 2.0]);
        core
    };
    let result = |seed| RoundResult {
        vector: Vec::new(),
        members: Vec::new(),
        gathered: Vec::new(),
        weight_total: 64.0,
        plan_hash: [seed; 32],
        unchanged: false,
        record: Some(crate::Record::default()),
        stats: crate::RoundStats::default(),
    };
    let outer = PolicyKind::DiLoCo { inner_steps: 4, outer_lr: 0.7, outer_momentum: 0.9 };
    for (policy, channel) in [
        (PolicyKind::Synchronous, Channel::Gradients),
        (PolicyKind::Synchronous, Channel::State),
        (PolicyKind::LocalUpdates, Channel::State),
        (outer, Channel::State),
    ] {
        let (mut member, mut late) = (member_of(policy), member_of(policy));
        let ends = channel == Channel::Gradients || policy.ends_epochs_with_state();
        for seed in 0..3 {
            let movement = vec![f32::from(seed), 0.5];
            member.averaged(channel, &result(seed), &[]);
            let parameters =
                if channel == Channel::State { member.agree(movement.clone()) } else { movement.clone() };
            if ends {
                member.epoch_done();
            }
            let sequel = member.take_sequels().remove(0);
            assert_eq!((sequel.before, sequel.after), (late.lineage.hash, member.lineage.hash));
            let missed = MissedRound {
                channel,
                plan_hash: sequel.plan_hash,
                samples: sequel.samples,
                after: sequel.after,
                vector: movement,
            };
            let odd = MissedRound { plan_hash: [99; 32], ..missed.clone() };
            assert!(late.make_up(odd, Instant::now()).is_err(), "it leads elsewhere");
            assert_eq!(late.make_up(missed, Instant::now()), Ok(parameters), "{policy:?} {channel:?}");
            if ends {
                late.epoch_done();
            }
            assert_eq!(late.lineage, member.lineage, "{policy:?} {channel:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_round_is_not_tried_again_at_once_while_something_runs_beside() {
    for background in [Background::Idle, Background::Running, Background::Ready] {
        let mut core = in_company();
        core.background = background;
        core.background_epoch = core.lineage.epoch;
        core.config.policy = PolicyKind::DelayedState;
        core.own.add(Instant::now(), 8);
        assert_eq!(core.next(Instant::now(), |_| false), Step::Average, "{background:?}");
        core.not_averaged(Instant::now(), Channel::Gradients, true, &[]);
        assert_eq!(core.next(Instant::now(), |_| false), Step::Accumulate, "{background:?}");
        tokio::time::advance(FAILED_PAUSE).await;
        assert_eq!(core.next(Instant::now(), |_| false), Step::Average, "{background:?}");
    }
}

fn average() -> RoundResult {
    RoundResult {
        vector: vec![0.0],
        members: Vec::new(),
        gathered: Vec::new(),
        weight_total: 64.0,
        plan_hash: [2; 32],
        unchanged: false,
        record: None,
        stats: crate::RoundStats::default(),
    }
}

/// Whoever failed over an average may have applied it or not: only a whole state is sure.
#[test]
fn a_program_that_did_not_finish_an_epoch_does_not_apply_its_round_twice() {
    let mut core = in_company();
    core.own.samples = 8;
    core.lineage.samples = 64;
    let ahead = core.lineage.next_epoch(&[2; 32], TARGET);
    assert!(core.may_make_up(&ahead));
    core.averaged(Channel::Gradients, &average(), &[]);
    assert!(!core.may_make_up(&ahead), "its optimizer raised, or the step after it");
    core.epoch_done();
    assert!(core.may_make_up(&ahead.next_epoch(&[3; 32], TARGET)));
    let after = core.lineage.next_epoch(&[4; 32], TARGET);
    let missed = MissedRound {
        channel: Channel::Gradients,
        plan_hash: [4; 32],
        samples: TARGET,
        after: after.hash,
        vector: vec![0.0],
    };
    core.make_up(missed, Instant::now()).unwrap();
    assert!(!core.may_make_up(&after), "the same for a round that it made up for");
    core.epoch_done();
    assert_eq!(core.lineage, after);
    assert!(core.may_make_up(&after.next_epoch(&[5; 32], TARGET)));
}

#[tokio::test(start_paused = true)]
async fn what_is_given_up_holds_nothing_up_and_gives_way_to_the_state_of_before() {
    for policy in [
        PolicyKind::Synchronous,
        PolicyKind::DelayedOptimizer,
        PolicyKind::DelayedState,
        PolicyKind::LocalUpdates,
    ] {
        for published in [false, true] {
            let mut core = in_company();
            core.config.policy = policy;
            core.own.add(Instant::now(), 8);
            assert!(!core.abandon(), "{policy:?}: there is nothing to give up");
            assert_eq!(core.own.samples, 8);
            let before = core.lineage;
            core.averaged(Channel::Gradients, &average(), &[]);
            if policy == PolicyKind::DelayedOptimizer {
                core.begin_background(Channel::Gradients);
                assert_eq!(core.next(Instant::now(), |_| false), Step::Accumulate);
            }
            assert!(core.abandon());
            assert_eq!((core.own.samples, core.background), (0, Background::Idle), "{policy:?}");
            assert!(!core.may_make_up(&before.next_epoch(&[2; 32], TARGET)));
            match published {
                true => drop(core.seal(Snapshot::default())),
                false => core.epoch_done(),
            }
            let given_up = core.lineage;
            assert_ne!(given_up.hash, before.next_epoch(&[2; 32], 64).hash, "it was not applied");
            assert_eq!(given_up.beats(&before), !published, "what is trained on it counts");
            core.seal(Snapshot::default());
            assert_eq!(core.lineage, given_up, "once");
            if published {
                assert_eq!(core.next(Instant::now(), |_| false), Step::LoadState, "{policy:?}: at once");
                core.adopt_lineage(before, Instant::now());
                assert_ne!(core.next(Instant::now(), |_| false), Step::LoadState);
            }
        }
    }
}

#[test]
fn an_average_that_is_not_handed_out_yet_cannot_be_given_up() {
    let mut core = in_company();
    core.config.policy = PolicyKind::DelayedGradient;
    core.begin_background(Channel::Gradients);
    core.averaged(Channel::Gradients, &average(), &[]);
    assert!(!core.abandon());
    core.background = Background::Ready;
    assert!(core.abandon());
    assert_eq!(core.background, Background::Idle);
    // One that it missed and made up for.
    core.seal(Snapshot::default());
    let after = core.lineage.next_epoch(&[4; 32], TARGET).hash;
    let (channel, plan_hash, vector) = (Channel::Gradients, [4; 32], vec![0.0]);
    core.make_up(MissedRound { channel, plan_hash, samples: TARGET, after, vector }, Instant::now()).unwrap();
    assert!(core.abandon());
}

/// It may have applied more of it the second time.
#[test]
fn what_is_given_up_twice_has_two_histories() {
    let mut core = in_company();
    let before = core.lineage;
    let mut give_up = || {
        core.adopt_lineage(before, Instant::now());
        core.unsettled = true;
        assert!(core.abandon());
        core.seal(Snapshot::default());
        core.lineage.hash
    };
    assert_ne!(give_up(), give_up());
}

/// At the start a history is named after the state, which may still be the first.
#[test]
fn a_first_average_that_is_given_up_is_made_up_for_from_the_start() {
    let mut config = SessionConfig::new("run", TARGET, Vec::new());
    config.policy = PolicyKind::DiLoCo { inner_steps: 4, outer_lr: 0.7, outer_momentum: 0.9 };
    let start = Lineage::genesis("run", &[0; 32]);
    let made = || {
        let mut core = Core::new(PeerId::from_ed25519(&[1; 32]), config.clone(), start, 7);
        core.seal(Snapshot::default());
        core
    };
    let (mut clumsy, mut late) = (made(), made());
    clumsy.averaged(Channel::State, &average(), &[]);
    clumsy.agree(vec![1.0, 2.0]);
    assert!(clumsy.abandon());
    clumsy.seal(Snapshot::default());
    assert_eq!(clumsy.lineage, late.lineage, "nothing of it was applied");
    let after = late.lineage.next_epoch(&[4; 32], TARGET).hash;
    let (channel, plan_hash, vector) = (Channel::State, [4; 32], vec![1.0, 2.0]);
    let missed = MissedRound { channel, plan_hash, samples: TARGET, after, vector };
    let parameters = late.make_up(missed.clone(), Instant::now());
    assert_eq!(clumsy.make_up(missed, Instant::now()), parameters);
    assert_eq!(clumsy.memory(), late.memory());
}
