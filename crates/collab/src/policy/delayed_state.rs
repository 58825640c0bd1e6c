//! Sans-I/O. Gradients are averaged and waited for; parameters are averaged beside the samples of one epoch, and what the
//! average changed is added when that epoch has ended: at the same point of the history on every peer, so that all of
//! them still hold the same bits.

use super::{Background, Situation, Step};

pub(super) fn next(now: &Situation) -> Step {
    match (now.background, now.background_due) {
        (Background::Idle, _) => super::synchronous::next(now),
        (Background::Ready, true) => Step::Apply,
        // The next round of gradients needs the parameters that are still on their way.
        (Background::Running, true) => Step::Accumulate,
        (_, false) if now.epoch_full() => Step::Average,
        (_, false) => Step::Accumulate,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::IDLE;
    use super::*;

    #[test]
    fn gradients_of_one_epoch_do_not_wait_for_the_state() {
        let running = Situation { background: Background::Running, state_due: true, ..IDLE };
        assert_eq!(next(&running), Step::Accumulate);
        assert_eq!(next(&Situation { samples_total: 64, ..running }), Step::Average);
        assert_eq!(next(&Situation { background: Background::Idle, ..running }), Step::AverageState);
    }

    #[test]
    fn the_state_is_applied_between_epochs() {
        let ready = Situation { background: Background::Ready, ..IDLE };
        assert_eq!(next(&ready), Step::Accumulate);
        assert_eq!(next(&Situation { background_due: true, ..ready }), Step::Apply);
        let late =
            Situation { background: Background::Running, background_due: true, samples_total: 64, ..IDLE };
        assert_eq!(next(&late), Step::Accumulate);
    }
}
