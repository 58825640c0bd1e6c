//! 16-bit float conversions without branches, so that compilers vectorise them. They agree with the F16C and NEON
//! instructions on every input (tests compare all halves, and floats around every half).

/// f32 to IEEE half: round to nearest, ties to even; NaN becomes quiet with its payload truncated.
#[inline(always)]
pub(crate) fn to_half(value: f32) -> u16 {
    const DENORMAL_MAGIC: f32 = 0.5;
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    // Adding 0.5 shifts the mantissa of a value below 2^-14 so that the float adder rounds it to the half's grid.
    let denormal =
        (f32::from_bits(magnitude) + DENORMAL_MAGIC).to_bits().wrapping_sub(DENORMAL_MAGIC.to_bits()) as u16;
    let odd = (magnitude >> 13) & 1;
    let normal = (magnitude.wrapping_add(0xc800_0fff).wrapping_add(odd) >> 13) as u16;
    let nan = 0x7e00 | (magnitude >> 13) as u16 & 0x3ff;
    let finite = if magnitude < 0x3880_0000 { denormal } else { normal };
    let large = if magnitude > 0x7f80_0000 { nan } else { 0x7c00 };
    sign | if magnitude >= 0x4780_0000 { large } else { finite }
}

/// IEEE half to f32, exact; a signalling NaN becomes quiet.
#[inline(always)]
pub(crate) fn from_half(half: u16) -> f32 {
    let magnitude = u32::from(half & 0x7fff) << 13;
    // The multiplication by 2^112 moves the exponent bias, and normalises denormals on the way.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    let quiet = if magnitude > 0x0f80_0000 { 0x0040_0000 } else { 0 };
    f32::from_bits(scaled | special | quiet | u32::from(half & 0x8000) << 16)
}

/// f32 to bfloat16: round to nearest, ties to even; NaN becomes quiet with its payload truncated.
#[inline(always)]
pub(crate) fn to_bfloat16(value: f32) -> u16 {
    let bits = value.to_bits();
    let odd = (bits >> 16) & 1;
    let rounded = (bits.wrapping_add(0x7fff).wrapping_add(odd) >> 16) as u16;
    let nan = (bits >> 16) as u16 | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }
}

/// bfloat16 to f32, exact.
#[inline(always)]
pub(crate) fn from_bfloat16(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{self, Isa, Kernel, Level};

    struct Both<'a>(&'a [f32; 8], &'a [u16; 8]);
    impl Kernel for Both<'_> {
        type Output = ([u16; 8], [f32; 8]);
        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Self::Output {
            (isa.narrow_halves(self.0), isa.widen_halves(self.1))
        }
    }

    fn check(value: f32, half: u16) {
        let (halves, floats) = simd::dispatch(Both(&[value; 8], &[half; 8]));
        let portable = simd::with_level(Level::Portable, || simd::dispatch(Both(&[value; 8], &[half; 8])));
        assert_eq!(halves, portable.0, "{value:e}");
        assert_eq!(floats.map(f32::to_bits), portable.1.map(f32::to_bits), "{half:04x}");
        assert_eq!(halves[0], half::f16::from_f32(value).to_bits(), "{value:e}");
        if !half::f16::from_bits(half).is_nan() {
            assert_eq!(floats[0].to_bits(), half::f16::from_bits(half).to_f32().to_bits(), "{half:04x}");
        }
    }

    #[test]
    fn every_half_and_the_floats_around_each() {
        for half in 0..=u16::MAX {
            let value = from_half(half);
            for offset in [0_u32, 1, 0x0fff, 0x1000, 0x1001, 0x1fff, u32::MAX, 0xffff_f000, 0xffff_efff] {
                check(f32::from_bits(value.to_bits().wrapping_add(offset)), half);
            }
        }
    }

    #[test]
    fn a_stride_over_all_floats() {
        for step in 0..=(u32::MAX / 9973) {
            let value = f32::from_bits(step * 9973);
            check(value, (step & 0xffff) as u16);
            assert_eq!(to_bfloat16(value), half::bf16::from_f32(value).to_bits(), "{value:e}");
        }
    }
}
