//! potluck's own 4-bit format: blocks of 64 values, each scaled by its largest magnitude (rounded up to bfloat16), on
//! the 16 levels of NF4 (arXiv:2305.14314), which are equally probable for normally distributed values.
//!
//! Layout: one bfloat16 scale per block, then two values per byte, the first in the low half; an odd count leaves
//! the last high half zero. Error: at most 0.152 of the block's scale, which exceeds the largest magnitude by at most
//! 2^-7 of it (2^-133 absolute for denormals). All-zero blocks are exact. NaN and infinity are refused with the index of
//! the first. Meant to be used with error feedback.

use crate::codec::{Codec, PIECE, Reader, Scratch, Sink, Target};
use crate::error::check_length;
use crate::half_float::from_bfloat16;
use crate::out::Out;
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport, Scheme};

const BLOCK: usize = 64;
const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
const BORDERS: [f32; 15] = {
    let mut borders = [0.0; 15];
    let mut index = 0;
    while index < 15 {
        borders[index] = (LEVELS[index] + LEVELS[index + 1]) * 0.5;
        index += 1;
    }
    borders
};
/// The largest finite bfloat16.
const SCALE_MAX: u16 = 0x7f7f;

pub(crate) struct Blockwise4Bit;

impl Codec for Blockwise4Bit {
    fn encoded_len(&self, count: usize) -> usize {
        2 * count.div_ceil(BLOCK) + count.div_ceil(2)
    }

    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        _: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        out.grow(2 * source.len().div_ceil(BLOCK));
        let clamped = simd::dispatch(Quantize { source, out })
            .map_err(|index| EncodeError::NotFinite { scheme: Scheme::Blockwise4Bit, index })?;
        Ok(EncodeReport { clamped, ..EncodeReport::default() })
    }

    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        let count = target.len();
        check_length(self.encoded_len(count), bytes.len())?;
        let (scales, pairs) = bytes.split_at(2 * count.div_ceil(BLOCK));
        let (scales, _) = scales.as_chunks::<2>();
        if let Some(index) = scales.iter().position(|scale| u16::from_le_bytes(*scale) > SCALE_MAX) {
            return Err(DecodeError::NotFinite { field: "scale", index });
        }
        if let (1, Some(last)) = (count % 2, pairs.last())
            && last >> 4 != 0
        {
            return Err(DecodeError::Field { field: "padding", expected: 0, found: u64::from(last >> 4) });
        }
        target.fill(Lookup { scales, pairs });
        Ok(())
    }
}

struct Quantize<'a, 'b> {
    source: Source<'a>,
    out: &'a mut Out<'b>,
}

/// The smallest bfloat16 that is not below `magnitude` (its bits); the largest finite one at the end of the range.
#[inline(always)]
fn scale_for(magnitude: u32) -> u16 {
    ((magnitude + 0xffff) >> 16).min(u32::from(SCALE_MAX)) as u16
}

/// The number of the nearest level, by counting the borders below. Wide, as the floats are: narrowed to a byte in the
/// same loop, each of the comparisons would be narrowed.
#[inline(always)]
fn level_of(quotient: f32) -> u32 {
    BORDERS.iter().map(|border| u32::from(quotient > *border)).sum()
}

impl Kernel for Quantize<'_, '_> {
    /// How many products were clamped, or the position of the first value that is not finite.
    type Output = Result<usize, usize>;
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Result<usize, usize> {
        let Self { source, out } = self;
        let mut scales_at = 0;
        let mut is_finite = true;
        let clamped = source.pieces(
            PIECE,
            #[inline(always)]
            |piece| {
                for block in piece.chunks(BLOCK) {
                    let mut padded = [0.0_f32; BLOCK];
                    padded[..block.len()].copy_from_slice(block);
                    let largest = padded.iter().fold(0_u32, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
                    is_finite &= largest < 0x7f80_0000;
                    // What a block that is not finite gives does not matter: it is refused below.
                    let scale = scale_for(largest.min(0x7f7f_ffff));
                    out.written()[scales_at..scales_at + 2].copy_from_slice(&scale.to_le_bytes());
                    scales_at += 2;
                    let divisor = if scale == 0 { 1.0 } else { from_bfloat16(scale) };
                    let mut levels = [0_u32; BLOCK];
                    for (level, value) in levels.iter_mut().zip(&padded) {
                        *level = level_of(value / divisor);
                    }
                    if block.len() % 2 == 1 {
                        levels[block.len()] = 0;
                    }
                    let mut pairs = [0_u8; BLOCK / 2];
                    for (pair, [low, high]) in pairs.iter_mut().zip(levels.as_chunks::<2>().0) {
                        *pair = (low | high << 4) as u8;
                    }
                    out.extend_from_slice(&pairs[..block.len().div_ceil(2)]);
                }
            },
        );
        if is_finite { Ok(clamped) } else { Err(source.first_non_finite().unwrap_or(0)) }
    }
}

struct Lookup<'a> {
    scales: &'a [[u8; 2]],
    pairs: &'a [u8],
}

/// Both levels of every byte: one look-up instead of two.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [LEVELS[byte & 15], LEVELS[byte >> 4]];
        byte += 1;
    }
    pairs
};

impl Reader for Lookup<'_> {
    #[inline(always)]
    fn read<I: Isa, S: Sink>(&self, _: I, at: usize, slots: &mut [f32], sink: S) {
        let pairs = self.pairs[at / 2..].chunks(BLOCK / 2);
        let blocks = slots.chunks_mut(BLOCK).zip(pairs).zip(&self.scales[at / BLOCK..]);
        for ((block, bytes), scale) in blocks {
            let scale = from_bfloat16(u16::from_le_bytes(*scale));
            let (pairs, last) = block.as_chunks_mut::<2>();
            let last_byte = bytes.get(pairs.len());
            for (pair, byte) in pairs.iter_mut().zip(bytes) {
                let [low, high] = PAIRS[usize::from(*byte)];
                sink.put(&mut pair[0], low * scale);
                sink.put(&mut pair[1], high * scale);
            }
            if let (Some(slot), Some(byte)) = (last.first_mut(), last_byte) {
                sink.put(slot, PAIRS[usize::from(*byte)][0] * scale);
            }
        }
    }
}
