//! More values than an f32 can count: what is added up over all of them must not stop at 2^24.

use potluck_compression::{Scheme, Scratch, tally};

/// Without optimisation a smaller vector, for its structure.
const COUNT: usize = if cfg!(debug_assertions) { (1 << 20) + 5 } else { (1 << 24) + 5 };

/// Nine of ten values are 1, the others spread evenly below.
fn values() -> Vec<f32> {
    (0..COUNT).map(|i| if i % 10 == 0 { (i % 1000) as f32 / 1000.0 } else { 1.0 }).collect()
}

/// The largest error that a value of such a vector may have.
fn bound(scheme: Scheme) -> f32 {
    match scheme {
        Scheme::None => 0.0,
        Scheme::Float16 => 2.0_f32.powi(-11),
        Scheme::ScaledFloat16 => 2.0_f32.powi(-10),
        Scheme::BFloat16 => 2.0_f32.powi(-8),
        // Values from 0 to 0.41 are beyond three deviations and share a bucket.
        Scheme::Uniform8Bit => 0.41,
        // A tenth of the values has a tenth of the buckets.
        Scheme::Quantile8Bit => 0.05,
        Scheme::Blockwise8Bit => 0.0106,
        Scheme::Blockwise4Bit => 0.153,
        other => panic!("no bound for {other:?}: document one"),
    }
}

#[test]
fn more_values_than_a_float_can_count() {
    let values = values();
    let (mut bytes, mut scratch) = (Vec::new(), Scratch::new());
    let mut decoded = vec![0.0_f32; COUNT];
    for scheme in Scheme::ALL {
        bytes.clear();
        scheme.encode(&values, &mut bytes, &mut scratch).unwrap();
        assert_eq!(bytes.len(), scheme.encoded_len(COUNT));
        scheme.decode(&bytes, &mut decoded).unwrap();
        let errors = decoded.iter().zip(&values).map(|(found, value)| (found - value).abs());
        let worst = errors.fold(0.0, f32::max);
        assert!(worst <= bound(*scheme), "{scheme:?}: {worst}");
        // The value that nearly all share survives: a mean over so many is still their mean.
        assert!((decoded[COUNT - 4] - 1.0).abs() <= bound(*scheme).min(0.003), "{scheme:?}");
        let [mean, expected] = [&decoded, &values]
            .map(|all| all.iter().map(|value| f64::from(*value)).sum::<f64>() / COUNT as f64);
        assert!((mean - expected).abs() < 0.005, "{scheme:?}: {mean} for {expected}");
    }
    let squares = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    assert!((tally(&values).square_sum / squares - 1.0).abs() < 1e-9);
}
