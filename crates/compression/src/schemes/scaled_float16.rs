//! hivemind's `MEANSTD_16BIT`: per row (the last axis), subtract the mean, divide by the standard deviation (at least
//! 2^-23), and send halves; means and deviations follow as f32. A vector is one row.
//!
//! Error: at most 2^-11 of the distance to the row's mean, plus 2^-25 of a standard deviation, plus f32 rounding of
//! the sum. Values more than 65504 deviations out are clamped and counted (possible only in rows of more than 4e9
//! values, or if the deviation is below 2^-23). NaN and infinity are refused with the index of the first, as are rows
//! whose distances from the mean overflow an f32.

use crate::codec::{Codec, Reader, Scratch, Sink, Target, append_chunks, f32_at};
use crate::error::check_length;
use crate::finite::first_non_finite;
use crate::out::Out;
use crate::schemes::float16::{HALF_MAX, clamp_half, read_halves};
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::tally::sum_lanes;
use crate::{DecodeError, EncodeError, EncodeReport, Scheme};

/// Deviations below this are raised to it, as hivemind does.
const DEVIATION_MIN: f32 = f32::EPSILON;

pub(crate) struct ScaledFloat16;

impl Codec for ScaledFloat16 {
    fn encoded_len(&self, count: usize) -> usize {
        encoded_len_rows(count, 1)
    }

    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        source.whole(scratch, |values, _| encode_rows(values, values.len(), 1, out))
    }

    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        decode_rows(bytes, target, 1)
    }
}

/// Bytes for `count` values in `rows` rows.
pub(crate) fn encoded_len_rows(count: usize, rows: usize) -> usize {
    count.saturating_mul(2).saturating_add(rows.saturating_mul(8))
}

/// Encode `rows` rows of `width` values each.
pub(crate) fn encode_rows(
    values: &[f32],
    width: usize,
    rows: usize,
    out: &mut Out<'_>,
) -> Result<EncodeReport, EncodeError> {
    if let Some(index) = first_non_finite(values) {
        return Err(EncodeError::NotFinite { scheme: Scheme::ScaledFloat16, index });
    }
    // The scales are needed first and stored last.
    let mut report = EncodeReport::default();
    let mut means = Vec::new();
    let mut deviations = Vec::new();
    // One row, the common case, keeps its scales on the stack.
    let mut single = (0.0, DEVIATION_MIN);
    for row in 0..rows {
        let row_values = &values[row * width..(row + 1) * width];
        let (mean, deviation) = simd::dispatch(Moments { row: row_values });
        // No value can be near the end of the range unless the mean or the deviation is.
        let spread = f64::from(deviation) * (width as f64).sqrt() + f64::from(mean.abs());
        if spread > 1e38
            && let Some(index) = row_values.iter().position(|v| is_too_wide(*v, mean))
        {
            return Err(EncodeError::TooWide { index: row * width + index });
        }
        report.saturated += simd::dispatch(Narrow { row: row_values, mean, deviation, out });
        if rows == 1 {
            single = (mean, deviation);
        } else {
            means.push(mean);
            deviations.push(deviation);
        }
    }
    if rows == 1 {
        out.extend_from_slice(&single.0.to_le_bytes());
        out.extend_from_slice(&single.1.to_le_bytes());
    }
    for scale in means.iter().chain(&deviations) {
        out.extend_from_slice(&scale.to_le_bytes());
    }
    Ok(report)
}

/// Whether the decoder's sum, with the rounding of a half, might leave the f32 range.
fn is_too_wide(value: f32, mean: f32) -> bool {
    let distance = (value - mean).abs();
    !(distance * 1.001).is_finite() || !(value.abs() + distance * 0.001).is_finite()
}

struct Moments<'a> {
    row: &'a [f32],
}

impl Kernel for Moments<'_> {
    type Output = (f32, f32);
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> (f32, f32) {
        if self.row.is_empty() {
            return (0.0, DEVIATION_MIN);
        }
        let count = self.row.len() as f64;
        let mean = (sum_lanes(self.row, |v| v) / count) as f32;
        // hivemind centres and squares in f32, and rounds norm, root of the count and quotient ...
        let squares = sum_lanes(
            self.row,
            #[inline(always)]
            |v| {
                let centred = v as f32 - mean;
                f64::from(centred * centred)
            },
        );
        let deviation = if (1e-30..1e30).contains(&squares) {
            f64::from(squares as f32).sqrt() as f32 / count.sqrt() as f32
        } else {
            // ... which overflows for large values and vanishes for tiny ones.
            let squares = sum_lanes(
                self.row,
                #[inline(always)]
                |v| (v - f64::from(mean)).powi(2),
            );
            (squares / count).sqrt() as f32
        };
        (mean, deviation.max(DEVIATION_MIN))
    }
}

struct Narrow<'a, 'b> {
    row: &'a [f32],
    mean: f32,
    deviation: f32,
    out: &'a mut Out<'b>,
}

impl Kernel for Narrow<'_, '_> {
    type Output = usize;
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        let Self { row, mean, deviation, out } = self;
        let mut saturated = 0_usize;
        append_chunks(
            Source::plain(row),
            2,
            out,
            #[inline(always)]
            |chunk, piece| {
                let (groups, rest) = chunk.as_chunks::<8>();
                let (slots, last) = piece.split_at_mut(groups.len() * 16);
                let mut outside = 0_u32;
                for (slot, group) in slots.as_chunks_mut::<16>().0.iter_mut().zip(groups) {
                    let scaled = group.map(|v| (v - mean) / deviation);
                    outside += scaled.iter().map(|v| u32::from(v.abs() > HALF_MAX)).sum::<u32>();
                    let halves = isa.narrow_halves(&scaled.map(clamp_half));
                    for (pair, half) in slot.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
                        *pair = half.to_le_bytes();
                    }
                }
                for (pair, value) in last.as_chunks_mut::<2>().0.iter_mut().zip(rest) {
                    let scaled = (value - mean) / deviation;
                    outside += u32::from(scaled.abs() > HALF_MAX);
                    *pair = crate::half_float::to_half(clamp_half(scaled)).to_le_bytes();
                }
                saturated += outside as usize;
            },
        );
        saturated
    }
}

/// Decode `rows` rows of equal width.
pub(crate) fn decode_rows(bytes: &[u8], target: Target<'_>, rows: usize) -> Result<(), DecodeError> {
    let count = target.len();
    check_length(encoded_len_rows(count, rows), bytes.len())?;
    let (halves, scales) = bytes.split_at(2 * count);
    let (means, deviations) = scales.split_at(4 * rows);
    if count > 0 {
        for (field, scales) in [("mean", means), ("std", deviations)] {
            if let Some(index) = (0..rows).find(|row| !f32_at(scales, 4 * row).is_finite()) {
                return Err(DecodeError::NotFinite { field, index });
            }
        }
        target.fill(Rows { halves, means, deviations, width: count / rows });
    }
    Ok(())
}

struct Rows<'a> {
    halves: &'a [u8],
    means: &'a [u8],
    deviations: &'a [u8],
    width: usize,
}

impl Reader for Rows<'_> {
    #[inline(always)]
    fn read<I: Isa, S: Sink>(&self, isa: I, at: usize, mut slots: &mut [f32], sink: S) {
        let mut halves = &self.halves[2 * at..];
        let (mut row, mut column) = (at / self.width, at % self.width);
        while !slots.is_empty() {
            let (here, after) = slots.split_at_mut(slots.len().min(self.width - column));
            let mean = f32_at(self.means, 4 * row);
            let deviation = f32_at(self.deviations, 4 * row);
            let (halves_here, halves_after) = halves.split_at(2 * here.len());
            read_halves(
                isa,
                halves_here,
                here,
                #[inline(always)]
                |slot, value| {
                    sink.put(slot, value * deviation + mean);
                },
            );
            (slots, halves) = (after, halves_after);
            (row, column) = (row + 1, 0);
        }
    }
}
