//! hivemind's `BLOCKWISE_8BIT` (bitsandbytes, arXiv:2110.02861), own implementation: blocks of 4096 values, each scaled
//! by its largest magnitude, on the fixed "dynamic" codebook that is finest near zero.
//!
//! Error: at most 0.0106 of the block's largest magnitude (0.0071 above -0.97 of it), and about 1 to 9 % of the value
//! itself down to 1e-5 of the largest magnitude. All-zero blocks are exact. NaN and infinity are refused with the index
//! of the first.

use std::sync::LazyLock;

use crate::codec::{Codec, Reader, Scratch, Sink, Target, f32_at, u64_at};
use crate::error::check_length;
use crate::finite::first_non_finite;
use crate::out::Out;
use crate::schemes::dynamic_map::{BORDERS, LEVELS};
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport, Scheme};

const BLOCK: usize = 4096;

pub(crate) struct Blockwise8Bit;

impl Codec for Blockwise8Bit {
    fn encoded_len(&self, count: usize) -> usize {
        (16 + 1024 + 4 * count.div_ceil(BLOCK)).saturating_add(count)
    }

    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        _: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        let blocks = source.len().div_ceil(BLOCK);
        out.extend_from_slice(&(blocks as u64).to_le_bytes());
        out.extend_from_slice(&256_u64.to_le_bytes());
        let scales_at = out.len();
        out.grow(4 * blocks);
        LEVELS.iter().for_each(|level| out.extend_from_slice(&level.to_le_bytes()));
        let clamped = simd::dispatch(Quantize { source, cells: &CELLS, scales_at, out })
            .map_err(|index| EncodeError::NotFinite { scheme: Scheme::Blockwise8Bit, index })?;
        Ok(EncodeReport { clamped, ..EncodeReport::default() })
    }

    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        check_length(self.encoded_len(target.len()), bytes.len())?;
        let blocks = target.len().div_ceil(BLOCK);
        for (field, expected, at) in [("absmax count", blocks as u64, 0), ("codebook length", 256, 8)] {
            let found = u64_at(bytes, at);
            if found != expected {
                return Err(DecodeError::Field { field, expected, found });
            }
        }
        let (scales, rest) = bytes[16..].split_at(4 * blocks);
        let levels: [f32; 256] = std::array::from_fn(|level| f32_at(rest, 4 * level));
        if let Some(index) = first_non_finite(&levels) {
            return Err(DecodeError::NotFinite { field: "codebook", index });
        }
        let largest = levels.iter().fold(0.0_f32, |max, level| max.max(level.abs()));
        if let Some(index) = (0..blocks).find(|block| !(f32_at(scales, 4 * block) * largest).is_finite()) {
            return Err(DecodeError::NotFinite { field: "absmax", index });
        }
        target.fill(Lookup { levels: &levels, scales, indices: &rest[1024..] });
        Ok(())
    }
}

/// The number of borders below each small range of floats; one more may lie inside. 4 KiB, so that the table and the
/// values of a block share the L1 cache.
static CELLS: LazyLock<Box<[u8; CELL_COUNT]>> = LazyLock::new(|| {
    let level_of = |value: f32| BORDERS.partition_point(|border| *border < value);
    let mut cells = Box::new([0; CELL_COUNT]);
    for (number, cell) in cells.iter_mut().enumerate() {
        let magnitude = number as u32 & 2047;
        // The smallest and the largest magnitude that fall into this cell; all that are smaller fall into the first.
        let near = if magnitude == 0 { 0 } else { (magnitude + CELL_OFFSET) << CELL_SHIFT };
        let far = ((magnitude + CELL_OFFSET + 1) << CELL_SHIFT) - 1;
        let sign = if number < 2048 { 1.0 } else { -1.0 };
        let (a, b) = (sign * f32::from_bits(near), sign * f32::from_bits(far));
        let base = level_of(a.min(b));
        assert!(level_of(a.max(b)) <= base + 1, "the codebook is coarser than the cells");
        *cell = base as u8;
    }
    cells
});

/// The border above each level; none above the last.
static BORDER_ABOVE: [f32; 256] = {
    let mut borders = [f32::INFINITY; 256];
    let mut index = 0;
    while index < 255 {
        borders[index] = BORDERS[index];
        index += 1;
    }
    borders
};

/// Sign, five exponent bits (2^-32 to 1) and six mantissa bits: borders are at least 1.4 % apart, so no cell holds two.
const CELL_COUNT: usize = 4096;
const CELL_SHIFT: u32 = 17;
/// Number of the cell of 1.0 before the offset that puts it at the end of its half.
const CELL_OFFSET: u32 = (0x3f80_0000 >> CELL_SHIFT) - (CELL_COUNT as u32 / 2 - 1);

#[inline(always)]
fn cell_of(value: f32) -> usize {
    let bits = value.to_bits();
    let magnitude = ((bits & 0x7fff_ffff) >> CELL_SHIFT).max(CELL_OFFSET) - CELL_OFFSET;
    (magnitude | (bits >> 31) << 11) as usize & (CELL_COUNT - 1)
}

struct Quantize<'a, 'b> {
    source: Source<'a>,
    cells: &'a [u8; CELL_COUNT],
    scales_at: usize,
    out: &'a mut Out<'b>,
}

impl Kernel for Quantize<'_, '_> {
    /// How many products were clamped, or the position of the first value that is not finite.
    type Output = Result<usize, usize>;
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Result<usize, usize> {
        const CHUNK: usize = 256;
        let Self { source, cells, mut scales_at, out } = self;
        let mut is_finite = true;
        let clamped = source.pieces(
            BLOCK,
            #[inline(always)]
            |block| {
                let largest = block.iter().fold(0_u32, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
                is_finite &= largest < 0x7f80_0000;
                out.written()[scales_at..scales_at + 4].copy_from_slice(&largest.to_le_bytes());
                scales_at += 4;
                // In an all-zero block every quotient is zero whatever the divisor.
                let scale = if largest == 0 { 1.0 } else { f32::from_bits(largest) };
                let indices = out.grow(block.len());
                for (chunk, indices) in block.chunks(CHUNK).zip(indices.chunks_mut(CHUNK)) {
                    // The arithmetic in the vector units, the look-ups after it.
                    let (mut quotients, mut numbers) = ([0.0_f32; CHUNK], [0_u16; CHUNK]);
                    for ((quotient, number), value) in quotients.iter_mut().zip(&mut numbers).zip(chunk) {
                        *quotient = value / scale;
                        *number = cell_of(*quotient) as u16;
                    }
                    for ((index, quotient), number) in indices.iter_mut().zip(&quotients).zip(numbers) {
                        let base = cells[usize::from(number) & (CELL_COUNT - 1)];
                        *index = base + u8::from(*quotient > BORDER_ABOVE[usize::from(base)]);
                    }
                }
            },
        );
        if is_finite { Ok(clamped) } else { Err(source.first_non_finite().unwrap_or(0)) }
    }
}

struct Lookup<'a> {
    levels: &'a [f32; 256],
    scales: &'a [u8],
    indices: &'a [u8],
}

impl Reader for Lookup<'_> {
    #[inline(always)]
    fn read<I: Isa, S: Sink>(&self, _: I, at: usize, slots: &mut [f32], sink: S) {
        let blocks = slots.chunks_mut(BLOCK).zip(self.indices[at..].chunks(BLOCK));
        for (number, (block, indices)) in blocks.enumerate() {
            let scale = f32_at(self.scales, 4 * (at / BLOCK + number));
            let scaled = self.levels.map(|level| level * scale);
            for (slot, index) in block.iter_mut().zip(indices) {
                sink.put(slot, scaled[usize::from(*index)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_find_the_nearest_level_around_every_border() {
        for border in BORDERS {
            for bits in border.to_bits() - 2..=border.to_bits() + 2 {
                let value = f32::from_bits(bits);
                let base = usize::from(CELLS[cell_of(value)]);
                let found = base + usize::from(value > BORDER_ABOVE[base]);
                assert_eq!(found, BORDERS.partition_point(|border| *border < value), "{value:e}");
            }
        }
    }
}
