//! The same training without any network: one process, one batch.

use crate::models::{Model, Optimizer};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Loss on data that nobody trained on.
pub fn test_loss(model: Model, params: &[f32]) -> f32 {
    let samples = model.samples(&mut StdRng::seed_from_u64(0xda7a), 512);
    model.loss(params, &samples)
}

/// The parameters after so many epochs of one process, with the data of a single peer in batches.
pub fn single_process(model: Model, seed: u64, target: u64, batch: usize, epochs: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1000));
    let mut params = model.initial(seed);
    let mut optimizer = Optimizer::new(params.len());
    for _ in 0..epochs {
        let (mut sum, mut count) = (vec![0.0; params.len()], 0);
        while count < target {
            let samples = model.samples(&mut rng, batch);
            model.add_gradients(&params, &samples, &mut sum);
            count += samples.len() as u64;
        }
        sum.iter_mut().for_each(|value| *value /= count as f32);
        optimizer.step(&mut params, &sum);
    }
    params
}
