//! Sans-I/O. Gradients are averaged and waited for; parameters are averaged beside the next samples, and what the
//! average changed is added to the parameters of that later moment.

use super::{Background, Situation, Step};

pub(super) fn next(now: &Situation) -> Step {
    match now.background {
        Background::Ready => Step::Apply,
        // The round of gradients is not held up by the state that is still on its way.
        Background::Running if now.epoch_full() => Step::Average,
        Background::Running => Step::Accumulate,
        Background::Idle => super::synchronous::next(now),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::IDLE;
    use super::*;

    #[test]
    fn gradients_do_not_wait_for_the_state() {
        let running = Situation { background: Background::Running, state_due: true, ..IDLE };
        assert_eq!(next(&running), Step::Accumulate);
        assert_eq!(next(&Situation { samples_total: 64, ..running }), Step::Average);
        assert_eq!(next(&Situation { background: Background::Ready, ..running }), Step::Apply);
        assert_eq!(next(&Situation { background: Background::Idle, ..running }), Step::AverageState);
    }
}
