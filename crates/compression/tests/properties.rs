//! Every scheme on awkward values, types and shapes: documented error bounds, same bytes on every instruction set, and
//! decoders that survive any input.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_compression::simd::{Level, with_level};
use potluck_compression::{
    DType, DecodeError, EncodeError, Limits, Scheme, Scratch, SerializedTensor, deserialize,
    first_non_finite, serialize,
};
use proptest::prelude::*;

fn encode(scheme: Scheme, values: &[f32]) -> Result<Vec<u8>, EncodeError> {
    let mut out = vec![0xab; 3];
    let result = scheme.encode(values, &mut out, &mut Scratch::new());
    assert_eq!(out[..3], [0xab; 3], "what was there stays");
    let body = out.split_off(3);
    match result {
        Ok(_) => assert_eq!(body.len(), scheme.encoded_len(values.len())),
        Err(_) => assert!(body.is_empty(), "an error leaves nothing behind"),
    }
    result.map(|_| body)
}

fn decode(scheme: Scheme, bytes: &[u8], count: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; count];
    scheme.decode(bytes, &mut values).unwrap();
    values
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The error that each scheme's file documents, for value `index` of `values`.
fn bound(scheme: Scheme, values: &[f32], index: usize) -> f64 {
    let value = f64::from(values[index]);
    let block = |size: usize| {
        let start = index / size * size;
        values[start..values.len().min(start + size)]
            .iter()
            .fold(0.0_f64, |max, v| max.max(f64::from(v.abs())))
    };
    let count = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let squares = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
    let ulp = |v: f64| v.abs() * 2.0_f64.powi(-22) + 1e-44;
    match scheme {
        Scheme::None => 0.0,
        Scheme::Float16 if value.abs() > 65504.0 => value.abs() - 65504.0,
        Scheme::Float16 => (value.abs() * 2.0_f64.powi(-11)).max(2.0_f64.powi(-25)),
        Scheme::BFloat16 => value.abs() * 2.0_f64.powi(-8) + 2.0_f64.powi(-134),
        Scheme::ScaledFloat16 => {
            let deviation = (squares / count).sqrt().max(f64::from(f32::EPSILON));
            let distance = (value - mean).abs();
            let clamped = (distance - 65504.0 * deviation).max(0.0);
            distance * 2.0_f64.powi(-11) * 1.001
                + deviation * 2.0_f64.powi(-24)
                + clamped
                + 4.0 * ulp(value)
                + 4.0 * ulp(mean)
        }
        Scheme::Uniform8Bit => {
            let deviation = if count > 1.0 { (squares / (count - 1.0)).sqrt() } else { 0.0 };
            let width = 6.0 * deviation / 256.0;
            let beyond =
                values.iter().fold(0.0_f64, |max, v| max.max((f64::from(*v) - mean).abs())) - 2.9 * deviation;
            let tail = if (value - mean).abs() >= 2.9 * deviation { beyond.max(0.0) } else { 0.0 };
            width * 1.001 + tail + 8.0 * ulp(value) + 8.0 * ulp(mean)
        }
        // The distance to the neighbours on both sides that are at least three buckets away.
        Scheme::Quantile8Bit => {
            let mut sorted = values.to_vec();
            sorted.sort_by(f32::total_cmp);
            let at = sorted.partition_point(|v| f64::from(*v) < value);
            let after = sorted.partition_point(|v| f64::from(*v) <= value);
            let reach = values.len() / 256 * 2 + 4;
            let low = f64::from(sorted[at.saturating_sub(reach)]);
            let high = f64::from(sorted[(after + reach).min(sorted.len() - 1)]);
            high - low + ulp(value)
        }
        Scheme::Blockwise8Bit => block(4096) * 0.0106 + 1e-44,
        Scheme::Blockwise4Bit => block(64) * 0.152 * (1.0 + 2.0_f64.powi(-7)) * 1.001 + 2.0_f64.powi(-133),
        other => panic!("no bound for {other:?}: document one"),
    }
}

fn check(scheme: Scheme, values: &[f32]) -> Result<(), TestCaseError> {
    let portable = with_level(Level::Portable, || encode(scheme, values));
    let found = encode(scheme, values);
    prop_assert_eq!(&found, &portable, "{:?}: the levels differ", scheme);
    prop_assert_eq!(&found, &with_level(Level::Avx2, || encode(scheme, values)));
    let bytes = match found {
        Ok(bytes) => bytes,
        Err(EncodeError::NotFinite { index, .. }) => {
            prop_assert_eq!(first_non_finite(values), Some(index), "{:?}", scheme);
            return Ok(());
        }
        Err(EncodeError::TooWide { index }) => {
            prop_assert!(scheme == Scheme::ScaledFloat16 && values[index].abs() > f32::MAX / 4.0);
            return Ok(());
        }
        Err(other) => return Err(TestCaseError::fail(other.to_string())),
    };
    let decoded = decode(scheme, &bytes, values.len());
    let portable = with_level(Level::Portable, || decode(scheme, &bytes, values.len()));
    prop_assert_eq!(bits(&decoded), bits(&portable));
    let mut acc: Vec<f32> = (0..values.len()).map(|i| i as f32 * 0.37 - 5.0).collect();
    let expected: Vec<f32> = acc.iter().zip(&decoded).map(|(a, x)| a + 0.3 * x).collect();
    scheme.decode_add(&bytes, 0.3, &mut acc).unwrap();
    prop_assert!(
        acc.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
    );
    if first_non_finite(values).is_none() {
        // Of long vectors a sample: the bound itself looks at the whole vector.
        let step = 1 + values.len() / 400;
        for (index, (found, value)) in decoded.iter().zip(values).enumerate().step_by(step) {
            let (error, bound) =
                ((f64::from(*found) - f64::from(*value)).abs(), bound(scheme, values, index));
            prop_assert!(error <= bound, "{scheme:?}[{index}]: {value:e} became {found:e}, bound {bound:e}");
        }
    }
    Ok(())
}

fn any_float() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -4.0_f32..4.0,
        2 => Just(0.0_f32),
        1 => Just(-0.0_f32),
        1 => any::<u32>().prop_map(f32::from_bits),
        1 => (0_u32..0x80_0000).prop_map(f32::from_bits),
        1 => Just(f32::MIN_POSITIVE),
    ]
}

fn finite_vector() -> impl Strategy<Value = Vec<f32>> {
    let scale = prop_oneof![Just(1.0_f32), Just(1e-42), Just(1e-30), Just(1e30), Just(3e37), Just(1e-3)];
    let offset = prop_oneof![4 => Just(0.0_f32), 1 => Just(1e4_f32)];
    (prop::collection::vec(-4.0_f32..4.0, 0..400), scale, offset)
        .prop_map(|(values, scale, offset)| values.iter().map(|v| v * scale + offset).collect())
}

proptest! {
    #[test]
    fn bounds_hold_for_finite_values(values in finite_vector()) {
        for scheme in Scheme::ALL {
            check(*scheme, &values)?;
        }
    }

    #[test]
    fn any_bits_are_encoded_or_refused(values in prop::collection::vec(any_float(), 0..300)) {
        for scheme in Scheme::ALL {
            check(*scheme, &values)?;
        }
    }

    #[test]
    fn types_and_shapes_round_trip(
        shape in prop::collection::vec(0_usize..5, 0..4),
        type_index in 0_usize..4,
        values in prop::collection::vec(-100.0_f32..100.0, 64),
    ) {
        let dtype = [DType::Float32, DType::Float64, DType::Float16, DType::BFloat16][type_index];
        let count: usize = shape.iter().product();
        let bytes_of = |v: &f32| match dtype {
            DType::Float32 => v.to_le_bytes().to_vec(),
            DType::Float64 => f64::from(*v).to_le_bytes().to_vec(),
            DType::Float16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
            _ => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
        };
        let raw: Vec<u8> = values[..count].iter().flat_map(bytes_of).collect();
        for scheme in Scheme::ALL {
            let tensor = match serialize(dtype, &shape, &raw, *scheme) {
                Ok((tensor, _)) => tensor,
                Err(EncodeError::UnsupportedType { .. }) => {
                    prop_assert!(dtype == DType::BFloat16);
                    continue;
                }
                Err(EncodeError::Scalar { .. }) => {
                    prop_assert!(shape.is_empty());
                    continue;
                }
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            };
            let message = tensor.to_protobuf();
            let read = SerializedTensor::from_protobuf(&message, &Limits::default()).unwrap();
            prop_assert_eq!(&read, &tensor);
            let decoded = deserialize(&read, &Limits::default()).unwrap();
            prop_assert_eq!((&decoded.shape, decoded.dtype, decoded.bytes.len()), (&shape, dtype, raw.len()));
            if *scheme == Scheme::None {
                prop_assert_eq!(decoded.bytes, raw.clone());
            }
        }
    }

    #[test]
    fn decoders_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..1500), count in 0_usize..1500) {
        for scheme in Scheme::ALL {
            let mut values = vec![7.5_f32; count];
            let result = scheme.decode(&bytes, &mut values);
            if bytes.len() != scheme.encoded_len(count) {
                let length = DecodeError::Length { expected: scheme.encoded_len(count), found: bytes.len() };
                prop_assert_eq!(&result, &Err(length));
            }
            if result.is_err() {
                prop_assert!(values.iter().all(|v| *v == 7.5), "{:?} wrote before it refused", scheme);
            }
            // Of the right length, too.
            let mut padded = bytes.clone();
            padded.resize(scheme.encoded_len(count), 0x5a);
            let _ = scheme.decode_add(&padded, 1.0, &mut values);
        }
        let limits = Limits { buffer_bytes_max: 1000, elements_max: 1000, dimensions_max: 4 };
        if let Ok(tensor) = SerializedTensor::from_protobuf(&bytes, &limits) {
            prop_assert!(tensor.buffer.len() <= 1000 && tensor.size.len() <= 4);
            let _ = deserialize(&tensor, &limits);
        }
    }

    #[test]
    fn quantile_keeps_order(values in prop::collection::vec(-1e6_f32..1e6, 2..600)) {
        let decoded = decode(Scheme::Quantile8Bit, &encode(Scheme::Quantile8Bit, &values).unwrap(), values.len());
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
        prop_assert!(order.windows(2).all(|pair| decoded[pair[0]] <= decoded[pair[1]]));
    }
}

#[test]
fn large_odd_and_awkward_vectors() {
    let wave = |count: usize| (0..count).map(|i| (i as f32 * 0.7531).sin().powi(3)).collect::<Vec<f32>>();
    let mut vectors = vec![vec![], vec![1.25], vec![0.0; 70_000], vec![-3.3; 4097], vec![1e-45; 65]];
    vectors.extend([63, 64, 65, 4095, 4096, 4097, 8193, 40_001].map(wave));
    let mut spiked = wave(9000);
    spiked[8999] = f32::MAX;
    vectors.push(spiked);
    vectors.push(vec![f32::MAX, f32::MAX, -f32::MAX, 0.0]);
    for values in &vectors {
        for scheme in Scheme::ALL {
            check(*scheme, values).unwrap();
        }
    }
    for scheme in Scheme::ALL {
        assert!(
            bits(&decode(*scheme, &encode(*scheme, &[0.0; 5000]).unwrap(), 5000)).iter().all(|b| *b == 0)
        );
    }
}

#[test]
fn a_single_bad_value_is_found_anywhere() {
    for at in [0, 1, 63, 64, 255, 256, 4095, 4096, 9998] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0_f32; 9999];
            values[at] = bad;
            for scheme in [
                Scheme::ScaledFloat16,
                Scheme::Uniform8Bit,
                Scheme::Quantile8Bit,
                Scheme::Blockwise8Bit,
                Scheme::Blockwise4Bit,
            ] {
                assert_eq!(encode(scheme, &values), Err(EncodeError::NotFinite { scheme, index: at }));
            }
            for scheme in [Scheme::None, Scheme::BFloat16] {
                let decoded = decode(scheme, &encode(scheme, &values).unwrap(), 9999);
                assert_eq!(first_non_finite(&decoded), Some(at));
            }
        }
    }
}

#[test]
fn strangers_cannot_make_us_allocate() {
    let limits = Limits { buffer_bytes_max: 100, elements_max: 1000, dimensions_max: 2 };
    let tensor = |size: &[u32], buffer: usize, compression| SerializedTensor {
        buffer: vec![0; buffer],
        size: size.to_vec(),
        requires_grad: false,
        dtype: DType::Float32,
        compression,
        chunks: 0,
    };
    let refused = |tensor: &SerializedTensor| deserialize(tensor, &limits).unwrap_err();
    let limit = |field, limit, found| DecodeError::Limit { field, limit, found };
    assert_eq!(refused(&tensor(&[u32::MAX, u32::MAX], 4, Scheme::None)), {
        limit("size (elements)", 1000, u64::from(u32::MAX).pow(2))
    });
    assert_eq!(refused(&tensor(&[1, 1, 1], 4, Scheme::None)), limit("size (dimensions)", 2, 3));
    assert_eq!(refused(&tensor(&[1], 101, Scheme::None)), limit("buffer", 100, 101));
    let rows = u64::from(u32::MAX);
    assert_eq!(refused(&tensor(&[u32::MAX, 0], 4, Scheme::ScaledFloat16)), limit("size (rows)", 1000, rows));
    assert_eq!(
        refused(&tensor(&[900], 90, Scheme::Float16)),
        DecodeError::Length { expected: 1800, found: 90 }
    );
    // A length that the message does not have.
    let message = [0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f];
    let found = SerializedTensor::from_protobuf(&message, &limits);
    assert_eq!(found, Err(limit("buffer", 100, 0xffff_ffff)));
    assert_eq!(
        SerializedTensor::from_protobuf(&[0x0a, 0x05, 1], &limits),
        Err(DecodeError::Malformed { field: "buffer" })
    );
    let names = SerializedTensor::from_protobuf(&[0x22, 1, b'x'], &limits);
    assert_eq!(names, Err(DecodeError::Unknown { field: "dtype", found: "x".to_owned() }));
}

#[test]
fn a_zero_does_not_hide_dimensions_that_overflow() {
    let tensor = SerializedTensor {
        buffer: Vec::new(),
        size: vec![u32::MAX, u32::MAX, u32::MAX, 0],
        requires_grad: false,
        dtype: DType::Float32,
        compression: Scheme::None,
        chunks: 0,
    };
    // Found by the fuzz target: whoever multiplied the shape from the left overflowed before the zero came.
    let refused = deserialize(&tensor, &Limits::default()).unwrap_err();
    assert!(matches!(refused, DecodeError::Limit { field: "size (elements)", .. }), "{refused}");
}

#[test]
fn headers_are_checked_by_name() {
    let values = [1.0_f32, 2.0, 3.0];
    let mut slots = [0.0_f32; 3];
    let mut bytes = encode(Scheme::Uniform8Bit, &values).unwrap();
    bytes[0] = 1;
    let field = DecodeError::Field { field: "codebook length", expected: 256, found: 257 };
    assert_eq!(Scheme::Uniform8Bit.decode(&bytes, &mut slots), Err(field));
    bytes[0] = 0;
    bytes[8 + 4 * 9..8 + 4 * 10].copy_from_slice(&f32::NAN.to_le_bytes());
    let not_finite = DecodeError::NotFinite { field: "codebook", index: 9 };
    assert_eq!(Scheme::Quantile8Bit.decode(&bytes, &mut slots), Err(not_finite));
    let mut bytes = encode(Scheme::Blockwise8Bit, &values).unwrap();
    bytes[16..20].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let not_finite = DecodeError::NotFinite { field: "absmax", index: 0 };
    assert_eq!(Scheme::Blockwise8Bit.decode(&bytes, &mut slots), Err(not_finite));
    let mut bytes = encode(Scheme::Blockwise4Bit, &values).unwrap();
    bytes[3] |= 0x10;
    let field = DecodeError::Field { field: "padding", expected: 0, found: 1 };
    assert_eq!(Scheme::Blockwise4Bit.decode(&bytes, &mut slots), Err(field));
    bytes[..2].copy_from_slice(&[0x80, 0x7f]);
    let not_finite = DecodeError::NotFinite { field: "scale", index: 0 };
    assert_eq!(Scheme::Blockwise4Bit.decode(&bytes, &mut slots), Err(not_finite));
    assert_eq!(slots, [0.0; 3]);
}
