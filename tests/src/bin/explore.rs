//! `make sim SEED=n SEEDS=m`: explore m seeds from n on; exit 1 at the first that breaks an invariant.
//! With `IDEAL=1` over an ideal protocol, which tells the session's faults from the network's.
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]

use potluck_tests::explore::{Protocol, explore, report};
use std::process::ExitCode;

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
    ExitCode::SUCCESS
}
