//! A group of peers on the simulated network, without a session: what most properties are measured on.

use potluck_averaging::{Averager, AveragerConfig, Progress, Round, RoundRequest, Swarm, SwarmConfig};
use potluck_compression::{Policy, Scheme, TensorInfo, TensorRole};
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{PeerSpec, SimNet};
use std::time::Duration;

/// A step that takes longer than this has failed.
const STEP_MAX: Duration = Duration::from_secs(120);
/// Everybody must see everybody within this.
const SEE_MAX: Duration = Duration::from_secs(60);

pub(super) struct Member {
    pub(super) swarm: Swarm,
    pub(super) averager: Averager,
    pub(super) id: PeerId,
}

pub(super) fn config(values: usize, scheme: Scheme) -> AveragerConfig {
    let tensors = vec![
        TensorInfo::vector("first", values / 3, TensorRole::Gradient),
        TensorInfo::vector("second", values - values / 3, TensorRole::Gradient),
    ];
    AveragerConfig::new(tensors, Policy::Fixed(scheme))
}

pub(super) fn links(up: f64, down: f64, latency: Duration) -> PeerSpec {
    PeerSpec { up_bytes_per_second: up, down_bytes_per_second: down, latency, ..PeerSpec::default() }
}

pub(super) async fn member(
    net: &SimNet,
    spec: PeerSpec,
    swarm: SwarmConfig,
    config: &AveragerConfig,
) -> Result<Member, String> {
    let transport = net.add_peer(spec);
    let (id, env) = (transport.local_peer(), transport.env());
    let swarm = Swarm::join(transport, env, swarm).await.map_err(|error| error.to_string())?;
    let averager = Averager::new(&swarm, "grad", config.clone());
    Ok(Member { swarm, averager, id })
}

/// Peers that all see one another, one for each machine; all but the first join through it.
pub(super) async fn group(
    net: &SimNet,
    machines: impl IntoIterator<Item = PeerSpec>,
    config: &AveragerConfig,
) -> Result<Vec<Member>, String> {
    let mut group: Vec<Member> = Vec::new();
    for machine in machines {
        let bootstrap = group.first().map(|first| first.id).into_iter().collect();
        group.push(member(net, machine, SwarmConfig::new("table", bootstrap), config).await?);
    }
    see(&group, group.len()).await?;
    Ok(group)
}

/// Wait until the view of each has this many peers.
pub(super) async fn see<'a>(group: impl IntoIterator<Item = &'a Member>, count: usize) -> Result<(), String> {
    let all = async {
        for member in group {
            let mut view = member.swarm.members();
            view.wait_for(|view| view.members.len() == count).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    };
    let late = |_| Err(format!("not everybody sees {count} peers after {SEE_MAX:?}"));
    tokio::time::timeout(SEE_MAX, all).await.unwrap_or_else(late)
}

/// Values that differ by peer and position, between -1 and 2.
pub(super) fn values(peer: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| ((at * 7 + peer * 13) % 101) as f32 / 50.0 - 1.0 + peer as f32 * 0.01).collect()
}

/// The next epoch begins at all peers; they know it of one another when this returns.
pub(super) async fn begin_epoch<'a>(
    group: impl IntoIterator<Item = &'a Member> + Clone,
    epoch: u64,
) -> Result<(), String> {
    for member in group.clone() {
        member.swarm.report_now(Progress { epoch, ..Progress::default() });
    }
    let ids: Vec<PeerId> = group.clone().into_iter().map(|member| member.id).collect();
    for member in group {
        let mut view = member.swarm.members();
        let known = view.wait_for(|view| {
            let mut others = ids.iter().filter(|id| **id != member.id);
            others.all(|id| view.members.get(id).is_none_or(|member| member.epoch >= epoch))
        });
        let late = |_| format!("the epoch {epoch} of others is not known after {SEE_MAX:?}");
        tokio::time::timeout(SEE_MAX, known).await.map_err(late)?.map_err(|error| error.to_string())?;
    }
    Ok(())
}

pub(super) async fn step(member: &Member, epoch: u64, vector: Vec<f32>) -> Result<Round, String> {
    let request = RoundRequest { timeout: STEP_MAX, ..RoundRequest::new(Some(epoch), vector, 1.0) };
    member.averager.step(request).await.map(|outcome| outcome.value).map_err(|error| error.to_string())
}

/// One step of all at the same time: their rounds and the time until the last was done.
pub(super) async fn step_all(
    net: &SimNet,
    group: &[Member],
    epoch: u64,
    len: usize,
) -> Result<(Vec<Round>, Duration), String> {
    begin_epoch(group, epoch).await?;
    let begun = net.elapsed();
    let steps = group.iter().enumerate().map(|(at, member)| step(member, epoch, values(at, len)));
    let rounds: Result<Vec<Round>, String> = futures::future::join_all(steps).await.into_iter().collect();
    Ok((rounds?, net.elapsed() - begun))
}

/// All hold the same bits of the same round.
pub(super) fn same_bits(rounds: &[Round]) -> bool {
    let bits = |round: &Round| round.vector.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    rounds
        .windows(2)
        .all(|pair| pair[0].result_hash == pair[1].result_hash && bits(&pair[0]) == bits(&pair[1]))
}

/// Whether everybody of `count` is in all of the averages.
pub(super) fn complete(rounds: &[Round], count: usize) -> bool {
    rounds
        .iter()
        .all(|round| round.members.len() == count && round.full_contributors.count_ones() as usize == count)
}
