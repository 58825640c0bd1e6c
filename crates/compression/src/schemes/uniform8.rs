//! hivemind's `UNIFORM_8BIT`: 256 buckets of equal width over mean +- 3 standard deviations, each decoded to the mean
//! of its values.
//!
//! Error: at most one bucket width, 6 sigma / 256 (plus rounding), for values within 3 sigma of the mean. Values further
//! out share the end buckets: they are counted as saturated, and err by at most the spread of the values beyond 3 sigma
//! (plus a width). Constant vectors are exact. NaN and infinity are refused with the index of the first.

use crate::codec::{Codec, PIECE, Scratch, Target};
use crate::out::Out;
use crate::schemes::codebook;
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport, Scheme};

pub(crate) struct Uniform8Bit;

impl Codec for Uniform8Bit {
    fn encoded_len(&self, count: usize) -> usize {
        codebook::encoded_len(count)
    }

    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        _: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        let moments = simd::dispatch(Moments { source });
        // A sum over f32 values cannot overflow an f64, so this sees exactly NaN and infinity.
        if !moments.square_sum.is_finite() {
            let index = source.first_non_finite().unwrap_or(0);
            return Err(EncodeError::NotFinite { scheme: Scheme::Uniform8Bit, index });
        }
        let grid = Grid::new(source, &moments);
        let saturated = simd::dispatch(Quantize { source, grid, out });
        Ok(EncodeReport { saturated, clamped: moments.clamped, ..EncodeReport::default() })
    }

    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        codebook::decode(bytes, target)
    }
}

/// Sums of the values, and of their squares, relative to the first value (which removes a common offset).
struct Sums {
    sum: f64,
    square_sum: f64,
    clamped: usize,
}

fn first(source: Source<'_>) -> f64 {
    if source.is_empty() { 0.0 } else { f64::from(source.at(0)) }
}

struct Moments<'a> {
    source: Source<'a>,
}

impl Kernel for Moments<'_> {
    type Output = Sums;
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Sums {
        let shift = first(self.source);
        let mut sums = Sums { sum: 0.0, square_sum: 0.0, clamped: 0 };
        sums.clamped = self.source.pieces(
            PIECE,
            #[inline(always)]
            |piece| {
                let [sum, square_sum] = sum_and_squares(isa, piece, shift);
                sums.sum += sum;
                sums.square_sum += square_sum;
            },
        );
        sums
    }
}

/// Both sums for a piece, in 16 fixed lanes. The offsets go through memory, or the two sets of lanes would not become
/// loops of vectors.
#[inline(always)]
fn sum_and_squares<I: Isa>(isa: I, piece: &[f32], shift: f64) -> [f64; 2] {
    const LANES: usize = 16;
    const GROUP: usize = 256;
    const AHEAD: usize = 1024;
    let (mut sums, mut squares) = ([0.0_f64; LANES], [0.0_f64; LANES]);
    let mut offsets = [0.0_f64; GROUP];
    for (number, group) in piece.chunks(GROUP).enumerate() {
        for line in (0..GROUP).step_by(16) {
            isa.prefetch(piece, number * GROUP + AHEAD + line);
        }
        if group.len() < GROUP {
            // Zeros, which change no sum, behind the last values.
            offsets = [0.0; GROUP];
        }
        for (offset, value) in offsets.iter_mut().zip(group) {
            *offset = f64::from(*value) - shift;
        }
        for lanes in offsets.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                sums[lane] += lanes[lane];
            }
        }
        for lanes in offsets.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                squares[lane] += lanes[lane] * lanes[lane];
            }
        }
    }
    [sums.iter().sum(), squares.iter().sum()]
}

/// `index = round((x * unit - mean) / scale) + 128`, where `unit` is a power of two that keeps `scale` in the middle of
/// the f32 range whatever the values are (denormals, or spreads above the range).
#[derive(Clone, Copy)]
struct Grid {
    unit: f32,
    mean: f32,
    scale: f32,
}

impl Grid {
    fn new(source: Source<'_>, sums: &Sums) -> Self {
        let count = source.len() as f64;
        let shift = first(source);
        let mean = if source.is_empty() { 0.0 } else { shift + sums.sum / count };
        let variance = (sums.square_sum - sums.sum * (sums.sum / count)) / (count - 1.0);
        // One value, or all equal (rounding may leave less than zero): any index is exact. NaN fails the test too.
        if !(variance > 0.0 && count > 1.0) {
            return Self { unit: 0.0, mean: 0.0, scale: 1.0 };
        }
        let scale = 6.0 * variance.sqrt() / 256.0;
        let unit = if scale < 2.0_f64.powi(-100) {
            2.0_f64.powi(60)
        } else if scale > 2.0_f64.powi(100) {
            2.0_f64.powi(-10)
        } else {
            1.0
        };
        // The mean is rounded to f32 before it is scaled, as hivemind subtracts it.
        let mean = if unit == 1.0 { mean } else { mean * unit };
        Self { unit: unit as f32, mean: mean as f32, scale: (scale * unit) as f32 }
    }
}

struct Quantize<'a, 'b> {
    source: Source<'a>,
    grid: Grid,
    out: &'a mut Out<'b>,
}

impl Kernel for Quantize<'_, '_> {
    type Output = usize;
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        // Adding 1.5 * 2^23 rounds a small number to the nearest integer, ties to even, in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        let Grid { unit, mean, scale } = self.grid;
        // hivemind multiplies, too: so does its `quantize_per_tensor`.
        let per_step = 1.0 / scale;
        let mut saturated = 0_usize;
        codebook::encode(
            isa,
            self.source,
            self.out,
            #[inline(always)]
            |chunk, indices| {
                let mut outside = 0_u32;
                for (index, value) in indices.iter_mut().zip(chunk) {
                    let steps = (value * unit - mean) * per_step;
                    let low = if steps < -128.0 { -128.0 } else { steps };
                    let clamped = if low > 127.0 { 127.0 } else { low };
                    outside += u32::from((steps - clamped).abs() > 0.5);
                    *index = ((clamped + ROUND).to_bits() as u8).wrapping_add(128);
                }
                saturated += outside as usize;
            },
        );
        saturated
    }
}
