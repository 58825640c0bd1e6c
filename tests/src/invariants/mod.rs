//! What must hold in every run: one file per invariant of ARCHITECTURE.md. Each looks at the record of a run and names
//! what is wrong; none may be loosened for a scenario.
//!
//! Invariant 4 (records expire) is the dht's and is checked there; 10 (mathematics) compares whole runs with plain
//! training, in `tests/scenarios.rs` and with torch in the Python tests; 12 (layers) is checked by the `tidy` tests.

mod bounded_calls;
mod epochs_never_fall;
mod faults_are_named;
mod finite;
mod no_wall_clock;
mod nothing_is_left;
mod one_group;
mod same_bits;
mod weighted_mean;

use crate::record::Entry;
use potluck_net_sim::TraceName;
use std::collections::BTreeSet;

/// A broken invariant: its name and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant.
    pub invariant: &'static str,
    /// What was found.
    pub found: String,
}

/// Check a record that may still grow; `exact` says that nothing was compressed.
pub fn check(entries: &[Entry], exact: bool) -> Vec<Violation> {
    let mut found = Vec::new();
    if exact {
        collect(&mut found, "a part is the weighted mean over its senders", weighted_mean::check(entries));
    }
    collect(&mut found, "same history, same bits", same_bits::check(entries));
    collect(&mut found, "one group per peer and epoch", one_group::check(entries));
    collect(&mut found, "an epoch never falls", epochs_never_fall::check(entries));
    collect(&mut found, "faults are named, the healthy are not blamed", faults_are_named::check(entries));
    collect(&mut found, "no call blocks past its deadline", bounded_calls::check(entries));
    collect(&mut found, "only finite values are averaged", finite::check(entries));
    found
}

/// Check what is left when everything has ended.
pub fn check_end(streams_left: usize) -> Vec<Violation> {
    let mut found = Vec::new();
    collect(&mut found, "nothing outlives its session", nothing_is_left::check(streams_left));
    found
}

/// Check a run against the same one with clocks that agree.
pub fn check_clocks(apart: &TraceName, together: &TraceName) -> Vec<Violation> {
    let mut found = Vec::new();
    collect(&mut found, "no wall clock decides anything", no_wall_clock::check(apart, together));
    found
}

/// Epochs whose round a program gave up: the same peers may average them again, so that it does not tell one round from
/// another. What they agree on afterwards is checked by their histories.
fn made_again(entries: &[Entry]) -> BTreeSet<u64> {
    let given_up = entries.iter().filter_map(|entry| match entry {
        Entry::GaveUp { epoch, .. } => Some(*epoch),
        _ => None,
    });
    given_up.collect()
}

fn collect(into: &mut Vec<Violation>, invariant: &'static str, found: Vec<String>) {
    into.extend(found.into_iter().map(|found| Violation { invariant, found }));
}
