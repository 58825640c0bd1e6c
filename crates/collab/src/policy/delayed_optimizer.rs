//! Sans-I/O. The average is waited for, the optimizer step then runs beside the next samples; its new parameters are
//! swapped in when they are there. No other average starts before that.

use super::{Background, Situation, Step};

pub(super) fn next(now: &Situation) -> Step {
    match now.background {
        Background::Ready => Step::Apply,
        Background::Running => Step::Accumulate,
        Background::Idle => super::synchronous::next(now),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::IDLE;
    use super::*;

    #[test]
    fn samples_go_on_while_the_optimizer_runs() {
        let full = Situation { samples_total: 640, background: Background::Running, ..IDLE };
        assert_eq!(next(&full), Step::Accumulate);
        assert_eq!(next(&Situation { background: Background::Ready, ..full }), Step::Apply);
    }
}
