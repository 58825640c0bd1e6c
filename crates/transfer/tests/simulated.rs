//! Newcomers in the simulator: several donors, a donor killed half way, joiners that feed one another, a liar.

#![expect(clippy::unwrap_used, reason = "a helper of tests may panic")]

use bytes::Bytes;
use potluck_net::{FaultKind, PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimNet, SimTransport, run};
use potluck_transfer::{CHUNK_BYTES, DownloadError, Exchange, HeldBytes, Sequel, Snapshot};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(600);

fn snapshot(epoch: u64, chunks: usize) -> Arc<Snapshot> {
    let byte = |index: usize| (index * 31 + index / 251 + epoch as usize) as u8;
    let weights: Bytes = (0..chunks * CHUNK_BYTES - 17).map(byte).collect();
    let blobs =
        BTreeMap::from([("weights".to_owned(), weights), ("step".to_owned(), Bytes::from_static(&[7; 4]))]);
    let meta = BTreeMap::from([("scheduler".to_owned(), "{\"last_epoch\": 3}".to_owned())]);
    Arc::new(Snapshot { epoch, lineage: [epoch as u8; 32], meta, blobs })
}

fn peer(net: &SimNet, megabytes_per_second: f64) -> (Arc<SimTransport>, Exchange) {
    let rate = megabytes_per_second * 1e6;
    let spec = PeerSpec { up_bytes_per_second: rate, down_bytes_per_second: rate, ..PeerSpec::default() };
    let transport = net.add_peer(spec);
    let exchange = Exchange::start(transport.clone(), net.env(transport.local_peer()), "run").unwrap();
    (transport, exchange)
}

/// So many peers of this speed that offer a state of so many chunks, epoch 9; and their names.
fn donors(
    net: &SimNet,
    count: usize,
    megabytes_per_second: f64,
    chunks: usize,
) -> (Vec<Exchange>, Vec<PeerId>) {
    let one = |_| {
        let (transport, exchange) = peer(net, megabytes_per_second);
        exchange.publish(snapshot(9, chunks));
        (exchange, transport.local_peer())
    };
    (0..count).map(one).unzip()
}

#[test]
fn a_newcomer_gets_the_newest_state_and_nothing_older_than_asked() {
    run(1, |net| async move {
        let (donor, old) = peer(&net, 10.0);
        let (_, newcomer) = peer(&net, 10.0);
        old.publish(snapshot(4, 2));
        old.publish(snapshot(5, 3));
        let from = [donor.local_peer()];
        let outcome = newcomer.download(&from, 0, TIMEOUT).await.unwrap();
        assert_eq!(outcome.value, *snapshot(5, 3));
        assert!(outcome.faults.is_empty());
        let refused = newcomer.download(&from, 6, TIMEOUT).await.unwrap_err();
        assert!(matches!(refused, DownloadError::NobodyOffers { asked: 1, epoch_min: 6, .. }), "{refused}");
    });
}

/// A peer whose newcomers have gone holds its own state and no more, whatever came and went: also when nobody asks again.
#[test]
fn older_states_are_let_go_when_nobody_asks_for_them_any_more() {
    run(8, |net| async move {
        let (donor, offering) = peer(&net, 10.0);
        let from = [donor.local_peer()];
        for epoch in 1..=5 {
            offering.publish(snapshot(epoch, 2));
            let (_, newcomer) = peer(&net, 10.0);
            assert_eq!(newcomer.download(&from, epoch, TIMEOUT).await.unwrap().value, *snapshot(epoch, 2));
        }
        let one: u64 = snapshot(6, 2).blobs.values().map(|blob| blob.len() as u64).sum();
        assert_eq!(offering.held().states, 3 * one, "at most two older ones beside the newest");
        tokio::time::sleep(Duration::from_secs(60)).await;
        offering.publish(snapshot(6, 2));
        assert_eq!(offering.held().states, one, "nobody asked for the older ones for a minute");
    });
}

#[test]
fn the_state_of_a_closed_run_is_for_its_members() {
    run(7, |net| async move {
        let (_, member) = peer(&net, 10.0);
        let (stranger, uninvited) = peer(&net, 10.0);
        let outside = stranger.local_peer();
        let transport = net.add_peer(PeerSpec::default());
        let (env, from) = (net.env(transport.local_peer()), [transport.local_peer()]);
        let closed = Exchange::start_for(transport, env, "run", move |peer| *peer != outside).unwrap();
        closed.publish(snapshot(5, 3));
        let refused = uninvited.download(&from, 0, TIMEOUT).await.unwrap_err();
        assert!(matches!(refused, DownloadError::NobodyOffers { .. }), "{refused}");
        assert_eq!(member.download(&from, 0, TIMEOUT).await.unwrap().value, *snapshot(5, 3));
    });
}

#[test]
fn three_donors_are_faster_than_one_and_a_killed_one_is_named() {
    run(2, |net| async move {
        let (_donors, ids) = donors(&net, 3, 4.0, 40);
        let (_, one) = peer(&net, 100.0);
        let (_, three) = peer(&net, 100.0);
        let start = tokio::time::Instant::now();
        assert!(one.download(&ids[..1], 9, TIMEOUT).await.unwrap().faults.is_empty());
        let alone = start.elapsed();
        let start = tokio::time::Instant::now();
        assert!(three.download(&ids, 9, TIMEOUT).await.unwrap().faults.is_empty());
        assert!(start.elapsed().as_secs_f64() < alone.as_secs_f64() / 2.4, "{:?} {alone:?}", start.elapsed());

        let (_, survivor) = peer(&net, 100.0);
        let killed = ids[0];
        let killer = net.clone();
        let download = survivor.download(&ids, 9, TIMEOUT);
        let kill = async {
            tokio::time::sleep(alone / 6).await;
            killer.crash(killed);
        };
        let (outcome, ()) = tokio::join!(download, kill);
        let outcome = outcome.unwrap();
        assert_eq!(outcome.value, *snapshot(9, 40));
        assert!(outcome.faults.iter().all(|fault| fault.peer == killed), "{:?}", outcome.faults);
        assert_eq!(outcome.faults.len(), 1);
    });
}

#[test]
fn joiners_feed_one_another_and_survive_the_donor() {
    run(3, |net| async move {
        let (donor, seed) = peer(&net, 6.0);
        let state = snapshot(2, 30);
        seed.publish(state.clone());
        let joiners: Vec<_> = (0..20).map(|_| peer(&net, 20.0)).collect();
        let mut ids: Vec<PeerId> = joiners.iter().map(|(transport, _)| transport.local_peer()).collect();
        ids.push(donor.local_peer());
        let downloads = joiners.iter().map(|(_, joiner)| joiner.download(&ids, 2, TIMEOUT));
        let outcomes = futures::future::join_all(downloads).await;
        assert!(outcomes.into_iter().all(|outcome| outcome.unwrap().value == *state));
        let copies = net.traffic(donor.local_peer()).up_bytes as f64 / state.bytes() as f64;
        assert!(copies < 4.0, "the donor sent {copies:.1} copies to 20 joiners");
    });
}

#[test]
fn the_history_that_is_wanted_comes_before_a_later_epoch_of_another() {
    run(13, |net| async move {
        let (honest_transport, honest) = peer(&net, 10.0);
        let (other_transport, other) = peer(&net, 10.0);
        let wanted = snapshot(3, 2);
        honest.publish(wanted.clone());
        other.publish(Arc::new(Snapshot { lineage: [77; 32], ..(*snapshot(9, 2)).clone() }));
        let (_, newcomer) = peer(&net, 10.0);
        let ids = [honest_transport.local_peer(), other_transport.local_peer()];
        let of = |lineage| newcomer.download_of(lineage, &ids, &[], 3, TIMEOUT);
        assert_eq!(of(wanted.lineage).await.unwrap().value, *wanted);
        assert_eq!(of([55; 32]).await.unwrap().value.epoch, 9, "whoever had it may have gone on");
    });
}

/// Two copies left the donor: chunks in random order would have missed one of eight.
#[test]
fn joiners_have_all_of_it_when_the_donor_dies_after_two_copies() {
    run(12, |net| async move {
        let (donor, seed) = peer(&net, 4.0);
        let state = snapshot(2, 60);
        seed.publish(state.clone());
        let joiners: Vec<_> = (0..20).map(|_| peer(&net, 2.0)).collect();
        let mut ids: Vec<PeerId> = joiners.iter().map(|(transport, _)| transport.local_peer()).collect();
        ids.push(donor.local_peer());
        let downloads = joiners.iter().map(|(_, joiner)| joiner.download(&ids, 2, TIMEOUT));
        let killed = std::cell::Cell::new(false);
        let kill = async {
            while net.traffic(donor.local_peer()).up_bytes < 2 * state.bytes() {
                // Virtual time: a step of the simulator, no wait.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            net.crash(donor.local_peer());
            killed.set(true);
            std::future::pending::<()>().await;
        };
        let outcomes = tokio::select! {
            outcomes = futures::future::join_all(downloads) => outcomes,
            () = kill => unreachable!("it is pending"),
        };
        assert!(killed.get(), "fewer than two copies were enough");
        for outcome in outcomes {
            assert_eq!(outcome.unwrap().value, *state);
        }
    });
}

#[test]
fn an_interrupted_download_resumes_and_a_liar_is_found_out() {
    run(4, |net| async move {
        let (donor, seed) = peer(&net, 2.0);
        seed.publish(snapshot(3, 20));
        let (_, newcomer) = peer(&net, 50.0);
        let ids = [donor.local_peer()];
        let error = newcomer.download(&ids, 3, Duration::from_secs(5)).await.unwrap_err();
        let DownloadError::Interrupted { done, chunks, .. } = error else { panic!("{error}") };
        assert!(done > 0 && done < chunks);
        let before = net.traffic(donor.local_peer()).up_bytes;
        assert_eq!(newcomer.download(&ids, 3, TIMEOUT).await.unwrap().value.epoch, 3);
        let again = net.traffic(donor.local_peer()).up_bytes - before;
        assert!(again as usize <= (chunks - done + 1) * (CHUNK_BYTES + 4096), "{again} bytes for the rest");

        // Two honest donors outvote a third that offers other bytes for the same epoch; its chunks are never asked for.
        let (liar_transport, liar) = peer(&net, 50.0);
        let (second_transport, second) = peer(&net, 50.0);
        let mut wrong = (*snapshot(3, 20)).clone();
        wrong.blobs.insert("step".into(), Bytes::from_static(&[8; 4]));
        liar.publish(Arc::new(wrong));
        second.publish(snapshot(3, 20));
        let (_, late) = peer(&net, 50.0);
        let ids = [donor.local_peer(), liar_transport.local_peer(), second_transport.local_peer()];
        assert_eq!(late.download(&ids, 3, TIMEOUT).await.unwrap().value, *snapshot(3, 20));
    });
}

#[test]
fn what_went_with_its_only_donor_is_given_up_although_others_answer() {
    run(10, |net| async move {
        let (only, newest) = peer(&net, 2.0);
        let (other, older) = peer(&net, 2.0);
        newest.publish(snapshot(5, 20));
        older.publish(snapshot(4, 3));
        let (_, newcomer) = peer(&net, 10.0);
        let ids = [only.local_peer(), other.local_peer()];
        let begun = tokio::time::Instant::now();
        let download = newcomer.download(&ids, 4, TIMEOUT);
        let kill = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            net.crash(only.local_peer());
        };
        let (failed, ()) = tokio::join!(download, kill);
        let failed = failed.unwrap_err();
        let is_half = matches!(failed, DownloadError::Interrupted { epoch: 5, done: 1..20, .. });
        assert!(is_half && failed.to_string().contains("nobody has the rest"), "{failed}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?} of {TIMEOUT:?}", begun.elapsed());
        assert_eq!(newcomer.download(&ids, 4, TIMEOUT).await.unwrap().value, *snapshot(4, 3));
    });
}

#[test]
fn a_dead_peer_is_a_fault_not_an_error() {
    run(5, |net| async move {
        let (donor, seed) = peer(&net, 20.0);
        let (dead, _gone) = peer(&net, 20.0);
        seed.publish(snapshot(1, 2));
        net.crash(dead.local_peer());
        let (_, newcomer) = peer(&net, 20.0);
        let outcome = newcomer.download(&[dead.local_peer(), donor.local_peer()], 0, TIMEOUT).await.unwrap();
        assert_eq!(outcome.value, *snapshot(1, 2));
        assert!(outcome.faults.iter().any(|fault| fault.peer == dead.local_peer()));
        assert!(outcome.faults.iter().all(|fault| fault.kind != FaultKind::Mismatch));
    });
}

#[test]
fn nobody_waits_for_a_donor_that_never_answers() {
    run(6, |net| async move {
        let (donor, seed) = peer(&net, 20.0);
        let (silent, _gone) = peer(&net, 20.0);
        seed.publish(snapshot(1, 2));
        net.vanish(silent.local_peer());
        let (_, newcomer) = peer(&net, 20.0);
        let begun = net.elapsed();
        let from = [silent.local_peer(), donor.local_peer()];
        let outcome = newcomer.download(&from, 0, TIMEOUT).await.unwrap();
        assert_eq!(outcome.value, *snapshot(1, 2));
        let took = net.elapsed() - begun;
        assert!(took < Duration::from_millis(1500), "{took:?}");
        let begun = net.elapsed();
        assert!(newcomer.download_next(&from, [7; 32], u64::MAX, TIMEOUT).await.is_err());
        let took = net.elapsed() - begun;
        assert!(took < Duration::from_millis(1500), "who is here does not know it: {took:?}");
    });
}

#[test]
fn a_donor_that_freezes_half_way_is_named_and_what_it_owed_comes_from_another() {
    run(8, |net| async move {
        let (_donors, from) = donors(&net, 2, 4.0, 40);
        let (transport, newcomer) = peer(&net, 100.0);
        let begun = net.elapsed();
        let freeze = async {
            let me = transport.local_peer();
            while net.traffic(me).down_bytes < 10 * CHUNK_BYTES as u64 {
                // Virtual time: a step of the simulator, no wait.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            net.vanish(from[0]);
        };
        let (outcome, ()) = tokio::join!(newcomer.download(&from, 0, TIMEOUT), freeze);
        let outcome = outcome.unwrap();
        assert_eq!(outcome.value, *snapshot(9, 40));
        // The other donor alone has work for some 9 s after the freeze.
        let took = net.elapsed() - begun;
        assert!(took < Duration::from_secs(18), "{took:?}");
        let named: Vec<_> = outcome.faults.iter().map(|fault| (fault.peer, fault.kind)).collect();
        assert_eq!(named, [(from[0], FaultKind::Silent)]);
    });
}

#[test]
fn a_slow_swarm_is_not_asked_for_everything_twice() {
    run(9, |net| async move {
        let (_donors, from) = donors(&net, 2, 0.1, 8);
        let (transport, newcomer) = peer(&net, 100.0);
        let outcome = newcomer.download(&from, 0, TIMEOUT).await.unwrap();
        assert!(outcome.faults.is_empty(), "{:?}", outcome.faults);
        let received = net.traffic(transport.local_peer()).down_bytes;
        assert!(received < 9 * CHUNK_BYTES as u64, "{received}");
    });
}

/// What led from the history of one epoch to that of the next; `bytes` in all.
fn sequel(epoch: u64, bytes: usize) -> Sequel {
    let make = move || Snapshot {
        epoch: epoch + 1,
        lineage: [epoch as u8 + 1; 32],
        blobs: BTreeMap::from([("average".to_owned(), vec![epoch as u8; bytes].into())]),
        ..Snapshot::default()
    };
    Sequel { before: [epoch as u8; 32], bytes: bytes as u64, make: Box::new(make) }
}

/// How many sequels, from this epoch on, somebody can get.
async fn known(newcomer: &Exchange, from: &[PeerId], first: u64) -> u64 {
    let mut epoch = first;
    while let Ok(next) = newcomer.download_next(from, [epoch as u8; 32], u64::MAX, TIMEOUT).await {
        assert_eq!(next.value, (sequel(epoch, next.value.bytes() as usize).make)());
        assert_eq!(next.faults, []);
        epoch += 1;
    }
    epoch - first
}

/// Who takes longer to load a state than an epoch takes finds what came after it; where nobody loads, one sequel is kept.
#[test]
fn what_came_after_a_state_is_kept_for_those_who_still_load_it() {
    run(9, |net| async move {
        let (donor, offering) = peer(&net, 1.0);
        let (_, newcomer) = peer(&net, 10.0);
        let from = [donor.local_peer()];
        offering.publish(snapshot(1, 8));
        offering.remember(sequel(0, 100));
        offering.remember(sequel(1, 100));
        assert_eq!(known(&newcomer, &from, 0).await, 0, "the one before the last is gone");
        assert_eq!(known(&newcomer, &from, 1).await, 1);
        // Eight seconds, in which four epochs end.
        let training = async {
            for epoch in 2..6 {
                tokio::time::sleep(Duration::from_millis(1500)).await;
                offering.publish(snapshot(epoch, 8));
                offering.remember(sequel(epoch - 1, CHUNK_BYTES + 7));
            }
        };
        let (loaded, ()) = tokio::join!(newcomer.download(&from, 1, TIMEOUT), training);
        assert_eq!(loaded.unwrap().value, *snapshot(1, 8));
        assert_eq!(known(&newcomer, &from, 1).await, 4);
        assert_eq!(
            newcomer.download(&from, 5, TIMEOUT).await.unwrap().value.epoch,
            5,
            "the state is still there"
        );
        tokio::time::sleep(Duration::from_secs(60)).await;
        offering.remember(sequel(5, 100));
        let held = HeldBytes { states: snapshot(5, 8).bytes(), sequels: 100 };
        assert_eq!(offering.held(), held, "nobody has asked for a minute");
    });
}

/// The state is the shorter way to whoever lacks more than it has bytes.
#[test]
fn sequels_are_never_larger_than_the_state() {
    run(10, |net| async move {
        let (donor, offering) = peer(&net, 10.0);
        let (_, newcomer) = peer(&net, 10.0);
        let from = [donor.local_peer()];
        offering.publish(snapshot(0, 8));
        for epoch in 0..9 {
            assert!(newcomer.download(&from, 0, TIMEOUT).await.is_ok(), "somebody asks");
            offering.remember(sequel(epoch, 3 * CHUNK_BYTES));
        }
        assert_eq!(known(&newcomer, &from, 7).await, 2);
        assert_eq!(known(&newcomer, &from, 6).await, 0);
        assert!(offering.held().sequels <= snapshot(0, 8).bytes());
    });
}

#[test]
fn the_sequel_that_most_offer_is_taken_whatever_epoch_a_liar_names() {
    run(11, |net| async move {
        let donors: Vec<_> = (0..3).map(|_| peer(&net, 10.0)).collect();
        let from: Vec<PeerId> = donors.iter().map(|(transport, _)| transport.local_peer()).collect();
        for (_, honest) in donors.iter().skip(1) {
            honest.remember(sequel(4, 1000));
        }
        let lie = Sequel { before: [4; 32], ..sequel(99, 1000) };
        donors[0].1.remember(lie);
        let (_, newcomer) = peer(&net, 10.0);
        assert!(newcomer.download_next(&from, [4; 32], 999, TIMEOUT).await.is_err(), "too large");
        let next = newcomer.download_next(&from, [4; 32], 1000, TIMEOUT).await.unwrap();
        assert_eq!(next.value, (sequel(4, 1000).make)());
    });
}
