//! Sans-I/O. Delayed gradients (arXiv:2103.03239, section 3.2): the round runs beside the next epoch's samples, and its
//! average is applied when it is there. The next round starts only after that, so a peer is never two steps late.

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
    fn one_round_at_a_time_and_its_average_first() {
        let full = Situation { samples_total: 64, ..IDLE };
        assert_eq!(next(&full), Step::Average);
        assert_eq!(next(&Situation { background: Background::Running, ..full }), Step::Accumulate);
        assert_eq!(next(&Situation { background: Background::Ready, ..full }), Step::Apply);
    }
}
