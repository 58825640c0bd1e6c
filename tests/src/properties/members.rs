//! P1 and P2: joining, and losing whom the network has lost.

use super::group::{Member, config, group, links, member, see, step, values};
use super::{Found, Property};
use potluck_averaging::SwarmConfig;
use potluck_compression::Scheme;
use potluck_net::{PeerId, Transport};
use potluck_net_sim::{FaultRates, PeerSpec, SimNet, run};
use std::time::Duration;

/// Hours in which no healthy peer may be given up.
const HOURS: u64 = 24;

/// P1: until two peers see each other, with three bootstrap addresses at which nobody answers.
pub(super) fn joining() -> Property {
    let found = || -> Found {
        let (near, far) =
            (joining_takes(Duration::from_micros(25))?, joining_takes(Duration::from_millis(25))?);
        let holds = near < Duration::from_secs(2) && far < Duration::from_secs(10);
        Ok((format!("{:.0} ms on one machine, {} at 100 ms", near.as_secs_f64() * 1e3, seconds(far)), holds))
    };
    Property::new("\"2 peers\" in 2 s on one machine, 10 s on two", found())
}

fn joining_takes(latency: Duration) -> Result<Duration, String> {
    run(1, async |net| {
        let (machine, config) = (links(100e6, 100e6, latency), config(1000, Scheme::None));
        let mut bootstrap: Vec<PeerId> = Vec::new();
        for _ in 0..3 {
            let dead = net.add_peer(machine.clone());
            net.vanish(dead.local_peer());
            bootstrap.push(dead.local_peer());
        }
        let first = member(&net, machine.clone(), SwarmConfig::new("table", Vec::new()), &config).await?;
        bootstrap.push(first.id);
        let begun = net.elapsed();
        let second = member(&net, machine, SwarmConfig::new("table", bootstrap), &config).await?;
        see([&first, &second], 2).await?;
        Ok(net.elapsed() - begun)
    })
}

/// P2: a killed, frozen or unplugged peer, on idle links and in the middle of a round that saturates them.
pub(super) fn detection() -> Property {
    let found = || -> Found {
        let faults = [
            ("killed", SimNet::crash as fn(&SimNet, PeerId)),
            ("frozen", SimNet::freeze),
            ("unplugged", SimNet::vanish),
        ];
        let (mut measured, mut worst) = (Vec::new(), Duration::ZERO);
        for (name, fault) in faults {
            for (links, saturated) in [("idle", false), ("saturated", true)] {
                let mut slowest = Duration::ZERO;
                for after in [300, 700, 1200] {
                    slowest = slowest.max(detection_takes(fault, saturated, Duration::from_millis(after))?);
                }
                measured.push(format!("{name} {} {links}", seconds(slowest)));
                worst = worst.max(slowest);
            }
        }
        Ok((measured.join(", "), worst < Duration::from_secs(3)))
    };
    Property::new("out of every view in 3 s, links saturated or not", found())
}

fn detection_takes(fault: fn(&SimNet, PeerId), saturated: bool, after: Duration) -> Result<Duration, String> {
    const LEN: usize = 400_000;
    run(2, async |net| {
        let machines = std::iter::repeat_n(links(1e6, 1e6, Duration::from_millis(5)), 5);
        let group = group(&net, machines, &config(LEN, Scheme::None)).await?;
        let busy = async {
            if saturated {
                let steps = group.iter().enumerate().map(|(at, member)| step(member, 0, values(at, LEN)));
                let _whatever = futures::future::join_all(steps).await;
            }
            std::future::pending::<Result<Duration, String>>().await
        };
        let measured = async {
            tokio::time::sleep(after).await;
            let begun = net.elapsed();
            fault(&net, group[4].id);
            see(&group[..4], 4).await?;
            Ok(net.elapsed() - begun)
        };
        tokio::select! {
            biased;
            measured = measured => measured,
            never = busy => never,
        }
    })
}

/// P2: a healthy swarm whose streams stall and break buries nobody.
pub(super) fn no_false_death() -> Property {
    let found = || -> Found {
        run(3, async |net| {
            let faults = FaultRates {
                delay: 0.01,
                delay_max: Duration::from_secs(1),
                reset: 0.001,
                ..FaultRates::default()
            };
            let machines = std::iter::repeat_n(PeerSpec { faults, ..PeerSpec::default() }, 4);
            let group = group(&net, machines, &config(1000, Scheme::None)).await?;
            let watches = group.iter().map(|member| deaths(member, group.len()));
            let lives = Duration::from_secs(HOURS * 3600);
            let dead = tokio::time::timeout(lives, futures::future::select_all(watches.map(Box::pin)));
            match dead.await {
                Err(_) => Ok((format!("nobody in {HOURS} h of 4 peers"), true)),
                Ok(_) => Ok((format!("a healthy peer after {}", seconds(net.elapsed())), false)),
            }
        })
    };
    Property::new("nobody in 24 h, 1 % of frames late by up to 1 s", found())
}

/// Resolves when this peer gives up another.
async fn deaths(member: &Member, count: usize) {
    let mut view = member.swarm.members();
    // A swarm that has ended is not what this waits for; its peers are lost to it all the same.
    _ = view.wait_for(|view| view.members.len() < count).await;
}

pub(super) fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}
