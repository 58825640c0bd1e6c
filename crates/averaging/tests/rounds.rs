//! Healthy rounds: group formation, arithmetic, agreement under every compression, bytes.

mod support;

use potluck_averaging::{RoundRequest, SwarmConfig};
use potluck_compression::Scheme;
use potluck_net::Transport;
use potluck_net_sim::{NatClass, PeerSpec, run};
use support::*;

#[test]
fn a_peer_alone_gets_its_own_bits_at_once() {
    run(1, async |net| {
        let alone = peers(&net, 1, PeerSpec::default(), &config(1000, Scheme::Uniform8Bit)).await;
        let before = net.elapsed();
        let outcome = alone[0].averager.step(request(0, values(0, 1000), 3.0)).await.unwrap();
        assert_eq!(outcome.value.vector, values(0, 1000));
        assert_eq!(net.elapsed(), before);
        assert_eq!(outcome.value.members.len(), 1);
    });
}

#[test]
fn groups_of_2_to_16_average_exactly() {
    for count in [2, 3, 5, 8, 16] {
        run(count as u64, async |net| {
            let peers = peers(&net, count, PeerSpec::default(), &config(20_000, Scheme::None)).await;
            for epoch in 0..3 {
                for peer in &peers {
                    peer.swarm.report(potluck_averaging::Progress { epoch, ..Default::default() });
                }
                let results = step_all(&peers, epoch, 20_000).await;
                let round = agreed(&results);
                assert_eq!(round.members.len(), count);
                let wanted = mean(&(0..count).collect::<Vec<_>>(), 20_000);
                assert!(distance(&round.vector, &wanted) < 1e-6);
                assert!(results.iter().all(|result| result.as_ref().unwrap().faults.is_empty()));
            }
        });
    }
}

#[test]
fn every_scheme_gives_all_members_the_same_bits() {
    for scheme in Scheme::ALL {
        run(7, async |net| {
            let peers = peers(&net, 3, PeerSpec::default(), &config(30_000, *scheme)).await;
            let results = step_all(&peers, 0, 30_000).await;
            let round = agreed(&results);
            assert!(distance(&round.vector, &mean(&[0, 1, 2], 30_000)) < 0.2, "{scheme:?}");
        });
    }
}

#[test]
fn weights_count_and_two_equal_peers_equal_one_big_batch() {
    run(8, async |net| {
        let peers = peers(&net, 2, PeerSpec::default(), &config(5000, Scheme::None)).await;
        let step =
            |at: usize, epoch, weight| peers[at].averager.step(request(epoch, values(at, 5000), weight));
        let (a, b) = tokio::join!(step(0, 0, 3.0), step(1, 0, 1.0));
        let round = &a.unwrap().value;
        assert_eq!(round.vector, b.unwrap().value.vector);
        assert_eq!(round.weight_total, 4.0);
        let wanted: Vec<f32> =
            values(0, 5000).iter().zip(values(1, 5000)).map(|(a, b)| (a * 3.0 + b) / 4.0).collect();
        assert!(distance(&round.vector, &wanted) < 1e-6);
    });
}

#[test]
fn a_small_round_takes_few_round_trips() {
    run(9, async |net| {
        let peers = peers(&net, 4, PeerSpec::default(), &config(1000, Scheme::None)).await;
        step_all(&peers, 0, 1000).await.into_iter().for_each(|r| drop(r.unwrap()));
        for peer in &peers {
            peer.swarm.report(potluck_averaging::Progress { epoch: 1, ..Default::default() });
        }
        let before = net.elapsed();
        step_all(&peers, 1, 1000).await.into_iter().for_each(|r| drop(r.unwrap()));
        let took = net.elapsed() - before;
        // One round trip is 4 times the latency of a peer to the backbone.
        let round_trip = PeerSpec::default().latency * 4;
        assert!(took < round_trip * 5, "{took:?} with round trips of {round_trip:?}");
    });
}

#[test]
fn bytes_stay_within_two_percent_of_the_least_possible() {
    run(10, async |net| {
        let peers = peers(&net, 4, PeerSpec::default(), &config(1_000_000, Scheme::Float16)).await;
        for result in step_all(&peers, 0, 1_000_000).await {
            let stats = result.unwrap().value.stats;
            let least = 1.5 * stats.encoded_bytes as f64;
            assert!((stats.bytes_sent as f64) < 1.02 * least, "{stats:?}");
            assert!((stats.bytes_received as f64) < 1.02 * least, "{stats:?}");
        }
    });
}

#[test]
fn whoever_steps_without_an_epoch_averages_with_whoever_does() {
    run(11, async |net| {
        let peers = peers(&net, 3, PeerSpec::default(), &config(1000, Scheme::None)).await;
        let steps = peers.iter().enumerate().take(2).map(|(at, peer)| {
            let request = RoundRequest::new(None, values(at, 1000), 1.0);
            peer.averager.step(request)
        });
        let results = futures::future::join_all(steps).await;
        assert_eq!(agreed(&results).members.len(), 2);
    });
}

#[test]
fn equal_vectors_are_not_sent_and_one_bit_of_difference_is() {
    run(13, async |net| {
        let len = 100_000;
        let peers = peers(&net, 4, PeerSpec::default(), &config(len, Scheme::Uniform8Bit)).await;
        for odd in [None, Some(3)] {
            let epoch = u64::from(odd.is_some());
            let steps = peers.iter().enumerate().map(|(at, peer)| {
                let mut vector = values(0, len);
                if odd == Some(at) {
                    vector[77] = f32::from_bits(vector[77].to_bits() ^ 1);
                }
                let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                let named = request(epoch, vector, 1.0);
                let gather = blake3::hash(&bytes).as_bytes().to_vec().into();
                peer.averager.step(RoundRequest { gather, gather_names_vector: true, ..named })
            });
            let results = futures::future::join_all(steps).await;
            let round = agreed(&results);
            assert_eq!((round.members.len(), round.unchanged), (4, odd.is_none()));
            assert_eq!(round.stats.bytes_sent == 0, odd.is_none(), "{:?}", round.stats);
            assert!(odd.is_some() || round.vector == values(0, len), "not even rounded");
        }
    });
}

#[test]
fn values_beyond_the_range_of_the_compression_are_counted() {
    run(14, async |net| {
        let peers = peers(&net, 2, PeerSpec::default(), &config(1000, Scheme::Float16)).await;
        let steps = peers.iter().map(|peer| peer.averager.step(request(0, vec![1e5; 1000], 1.0)));
        for result in futures::future::join_all(steps).await {
            let round = result.unwrap().value;
            assert_eq!(round.vector, [65504.0; 1000]);
            // The half that this peer sent, and the half that it averaged.
            assert_eq!(round.stats.saturated, 1000);
        }
    });
}

#[test]
fn auxiliary_and_dial_out_peers_are_full_members() {
    run(12, async |net| {
        let config = config(100_000, Scheme::Float16);
        let relay = net.add_peer(PeerSpec { relay: true, ..PeerSpec::default() });
        let mut peers = vec![join(relay.clone(), SwarmConfig::new("test", vec![]), config.clone()).await];
        for _ in 0..2 {
            let hidden = net.add_peer(PeerSpec { nat: NatClass::Symmetric, ..PeerSpec::default() });
            let mut swarm = SwarmConfig::new("test", vec![relay.local_peer()]);
            swarm.client_mode = true;
            peers.push(join(hidden, swarm, config.clone()).await);
        }
        let helper = net.add_peer(PeerSpec::default());
        let mut swarm = SwarmConfig::new("test", vec![relay.local_peer()]);
        swarm.auxiliary = true;
        peers.push(join(helper, swarm, config.clone()).await);
        all_see(&peers, 4).await;
        let steps = peers.iter().enumerate().map(|(at, peer)| {
            let vector = if at == 3 { Vec::new() } else { values(at, 100_000) };
            peer.averager.step(request(0, vector, 1.0))
        });
        let results = futures::future::join_all(steps).await;
        let round = agreed(&results[..3]);
        assert_eq!(round.members.len(), 4);
        assert_eq!(round.weight_total, 3.0);
        assert!(distance(&round.vector, &mean(&[0, 1, 2], 100_000)) < 1e-2);
        assert!(results[3].is_ok());
    });
}
