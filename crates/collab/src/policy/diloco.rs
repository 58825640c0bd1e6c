//! Sans-I/O. DiLoCo (arXiv:2311.08105): many local steps, then the averaged movement of the parameters is the gradient of
//! an outer optimizer, SGD with Nesterov momentum. Whoever has done its inner steps first calls the others; a slow
//! peer joins with the steps that it has, so that nobody waits for it.

use super::{Situation, Step};

pub(super) fn next(now: &Situation, inner_steps: u32) -> Step {
    if now.state_open || now.local_steps >= inner_steps { Step::AverageState } else { Step::Accumulate }
}

/// The outer optimizer: identical on all peers, because it sees only agreed values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outer {
    pub(crate) learning_rate: f32,
    pub(crate) momentum: f32,
    pub(crate) velocity: Vec<f32>,
}

impl Outer {
    pub(crate) fn new(learning_rate: f32, momentum: f32) -> Self {
        Self { learning_rate, momentum, velocity: Vec::new() }
    }

    /// The next agreed parameters, from the last agreed ones and the averaged movement away from them.
    pub(crate) fn step(&mut self, agreed: &[f32], movement: &[f32]) -> Vec<f32> {
        self.velocity.resize(agreed.len(), 0.0);
        let (rate, momentum) = (self.learning_rate, self.momentum);
        agreed
            .iter()
            .zip(movement)
            .zip(&mut self.velocity)
            .map(|((agreed, movement), velocity)| {
                *velocity = momentum * *velocity + movement;
                agreed + rate * (movement + momentum * *velocity)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::IDLE;
    use super::*;

    #[test]
    fn inner_steps_decide_and_a_call_from_others_too() {
        assert_eq!(next(&Situation { local_steps: 7, samples_total: 9999, ..IDLE }, 8), Step::Accumulate);
        assert_eq!(next(&Situation { local_steps: 8, ..IDLE }, 8), Step::AverageState);
        assert_eq!(next(&Situation { local_steps: 1, state_open: true, ..IDLE }, 8), Step::AverageState);
    }

    #[test]
    fn without_momentum_and_at_rate_one_it_is_plain_averaging() {
        let mut outer = Outer::new(1.0, 0.0);
        assert_eq!(outer.step(&[1.0, 2.0], &[0.5, -1.0]), [1.5, 1.0]);
    }

    /// `torch.optim.SGD(lr=0.5, momentum=0.5, nesterov=True)` on the negated movement.
    #[test]
    fn nesterov_as_torch_computes_it() {
        let mut outer = Outer::new(0.5, 0.5);
        let first = outer.step(&[0.0], &[1.0]);
        assert_eq!(first, [0.75]);
        assert_eq!(outer.step(&first, &[1.0]), [0.75 + 0.5 * (1.0 + 0.5 * 1.5)]);
    }
}
