//! P13: a swarm too large for everybody to be connected to everybody.

use super::group::{Member, config, group, links, member, see};
use super::members::seconds;
use super::{Found, Property};
use potluck_averaging::{Progress, RoundRequest, Swarm, SwarmConfig};
use potluck_compression::Scheme;
use potluck_net::PeerId;
use potluck_net_sim::{PeerSpec, SimNet, run};
use std::time::Duration;

/// Peers of the large swarm, and the rounds that they make.
const PEERS: usize = 1000;
const ROUNDS: u64 = 100;
/// Peers that join at the same time.
const AT_ONCE: usize = 50;
/// Real time after which joining is given up: the table is for people who wait for it.
const JOIN_MAX: Duration = Duration::from_secs(60);
/// Real time within which the rounds must be done.
const ROUNDS_MAX: Duration = Duration::from_secs(60);
/// Peers through which all others join.
const KNOWN: usize = 3;
/// Connections of one peer: its row, its column and a few more.
const LINKS_MAX: usize = 192;

/// P13: a thousand peers in a grid of groups, in seconds of real time.
pub(super) fn large() -> Property {
    Property::new("1,000 peers: 100 rounds in 60 s of real time", in_groups(PEERS, ROUNDS))
}

/// What being there costs a group of volunteers while nobody averages.
pub(super) fn at_rest() -> Property {
    Property::new("50 peers: heartbeats take 1 % of a 20 Mbit/s uplink", heartbeats(50))
}

fn heartbeats(peers: usize) -> Found {
    const SECONDS: u32 = 30;
    const UP: f64 = 20e6 / 8.0;
    run(15, async |net| {
        let home = || links(UP, 4.0 * UP, Duration::from_millis(15));
        let all = group(&net, std::iter::repeat_with(home).take(peers), &config(30, Scheme::None)).await?;
        // What joining has left to say.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let sent = || all.iter().map(|member| net.traffic(member.id).up_bytes).max().unwrap_or_default();
        let before = sent();
        tokio::time::sleep(Duration::from_secs(SECONDS.into())).await;
        let rate = (sent() - before) as f64 / f64::from(SECONDS);
        let measured = format!("{:.1} KB/s sent, {:.2} % of the link", rate / 1e3, 100.0 * rate / UP);
        Ok((measured, rate <= UP / 100.0))
    })
}

/// So many peers make so many rounds, in groups if they are many. What it took, and whether that is good.
///
/// # Errors
/// What went wrong.
#[expect(clippy::disallowed_methods, reason = "how long the simulator itself takes is what is measured")]
pub fn in_groups(peers: usize, rounds: u64) -> Found {
    run(14, async |net| {
        let begun = std::time::Instant::now();
        let swarm = join_all(&net, peers).await?;
        see(&swarm, peers).await?;
        let (joined, joined_at) = (begun.elapsed(), net.elapsed());
        let begun = std::time::Instant::now();
        let (mut done, mut failed) = (0, 0);
        while done < rounds && begun.elapsed() < ROUNDS_MAX {
            failed += large_round(&swarm, done).await;
            done += 1;
        }
        let most = |of: &[Member]| {
            of.iter().map(|member| net.traffic(member.id).connections).max().unwrap_or_default()
        };
        let (most_links, elsewhere) = (most(&swarm), most(&swarm[KNOWN.min(swarm.len())..]));
        let measured = format!(
            "{done} rounds in {} ({} simulated) after {} of joining; {failed} of {} steps failed; at most {most_links} \
             connections, {elsewhere} where nobody joined through",
            seconds(begun.elapsed()),
            seconds(net.elapsed() - joined_at),
            seconds(joined),
            peers as u64 * done,
        );
        Ok((measured, done == rounds && failed == 0 && most_links <= LINKS_MAX))
    })
}

#[expect(clippy::disallowed_methods, reason = "how long the simulator itself takes is what is measured")]
async fn join_all(net: &SimNet, peers: usize) -> Result<Vec<Member>, String> {
    let begun = std::time::Instant::now();
    let config = config(30, Scheme::None);
    let mut swarm: Vec<Member> = group(net, std::iter::repeat_n(PeerSpec::default(), KNOWN), &config).await?;
    let known: Vec<PeerId> = swarm.iter().map(|member| member.id).collect();
    while swarm.len() < peers {
        if begun.elapsed() > JOIN_MAX {
            let (joined, took) = (swarm.len(), seconds(begun.elapsed()));
            return Err(format!("only {joined} peers joined in {took} of real time"));
        }
        let joins = (0..AT_ONCE.min(peers - swarm.len()))
            .map(|_| member(net, PeerSpec::default(), SwarmConfig::new("table", known.clone()), &config));
        for joined in futures::future::join_all(joins).await {
            swarm.push(joined?);
        }
    }
    Ok(swarm)
}

/// Everybody steps; how many got no average.
async fn large_round(large: &[Member], epoch: u64) -> u64 {
    let report = |swarm: &Swarm| swarm.report(Progress { epoch, ..Progress::default() });
    large.iter().for_each(|member| report(&member.swarm));
    let steps = large
        .iter()
        .enumerate()
        .map(|(at, member)| member.averager.step(RoundRequest::new(Some(epoch), vec![at as f32; 30], 1.0)));
    let outcomes = futures::future::join_all(steps).await;
    outcomes.iter().filter(|outcome| outcome.is_err()).count() as u64
}
