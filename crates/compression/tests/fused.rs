//! What a reducer does in one pass gives the bits of the same steps one after the other, for every scheme and on every
//! instruction set.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_compression::simd::{Level, with_level};
use potluck_compression::{EncodeError, Scheme, Scratch, Tally, first_non_finite, sum_values, tally};
use proptest::prelude::*;

const LEVELS: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

/// Bits, with all NaN alike: which NaN an addition returns is not defined.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
}

fn encode(scheme: Scheme, values: &[f32]) -> Result<Vec<u8>, EncodeError> {
    let mut out = Vec::new();
    scheme.encode(values, &mut out, &mut Scratch::new()).map(|_| out)
}

/// The definition of a tally, but for the order of the sum.
fn check_tally(found: Tally, values: &[f32]) {
    assert_eq!(found.first_non_finite, first_non_finite(values));
    let expected: f64 =
        values.iter().filter(|value| value.is_finite()).map(|value| f64::from(*value).powi(2)).sum();
    assert!((found.square_sum - expected).abs() <= 1e-12 * expected, "{} {expected}", found.square_sum);
}

fn check_sum(scheme: Scheme, bytes: &[u8], weight: f32, sum: &[f32]) {
    let mut decoded = vec![0.0; sum.len()];
    scheme.decode(bytes, &mut decoded).unwrap();
    let expected: Vec<f32> = sum.iter().zip(&decoded).map(|(old, x)| old + weight * x).collect();
    let whole = tally(&decoded);
    check_tally(whole, &decoded);
    for level in LEVELS {
        with_level(level, || {
            let mut out = vec![f32::NAN; sum.len()];
            assert_eq!(scheme.decode_sum(bytes, weight, sum, &mut out), Ok(whole), "{scheme:?} {level:?}");
            assert_eq!(bits(&out), bits(&expected), "{scheme:?} {level:?}");
            let mut acc = sum.to_vec();
            assert_eq!(scheme.decode_add_tally(bytes, weight, &mut acc), Ok(whole));
            assert_eq!(bits(&acc), bits(&expected), "{scheme:?} {level:?}");
            assert_eq!(sum_values(&decoded, weight, sum, &mut out), whole);
            assert_eq!(bits(&out), bits(&expected));
            assert_eq!(tally(&decoded), whole, "{level:?}");
        });
    }
}

fn check_scaled(scheme: Scheme, values: &[f32], factor: f32) {
    let scaled: Vec<f32> = values.iter().map(|value| (value * factor).clamp(f32::MIN, f32::MAX)).collect();
    let overflowed = values.iter().filter(|value| (**value * factor).is_infinite()).count();
    let mut bytes = Vec::new();
    let expected = scheme.encode(&scaled, &mut bytes, &mut Scratch::new());
    for level in LEVELS {
        with_level(level, || {
            // What is in the scratch already must not matter.
            let mut scratch = Scratch::new();
            scheme.encode_scaled(&[1.0; 7], 2.0, &mut Vec::new(), &mut scratch).unwrap();
            let mut out = vec![0xcd; 5];
            let found = scheme.encode_scaled(values, factor, &mut out, &mut scratch);
            assert_eq!(out[..5], [0xcd; 5]);
            match expected {
                Ok(report) => {
                    let found = found.unwrap();
                    assert_eq!((found.saturated, found.nan), (report.saturated, report.nan), "{scheme:?}");
                    assert_eq!(found.clamped, overflowed, "{scheme:?}");
                    assert_eq!(out[5..], bytes, "{scheme:?} {level:?}");
                }
                Err(error) => assert_eq!((found, out.len()), (Err(error), 5), "{scheme:?}"),
            }
        });
    }
}

fn any_float() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -4.0_f32..4.0,
        2 => Just(0.0_f32),
        1 => any::<u32>().prop_map(f32::from_bits),
        1 => (0_u32..0x80_0000).prop_map(f32::from_bits),
        1 => Just(f32::MAX),
    ]
}

proptest! {
    #[test]
    fn one_pass_gives_the_bits_of_two(
        values in prop::collection::vec(any_float(), 0..200),
        weight in -3.0_f32..3.0,
        factor in prop_oneof![Just(1.0_f32), Just(0.0), Just(1e30), Just(1e-30), -3.0_f32..3.0],
    ) {
        let sum: Vec<f32> = values.iter().rev().map(|value| value * 0.3 + 1.0).collect();
        for scheme in Scheme::ALL {
            check_scaled(*scheme, &values, factor);
            if let Ok(bytes) = encode(*scheme, &values) {
                check_sum(*scheme, &bytes, weight, &sum);
            }
        }
    }
}

#[test]
fn long_vectors_are_cut_into_pieces_unnoticed() {
    for count in [0, 1, 15, 17, 4095, 4096, 4097, 8192, 12_289, 40_000] {
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7531).sin().powi(3)).collect();
        let sum: Vec<f32> = (0..count).map(|i| (i as f32 * 0.31).cos()).collect();
        for scheme in Scheme::ALL {
            check_sum(*scheme, &encode(*scheme, &values).unwrap(), 0.37, &sum);
            check_scaled(*scheme, &values, 1.0 / 3.0);
        }
    }
}

#[test]
fn the_first_value_that_is_not_finite_is_found_in_any_piece() {
    for at in [0, 1, 4095, 4096, 8191, 9998] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![2.0_f32; 9999];
            (values[at], values[9998]) = (bad, bad);
            let finite = values.iter().filter(|value| value.is_finite()).count();
            let expected = Tally { square_sum: 4.0 * finite as f64, first_non_finite: Some(at) };
            assert_eq!(tally(&values), expected);
            for scheme in [Scheme::None, Scheme::BFloat16] {
                let bytes = encode(scheme, &values).unwrap();
                let mut out = vec![0.0; 9999];
                assert_eq!(scheme.decode_sum(&bytes, 1.0, &[1.0; 9999], &mut out), Ok(expected));
            }
            // Infinity is clamped by the scaling; NaN is refused by the schemes that cannot express it.
            for scheme in
                [Scheme::ScaledFloat16, Scheme::Uniform8Bit, Scheme::Quantile8Bit, Scheme::Blockwise8Bit]
            {
                let found = scheme.encode_scaled(&values, 0.5, &mut Vec::new(), &mut Scratch::new());
                match found {
                    Err(EncodeError::NotFinite { index, .. }) => assert!(bad.is_nan() && index == at),
                    Err(EncodeError::TooWide { .. }) => assert_eq!(scheme, Scheme::ScaledFloat16),
                    other => assert_eq!(other.unwrap().clamped, 9999 - finite),
                }
            }
        }
    }
}

#[test]
fn malformed_buffers_leave_the_sum_alone() {
    for scheme in Scheme::ALL {
        let (mut acc, mut out) = ([1.5_f32; 9], [2.5_f32; 9]);
        let short = vec![0; scheme.encoded_len(9) - 1];
        assert!(scheme.decode_add_tally(&short, 1.0, &mut acc).is_err());
        assert!(scheme.decode_sum(&short, 1.0, &acc, &mut out).is_err());
        assert_eq!((acc, out), ([1.5; 9], [2.5; 9]));
    }
}
