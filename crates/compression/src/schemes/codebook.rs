//! What the uniform and quantile formats share: `i64 256 | 256 f32 levels | one u8 index per value`, where each level
//! is the mean of the values that share its index, so that an encoder may choose indices as it likes.

use crate::codec::{Reader, Sink, Target, f32_at, u64_at};
use crate::error::check_length;
use crate::simd::Isa;
use crate::source::Source;
use crate::{DecodeError, finite::first_non_finite};

/// Length field and levels.
pub(super) const HEADER_BYTES: usize = 8 + 4 * 256;

/// Values that are indexed at a time, before their sums are taken: they are still in the L1 cache then.
pub(super) const CHUNK: usize = 1024;

pub(super) fn encoded_len(count: usize) -> usize {
    count.saturating_add(HEADER_BYTES)
}

/// One of four accumulators per level: neighbours often share an index, and four tables keep one addition from
/// waiting for the previous.
#[derive(Clone, Copy, Default)]
struct Bucket {
    sum: f64,
    count: u64,
}

/// Append the buffer, with `index(chunk, indices)` choosing the indices of at most [`CHUNK`] values at a time.
#[inline(always)]
pub(super) fn encode(source: Source<'_>, out: &mut Vec<u8>, mut index: impl FnMut(&[f32], &mut [u8])) {
    let start = out.len();
    out.reserve(encoded_len(source.len()));
    out.extend_from_slice(&256_u64.to_le_bytes());
    out.resize(start + HEADER_BYTES, 0);
    let mut buckets = [[Bucket::default(); 256]; 4];
    source.pieces(
        CHUNK,
        #[inline(always)]
        |chunk| {
            let at = out.len();
            out.resize(at + chunk.len(), 0);
            let indices = &mut out[at..];
            index(chunk, indices);
            for (four, of) in chunk.chunks(4).zip(indices.chunks(4)) {
                for (table, (value, index)) in buckets.iter_mut().zip(four.iter().zip(of)) {
                    let bucket = &mut table[usize::from(*index)];
                    bucket.sum += f64::from(*value);
                    bucket.count += 1;
                }
            }
        },
    );
    for (level, slot) in out[start + 8..start + HEADER_BYTES].chunks_exact_mut(4).enumerate() {
        let sum: f64 = buckets.iter().map(|table| table[level].sum).sum();
        let count: u64 = buckets.iter().map(|table| table[level].count).sum();
        let mean = if count == 0 { 0.0 } else { (sum / count as f64) as f32 };
        slot.copy_from_slice(&mean.to_le_bytes());
    }
}

/// Check the header and write `levels[index]` to each slot.
pub(super) fn decode(bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
    check_length(encoded_len(target.len()), bytes.len())?;
    let length = u64_at(bytes, 0);
    if length != 256 {
        return Err(DecodeError::Field { field: "codebook length", expected: 256, found: length });
    }
    let levels: [f32; 256] = std::array::from_fn(|level| f32_at(bytes, 8 + 4 * level));
    if let Some(index) = first_non_finite(&levels) {
        return Err(DecodeError::NotFinite { field: "codebook", index });
    }
    target.fill(Lookup { levels: &levels, indices: &bytes[HEADER_BYTES..] });
    Ok(())
}

struct Lookup<'a> {
    levels: &'a [f32; 256],
    indices: &'a [u8],
}

impl Reader for Lookup<'_> {
    #[inline(always)]
    fn read<I: Isa, S: Sink>(&self, _: I, at: usize, slots: &mut [f32], sink: S) {
        for (slot, index) in slots.iter_mut().zip(&self.indices[at..]) {
            sink.put(slot, self.levels[usize::from(*index)]);
        }
    }
}
