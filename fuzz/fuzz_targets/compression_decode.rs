//! Every buffer decoder: any bytes for any count either decode or are refused, without touching the output.
#![no_main]

use libfuzzer_sys::fuzz_target;
use potluck_compression::{Scheme, first_non_finite};

fuzz_target!(|input: (u8, u16, &[u8])| {
    let (scheme, count, bytes) = input;
    let Some(scheme) = Scheme::ALL.get(usize::from(scheme) % Scheme::ALL.len()) else { return };
    // Mostly the length that fits, so that the checks behind the first are reached.
    let count = usize::from(count % 8192);
    let mut fitted = bytes.to_vec();
    if bytes.len() % 4 != 0 {
        fitted.resize(scheme.encoded_len(count), 0);
    }
    let mut values = vec![1.5_f32; count];
    if scheme.decode(&fitted, &mut values).is_err() {
        assert!(values.iter().all(|value| *value == 1.5));
        assert!(scheme.decode_add(&fitted, 2.0, &mut values).is_err());
        assert!(scheme.decode_sum(&fitted, 2.0, &vec![0.0; count], &mut values).is_err());
        assert!(values.iter().all(|value| *value == 1.5));
    } else {
        let mut sum = vec![1.0_f32; count];
        scheme.decode_add(&fitted, 2.0, &mut sum).expect("what decodes can be added");
        for (sum, value) in sum.iter().zip(&values) {
            let expected = 1.0 + 2.0 * value;
            assert!(sum.to_bits() == expected.to_bits() || sum.is_nan() && expected.is_nan());
        }
        let mut out = vec![0.0_f32; count];
        let found =
            scheme.decode_sum(&fitted, 2.0, &vec![1.0; count], &mut out).expect("what decodes can be added");
        assert_eq!(found.first_non_finite, first_non_finite(&values));
        assert!(out.iter().zip(&sum).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()));
    }
});
