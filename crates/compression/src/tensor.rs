//! Typed tensors to and from the fields of hivemind's `Tensor` message, with limits for what strangers declare.

use crate::codec::Target;
use crate::error::check_length;
use crate::schemes::scaled_float16::{decode_rows, encode_rows};
use crate::{DType, DecodeError, EncodeError, Scheme, Scratch};

/// A tensor as it travels: the fields of hivemind's `runtime.proto` `Tensor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SerializedTensor {
    /// The encoded values.
    pub buffer: Vec<u8>,
    /// The shape; `[]` is a scalar.
    pub size: Vec<u32>,
    /// Whether the sender's tensor takes part in back-propagation.
    pub requires_grad: bool,
    /// The element type of the original.
    pub dtype: DType,
    /// How `buffer` is encoded.
    pub compression: Scheme,
    /// Number of messages the buffer is split over; 0 if it is not split.
    pub chunks: u32,
}

/// A decoded tensor: element type, shape, little-endian elements in C order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// Element type.
    pub dtype: DType,
    /// Shape; `[]` is a scalar.
    pub shape: Vec<usize>,
    /// `shape.product() * dtype.size()` bytes.
    pub bytes: Vec<u8>,
}

/// What a stranger may declare. Checked before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest encoded buffer (and protobuf message without its small fields).
    pub buffer_bytes_max: usize,
    /// Most elements in a tensor.
    pub elements_max: usize,
    /// Most dimensions.
    pub dimensions_max: usize,
}

impl Default for Limits {
    /// 1 GiB encoded, 2^28 elements, 16 dimensions.
    fn default() -> Self {
        Self { buffer_bytes_max: 1 << 30, elements_max: 1 << 28, dimensions_max: 16 }
    }
}

/// Encode a tensor: `raw` holds the elements of `shape` in C order, little-endian.
///
/// f64 is rounded to f32 before a lossy scheme (as hivemind does). `NoCompression` sends bfloat16 as float32, as
/// hivemind does by default.
///
/// # Errors
/// The buffer does not fit the shape, or the scheme does not apply to the type or to the values.
pub fn serialize(
    dtype: DType,
    shape: &[usize],
    raw: &[u8],
    scheme: Scheme,
) -> Result<SerializedTensor, EncodeError> {
    let size: Vec<u32> = shape
        .iter()
        .map(|dim| u32::try_from(*dim).map_err(|_| EncodeError::ShapeTooLarge))
        .collect::<Result<_, _>>()?;
    let count = elements(shape).ok_or(EncodeError::ShapeTooLarge)?;
    let expected = count.checked_mul(dtype.size()).ok_or(EncodeError::ShapeTooLarge)?;
    if raw.len() != expected {
        return Err(EncodeError::BufferLength { dtype, expected, found: raw.len() });
    }
    let mut buffer = Vec::new();
    if scheme == Scheme::None && dtype != DType::BFloat16 {
        buffer.extend_from_slice(raw);
    } else {
        let refused = EncodeError::UnsupportedType { scheme, dtype };
        if !applies(scheme, dtype) {
            return Err(refused);
        }
        let values = dtype.widen(raw).ok_or(refused)?;
        if scheme == Scheme::ScaledFloat16 {
            let (width, rows) = rows_of(shape).ok_or(EncodeError::Scalar { scheme })?;
            encode_rows(&values, width, rows, &mut buffer)?;
        } else {
            scheme.encode(&values, &mut buffer, &mut Scratch::new())?;
        }
    }
    Ok(SerializedTensor { buffer, size, requires_grad: false, dtype, compression: scheme, chunks: 0 })
}

/// Decode a tensor that a stranger sent.
///
/// # Errors
/// A declared size is above `limits`, or the buffer does not fit the other fields.
pub fn deserialize(tensor: &SerializedTensor, limits: &Limits) -> Result<RawTensor, DecodeError> {
    let &SerializedTensor { dtype, compression: scheme, .. } = tensor;
    check_limit("buffer", limits.buffer_bytes_max, tensor.buffer.len())?;
    check_limit("size (dimensions)", limits.dimensions_max, tensor.size.len())?;
    let shape: Vec<usize> = tensor.size.iter().map(|dim| *dim as usize).collect();
    let too_many = DecodeError::Limit {
        field: "size (elements)",
        limit: limits.elements_max as u64,
        found: shape.iter().fold(1_u64, |count, dim| count.saturating_mul((*dim).max(1) as u64)),
    };
    let count = elements(&shape).filter(|count| *count <= limits.elements_max).ok_or(too_many)?;
    let buffer = &tensor.buffer;
    let same_bytes = count.saturating_mul(dtype.size());
    let short_bfloat16 = dtype == DType::BFloat16 && buffer.len() == same_bytes;
    if scheme == Scheme::None && (dtype != DType::BFloat16 || short_bfloat16) {
        check_length(same_bytes, buffer.len())?;
        return Ok(RawTensor { dtype, shape, bytes: buffer.clone() });
    }
    let refused = DecodeError::UnsupportedType { scheme, dtype };
    if !applies(scheme, dtype) {
        return Err(refused);
    }
    let rows = if scheme == Scheme::ScaledFloat16 {
        let (_, rows) = rows_of(&shape).ok_or(refused.clone())?;
        check_limit("size (rows)", limits.elements_max, rows)?;
        Some(rows)
    } else {
        None
    };
    let expected = match rows {
        Some(rows) => crate::schemes::scaled_float16::encoded_len_rows(count, rows),
        None => scheme.encoded_len(count),
    };
    // The length is right before memory is taken for the values: at most eight bytes for each half byte received.
    check_length(expected, buffer.len())?;
    let mut values = vec![0.0_f32; count];
    match rows {
        Some(rows) => decode_rows(buffer, Target::Assign(&mut values), rows)?,
        None => scheme.decode(buffer, &mut values)?,
    }
    let bytes = dtype.narrow(&values).ok_or(refused)?;
    Ok(RawTensor { dtype, shape, bytes })
}

/// hivemind's halves exclude bfloat16, and nothing lossy applies to integers.
fn applies(scheme: Scheme, dtype: DType) -> bool {
    let halves = matches!(scheme, Scheme::Float16 | Scheme::ScaledFloat16);
    dtype.is_float() && !(halves && dtype == DType::BFloat16)
}

/// Width of the last axis and number of rows; `None` for scalars, and if the rows overflow.
fn rows_of(shape: &[usize]) -> Option<(usize, usize)> {
    let (width, outer) = shape.split_last()?;
    Some((*width, elements(outer)?))
}

/// The number of elements; `None` if whoever multiplies the dimensions would overflow, which a zero among them does not
/// excuse: the order of the dimensions is a stranger's choice.
fn elements(shape: &[usize]) -> Option<usize> {
    let others =
        shape.iter().filter(|dim| **dim != 0).try_fold(1_usize, |count, dim| count.checked_mul(*dim))?;
    Some(if shape.contains(&0) { 0 } else { others })
}

fn check_limit(field: &'static str, limit: usize, found: usize) -> Result<(), DecodeError> {
    if found > limit {
        return Err(DecodeError::Limit { field, limit: limit as u64, found: found as u64 });
    }
    Ok(())
}
