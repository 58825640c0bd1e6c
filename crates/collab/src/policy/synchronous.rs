//! Sans-I/O. Large synchronous batches: everybody averages when the target is in, and waits for the average.

use super::{Situation, Step};

pub(super) fn next(now: &Situation) -> Step {
    if now.state_due || now.state_open {
        Step::AverageState
    } else if now.epoch_full() {
        Step::Average
    } else {
        Step::Accumulate
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::IDLE;
    use super::*;

    #[test]
    fn state_is_averaged_before_the_epoch_goes_on() {
        let due = Situation { state_due: true, samples_total: 64, ..IDLE };
        assert_eq!(next(&due), Step::AverageState);
        assert_eq!(next(&Situation { state_due: false, ..due }), Step::Average);
        assert_eq!(next(&Situation { samples_total: 63, ..IDLE }), Step::Accumulate);
    }
}
