//! `potluck sim`: what a run will cost, before machines are rented for it. The peers are simulated, their sessions,
//! averaging and compression are the real ones.

use crate::failure::Failure;
use crate::rehearsal::{Outcome, Plan, Round, rehearse};
use crate::view;
use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use potluck_collab::Scheme;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

pub(crate) const HELP: &str = "Simulates peers with the real averaging on links as given; nothing is sent anywhere. The same seed \
prints the same figures. Of a large model two shorter vectors are simulated, and the figures extended in a straight line.\n\n\
Examples:\n  potluck sim --peers 8 --values 124e6 --up 20 --down 100 --compute 60\n  \
potluck sim --peers 16 --values 1e9 --compression uniform8bit --churn 0.05 --json | jq .round_seconds";

/// Values of all peers together that are simulated as they are; more take memory and minutes, and show the same.
const VALUES_MAX: f64 = 24e6;
/// Weights and two statistics of the optimizer, as f32.
const STATE_BYTES_PER_VALUE: usize = 12;

#[derive(ClapArgs)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// Number of peers
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..=256))]
    peers: u64,
    /// Values that are averaged: the model's trainable parameters, such as 124e6
    #[arg(long, default_value_t = 124e6, value_parser = values)]
    values: f64,
    /// Upload of each peer in Mbit/s
    #[arg(long, default_value_t = 100.0, value_parser = crate::status::positive)]
    up: f64,
    /// Download of each peer in Mbit/s
    #[arg(long, default_value_t = 100.0, value_parser = crate::status::positive)]
    down: f64,
    /// Round trip between two peers in ms
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(0..=5000))]
    rtt: u64,
    /// How gradients travel: none, float16, scaledfloat16, uniform8bit, quantile8bit or blockwise8bit
    #[arg(long, default_value = "float16", value_parser = scheme)]
    compression: Scheme,
    /// Seconds in which the peers together compute the samples of one epoch
    #[arg(long, default_value_t = 60.0, value_parser = crate::status::positive)]
    compute: f64,
    /// Chance of each peer to be killed in an epoch; it comes back one epoch later
    #[arg(long, default_value_t = 0.0, value_parser = chance)]
    churn: f64,
    /// Epochs to simulate
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// Simulate every value, whatever memory and time that takes
    #[arg(long)]
    full: bool,
    /// Seed of everything that is left to chance
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

fn values(text: &str) -> Result<f64, String> {
    let values: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (1.0..=1e12).contains(&values) { Ok(values.round()) } else { Err("allowed is 1 to 1e12".to_owned()) }
}

fn chance(text: &str) -> Result<f64, String> {
    let chance: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=0.5).contains(&chance) { Ok(chance) } else { Err("allowed is 0 to 0.5".to_owned()) }
}

/// `Float16Compression` is `float16` here.
fn short(scheme: Scheme) -> String {
    let name = scheme.name().to_lowercase();
    match name.trim_end_matches("compression").trim_end_matches("quantization") {
        "no" => "none".to_owned(),
        name => name.to_owned(),
    }
}

fn scheme(text: &str) -> Result<Scheme, String> {
    let known = Scheme::ALL.iter().find(|scheme| short(**scheme) == text.to_lowercase());
    known.copied().ok_or_else(|| {
        let names: Vec<String> = Scheme::ALL.iter().map(|scheme| short(*scheme)).collect();
        format!("allowed is {}", names.join(", "))
    })
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    peers: u64,
    values: f64,
    up_mbit_per_second: f64,
    down_mbit_per_second: f64,
    rtt_ms: u64,
    compression: String,
    compute_seconds: f64,
    churn: f64,
    epochs: u64,
    seed: u64,
    /// Lengths of the vectors that were simulated; where they are shorter than `values`, the figures were extended.
    simulated_values: Vec<usize>,
    #[serde(flatten)]
    figures: Figures,
    /// Part of the link that a round uses while it moves data, 0 to 1.
    up_used_in_round: f64,
    down_used_in_round: f64,
    /// Part of the link that the whole run uses, with heartbeats and downloads of the state, 0 to 1.
    up_used: f64,
    down_used: f64,
    /// Part of the time in which peers average instead of computing.
    averaging_time: f64,
    /// As simulated with the longest vector: failures do not lie on a straight line.
    rounds_failed: u64,
    faults: BTreeMap<String, u64>,
    peers_killed: u64,
    state_loads: usize,
}

/// What was measured; all of it grows with the vector in a straight line.
#[derive(Debug, Clone, Serialize)]
struct Figures {
    round_seconds: f64,
    round_seconds_min: f64,
    round_seconds_max: f64,
    /// Of these: until the group was complete.
    gather_seconds: f64,
    members: f64,
    /// Of one peer in one round.
    bytes_sent: f64,
    bytes_received: f64,
    messages_sent: f64,
    /// From one epoch to the next.
    epoch_seconds: f64,
    /// Of one peer over its link in one epoch, with everything.
    epoch_bytes_up: f64,
    epoch_bytes_down: f64,
    state_load_seconds: f64,
    /// Of the state that a newcomer loads.
    state_bytes: f64,
}

impl Figures {
    fn of(plan: &Plan, outcome: &Outcome) -> Self {
        let rounds = &outcome.rounds;
        let mean = |figure: &dyn Fn(&Round) -> f64| mean(rounds.iter().map(figure));
        let seconds = || rounds.iter().map(|round| round.seconds);
        let epochs = outcome.epochs.max(1) as f64;
        let each = epochs * plan.peers as f64;
        Self {
            round_seconds: mean(&|round| round.seconds),
            round_seconds_min: seconds().reduce(f64::min).unwrap_or(0.0),
            round_seconds_max: seconds().reduce(f64::max).unwrap_or(0.0),
            gather_seconds: mean(&|round| round.gather_seconds),
            members: mean(&|round| round.members as f64),
            bytes_sent: mean(&|round| round.bytes_sent as f64),
            bytes_received: mean(&|round| round.bytes_received as f64),
            messages_sent: mean(&|round| round.frames_sent as f64),
            epoch_seconds: outcome.seconds / epochs,
            epoch_bytes_up: outcome.up_bytes as f64 / each,
            epoch_bytes_down: outcome.down_bytes as f64 / each,
            state_load_seconds: self::mean(outcome.loads.iter().copied()),
            state_bytes: plan.state_bytes as f64,
        }
    }

    /// The line through `self` and `longer`, at `by` times the distance between them.
    fn extended(&self, longer: &Self, by: f64) -> Self {
        let at = |figure: fn(&Self) -> f64| (figure(self) + (figure(longer) - figure(self)) * by).max(0.0);
        Self {
            round_seconds: at(|it| it.round_seconds),
            round_seconds_min: at(|it| it.round_seconds) * longer.round_seconds_min
                / longer.round_seconds.max(1e-9),
            round_seconds_max: at(|it| it.round_seconds) * longer.round_seconds_max
                / longer.round_seconds.max(1e-9),
            // Who is there and how long they are waited for has nothing to do with the vector.
            gather_seconds: longer.gather_seconds,
            members: longer.members,
            bytes_sent: at(|it| it.bytes_sent),
            bytes_received: at(|it| it.bytes_received),
            messages_sent: at(|it| it.messages_sent),
            epoch_seconds: at(|it| it.epoch_seconds),
            epoch_bytes_up: at(|it| it.epoch_bytes_up),
            epoch_bytes_down: at(|it| it.epoch_bytes_down),
            state_load_seconds: at(|it| it.state_load_seconds),
            state_bytes: at(|it| it.state_bytes),
        }
    }
}

/// The mean; 0 of nothing.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    // The sum of nothing would be -0.
    values.fold(0.0, |sum, value| sum + value) / count
}

/// Simulate and tell.
pub(crate) async fn run(args: Args) -> Result<()> {
    let all = args.values as usize;
    let longest = if args.full { all } else { all.min((VALUES_MAX / args.peers as f64) as usize) };
    let lengths = if longest < all { vec![longest / 4, longest] } else { vec![all] };
    let plans: Vec<Plan> = lengths.iter().map(|values| plan(&args, *values)).collect();
    let (seed, logged) = (args.seed, std::env::var_os(crate::log::VARIABLE).is_some());
    let (simulated, simulate) = (plans.clone(), move |plan: &Plan| rehearse(seed, plan));
    // Virtual time has a runtime of its own, which cannot be inside this one.
    let rehearsed = tokio::task::spawn_blocking(move || {
        let all = || simulated.iter().map(simulate).collect::<Result<Vec<Outcome>, String>>();
        // What simulated peers warn of is nobody's trouble.
        if logged {
            all()
        } else {
            tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::default(), all)
        }
    });
    let hint = "try faster links, fewer --values, or a stronger --compression";
    let outcomes = rehearsed
        .await
        .context("the simulation ended early")?
        .map_err(|reason| Failure::new(reason, hint))?;
    let report = report(&args, &plans, &outcomes);
    let text =
        if args.json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { text(&report) };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

fn plan(args: &Args, values: usize) -> Plan {
    Plan {
        peers: args.peers as usize,
        values,
        // Nobody loads it unless somebody comes back.
        state_bytes: if args.churn > 0.0 { values * STATE_BYTES_PER_VALUE } else { 16 },
        up_bytes_per_second: bytes_per_second(args.up),
        down_bytes_per_second: bytes_per_second(args.down),
        round_trip: Duration::from_millis(args.rtt),
        scheme: args.compression,
        compute: Duration::from_secs_f64(args.compute),
        churn: args.churn,
        rounds: args.rounds,
    }
}

fn bytes_per_second(mbit: f64) -> f64 {
    mbit * 1e6 / 8.0
}

fn report(args: &Args, plans: &[Plan], outcomes: &[Outcome]) -> Report {
    let simulated_values: Vec<usize> = plans.iter().map(|plan| plan.values).collect();
    let measured: Vec<Figures> =
        plans.iter().zip(outcomes).map(|(plan, outcome)| Figures::of(plan, outcome)).collect();
    let mut figures = match (&measured[..], &simulated_values[..]) {
        ([shorter, longer], [short, long]) => {
            let by = (args.values - *short as f64) / (*long - *short).max(1) as f64;
            shorter.extended(longer, by)
        }
        _ => measured[0].clone(),
    };
    let last = &outcomes[outcomes.len() - 1];
    // While data moves: the time that a round waits for its members is not the link's.
    let (up, down) = (bytes_per_second(args.up), bytes_per_second(args.down));
    let least = (figures.bytes_sent / up).max(figures.bytes_received / down).max(1e-9);
    // What was extended must not outrun the link.
    let moving = (figures.round_seconds - figures.gather_seconds).max(least);
    figures.round_seconds = moving + figures.gather_seconds;
    let epoch = figures.epoch_seconds.max(figures.round_seconds).max(1e-9);
    Report {
        peers: args.peers,
        values: args.values,
        up_mbit_per_second: args.up,
        down_mbit_per_second: args.down,
        rtt_ms: args.rtt,
        compression: short(args.compression),
        compute_seconds: args.compute,
        churn: args.churn,
        epochs: args.rounds,
        seed: args.seed,
        simulated_values,
        up_used_in_round: figures.bytes_sent / moving / up,
        down_used_in_round: figures.bytes_received / moving / down,
        up_used: figures.epoch_bytes_up / epoch / up,
        down_used: figures.epoch_bytes_down / epoch / down,
        averaging_time: (figures.round_seconds / epoch).min(1.0),
        rounds_failed: last.failed,
        faults: last.faults.clone(),
        peers_killed: last.killed,
        state_loads: last.loads.len(),
        figures,
    }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let mut line = |name: &str, text: String| {
        let _written = writeln!(out, "{name:<10}{text}");
    };
    line(
        "run",
        format!(
            "{} peers with {} Mbit/s up and {} down, {} ms apart; {} values as {}, {} of computing",
            report.peers,
            report.up_mbit_per_second,
            report.down_mbit_per_second,
            report.rtt_ms,
            report.values,
            report.compression,
            view::seconds(report.compute_seconds)
        ),
    );
    let figures = &report.figures;
    let lengths: Vec<String> = report.simulated_values.iter().map(ToString::to_string).collect();
    let how = if lengths.len() > 1 { ", the figures extended from there" } else { "" };
    line("simulated", format!("{} epochs with {} values{how}", report.epochs, lengths.join(" and ")));
    line(
        "round",
        format!(
            "{} ({} to {}), of which {} waiting for the group; {:.1} of {} members",
            view::seconds(figures.round_seconds),
            view::seconds(figures.round_seconds_min),
            view::seconds(figures.round_seconds_max),
            view::seconds(figures.gather_seconds),
            figures.members,
            report.peers
        ),
    );
    let epoch = view::seconds(figures.epoch_seconds);
    line("epoch", format!("{epoch}, {:.0} % of it averaging", report.averaging_time * 100.0));
    line(
        "per peer",
        format!(
            "{} sent, {} received, {:.0} messages each round",
            view::bytes(figures.bytes_sent as u64),
            view::bytes(figures.bytes_received as u64),
            figures.messages_sent
        ),
    );
    line(
        "link",
        format!(
            "{:.0} % of up and {:.0} % of down while averaging, {:.0} % and {:.0} % over all",
            report.up_used_in_round * 100.0,
            report.down_used_in_round * 100.0,
            report.up_used * 100.0,
            report.down_used * 100.0
        ),
    );
    let faults: Vec<String> = report.faults.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let faults = if faults.is_empty() { "none".to_owned() } else { faults.join(", ") };
    line("failures", format!("{} peers' rounds had no average; faults: {faults}", report.rounds_failed));
    if report.churn > 0.0 {
        line(
            "churn",
            format!(
                "{} killed; {} downloads of the state ({}) took {} on average",
                report.peers_killed,
                report.state_loads,
                view::bytes(figures.state_bytes as u64),
                view::seconds(figures.state_load_seconds)
            ),
        );
    }
    out
}
