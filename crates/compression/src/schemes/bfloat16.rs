//! The upper 16 bits of an f32, rounded to nearest even. potluck's own: hivemind has no native bfloat16 on the wire.
//!
//! Error: at most 2^-8 of the value for normal values, at most 2^-134 absolute for denormals. NaN (made quiet) and
//! infinity pass and NaN is counted; a finite value that would round up to infinity becomes the largest finite one and
//! is counted as saturated.

use crate::codec::{Codec, Reader, Scratch, Sink, Target, append_chunks};
use crate::error::check_length;
use crate::half_float::{from_bfloat16, to_bfloat16};
use crate::out::Out;
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport};

pub(crate) struct BFloat16;

impl Codec for BFloat16 {
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

struct Narrow<'a, 'b> {
    source: Source<'a>,
    out: &'a mut Out<'b>,
}

impl Kernel for Narrow<'_, '_> {
    type Output = EncodeReport;
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> EncodeReport {
        let mut report = EncodeReport::default();
        report.clamped = append_chunks(
            self.source,
            2,
            self.out,
            #[inline(always)]
            |chunk, piece| {
                let (mut saturated, mut nan) = (0_u32, 0_u32);
                for (pair, value) in piece.as_chunks_mut::<2>().0.iter_mut().zip(chunk) {
                    let magnitude = value.to_bits() & 0x7fff_ffff;
                    // From here on rounding reaches the infinity's bits.
                    let overflow = (0x7f7f_8000..0x7f80_0000).contains(&magnitude);
                    saturated += u32::from(overflow);
                    nan += u32::from(magnitude > 0x7f80_0000);
                    let rounded = to_bfloat16(*value);
                    *pair = (if overflow { rounded.wrapping_sub(1) } else { rounded }).to_le_bytes();
                }
                report.saturated += saturated as usize;
                report.nan += nan as usize;
            },
        );
        report
    }
}

struct Halves<'a>(&'a [u8]);

impl Reader for Halves<'_> {
    #[inline(always)]
    fn read<I: Isa, S: Sink>(&self, _: I, at: usize, slots: &mut [f32], sink: S) {
        for (slot, pair) in slots.iter_mut().zip(self.0[2 * at..].as_chunks::<2>().0) {
            sink.put(slot, from_bfloat16(u16::from_le_bytes(*pair)));
        }
    }
}
