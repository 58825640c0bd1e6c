//! Finding values that are not finite, at memory speed.

use crate::simd::{self, Isa, Kernel};

struct AnyNonFinite<'a>(&'a [f32]);

impl Kernel for AnyNonFinite<'_> {
    type Output = Option<usize>;
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> Option<usize> {
        const CHUNK: usize = 256;
        for (number, chunk) in self.0.chunks(CHUNK).enumerate() {
            // The largest magnitude, as an integer: order of magnitudes is order of bits, NaN on top.
            let largest = chunk.iter().fold(0_u32, |max, v| max.max(v.to_bits() & 0x7fff_ffff));
            if largest >= 0x7f80_0000 {
                return chunk.iter().position(|v| !v.is_finite()).map(|at| number * CHUNK + at);
            }
        }
        None
    }
}

/// Position of the first NaN or infinity.
///
/// ```
/// assert_eq!(potluck_compression::first_non_finite(&[1.0, f32::NAN, f32::INFINITY]), Some(1));
/// assert_eq!(potluck_compression::first_non_finite(&[1.0, -0.0]), None);
/// ```
#[must_use]
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    simd::dispatch(AnyNonFinite(values))
}
