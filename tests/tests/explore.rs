//! Seeds of random faults, as `make sim` explores them; thousands on demand there.

use potluck_tests::explore::{Protocol, explore, report};

fn hold(seeds: impl IntoIterator<Item = u64>, protocol: Protocol) {
    for seed in seeds {
        let explored = explore(seed, protocol);
        assert!(explored.violations.is_empty(), "{}", report(seed, &explored));
    }
}

#[test]
fn sessions_keep_every_invariant_over_an_ideal_protocol() {
    hold(0..100, Protocol::Ideal);
}

#[test]
fn sessions_keep_every_invariant_over_the_native_protocol() {
    hold(0..100, Protocol::Native);
}

#[test]
fn sessions_keep_every_invariant_over_the_native_protocol_further() {
    hold(100..200, Protocol::Native);
}

/// A peer holds the part that a group of two agreed on, and restarts before the other has it.
#[test]
fn nobody_waits_for_ever_for_a_part_whose_holder_is_lost() {
    hold([11831], Protocol::Native);
}
