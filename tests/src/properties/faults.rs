//! P4, P5, P6 and P12: rounds in which something goes wrong.

use super::group::{Member, begin_epoch, complete, config, group, links, same_bits, step, step_all, values};
use super::{Found, Property};
use potluck_averaging::{AveragerConfig, Round, RoundRequest};
use potluck_compression::Scheme;
use potluck_net::{FaultKind, PeerId};
use potluck_net_sim::{FaultRates, PeerSpec, SimNet, run};
use std::time::Duration;

/// P4: rounds that hold everybody, while frames are late and streams break.
pub(super) fn completeness() -> Property {
    let found = || -> Found {
        let (mut all, mut whole, mut worst) = (0_usize, 0_usize, (1.0_f64, String::new()));
        for (count, rounds) in [(2, 300), (8, 100), (16, 40), (32, 10)] {
            for percent in [0, 5, 20] {
                let held = complete_rounds(count, rounds, f64::from(percent) / 100.0)?;
                let share = held as f64 / rounds as f64;
                if share < worst.0 {
                    worst = (share, format!("; worst {held} of {rounds}: {count} peers, {percent} %"));
                }
                (all, whole) = (all + rounds, whole + held);
            }
        }
        let share = whole as f64 / all as f64;
        Ok((format!("{:.2} % of {all}{}", share * 100.0, worst.1), share >= 0.999))
    };
    Property::new("99.9 % of rounds whole, 2 to 32 peers, 0/5/20 % faults", found())
}

/// How many of these rounds held everybody. Nine of ten faulty frames are late by up to 100 ms, one breaks its stream.
fn complete_rounds(count: usize, rounds: usize, rate: f64) -> Result<usize, String> {
    const LEN: usize = 4000;
    run(7, async |net| {
        let healthy = config(LEN, Scheme::None);
        let faults = FaultRates {
            delay: rate * 0.9,
            delay_max: Duration::from_millis(100),
            reset: rate * 0.1,
            ..FaultRates::default()
        };
        let machines = std::iter::repeat_n(PeerSpec { faults, ..PeerSpec::default() }, count);
        let group = group(&net, machines, &healthy).await?;
        let mut whole = 0;
        for epoch in 0..rounds as u64 {
            // A round that fails is one that is not whole.
            let stepped = step_all(&net, &group, epoch, LEN).await;
            whole += usize::from(stepped.is_ok_and(|(rounds, _)| complete(&rounds, count)));
        }
        Ok(whole)
    })
}

/// Peers of the rounds in which one is lost, and the one.
const PEERS: usize = 4;
const VICTIM: usize = 1;

/// Step all in this epoch, lose the victim at `after`; the survivors' rounds and their time.
async fn lose_one(
    net: &SimNet,
    group: &[Member],
    (epoch, len): (u64, usize),
    fault: fn(&SimNet, PeerId),
    after: Duration,
) -> Result<(Vec<Round>, Duration), String> {
    begin_epoch(group, epoch).await?;
    let begun = net.elapsed();
    let harm = async {
        let lost = async {
            let _whatever = step(&group[VICTIM], epoch, values(VICTIM, len)).await;
        };
        let blow = async {
            tokio::time::sleep(after).await;
            fault(net, group[VICTIM].id);
        };
        tokio::join!(lost, blow);
        std::future::pending::<()>().await;
    };
    let steps = group
        .iter()
        .enumerate()
        .filter(|(at, _)| *at != VICTIM)
        .map(|(at, member)| step(member, epoch, values(at, len)));
    tokio::select! {
        biased;
        rounds = futures::future::join_all(steps) => {
            Ok((rounds.into_iter().collect::<Result<_, _>>()?, net.elapsed() - begun))
        }
        () = harm => Err("a peer that was lost ended the round".to_owned()),
    }
}

/// P5: a reducer is lost at a third of a round and at two thirds.
pub(super) fn fault_cost() -> Property {
    let found = || -> Found {
        let three = fault_free(PEERS - 1)?;
        let four = fault_free(PEERS)?;
        let (mut measured, mut round, mut next) = (Vec::new(), 0.0_f64, 0.0_f64);
        let faults = [("killed", SimNet::crash as fn(&SimNet, PeerId)), ("frozen", SimNet::freeze)];
        for (name, fault) in faults {
            let mut worst = 0.0_f64;
            for share in [0.33, 0.67] {
                let (lost, after) = cost_of(fault, four.mul_f64(share))?;
                worst = worst.max(lost.as_secs_f64() / four.as_secs_f64());
                next = next.max(after.as_secs_f64() / three.as_secs_f64());
            }
            measured.push(format!("{worst:.2}x {name}"));
            round = round.max(worst);
        }
        measured.push(format!("the next {next:.2}x"));
        Ok((format!("{} of {:.1} s", measured.join(", "), four.as_secs_f64()), round < 2.0 && next < 1.1))
    };
    Property::new("a lost reducer: round under 2x, the next under 1.1x", found())
}

/// Values of the rounds of P5.
const LEN: usize = 1_000_000;

fn slow() -> PeerSpec {
    links(1e6, 1e6, Duration::from_millis(5))
}

fn fault_free(count: usize) -> Result<Duration, String> {
    run(8, async |net| {
        let group = group(&net, std::iter::repeat_n(slow(), count), &config(LEN, Scheme::None)).await?;
        step_all(&net, &group, 0, LEN).await?;
        Ok(step_all(&net, &group, 1, LEN).await?.1)
    })
}

fn cost_of(fault: fn(&SimNet, PeerId), after: Duration) -> Result<(Duration, Duration), String> {
    run(8, async |net| {
        let mut group = group(&net, std::iter::repeat_n(slow(), PEERS), &config(LEN, Scheme::None)).await?;
        step_all(&net, &group, 0, LEN).await?;
        let (rounds, lost) = lose_one(&net, &group, (1, LEN), fault, after).await?;
        if !same_bits(&rounds) {
            return Err("survivors hold different bits".to_owned());
        }
        let _gone = group.remove(VICTIM);
        let (rounds, next) = step_all(&net, &group, 2, LEN).await?;
        if complete(&rounds, PEERS - 1) {
            Ok((lost, next))
        } else {
            Err("the next round lacks somebody".to_owned())
        }
    })
}

/// P6: the survivors of a round in which a peer was killed hold the same bits, whatever the compression.
pub(super) fn agreement() -> Property {
    const LEN: usize = 200_000;
    let found = || -> Found {
        let mut differing = Vec::new();
        let moments = [60, 250, 500];
        for scheme in Scheme::ALL {
            for after in moments {
                let same = run(after, async |net| {
                    let machines = std::iter::repeat_n(slow(), PEERS);
                    let group = group(&net, machines, &config(LEN, *scheme)).await?;
                    let after = Duration::from_millis(after);
                    let (rounds, _) = lose_one(&net, &group, (0, LEN), SimNet::crash, after).await?;
                    Ok::<_, String>(same_bits(&rounds))
                })?;
                if !same {
                    differing.push(format!("{scheme:?} after {after} ms"));
                }
            }
        }
        let all = Scheme::ALL.len() * moments.len();
        let measured = format!("{} of {all} rounds of {} schemes", all - differing.len(), Scheme::ALL.len());
        Ok((if differing.is_empty() { measured } else { differing.join(", ") }, differing.is_empty()))
    };
    Property::new("survivors of a kill hold the same bits, every scheme", found())
}

/// P12: a peer offers values that are not finite or not plausible, with and without looking at them itself.
pub(super) fn safety() -> Property {
    let found = || -> Found {
        let (mut refused, mut all, mut wrong) = (0, 0, Vec::new());
        for (name, factor, kind) in [
            ("NaN", f32::NAN, FaultKind::NotFinite),
            ("Inf", f32::INFINITY, FaultKind::NotFinite),
            ("1e6x", 1e6, FaultKind::Implausible),
        ] {
            for check_own in [true, false] {
                all += 1;
                match poisoned(factor, kind, check_own)? {
                    None => refused += 1,
                    Some(reason) => wrong.push(format!("{name}: {reason}")),
                }
            }
        }
        let measured = format!("{refused} of {all} refused, their sender named");
        Ok((std::iter::once(measured).chain(wrong).collect::<Vec<_>>().join("; "), refused == all))
    };
    Property::new("NaN, Inf and 1e6x never count; the sender is named", found())
}

/// What was wrong with a round into which the last of three peers puts its values times `factor`.
fn poisoned(factor: f32, kind: FaultKind, check_own: bool) -> Result<Option<String>, String> {
    const LEN: usize = 10_000;
    run(9, async |net| {
        let config = AveragerConfig { check_own, ..config(LEN, Scheme::None) };
        let group = group(&net, std::iter::repeat_n(PeerSpec::default(), 3), &config).await?;
        let steps = group.iter().enumerate().map(|(at, member)| {
            let mut vector = values(at, LEN);
            if at == 2 {
                vector.iter_mut().for_each(|value| *value *= factor);
            }
            member.averager.step(RoundRequest::new(Some(0), vector, 1.0))
        });
        let honest = values(0, LEN).into_iter().zip(values(1, LEN)).map(|(a, b)| f32::midpoint(a, b));
        let honest: Vec<f32> = honest.collect();
        let mut named = false;
        for outcome in futures::future::join_all(steps).await {
            let outcome = outcome.map_err(|error| error.to_string())?;
            let off = outcome.value.vector.iter().zip(&honest).map(|(a, b)| (a - b).abs());
            if !off.fold(0.0, f32::max).lt(&1e-5) || !outcome.value.vector.iter().all(|v| v.is_finite()) {
                return Ok(Some("it counted".to_owned()));
            }
            if outcome.faults.iter().any(|fault| fault.kind == kind && fault.peer != group[2].id) {
                return Ok(Some("somebody else was named".to_owned()));
            }
            named |= outcome.faults.iter().any(|fault| fault.kind == kind);
        }
        Ok((!named).then(|| "nobody was named".to_owned()))
    })
}
