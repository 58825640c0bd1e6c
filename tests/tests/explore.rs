//! 200 seeds of random faults, as `make sim` explores them; thousands on demand there.

use potluck_tests::explore::{Protocol, explore, report};

#[test]
fn sessions_keep_every_invariant_over_an_ideal_protocol() {
    for seed in 0..300 {
        let explored = explore(seed, Protocol::Ideal);
        assert!(explored.violations.is_empty(), "{}", report(seed, &explored));
    }
}
