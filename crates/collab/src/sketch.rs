//! Sans-I/O. A small random projection of the parameters, so that peers can tell from heartbeats how far apart they
//! are without sending parameters.
//!
//! A count sketch (Charikar et al. 2002): each value is added, with a random sign, to one of a few buckets. The
//! squared distance of two sketches estimates the squared distance of the vectors without bias; with 32 buckets its
//! relative standard deviation is about 25 %.

/// Number of buckets.
pub(crate) const SKETCH_LEN: usize = 32;

/// The sketch of a vector. Sketches of the same epoch are comparable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sketch {
    /// The epoch whose parameters these were; it also seeds the projection.
    pub(crate) epoch: u64,
    pub(crate) values: [f32; SKETCH_LEN],
}

impl Sketch {
    pub(crate) fn of(epoch: u64, vector: &[f32]) -> Self {
        let mut sums = [0.0_f64; SKETCH_LEN];
        let mut index = mix(epoch);
        for value in vector {
            index = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let bits = mix(index);
            let bucket = (bits % SKETCH_LEN as u64) as usize;
            let sign = if bits >> 63 == 0 { 1.0 } else { -1.0 };
            sums[bucket] += sign * f64::from(*value);
        }
        Self { epoch, values: sums.map(|sum| sum as f32) }
    }

    /// The estimated distance of two vectors relative to the norm of the first; `None` if they are of two epochs.
    pub(crate) fn drift(&self, other: &Self) -> Option<f32> {
        if self.epoch != other.epoch {
            return None;
        }
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
        let distance = square(
            &mut self
                .values
                .iter()
                .zip(&other.values)
                .map(|(ours, theirs)| f64::from(*ours) - f64::from(*theirs)),
        );
        let norm = square(&mut self.values.iter().map(|value| f64::from(*value)));
        if distance == 0.0 {
            return Some(0.0);
        }
        Some((distance / norm.max(f64::MIN_POSITIVE)).sqrt() as f32)
    }
}

/// The finaliser of splitmix64.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_is_within_a_factor_of_two() {
        for epoch in 0..20 {
            let ours: Vec<f32> = (0..10_000).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
            let theirs: Vec<f32> = ours
                .iter()
                .enumerate()
                .map(|(i, value)| value + ((i * 53 % 97) as f32 - 48.0) * 1e-4)
                .collect();
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|value| f64::from(value * value)).sum::<f64>().sqrt()
            };
            let exact =
                norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b)) / norm(&mut ours.iter().copied());
            let estimate = f64::from(Sketch::of(epoch, &ours).drift(&Sketch::of(epoch, &theirs)).unwrap());
            assert!((0.5..2.0).contains(&(estimate / exact)), "epoch {epoch}: {estimate} for {exact}");
        }
    }

    #[test]
    fn equal_vectors_do_not_drift_and_epochs_are_not_compared() {
        let sketch = Sketch::of(1, &[1.0, 2.0]);
        assert_eq!(sketch.drift(&sketch), Some(0.0));
        assert_eq!(Sketch::of(1, &[0.0]).drift(&Sketch::of(1, &[0.0])), Some(0.0));
        assert_eq!(sketch.drift(&Sketch::of(2, &[1.0, 2.0])), None);
    }
}
