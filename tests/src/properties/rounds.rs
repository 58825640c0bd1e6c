//! P3, P7 and P8: what a healthy round costs.

use super::group::{Member, config, group, links, step_all};
use super::members::seconds;
use super::{Found, Property};
use potluck_compression::Scheme;
use potluck_net_sim::{PeerSpec, run};
use std::time::Duration;

/// Values so few that their transfer takes no time.
const FEW: usize = 1000;
/// Values whose transfer takes seconds at home.
const MANY: usize = 1_000_000;

/// P3: two peers whose link costs nothing.
pub(super) fn overhead_near() -> Property {
    let found = || -> Found {
        let took = tiny_round(2, Duration::from_micros(25))?;
        Ok((format!("{:.1} ms", took.as_secs_f64() * 1e3), took < Duration::from_millis(100)))
    };
    Property::new("under 100 ms with 2 peers on one machine", found())
}

/// P3: peers 100 ms of round trip apart. One of the round trips is the transfer itself: contributions travel one way, averages
/// the other.
pub(super) fn overhead_far() -> Property {
    const ROUND_TRIP: Duration = Duration::from_millis(100);
    let found = || -> Found {
        let (mut measured, mut worst) = (Vec::new(), 0.0_f64);
        for count in [2, 4, 16] {
            let whole = tiny_round(count, ROUND_TRIP / 4)?.as_secs_f64() / ROUND_TRIP.as_secs_f64();
            let beyond = whole - 1.0;
            measured.push(format!("{beyond:.2} of {whole:.2} in all ({count} peers)"));
            worst = worst.max(beyond);
        }
        Ok((measured.join(", "), worst < 3.0))
    };
    Property::new("under 3 round trips of 100 ms beyond the transfer's own", found())
}

/// The slowest of a few rounds, one right after the other, after the first, which opens the streams.
fn tiny_round(count: usize, latency: Duration) -> Result<Duration, String> {
    run(4, async |net| {
        let machines = std::iter::repeat_n(links(1e9, 1e9, latency), count);
        let group = group(&net, machines, &config(FEW, Scheme::None)).await?;
        step_all(&net, &group, 0, FEW).await?;
        let mut slowest = Duration::ZERO;
        for epoch in 1..6 {
            slowest = slowest.max(step_all(&net, &group, epoch, FEW).await?.1);
        }
        Ok(slowest)
    })
}

/// P7: the bytes that a peer sends or receives in a round, framing included, beside the least possible.
pub(super) fn bytes() -> Property {
    let found = || -> Found {
        let (mut measured, mut worst) = (Vec::new(), 0.0_f64);
        for (count, scheme) in
            [(2, Scheme::None), (4, Scheme::Float16), (8, Scheme::None), (16, Scheme::Uniform8Bit)]
        {
            let beyond = bytes_beyond(count, scheme)?;
            measured.push(format!("{beyond:.3}x {count} peers {scheme:?}"));
            worst = worst.max(beyond);
        }
        Ok((measured.join(", "), worst < 1.02))
    };
    Property::new("at most 1.02x of 2(N-1)/N of the encoded vector", found())
}

fn bytes_beyond(count: usize, scheme: Scheme) -> Result<f64, String> {
    run(5, async |net| {
        let machines = std::iter::repeat_n(PeerSpec::default(), count);
        let group = group(&net, machines, &config(MANY, scheme)).await?;
        let (rounds, _) = step_all(&net, &group, 0, MANY).await?;
        let share = 2.0 * (count as f64 - 1.0) / count as f64;
        let beyond = rounds.iter().map(|round| {
            let most = round.stats.bytes_sent.max(round.stats.bytes_received);
            most as f64 / (share * round.stats.encoded_bytes as f64)
        });
        Ok(beyond.fold(0.0, f64::max))
    })
}

/// P8: the share of the slower direction that rounds use once rates are measured.
pub(super) fn bandwidth() -> Property {
    let found = || -> Found {
        let home = (1e6, 5e6);
        let groups: [(&str, Vec<(f64, f64)>); 3] = [
            ("equal", vec![(2e6, 2e6); 4]),
            ("up 1, down 5", vec![home; 4]),
            ("mixed", vec![(10e6, 10e6), home, home, (1e6, 2e6)]),
        ];
        let (mut measured, mut least) = (Vec::new(), f64::INFINITY);
        for (name, rates) in groups {
            let used = bandwidth_used(&rates)?;
            measured.push(format!("{:.0} % {name}", used * 100.0));
            least = least.min(used);
        }
        Ok((measured.join(", "), least >= 0.9))
    };
    Property::new("90 % of the slower direction used, rates measured", found())
}

fn bandwidth_used(rates: &[(f64, f64)]) -> Result<f64, String> {
    run(6, async |net| {
        let machines = rates.iter().map(|(up, down)| links(*up, *down, Duration::from_millis(5)));
        let group: Vec<Member> = group(&net, machines, &config(2 * MANY, Scheme::None)).await?;
        // Rates are known from what has passed: three rounds to learn them.
        for epoch in 0..3 {
            step_all(&net, &group, epoch, 2 * MANY).await?;
        }
        let (rounds, took) = step_all(&net, &group, 3, 2 * MANY).await?;
        let slower: Vec<f64> = rates.iter().map(|(up, down)| up.min(*down)).collect();
        let ideal = least_time(rounds[0].stats.encoded_bytes as f64, &slower);
        if took.as_secs_f64() < ideal {
            return Err(format!("{} is less than the least possible, {ideal:.2} s", seconds(took)));
        }
        Ok(ideal / took.as_secs_f64())
    })
}

/// The least seconds of a butterfly over peers with these rates: a peer that reduces the share s of the vector sends and
/// receives 1 + s(N-2) vectors, so that by time T it can have taken (T rate - 1)/(N-2), and all shares make 1.
fn least_time(encoded: f64, rates: &[f64]) -> f64 {
    let others = rates.len() as f64 - 2.0;
    let shares = |time: f64| -> f64 {
        rates.iter().map(|rate| ((time * rate / encoded - 1.0) / others).max(0.0)).sum()
    };
    // Nobody is done before it has sent its own vector.
    let (mut low, mut high) =
        (0.0, rates.iter().map(|rate| (1.0 + others) * encoded / rate).fold(0.0, f64::max));
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if shares(middle) < 1.0 { low = middle } else { high = middle }
    }
    high.max(rates.iter().map(|rate| encoded / rate).fold(0.0, f64::max))
}
