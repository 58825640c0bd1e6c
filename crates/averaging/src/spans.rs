//! Sans-I/O. How a flat vector is cut into chunks: the unit that is encoded, framed, checked and summed.
//!
//! Consecutive tensors with the same elementwise scheme merge into one span; schemes that derive a codebook or a scale
//! from their values stay within one tensor, so that no tensor spoils another's codebook. Every peer computes the same
//! chunks from the same tensors, policy and group size; [`Layout::hash`] proves it.

use potluck_compression::{Policy, Scheme, TensorInfo};
use std::ops::Range;

/// Values in the largest chunk: 512 KiB as f32.
const CHUNK_VALUES_MAX: usize = 128 << 10;
/// Values in the smallest chunk that cutting may make: below this, headers and codebooks would cost over 1 %.
const CHUNK_VALUES_MIN: usize = 4 << 10;
/// Cuts fall on multiples of this, the block length of the block-wise schemes.
const CHUNK_GRAIN: usize = 4096;

/// One chunk of the vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Its values.
    pub range: Range<usize>,
    /// How they travel.
    pub scheme: Scheme,
}

impl Chunk {
    /// Bytes of the encoded chunk.
    pub fn encoded_bytes(&self) -> usize {
        self.scheme.encoded_len(self.range.len())
    }
}

/// All chunks of a vector, in order, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The chunks.
    pub chunks: Vec<Chunk>,
    /// Number of values.
    pub values: usize,
}

/// Whether a scheme treats every value by itself.
fn elementwise(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::None | Scheme::Float16 | Scheme::BFloat16)
}

impl Layout {
    /// The layout of these tensors for a group of `reducers` peers.
    pub fn new(tensors: &[TensorInfo], policy: &Policy, reducers: usize) -> Self {
        let spans =
            tensors.iter().map(|tensor| (tensor.shape.iter().product::<usize>(), policy.scheme_for(tensor)));
        Self::from_spans(spans, reducers)
    }

    /// The layout of consecutive `(length, scheme)` spans.
    pub fn from_spans(spans: impl IntoIterator<Item = (usize, Scheme)>, reducers: usize) -> Self {
        let mut merged: Vec<(Range<usize>, Scheme)> = Vec::new();
        let mut values = 0;
        for (len, scheme) in spans {
            let range = values..values + len;
            values += len;
            if len == 0 {
                continue;
            }
            match merged.last_mut() {
                Some((last, same)) if *same == scheme && elementwise(scheme) => last.end = range.end,
                _ => merged.push((range, scheme)),
            }
        }
        let step = chunk_values(values, reducers);
        let mut chunks = Vec::new();
        for (range, scheme) in merged {
            // Equal chunks: parts of equally fast reducers are then equal as well.
            let count = (range.len() as f64 / step as f64).round().max(1.0) as usize;
            let grain = if elementwise(scheme) { 1 } else { CHUNK_GRAIN };
            let len = range.len().div_ceil(count).div_ceil(grain) * grain;
            let starts = range.clone().step_by(len);
            chunks.extend(starts.map(|at| Chunk { range: at..(at + len).min(range.end), scheme }));
        }
        Self { chunks, values }
    }

    /// Encoded bytes of the whole vector.
    pub fn encoded_bytes(&self) -> usize {
        self.chunks.iter().map(Chunk::encoded_bytes).sum()
    }

    /// What two peers must agree on before they average.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for chunk in &self.chunks {
            hasher.update(&(chunk.range.start as u64).to_le_bytes());
            hasher.update(&(chunk.range.end as u64).to_le_bytes());
            hasher.update(&[chunk.scheme.wire_id()]);
        }
        *hasher.finalize().as_bytes()
    }
}

/// Chunk length for a vector: about four chunks per reducer while that is not too small or too large.
fn chunk_values(values: usize, reducers: usize) -> usize {
    (values / (4 * reducers.max(1))).clamp(CHUNK_VALUES_MIN, CHUNK_VALUES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elementwise_spans_merge_and_codebooks_do_not() {
        let layout = Layout::from_spans(
            [
                (10, Scheme::Float16),
                (20, Scheme::Float16),
                (5, Scheme::Uniform8Bit),
                (5, Scheme::Uniform8Bit),
            ],
            2,
        );
        let ranges: Vec<_> = layout.chunks.iter().map(|chunk| chunk.range.clone()).collect();
        assert_eq!(ranges, [0..30, 30..35, 35..40]);
    }

    #[test]
    fn chunks_cover_everything_once() {
        for len in [0, 1, 4095, 4096, 100_000, 1_000_000] {
            for reducers in [1, 2, 16, 64] {
                let layout = Layout::from_spans([(len, Scheme::None)], reducers);
                let mut at = 0;
                for chunk in &layout.chunks {
                    assert_eq!(chunk.range.start, at);
                    assert!(!chunk.range.is_empty() && chunk.range.len() <= 3 * CHUNK_VALUES_MAX / 2);
                    at = chunk.range.end;
                }
                assert_eq!(at, len);
            }
        }
    }
}
