//! P6, P9 and P11: swarms that were split, that nobody can dial, and whose clocks differ.

use super::group::{Member, complete, config, group, member, see, step_all};
use super::members::seconds;
use super::{Found, Property};
use crate::harness::{PeerPlan, RunSpec, World};
use crate::record::Entry;
use potluck_averaging::SwarmConfig;
use potluck_collab::{Event, Lineage};
use potluck_compression::Scheme;
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{NatClass, PeerSpec, run};
use std::time::Duration;

/// A run agrees within this, or it does not.
const AGREE_MAX: Duration = Duration::from_secs(240);

/// P6: a swarm that was split for ten seconds has one history again.
pub(super) fn one_lineage() -> Property {
    let found = || -> Found {
        run(10, async |net| {
            let mut world = World::new(net, RunSpec { epochs: u64::MAX, ..RunSpec::new(10) });
            let peers: Vec<PeerId> = (0..5).map(|_| world.start(PeerPlan::default())).collect();
            tokio::time::sleep(Duration::from_secs(5)).await;
            world.partition(&peers[..2], false);
            tokio::time::sleep(Duration::from_secs(10)).await;
            let epoch = |world: &World| {
                let latest = world.record.latest();
                latest.values().map(|(lineage, ..)| lineage.epoch).max().unwrap_or_default()
            };
            let before = epoch(&world);
            world.heal_partitions();
            let took = world.until_agreed(before + 1, AGREE_MAX).await?;
            let rounds = epoch(&world) - before;
            // Time in which somebody could say it again.
            tokio::time::sleep(Duration::from_secs(5)).await;
            let said = peers.iter().map(|peer| {
                world.record.with(|entries| entries.iter().filter(|entry| gave_way(entry, *peer)).count())
            });
            let said: Vec<usize> = said.collect();
            // Two were cut off from three: their epochs are the ones that are lost.
            let once = said == [1, 1, 0, 0, 0];
            world.finish().await;
            let measured = format!("{rounds} rounds, {}; said {said:?} times by the peers", seconds(took));
            Ok((measured, rounds <= 2 && once))
        })
    };
    Property::new("a split swarm is one within 2 rounds and says so once", found())
}

fn gave_way(entry: &Entry, who: PeerId) -> bool {
    matches!(entry, Entry::Event { peer, event: Event::LineageLost { .. }, .. } if *peer == who)
}

/// P9: whoever only dials out reduces too, through one relay.
pub(super) fn dial_out() -> Property {
    const LEN: usize = 200_000;
    let found = || -> Found {
        run(11, async |net| {
            let _relay = net.add_peer(PeerSpec { relay: true, ..PeerSpec::default() });
            let nats =
                [NatClass::Symmetric, NatClass::PortRestricted, NatClass::OutboundOnly, NatClass::Symmetric];
            let mut hidden: Vec<Member> = Vec::new();
            for nat in nats {
                let bootstrap = hidden.first().map(|first| first.id).into_iter().collect();
                let swarm = SwarmConfig { client_mode: true, ..SwarmConfig::new("table", bootstrap) };
                let machine = PeerSpec { nat, ..PeerSpec::default() };
                hidden.push(member(&net, machine, swarm, &config(LEN, Scheme::Float16)).await?);
            }
            see(&hidden, hidden.len()).await?;
            step_all(&net, &hidden, 0, LEN).await?;
            let (rounds, _) = step_all(&net, &hidden, 1, LEN).await?;
            // Who reduces the share s sends 1 + 2s vectors, who does not reduce sends one.
            let shares = rounds
                .iter()
                .map(|round| (round.stats.bytes_sent as f64 / round.stats.encoded_bytes as f64 - 1.0) / 2.0);
            let least = shares.fold(f64::INFINITY, f64::min);
            let whole = complete(&rounds, hidden.len());
            let measured = format!(
                "{} hidden peers: whole {whole}, each reduces {:.0} % or more",
                hidden.len(),
                least * 100.0
            );
            Ok((measured, whole && least > 0.1))
        })
    };
    Property::new("nobody reachable, one relay: all send, get and reduce", found())
}

/// P9: where the hole punch works, the relay carries next to nothing.
pub(super) fn hole_punching() -> Property {
    const LEN: usize = 500_000;
    let found = || -> Found {
        run(12, async |net| {
            let relay = net.add_peer(PeerSpec { relay: true, ..PeerSpec::default() });
            let home = PeerSpec { nat: NatClass::PortRestricted, ..PeerSpec::default() };
            let group = group(&net, std::iter::repeat_n(home, 3), &config(LEN, Scheme::None)).await?;
            let mut sent = 0;
            for epoch in 0..3 {
                let (rounds, _) = step_all(&net, &group, epoch, LEN).await?;
                sent += rounds.iter().map(|round| round.stats.bytes_sent).sum::<u64>();
            }
            let share = net.traffic(relay.local_peer()).relayed_bytes as f64 / sent as f64;
            Ok((format!("{:.2} % of the bytes went through the relay", share * 100.0), share < 0.01))
        })
    };
    Property::new("a punched connection replaces the relayed one", found())
}

/// P11: a run whose clocks are two hours apart, beside the same run without.
pub(super) fn clocks() -> Property {
    let found = || -> Found {
        let (right, wrong) = (history(0)?, history(3600)?);
        let same = right == wrong;
        let measured = if same { "the same bits at the same time" } else { "another history" };
        Ok((measured.to_owned(), same))
    };
    Property::new("clocks an hour off either way change nothing", found())
}

/// Every peer's history and the hash of its parameters.
type Ends = Vec<(PeerId, Lineage, u64)>;

/// When a run of three with this skew agreed, and on what.
fn history(skew: i64) -> Result<(Duration, Ends), String> {
    run(13, async |net| {
        let mut world = World::new(net, RunSpec::new(13));
        for sign in [0, -1, 1] {
            let machine = PeerSpec { clock_skew: sign * skew, ..PeerSpec::default() };
            world.start(PeerPlan { machine, ..PeerPlan::default() });
        }
        let took = world.until_agreed(10, AGREE_MAX).await?;
        let latest = world.record.latest();
        world.finish().await;
        Ok((took, latest.into_iter().map(|(peer, (lineage, params, _))| (peer, lineage, params)).collect()))
    })
}
