//! P10: state for newcomers.

use super::group::{Member, config, group, links, step_all};
use super::{Found, Property};
use potluck_compression::Scheme;
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{SimNet, run};
use potluck_transfer::{CHUNK_BYTES, Exchange, Snapshot};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A download that takes longer than this has failed.
const DOWNLOAD_MAX: Duration = Duration::from_secs(600);
/// One way to the backbone.
const LATENCY: Duration = Duration::from_millis(5);

fn snapshot(chunks: usize) -> Arc<Snapshot> {
    let bytes: Vec<u8> = (0..chunks * CHUNK_BYTES).map(|at| (at * 31 + at / 251) as u8).collect();
    let blobs = BTreeMap::from([("weights".to_owned(), bytes.into())]);
    Arc::new(Snapshot { epoch: 7, lineage: [7; 32], meta: BTreeMap::new(), blobs })
}

fn peer(net: &SimNet, megabytes_per_second: f64) -> Result<(PeerId, Exchange), String> {
    let rate = megabytes_per_second * 1e6;
    let transport = net.add_peer(links(rate, rate, LATENCY));
    let id = transport.local_peer();
    let exchange = Exchange::start(transport, net.env(id), "table").map_err(|error| error.to_string())?;
    Ok((id, exchange))
}

/// Download the state; the time it took.
async fn download(
    net: &SimNet,
    to: &Exchange,
    from: &[PeerId],
    wanted: &Snapshot,
) -> Result<Duration, String> {
    let begun = net.elapsed();
    let outcome = to.download(from, wanted.epoch, DOWNLOAD_MAX).await.map_err(|error| error.to_string())?;
    if outcome.value == *wanted { Ok(net.elapsed() - begun) } else { Err("another state arrived".to_owned()) }
}

/// P10: four donors feed one newcomer that is faster than any of them.
pub(super) fn several_donors() -> Property {
    let found = || -> Found {
        run(15, async |net| {
            let state = snapshot(80);
            let mut donors = Vec::new();
            for _ in 0..4 {
                let (id, exchange) = peer(&net, 4.0)?;
                exchange.publish(state.clone());
                donors.push((id, exchange));
            }
            let ids: Vec<PeerId> = donors.iter().map(|(id, _)| *id).collect();
            let (_, newcomer) = peer(&net, 100.0)?;
            let took = download(&net, &newcomer, &ids, &state).await?.as_secs_f64();
            let ratio = took / (state.bytes() as f64 / 16e6);
            Ok((
                format!("{ratio:.2}x: {:.0} MB in {took:.1} s from 4 donors", state.bytes() as f64 / 1e6),
                ratio < 1.3,
            ))
        })
    };
    Property::new("a newcomer's download within 1.3x of the ideal", found())
}

/// P10: twenty newcomers at once, of one donor with a slow uplink.
pub(super) fn twenty_at_once() -> Property {
    let found = || -> Found {
        run(16, async |net| {
            let state = snapshot(30);
            let (donor, seed) = peer(&net, 6.0)?;
            seed.publish(state.clone());
            let mut joiners = Vec::new();
            for _ in 0..20 {
                joiners.push(peer(&net, 20.0)?);
            }
            let ids: Vec<PeerId> = joiners.iter().map(|(id, _)| *id).chain([donor]).collect();
            let downloads = joiners.iter().map(|(_, joiner)| download(&net, joiner, &ids, &state));
            let took: Result<Vec<Duration>, String> =
                futures::future::join_all(downloads).await.into_iter().collect();
            let slowest = took?.into_iter().max().unwrap_or_default().as_secs_f64();
            let copies = net.traffic(donor).up_bytes as f64 / state.bytes() as f64;
            let ideal = state.bytes() as f64 / 6e6;
            let measured = format!(
                "{copies:.2} copies left the donor; all done after {:.2}x of one copy's time",
                slowest / ideal
            );
            Ok((measured, copies < 4.0))
        })
    };
    Property::new("20 at once feed one another: under 4 copies sent", found())
}

/// P10: what the donors' rounds take while a newcomer downloads from all of them.
pub(super) fn donors_go_on() -> Property {
    const LEN: usize = 250_000;
    let found = || -> Found {
        run(17, async |net| {
            let machines = std::iter::repeat_n(links(10e6, 10e6, LATENCY), 4);
            let group: Vec<Member> = group(&net, machines, &config(LEN, Scheme::None)).await?;
            let state = snapshot(60);
            let mut donors = Vec::new();
            for member in &group {
                let (transport, env) = (member.swarm.transport(), member.swarm.env());
                let donor = Exchange::start(transport, env, "table").map_err(|error| error.to_string())?;
                donor.publish(state.clone());
                donors.push(donor);
            }
            let ids: Vec<PeerId> = group.iter().map(|member| member.id).collect();
            step_all(&net, &group, 0, LEN).await?;
            let alone = steps(&net, &group, 1).await?;
            let (_, newcomer) = peer(&net, 10.0)?;
            let load = download(&net, &newcomer, &ids, &state);
            let (busy, took) = tokio::join!(steps(&net, &group, 6), load);
            let (busy, took) = (busy?, took?);
            let more = busy.as_secs_f64() / alone.as_secs_f64() - 1.0;
            let measured = format!(
                "{:+.1} % over 5 steps of {:.2} s while {:.0} MB were loaded in {:.1} s",
                more * 100.0,
                alone.as_secs_f64() / 5.0,
                state.bytes() as f64 / 1e6,
                took.as_secs_f64()
            );
            Ok((measured, more < 0.05))
        })
    };
    Property::new("donors' step time (2 s of computing) rises under 5 %", found())
}

/// Five steps, each two seconds of computing and one round; the time of all.
async fn steps(net: &SimNet, group: &[Member], first: u64) -> Result<Duration, String> {
    const LEN: usize = 250_000;
    let begun = net.elapsed();
    for epoch in first..first + 5 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        step_all(net, group, epoch, LEN).await?;
    }
    Ok(net.elapsed() - begun)
}
