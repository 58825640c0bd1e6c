//! A swarm on the simulated network, and the values that its peers average.
#![allow(dead_code, reason = "each test binary uses a part of this")]

use potluck_averaging::{Averager, AveragerConfig, Round, RoundError, RoundRequest, Swarm, SwarmConfig};
use potluck_compression::{Policy, Scheme, TensorInfo, TensorRole};
use potluck_net::{Outcome, PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimNet, SimTransport};
use std::sync::Arc;
use std::time::Duration;

pub(crate) struct Peer {
    pub(crate) swarm: Swarm,
    pub(crate) averager: Averager,
    pub(crate) id: PeerId,
}

pub(crate) fn config(values: usize, scheme: Scheme) -> AveragerConfig {
    let tensors = vec![
        TensorInfo::vector("first", values / 3, TensorRole::Gradient),
        TensorInfo::vector("second", values - values / 3, TensorRole::Gradient),
    ];
    AveragerConfig::new(tensors, Policy::Fixed(scheme))
}

pub(crate) async fn peer(
    net: &SimNet,
    spec: PeerSpec,
    bootstrap: Vec<PeerId>,
    config: AveragerConfig,
) -> Peer {
    join(net.add_peer(spec), SwarmConfig::new("test", bootstrap), config).await
}

pub(crate) async fn join(transport: Arc<SimTransport>, swarm: SwarmConfig, config: AveragerConfig) -> Peer {
    let env = transport.env();
    let swarm = Swarm::join(transport.clone(), env, swarm).await.expect("the bootstrap peer is up");
    let averager = Averager::new(&swarm, "grad", config);
    Peer { swarm, averager, id: transport.local_peer() }
}

/// `count` peers that all see one another.
pub(crate) async fn peers(net: &SimNet, count: usize, spec: PeerSpec, config: &AveragerConfig) -> Vec<Peer> {
    let mut peers: Vec<Peer> = Vec::new();
    for _ in 0..count {
        let bootstrap = peers.first().map(|peer| peer.id).into_iter().collect();
        peers.push(peer(net, spec.clone(), bootstrap, config.clone()).await);
    }
    all_see(&peers, count).await;
    peers
}

pub(crate) async fn all_see(peers: &[Peer], count: usize) {
    for peer in peers {
        let mut members = peer.swarm.members();
        members.wait_for(|view| view.members.len() == count).await.expect("the swarm lives");
    }
}

/// Values that differ by peer and position.
pub(crate) fn values(peer: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| ((at * 7 + peer * 13) % 101) as f32 / 50.0 - 1.0 + peer as f32 * 0.01).collect()
}

pub(crate) fn request(epoch: u64, vector: Vec<f32>, weight: f64) -> RoundRequest {
    RoundRequest { timeout: Duration::from_secs(60), ..RoundRequest::new(Some(epoch), vector, weight) }
}

pub(crate) type Stepped = Result<Outcome<Round>, RoundError>;

/// One step of each peer at the same time, with weight 1.
pub(crate) async fn step_all(peers: &[Peer], epoch: u64, len: usize) -> Vec<Stepped> {
    let steps =
        peers.iter().enumerate().map(|(at, peer)| peer.averager.step(request(epoch, values(at, len), 1.0)));
    futures::future::join_all(steps).await
}

/// The f32 mean of these peers' values, weight 1 each, in f64.
pub(crate) fn mean(peers: &[usize], len: usize) -> Vec<f32> {
    let all: Vec<Vec<f32>> = peers.iter().map(|peer| values(*peer, len)).collect();
    (0..len).map(|at| (all.iter().map(|v| f64::from(v[at])).sum::<f64>() / all.len() as f64) as f32).collect()
}

pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|value| value.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// All results exist and hold the same bits; the first of them.
pub(crate) fn agreed(results: &[Stepped]) -> &Round {
    let rounds: Vec<&Round> = results.iter().map(|result| &result.as_ref().expect("a round").value).collect();
    for round in &rounds {
        let equal = round.vector.iter().zip(&rounds[0].vector).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(equal, "members hold different bits: {:?} and {:?}", round.members, rounds[0].members);
        assert_eq!(round.plan_hash, rounds[0].plan_hash);
        assert_eq!(round.members, rounds[0].members);
    }
    rounds[0]
}
