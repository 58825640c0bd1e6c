//! Tensors in the caller's memory: any alignment, any float type, the same on every path.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_compression::simd::{Level, with_level};
use potluck_compression::{DType, DecodeError, Decoding, EncodeError, Encoding, Limits, Scheme, Scratch};
use std::mem::MaybeUninit;

const FLOATS: [DType; 4] = [DType::Float32, DType::Float64, DType::Float16, DType::BFloat16];

fn raw(dtype: DType, values: &[f32]) -> Vec<u8> {
    let bytes_of = |v: &f32| match dtype {
        DType::Float32 => v.to_le_bytes().to_vec(),
        DType::Float64 => f64::from(*v).to_le_bytes().to_vec(),
        DType::Float16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
        _ => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes_of).collect()
}

/// Encode into memory that holds something else, `shift` bytes off.
fn encode(dtype: DType, raw: &[u8], scheme: Scheme, shift: usize) -> Result<Vec<u8>, EncodeError> {
    let mut moved = vec![0x55; shift];
    moved.extend_from_slice(raw);
    let encoding = Encoding::new(dtype, &[raw.len() / dtype.size()], &moved[shift..], scheme)?;
    let mut room = vec![MaybeUninit::new(0xaa_u8); encoding.encoded_len()];
    encoding.write(&mut room, &mut Scratch::new())?;
    // SAFETY: it was initialised before it was written.
    Ok(room.iter().map(|byte| unsafe { byte.assume_init() }).collect())
}

fn decode(dtype: DType, count: u32, scheme: Scheme, buffer: &[u8], shift: usize) -> Vec<u8> {
    let decoding = Decoding::new(dtype, &[count], scheme, buffer, &Limits::default()).unwrap();
    let mut memory = vec![0x55; shift + decoding.decoded_len()];
    decoding.write(&mut memory[shift..]).unwrap();
    assert!(memory[..shift].iter().all(|byte| *byte == 0x55));
    memory.split_off(shift)
}

#[test]
fn bytes_do_not_depend_on_where_they_are() {
    let values: Vec<f32> = (0..9001).map(|i| (i as f32 * 0.7531).sin().powi(3)).collect();
    for scheme in Scheme::ALL {
        for dtype in FLOATS {
            let raw = raw(dtype, &values);
            let Ok(buffer) = encode(dtype, &raw, *scheme, 0) else {
                assert_eq!(dtype, DType::BFloat16, "{scheme:?}");
                continue;
            };
            let decoded = decode(dtype, 9001, *scheme, &buffer, 0);
            for level in [Level::Portable, Level::Avx2, Level::Avx512] {
                for shift in [0, 1, 4] {
                    with_level(level, || {
                        let again = encode(dtype, &raw, *scheme, shift).unwrap();
                        assert!(again == buffer, "{scheme:?} of {dtype:?} at {shift}");
                        let again = decode(dtype, 9001, *scheme, &buffer, shift);
                        assert!(again == decoded, "{scheme:?} to {dtype:?} at {shift}");
                    });
                }
            }
            // Other types get what f32 gets, rounded.
            if *scheme != Scheme::None {
                let wide = decode(DType::Float32, 9001, *scheme, &buffer, 0);
                let wide: Vec<f32> = wide.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                assert!(self::raw(dtype, &wide) == decoded, "{scheme:?} to {dtype:?}");
            }
        }
    }
}

#[test]
fn a_refused_buffer_leaves_the_memory_alone() {
    let raw = raw(DType::Float32, &[1.0, 2.0, 3.0]);
    let mut buffer = encode(DType::Float32, &raw, Scheme::Uniform8Bit, 0).unwrap();
    buffer[0] = 1;
    for dtype in FLOATS {
        let limits = Limits::default();
        let decoding = Decoding::new(dtype, &[3], Scheme::Uniform8Bit, &buffer, &limits).unwrap();
        let mut memory = vec![0x55; decoding.decoded_len()];
        let refused = decoding.write(&mut memory);
        let expected = DecodeError::Field { field: "codebook length", expected: 256, found: 257 };
        assert_eq!(refused, Err(expected));
        assert!(memory.iter().all(|byte| *byte == 0x55));
    }
}

#[test]
fn what_was_clamped_is_counted_for_every_type() {
    for (dtype, count) in [(DType::Float32, 3), (DType::Float64, 3)] {
        let raw = raw(dtype, &[1e6, -1e6, f32::INFINITY, f32::NAN, 1.0]);
        let encoding = Encoding::new(dtype, &[5], &raw, Scheme::Float16).unwrap();
        let mut room = vec![MaybeUninit::uninit(); encoding.encoded_len()];
        let report = encoding.write(&mut room, &mut Scratch::new()).unwrap();
        assert_eq!((report.saturated, report.nan), (count, 1));
    }
}
