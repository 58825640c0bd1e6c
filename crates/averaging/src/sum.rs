//! Sans-I/O. The arithmetic of one chunk: checks, the weighted sum in group order, and the encoded mean.
//!
//! Weights are divided by the largest one first, so that equal weights are exactly 1 and sums of them exact; the sum is
//! kept in f32, whose error grows as N times 2^-24 of the terms' magnitude: 4e-6 relative for 64 members.

use crate::spans::Chunk;
use potluck_compression::{Scratch, first_non_finite};
use potluck_net::FaultKind;

/// Slack for what a lossy encoding may add to a chunk's norm.
const NORM_SLACK: f64 = 4.0;

/// The running sum of one chunk.
pub(crate) struct ChunkSum {
    sum: Vec<f32>,
    decoded: Vec<f32>,
    scratch: Scratch,
    weight: f64,
    mask: u64,
}

impl ChunkSum {
    pub(crate) fn new() -> Self {
        Self { sum: Vec::new(), decoded: Vec::new(), scratch: Scratch::new(), weight: 0.0, mask: 0 }
    }

    /// Add plain values with a relative weight.
    pub(crate) fn add(&mut self, sender: usize, weight: f64, values: &[f32]) {
        self.sum.resize(values.len(), 0.0);
        let factor = weight as f32;
        for (sum, value) in self.sum.iter_mut().zip(values) {
            *sum += factor * value;
        }
        self.weight += weight;
        self.mask |= 1 << sender;
    }

    /// Check our own values and add them.
    pub(crate) fn add_own(
        &mut self,
        chunk: &Chunk,
        sender: usize,
        weight: f64,
        vector: &[f32],
    ) -> Result<(), (FaultKind, String)> {
        let values = &vector[chunk.range.clone()];
        if let Some(at) = first_non_finite(values) {
            return Err((
                FaultKind::NotFinite,
                format!("value {} is {}", chunk.range.start + at, values[at]),
            ));
        }
        self.add(sender, weight, values);
        Ok(())
    }

    /// Check an encoded contribution and add it. On an error the sum is as it was.
    pub(crate) fn add_encoded(
        &mut self,
        chunk: &Chunk,
        sender: usize,
        weight: f64,
        norm: f64,
        bytes: &[u8],
    ) -> Result<(), (FaultKind, String)> {
        let mut decoded = std::mem::take(&mut self.decoded);
        decoded.resize(chunk.range.len(), 0.0);
        let checked = check(chunk, norm, bytes, &mut decoded);
        if checked.is_ok() {
            self.add(sender, weight, &decoded);
        }
        self.decoded = decoded;
        checked
    }

    /// The encoded mean and its senders; ready for the next chunk. `None` if nobody contributed.
    pub(crate) fn finish(&mut self, chunk: &Chunk) -> Option<(u64, Vec<u8>)> {
        let (weight, mask) = (std::mem::take(&mut self.weight), std::mem::take(&mut self.mask));
        self.sum.resize(chunk.range.len(), 0.0);
        if weight > 0.0 {
            let factor = (1.0 / weight) as f32;
            self.sum.iter_mut().for_each(|value| *value *= factor);
        }
        // Finite terms can still add up to infinity, which some schemes cannot express.
        self.sum.iter_mut().for_each(|value| *value = value.clamp(f32::MIN, f32::MAX));
        let mut bytes = Vec::with_capacity(chunk.encoded_bytes());
        let encoded = chunk.scheme.encode(&self.sum, &mut bytes, &mut self.scratch);
        self.sum.clear();
        encoded.ok().map(|_| (mask, bytes))
    }
}

fn check(chunk: &Chunk, norm: f64, bytes: &[u8], decoded: &mut [f32]) -> Result<(), (FaultKind, String)> {
    chunk.scheme.decode(bytes, decoded).map_err(|error| (FaultKind::Malformed, error.to_string()))?;
    if let Some(at) = first_non_finite(decoded) {
        return Err((FaultKind::NotFinite, format!("value {} is {}", chunk.range.start + at, decoded[at])));
    }
    let found = square_sum(decoded).sqrt();
    if found > norm * NORM_SLACK + f64::from(f32::MIN_POSITIVE) {
        return Err((
            FaultKind::Implausible,
            format!("norm {found:e} in one chunk, {norm:e} announced for all"),
        ));
    }
    Ok(())
}

/// The sum of squares of all finite values.
pub(crate) fn square_sum(values: &[f32]) -> f64 {
    let square = |value: &f32| f64::from(*value) * f64::from(*value);
    let piece_sum = |piece: &[f32]| {
        let sum: f64 = piece.iter().map(square).sum();
        if sum.is_finite() { sum } else { piece.iter().filter(|value| value.is_finite()).map(square).sum() }
    };
    values.chunks(1024).map(piece_sum).sum()
}
