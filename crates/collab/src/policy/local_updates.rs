//! Sans-I/O. Local updates: every peer applies its own gradients at once; parameters are averaged, weighted by samples,
//! when the target is in.

use super::{Situation, Step};

pub(super) fn next(now: &Situation) -> Step {
    if now.state_open || now.samples_total >= now.target { Step::AverageState } else { Step::Accumulate }
}

#[cfg(test)]
mod tests {
    use super::super::tests::IDLE;
    use super::*;

    #[test]
    fn parameters_are_averaged_when_the_target_is_in() {
        assert_eq!(next(&Situation { samples_total: 63, ..IDLE }), Step::Accumulate);
        assert_eq!(next(&Situation { samples_total: 64, ..IDLE }), Step::AverageState);
        assert_eq!(next(&Situation { state_open: true, ..IDLE }), Step::AverageState);
    }
}
