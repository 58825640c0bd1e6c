//! Typed tensors to and from the fields of hivemind's `Tensor` message, with limits for what strangers declare.

use std::mem::MaybeUninit;

use crate::codec::Target;
use crate::error::check_length;
use crate::out::Out;
use crate::schemes::scaled_float16::{decode_rows, encode_rows, encoded_len_rows};
use crate::source::Source;
use crate::{DType, DecodeError, EncodeError, EncodeReport, Scheme, Scratch};

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

/// A tensor to be encoded: `raw` holds the elements of `shape` in C order, little-endian. Everything about it but its
/// values is checked.
///
/// f64 is rounded to f32 before a lossy scheme (as hivemind does). `NoCompression` sends bfloat16 as float32, as
/// hivemind does by default.
#[derive(Clone, Copy, Debug)]
pub struct Encoding<'a> {
    dtype: DType,
    raw: &'a [u8],
    scheme: Scheme,
    /// Width and number of rows, for the scheme that scales by row.
    rows: Option<(usize, usize)>,
    encoded_len: usize,
}

impl<'a> Encoding<'a> {
    /// Check what can be checked without looking at the values.
    ///
    /// # Errors
    /// The buffer does not fit the shape, or the scheme does not apply to the type or the shape.
    pub fn new(dtype: DType, shape: &[usize], raw: &'a [u8], scheme: Scheme) -> Result<Self, EncodeError> {
        let count = elements(shape).ok_or(EncodeError::ShapeTooLarge)?;
        let expected = count.checked_mul(dtype.size()).ok_or(EncodeError::ShapeTooLarge)?;
        if raw.len() != expected || shape.iter().any(|dim| u32::try_from(*dim).is_err()) {
            let wrong_length = EncodeError::BufferLength { dtype, expected, found: raw.len() };
            return Err(if raw.len() == expected { EncodeError::ShapeTooLarge } else { wrong_length });
        }
        let mut encoding = Self { dtype, raw, scheme, rows: None, encoded_len: expected };
        if encoding.is_copy() {
            return Ok(encoding);
        }
        if !applies(scheme, dtype) {
            return Err(EncodeError::UnsupportedType { scheme, dtype });
        }
        encoding.encoded_len = scheme.encoded_len(count);
        if scheme == Scheme::ScaledFloat16 {
            let (width, rows) = rows_of(shape).ok_or(EncodeError::Scalar { scheme })?;
            encoding.rows = Some((width, rows));
            encoding.encoded_len = encoded_len_rows(count, rows);
        }
        Ok(encoding)
    }

    /// Bytes of the encoded buffer.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        self.encoded_len
    }

    fn is_copy(&self) -> bool {
        self.scheme == Scheme::None && self.dtype != DType::BFloat16
    }

    /// Write the buffer to `room`, [`encoded_len`](Self::encoded_len) bytes that need not be initialised, and touch no
    /// other memory in proportion to the tensor (other types than f32 are widened first).
    ///
    /// # Errors
    /// The scheme does not apply to these values; `room` then holds anything.
    ///
    /// # Panics
    /// If `room` has another length.
    pub fn write(
        &self,
        room: &mut [MaybeUninit<u8>],
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        assert_eq!(room.len(), self.encoded_len, "room for another buffer");
        if self.is_copy() {
            room.write_copy_of_slice(self.raw);
            return Ok(EncodeReport::default());
        }
        let refused = EncodeError::UnsupportedType { scheme: self.scheme, dtype: self.dtype };
        let values = self.dtype.values(self.raw).ok_or(refused)?;
        let Some((width, rows)) = self.rows else {
            return self.scheme.write(Source::plain(&values), room, scratch);
        };
        let mut out = Out::new(room);
        let report = encode_rows(&values, width, rows, &mut out)?;
        assert_eq!(out.len(), self.encoded_len, "rows were forgotten");
        Ok(report)
    }
}

/// Encode a tensor (see [`Encoding`]), and say what had to be changed besides rounding.
///
/// # Errors
/// The buffer does not fit the shape, or the scheme does not apply to the type or to the values.
pub fn serialize(
    dtype: DType,
    shape: &[usize],
    raw: &[u8],
    scheme: Scheme,
) -> Result<(SerializedTensor, EncodeReport), EncodeError> {
    let encoding = Encoding::new(dtype, shape, raw, scheme)?;
    let size = shape.iter().map(|dim| u32::try_from(*dim).map_err(|_| EncodeError::ShapeTooLarge));
    let size = size.collect::<Result<_, _>>()?;
    let mut buffer = Vec::with_capacity(encoding.encoded_len);
    let room = &mut buffer.spare_capacity_mut()[..encoding.encoded_len];
    let report = encoding.write(room, &mut Scratch::new())?;
    // SAFETY: `write` has initialised all of it.
    unsafe { buffer.set_len(encoding.encoded_len) };
    let tensor =
        SerializedTensor { buffer, size, requires_grad: false, dtype, compression: scheme, chunks: 0 };
    Ok((tensor, report))
}

/// A tensor that a stranger sent, to be decoded: everything but the scheme's own fields is checked.
#[derive(Clone, Copy, Debug)]
pub struct Decoding<'a> {
    dtype: DType,
    scheme: Scheme,
    buffer: &'a [u8],
    count: usize,
    rows: Option<usize>,
}

impl<'a> Decoding<'a> {
    /// Check the declared sizes, before memory is taken for the values.
    ///
    /// # Errors
    /// A declared size is above `limits`, the scheme does not apply to the type, or the buffer's length is wrong.
    pub fn new(
        dtype: DType,
        size: &[u32],
        scheme: Scheme,
        buffer: &'a [u8],
        limits: &Limits,
    ) -> Result<Self, DecodeError> {
        check_limit("buffer", limits.buffer_bytes_max, buffer.len())?;
        check_limit("size (dimensions)", limits.dimensions_max, size.len())?;
        let shape: Vec<usize> = size.iter().map(|dim| *dim as usize).collect();
        let too_many = DecodeError::Limit {
            field: "size (elements)",
            limit: limits.elements_max as u64,
            found: shape.iter().fold(1_u64, |count, dim| count.saturating_mul((*dim).max(1) as u64)),
        };
        let count = elements(&shape).filter(|count| *count <= limits.elements_max).ok_or(too_many)?;
        let mut decoding = Self { dtype, scheme, buffer, count, rows: None };
        if decoding.is_copy() {
            check_length(decoding.decoded_len(), buffer.len())?;
            return Ok(decoding);
        }
        let refused = DecodeError::UnsupportedType { scheme, dtype };
        if !applies(scheme, dtype) {
            return Err(refused);
        }
        let mut expected = scheme.encoded_len(count);
        if scheme == Scheme::ScaledFloat16 {
            let (_, rows) = rows_of(&shape).ok_or(refused)?;
            check_limit("size (rows)", limits.elements_max, rows)?;
            decoding.rows = Some(rows);
            expected = encoded_len_rows(count, rows);
        }
        // So at most eight bytes are taken for each half byte received.
        check_length(expected, buffer.len())?;
        Ok(decoding)
    }

    /// Bytes of the decoded elements.
    #[must_use]
    pub fn decoded_len(&self) -> usize {
        self.count.saturating_mul(self.dtype.size())
    }

    /// Whether the buffer holds the elements themselves. bfloat16 travels as itself or as f32.
    fn is_copy(&self) -> bool {
        self.scheme == Scheme::None
            && (self.dtype != DType::BFloat16 || self.buffer.len() == self.decoded_len())
    }

    /// Write the little-endian elements in C order to `out`, [`decoded_len`](Self::decoded_len) bytes.
    ///
    /// # Errors
    /// The buffer is not what the scheme prescribes; `out` is untouched.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn write(&self, out: &mut [u8]) -> Result<(), DecodeError> {
        assert_eq!(out.len(), self.decoded_len(), "memory for another tensor");
        if self.is_copy() {
            out.copy_from_slice(self.buffer);
            return Ok(());
        }
        let target = match self.dtype.values_mut(out) {
            Ok(values) => Target::Assign(values),
            Err(out) => Target::Narrow { dtype: self.dtype, out },
        };
        match self.rows {
            Some(rows) => decode_rows(self.buffer, target, rows),
            None => self.scheme.decode_to(self.buffer, target),
        }
    }
}

/// Decode a tensor that a stranger sent.
///
/// # Errors
/// A declared size is above `limits`, or the buffer does not fit the other fields.
pub fn deserialize(tensor: &SerializedTensor, limits: &Limits) -> Result<RawTensor, DecodeError> {
    let &SerializedTensor { dtype, compression, .. } = tensor;
    let decoding = Decoding::new(dtype, &tensor.size, compression, &tensor.buffer, limits)?;
    let mut bytes = vec![0; decoding.decoded_len()];
    decoding.write(&mut bytes)?;
    Ok(RawTensor { dtype, shape: tensor.size.iter().map(|dim| *dim as usize).collect(), bytes })
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
