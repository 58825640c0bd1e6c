//! What the uniform and quantile formats share: `i64 256 | 256 f32 levels | one u8 index per value`, where each level
//! is the mean of the values that share its index, so that an encoder may choose indices as it likes.

use crate::codec::{Reader, Sink, Target, f32_at, u64_at};
use crate::error::check_length;
use crate::out::Out;
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

/// Sum and number of the values of a level, which one vector addition updates together.
type Bucket = [f64; 2];

/// Neighbours often share an index: with four tables one addition need not wait for the previous.
type Tables = [[Bucket; 256]; 4];

/// Take a chunk's values in, and ask for what follows it in memory, which the next call looks at.
#[inline(always)]
fn count_in<I: Isa>(isa: I, tables: &mut Tables, values: &[f32], indices: &[u8]) {
    const GROUP: usize = 16;
    let (groups, rest) = values.as_chunks::<GROUP>();
    let (index_groups, index_rest) = indices.as_chunks::<GROUP>();
    for (number, (group, of)) in groups.iter().zip(index_groups).enumerate() {
        isa.prefetch(values, values.len() + number * GROUP);
        for lane in 0..GROUP {
            let bucket = &mut tables[lane % 4][usize::from(of[lane])];
            *bucket = [bucket[0] + f64::from(group[lane]), bucket[1] + 1.0];
        }
    }
    for (lane, (value, index)) in rest.iter().zip(index_rest).enumerate() {
        let bucket = &mut tables[lane % 4][usize::from(*index)];
        *bucket = [bucket[0] + f64::from(*value), bucket[1] + 1.0];
    }
}

/// Append the buffer, with `index(chunk, indices)` choosing the indices of at most [`CHUNK`] values at a time.
#[inline(always)]
pub(super) fn encode<I: Isa>(
    isa: I,
    source: Source<'_>,
    out: &mut Out<'_>,
    mut index: impl FnMut(&[f32], &mut [u8]),
) {
    out.grow(HEADER_BYTES)[..8].copy_from_slice(&256_u64.to_le_bytes());
    let mut tables: Tables = [[[0.0; 2]; 256]; 4];
    source.pieces(
        CHUNK,
        #[inline(always)]
        |chunk| {
            let indices = out.grow(chunk.len());
            index(chunk, indices);
            count_in(isa, &mut tables, chunk, indices);
        },
    );
    for (level, slot) in out.written()[8..HEADER_BYTES].chunks_exact_mut(4).enumerate() {
        let sum: f64 = tables.iter().map(|table| table[level][0]).sum();
        let count: f64 = tables.iter().map(|table| table[level][1]).sum();
        let mean = if count == 0.0 { 0.0 } else { (sum / count) as f32 };
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
