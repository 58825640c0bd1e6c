//! `make sim SEED=n SEEDS=m`: explore m seeds from n on; exit 1 at the first that breaks an invariant.
//! With `IDEAL=1` over an ideal protocol, which tells the session's faults from the network's.
//!
//! Then the table of what the protocol promises, measured; a missed target is printed as such and fails the command with
//! `TABLE=strict` only. `TABLE=0` leaves the table out, `TABLE=P4` measures the lines that begin with this.
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]

use potluck_tests::explore::{Protocol, explore, report};
use potluck_tests::properties;
use std::process::ExitCode;

/// A thousand simulated peers allocate and free some hundred thousand small things a second.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => text.parse().unwrap_or_else(|_| {
            println!("{name}={text:?} is no number");
            std::process::exit(2);
        }),
        _ => default,
    }
}

fn main() -> ExitCode {
    let (first, count) = (number("SEED", 1), number("SEEDS", 1));
    let protocol = if number("IDEAL", 0) == 0 { Protocol::Native } else { Protocol::Ideal };
    for seed in first..first.saturating_add(count) {
        let explored = explore(seed, protocol);
        if !explored.violations.is_empty() {
            println!("seed {seed} failed\n{}", report(seed, &explored));
            return ExitCode::FAILURE;
        }
    }
    println!("{count} seeds from {first} on: every invariant held");
    let wanted = std::env::var("TABLE").unwrap_or_default();
    let missed = if wanted == "0" { 0 } else { table(&wanted) };
    if missed > 0 && wanted == "strict" { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Print the table of properties; how many are missed.
fn table(wanted: &str) -> usize {
    let only = if wanted.starts_with('P') { wanted } else { "" };
    println!("\n       {:<24} {:<52} measured in simulated time", "property", "target");
    let mut missed = 0;
    for (name, measure) in properties::ALL.iter().filter(|(name, _)| name.starts_with(only)) {
        let property = measure();
        println!("{} {name:<24} {property}", if property.holds { "holds " } else { "MISSED" });
        missed += usize::from(!property.holds);
    }
    println!("{missed} targets missed");
    missed
}
