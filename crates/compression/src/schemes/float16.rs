//! IEEE half precision (IEEE 754-2008 binary16), hivemind's `FLOAT16`: clamp to +-65504, round to nearest even.
//!
//! Error: at most 2^-11 of the value for magnitudes in [2^-14, 65504], at most 2^-25 absolute below.
//! Larger magnitudes and infinities become +-65504 and are counted as saturated; NaN travels as NaN and is counted.

use crate::codec::{Codec, Reader, Scratch, Sink, Target, append_chunks};
use crate::error::check_length;
use crate::out::Out;
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport};

/// The largest finite half.
pub(crate) const HALF_MAX: f32 = 65504.0;

pub(crate) struct Float16;

impl Codec for Float16 {
    fn encoded_len(&self, count: usize) -> usize {
        count.saturating_mul(2)
    }

    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        _: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        Ok(simd::dispatch(Narrow { source, out }))
    }

    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        check_length(self.encoded_len(target.len()), bytes.len())?;
        target.fill(Halves(bytes));
        Ok(())
    }
}

/// Clamp to the range of a half; NaN passes.
#[inline(always)]
pub(crate) fn clamp_half(value: f32) -> f32 {
    let low = if value < -HALF_MAX { -HALF_MAX } else { value };
    if low > HALF_MAX { HALF_MAX } else { low }
}

struct Narrow<'a, 'b> {
    source: Source<'a>,
    out: &'a mut Out<'b>,
}

impl Kernel for Narrow<'_, '_> {
    type Output = EncodeReport;
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> EncodeReport {
        let mut report = EncodeReport::default();
        report.clamped = append_chunks(
            self.source,
            2,
            self.out,
            #[inline(always)]
            |chunk, piece| {
                let (groups, rest) = chunk.as_chunks::<8>();
                let (slots, last) = piece.split_at_mut(groups.len() * 16);
                // Eight counters each, as the vector has: a chunk is far too short to overflow them.
                let (mut saturated, mut nan) = ([0_u32; 8], [0_u32; 8]);
                for (slot, group) in slots.as_chunks_mut::<16>().0.iter_mut().zip(groups) {
                    for lane in 0..8 {
                        saturated[lane] += u32::from(group[lane].abs() > HALF_MAX);
                        nan[lane] += u32::from(group[lane].is_nan());
                    }
                    let halves = isa.narrow_halves(&group.map(clamp_half));
                    for (pair, half) in slot.chunks_exact_mut(2).zip(halves) {
                        pair.copy_from_slice(&half.to_le_bytes());
                    }
                }
                for (pair, value) in last.chunks_exact_mut(2).zip(rest) {
                    saturated[0] += u32::from(value.abs() > HALF_MAX);
                    nan[0] += u32::from(value.is_nan());
                    pair.copy_from_slice(&crate::half_float::to_half(clamp_half(*value)).to_le_bytes());
                }
                report.saturated += saturated.iter().sum::<u32>() as usize;
                report.nan += nan.iter().sum::<u32>() as usize;
            },
        );
        report
    }
}

/// Decode little-endian halves, mapping each value before it is stored.
#[inline(always)]
pub(crate) fn read_halves<I: Isa>(isa: I, bytes: &[u8], slots: &mut [f32], put: impl Fn(&mut f32, f32)) {
    let (groups, rest) = slots.as_chunks_mut::<8>();
    let (words, last) = bytes.split_at(groups.len() * 16);
    for (group, word) in groups.iter_mut().zip(words.as_chunks::<16>().0) {
        let mut halves = [0_u16; 8];
        for (half, pair) in halves.iter_mut().zip(word.as_chunks::<2>().0) {
            *half = u16::from_le_bytes(*pair);
        }
        let values = isa.widen_halves(&halves);
        for (slot, value) in group.iter_mut().zip(values) {
            put(slot, value);
        }
    }
    for (slot, pair) in rest.iter_mut().zip(last.as_chunks::<2>().0) {
        put(slot, crate::half_float::from_half(u16::from_le_bytes(*pair)));
    }
}

struct Halves<'a>(&'a [u8]);

impl Reader for Halves<'_> {
    #[inline(always)]
    fn read<I: Isa, S: Sink>(&self, isa: I, at: usize, slots: &mut [f32], sink: S) {
        read_halves(
            isa,
            &self.0[2 * at..],
            slots,
            #[inline(always)]
            |slot, value| sink.put(slot, value),
        );
    }
}
