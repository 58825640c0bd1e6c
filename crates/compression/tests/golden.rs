//! hivemind's own buffers, byte for byte: encoding gives them, decoding reads them, on the SIMD and the portable path.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_compression::low_rank::orthogonalize;
use potluck_compression::simd::{Level, detected, with_level};
use potluck_compression::{DType, Limits, Scheme, SerializedTensor, deserialize, serialize};
use serde_json::Value;

fn vectors() -> Value {
    serde_json::from_str(include_str!("data/vectors.json")).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn scheme(codec: &str) -> Scheme {
    match codec {
        "NONE" => Scheme::None,
        "FLOAT16" => Scheme::Float16,
        "MEANSTD_16BIT" => Scheme::ScaledFloat16,
        "UNIFORM_8BIT" => Scheme::Uniform8Bit,
        "QUANTILE_8BIT" => Scheme::Quantile8Bit,
        "BLOCKWISE_8BIT" => Scheme::Blockwise8Bit,
        other => panic!("a codec without a scheme: {other}"),
    }
}

/// "f32 [[1,2],[3,4]]" or "f32 0..7" as numbers.
fn numbers(tensor: &str) -> Vec<f64> {
    let (_, list) = tensor.split_once(' ').unwrap();
    if list == "0..7" {
        return (0..8).map(f64::from).collect();
    }
    let flat = list.replace(['[', ']'], "");
    flat.split(',').filter(|text| !text.is_empty()).map(|text| text.trim().parse().unwrap()).collect()
}

fn raw(dtype: DType, numbers: &[f64]) -> Vec<u8> {
    let bytes_of = |v: &f64| match dtype {
        DType::Float64 => v.to_le_bytes().to_vec(),
        DType::Float32 => (*v as f32).to_le_bytes().to_vec(),
        DType::Float16 => half::f16::from_f64(*v).to_le_bytes().to_vec(),
        DType::BFloat16 => half::bf16::from_f64(*v).to_le_bytes().to_vec(),
        other => panic!("no vectors for {other:?}"),
    };
    numbers.iter().flat_map(bytes_of).collect()
}

fn check_codec(vector: &Value) {
    let text = |key: &str| vector[key].as_str();
    let (codec, tensor) = (text("codec").unwrap(), text("tensor").unwrap());
    let short = tensor.split_once(' ').unwrap().0;
    let dtype = match short {
        "f32" => DType::Float32,
        "f64" => DType::Float64,
        "f16" => DType::Float16,
        "bf16" => DType::BFloat16,
        other => panic!("{other}"),
    };
    let values = numbers(tensor);
    let shape = if tensor.contains("[[") { vec![2, 2] } else { vec![values.len()] };
    let found = serialize(dtype, &shape, &raw(dtype, &values), scheme(codec));
    let Some(buffer) = text("buffer") else {
        assert!(found.is_err(), "{codec} {tensor} must be refused");
        return;
    };
    let found = found.unwrap().0;
    assert_eq!(found.buffer, unhex(buffer), "{codec} {tensor}");
    assert_eq!(Some(dtype.name()), text("dtype"));
    let message = found.to_protobuf();
    let read = SerializedTensor::from_protobuf(&message, &Limits::default()).unwrap();
    assert_eq!(read, found);
    let decoded = deserialize(&read, &Limits::default()).unwrap();
    assert_eq!((decoded.dtype, decoded.shape), (dtype, shape));
    if codec != "BLOCKWISE_8BIT" && codec != "MEANSTD_16BIT" && dtype != DType::Float64 {
        assert_eq!(decoded.bytes, raw(dtype, &values), "{codec} {tensor}: few values are exact");
    }
}

#[test]
fn codecs() {
    let vectors = vectors();
    let codecs = vectors["codecs"].as_array().unwrap();
    assert!(codecs.len() > 30);
    for level in [Level::Portable, Level::Avx2, detected()] {
        with_level(level, || codecs.iter().for_each(check_codec));
    }
}

#[test]
fn half_precision_extremes() {
    let mut out = Vec::new();
    let values = [1e6, -1e6, 1e-8, 65504.0, 65520.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for level in [Level::Portable, detected()] {
        out.clear();
        let report =
            with_level(level, || Scheme::Float16.encode(&values, &mut out, &mut Default::default())).unwrap();
        assert_eq!(out, unhex("ff7bfffb0000ff7bff7b007eff7bfffb"));
        assert_eq!((report.saturated, report.nan), (5, 1));
    }
}

#[test]
fn protobuf_messages() {
    let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let message = |shape: &[usize], values: &[f32], scheme| {
        serialize(DType::Float32, shape, &f32s(values), scheme).unwrap().0
    };
    let plain = message(&[3], &[1.0, -2.0, 0.5], Scheme::None);
    assert_eq!(plain.to_protobuf(), unhex("0a0c0000803f000000c00000003f1201032207666c6f61743332"));
    let scalar = message(&[], &[3.25], Scheme::None);
    assert_eq!(scalar.to_protobuf(), unhex("0a04000050402207666c6f61743332"));
    let mut grad = message(&[1], &[1.0], Scheme::None);
    grad.requires_grad = true;
    assert_eq!(grad.to_protobuf(), unhex("0a040000803f12010118012207666c6f61743332"));
    let half = message(&[3], &[1.0, -2.0, 0.5], Scheme::Float16);
    assert_eq!(half.to_protobuf(), unhex("0a06003c00c000381201032207666c6f617433322802"));
    for tensor in [plain, scalar, grad, half] {
        let read = SerializedTensor::from_protobuf(&tensor.to_protobuf(), &Limits::default()).unwrap();
        assert_eq!(read, tensor);
    }
}

#[test]
fn integers_travel_uncompressed_only() {
    let raw: Vec<u8> = [1_i64, -1].iter().flat_map(|v| v.to_le_bytes()).collect();
    let (tensor, _) = serialize(DType::Int64, &[2], &raw, Scheme::None).unwrap();
    assert_eq!(deserialize(&tensor, &Limits::default()).unwrap().bytes, raw);
    for scheme in Scheme::ALL.iter().filter(|scheme| **scheme != Scheme::None) {
        assert!(serialize(DType::Int64, &[2], &raw, *scheme).is_err());
    }
}

#[test]
fn gram_schmidt() {
    let expected = unhex(vectors()["orthogonalize"]["output_f32_le"].as_str().unwrap());
    for level in [Level::Portable, detected()] {
        let mut matrix = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        with_level(level, || orthogonalize(&mut matrix, 2));
        let found: Vec<u8> = matrix.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(found, expected);
    }
}
