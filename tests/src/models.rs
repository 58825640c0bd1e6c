//! Toy models, so that simulated runs have a loss: least squares and a small multilayer perceptron, with gradients by
//! hand, in f32, in a fixed order of operations. Data follow from a seed.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Inputs of both models.
const INPUTS: usize = 6;
/// Hidden units of the perceptron.
const HIDDEN: usize = 8;
/// Over how many copies the broad model spreads its weight.
const COPIES: usize = 100_000;

/// Which model a run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// `y = w x`, with noise; convex, so every correct run ends at the same loss.
    LeastSquares,
    /// One hidden layer of tanh units against a fixed teacher.
    Perceptron,
    /// Least squares whose weight is the scaled sum of many: it trains alike, and its rounds move 2.4 MB.
    Broad,
}

/// One training example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    x: [f32; INPUTS],
    y: f32,
}

/// Uniform in -1..1.
fn unit(rng: &mut StdRng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
}

impl Model {
    /// Names and shapes of the parameters, in the order of the vector.
    pub fn tensors(self) -> Vec<(&'static str, Vec<usize>)> {
        match self {
            Self::LeastSquares => vec![("weight", vec![INPUTS]), ("bias", vec![1])],
            Self::Perceptron => vec![
                ("hidden.weight", vec![HIDDEN, INPUTS]),
                ("hidden.bias", vec![HIDDEN]),
                ("out.weight", vec![HIDDEN]),
            ],
            Self::Broad => vec![("weight", vec![COPIES, INPUTS]), ("bias", vec![1])],
        }
    }

    /// Number of parameters.
    pub fn len(self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Whether there are none: never.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The parameters that every peer starts from.
    pub fn initial(self, seed: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x1417);
        (0..self.len()).map(|_| 0.5 * unit(&mut rng)).collect()
    }

    /// `count` fresh examples.
    pub fn samples(self, rng: &mut StdRng, count: usize) -> Vec<Sample> {
        let mut teacher_rng = StdRng::seed_from_u64(0x7ea_c4e5);
        let teacher: Vec<f32> = (0..self.len()).map(|_| unit(&mut teacher_rng)).collect();
        (0..count)
            .map(|_| {
                let mut x = [0.0; INPUTS];
                x.iter_mut().for_each(|value| *value = unit(rng));
                let noise = 0.05 * unit(rng);
                Sample { y: self.predict(&teacher, &x) + noise, x }
            })
            .collect()
    }

    fn predict(self, params: &[f32], x: &[f32; INPUTS]) -> f32 {
        match self {
            Self::LeastSquares => dot(&params[..INPUTS], x) + params[INPUTS],
            Self::Perceptron => {
                let (weight, rest) = params.split_at(HIDDEN * INPUTS);
                let (bias, out) = rest.split_at(HIDDEN);
                (0..HIDDEN)
                    .map(|unit| out[unit] * (dot(&weight[unit * INPUTS..][..INPUTS], x) + bias[unit]).tanh())
                    .sum()
            }
            Self::Broad => {
                let (weight, bias) = params.split_at(COPIES * INPUTS);
                let mut sum = [0.0; INPUTS];
                for copy in weight.as_chunks::<INPUTS>().0 {
                    sum.iter_mut().zip(copy).for_each(|(sum, weight)| *sum += weight);
                }
                dot(&sum, x) / scale() + bias[0]
            }
        }
    }

    /// Half the mean squared error.
    pub fn loss(self, params: &[f32], samples: &[Sample]) -> f32 {
        let sum: f32 = samples.iter().map(|s| (self.predict(params, &s.x) - s.y).powi(2)).sum();
        0.5 * sum / samples.len().max(1) as f32
    }

    /// The sum over samples of the gradient of half the squared error, added to `sum` in the order of the samples.
    pub fn add_gradients(self, params: &[f32], samples: &[Sample], sum: &mut [f32]) {
        for sample in samples {
            let error = self.predict(params, &sample.x) - sample.y;
            match self {
                Self::LeastSquares => {
                    for (slot, x) in sum.iter_mut().zip(&sample.x) {
                        *slot += error * x;
                    }
                    sum[INPUTS] += error;
                }
                Self::Perceptron => perceptron_gradient(params, &sample.x, error, sum),
                Self::Broad => {
                    let (weight, bias) = sum.split_at_mut(COPIES * INPUTS);
                    let gradient = sample.x.map(|x| error * x / scale());
                    for copy in weight.as_chunks_mut::<INPUTS>().0 {
                        copy.iter_mut().zip(&gradient).for_each(|(slot, gradient)| *slot += gradient);
                    }
                    bias[0] += error;
                }
            }
        }
    }
}

/// What the sum of the broad model's copies is divided by, so that it trains as fast as least squares.
fn scale() -> f32 {
    (COPIES as f32).sqrt()
}

fn perceptron_gradient(params: &[f32], x: &[f32; INPUTS], error: f32, sum: &mut [f32]) {
    let (weight, rest) = params.split_at(HIDDEN * INPUTS);
    let (bias, out) = rest.split_at(HIDDEN);
    let (weight_sum, rest_sum) = sum.split_at_mut(HIDDEN * INPUTS);
    let (bias_sum, out_sum) = rest_sum.split_at_mut(HIDDEN);
    for unit in 0..HIDDEN {
        let active = (dot(&weight[unit * INPUTS..][..INPUTS], x) + bias[unit]).tanh();
        out_sum[unit] += error * active;
        let back = error * out[unit] * (1.0 - active * active);
        bias_sum[unit] += back;
        for (slot, x) in weight_sum[unit * INPUTS..][..INPUTS].iter_mut().zip(x) {
            *slot += back * x;
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Plain SGD with momentum: the optimizer statistics that a newcomer must not miss.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer {
    /// Step size.
    pub learning_rate: f32,
    /// Momentum.
    pub momentum: f32,
    /// The statistics.
    pub velocity: Vec<f32>,
}

impl Optimizer {
    /// The one that all toy runs use.
    pub fn new(len: usize) -> Self {
        Self { learning_rate: 0.2, momentum: 0.5, velocity: vec![0.0; len] }
    }

    /// One step.
    pub fn step(&mut self, params: &mut [f32], gradient: &[f32]) {
        for ((param, velocity), gradient) in params.iter_mut().zip(&mut self.velocity).zip(gradient) {
            *velocity = self.momentum * *velocity + gradient;
            *param -= self.learning_rate * *velocity;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        for model in [Model::LeastSquares, Model::Perceptron] {
            let samples = model.samples(&mut StdRng::seed_from_u64(3), 16);
            let params = model.initial(5);
            let mut gradient = vec![0.0; model.len()];
            model.add_gradients(&params, &samples, &mut gradient);
            for index in 0..model.len() {
                let mut moved = params.clone();
                let slope = |moved: &[f32]| f64::from(model.loss(moved, &samples));
                moved[index] = params[index] + 1e-2;
                let above = slope(&moved);
                moved[index] = params[index] - 1e-2;
                let numeric = (above - slope(&moved)) / 2e-2;
                let exact = f64::from(gradient[index]) / 16.0;
                assert!((numeric - exact).abs() < 1e-3, "{model:?} {index}: {numeric} {exact}");
            }
        }
    }

    #[test]
    fn the_broad_model_is_least_squares_in_more_values() {
        let broad = Model::Broad.initial(3);
        let copies = broad[..COPIES * INPUTS].as_chunks::<INPUTS>().0;
        let weight = |input: usize| copies.iter().map(|copy| copy[input]).sum::<f32>() / scale();
        let narrow: Vec<f32> = (0..INPUTS).map(weight).chain([broad[COPIES * INPUTS]]).collect();
        let samples = Model::LeastSquares.samples(&mut StdRng::seed_from_u64(3), 16);
        let close = |a: f32, b: f32| (a - b).abs() < 1e-3 * (1.0 + b.abs());
        assert!(close(Model::Broad.loss(&broad, &samples), Model::LeastSquares.loss(&narrow, &samples)));
        let (mut of_broad, mut of_narrow) = (vec![0.0; broad.len()], vec![0.0; narrow.len()]);
        Model::Broad.add_gradients(&broad, &samples, &mut of_broad);
        Model::LeastSquares.add_gradients(&narrow, &samples, &mut of_narrow);
        for copy in of_broad[..COPIES * INPUTS].as_chunks::<INPUTS>().0 {
            assert!(copy.iter().zip(&of_narrow).all(|(of, narrow)| close(of * scale(), *narrow)));
        }
        assert!(close(of_broad[COPIES * INPUTS], of_narrow[INPUTS]));
    }

    #[test]
    fn training_lowers_the_loss() {
        for model in [Model::LeastSquares, Model::Perceptron] {
            let mut rng = StdRng::seed_from_u64(1);
            let (mut params, mut optimizer) = (model.initial(1), Optimizer::new(model.len()));
            let test = model.samples(&mut rng, 256);
            let before = model.loss(&params, &test);
            for _ in 0..60 {
                let samples = model.samples(&mut rng, 32);
                let mut sum = vec![0.0; model.len()];
                model.add_gradients(&params, &samples, &mut sum);
                sum.iter_mut().for_each(|value| *value /= 32.0);
                optimizer.step(&mut params, &sum);
            }
            let after = model.loss(&params, &test);
            assert!(after < 0.2 * before, "{model:?}: {before} -> {after}");
        }
    }
}
