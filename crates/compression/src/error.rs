//! What can go wrong: one enum for encoding (the caller's values), one for decoding (a stranger's bytes).

use crate::{DType, Scheme};

/// What an encoder had to change besides rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeReport {
    /// Values that were out of the scheme's range and were clamped to its end (infinities included).
    pub saturated: usize,
    /// NaN values that travel as NaN. Only schemes that can express NaN report them; the others refuse.
    pub nan: usize,
    /// Products of [`encode_scaled`](Scheme::encode_scaled) beyond the f32 range, clamped to its end before they were
    /// encoded.
    pub clamped: usize,
}

/// The values cannot be encoded; nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// This scheme cannot express NaN or infinity.
    #[error(
        "value {index} is not finite, which {} cannot express: skip the step or use Float16Compression",
        scheme.name()
    )]
    NotFinite {
        /// The scheme that refused.
        scheme: Scheme,
        /// Position of the first value that is not finite.
        index: usize,
    },
    /// The values spread over more than the f32 range, so that scaling them would overflow at the decoder.
    #[error("value {index} is further from the mean than f32 can express: use NoCompression for such values")]
    TooWide {
        /// Position of the first such value.
        index: usize,
    },
    /// The tensor's buffer does not fit its shape and type.
    #[error("a {dtype:?} tensor of this shape has {expected} bytes, not {found}")]
    BufferLength {
        /// The element type.
        dtype: DType,
        /// Bytes that shape and type ask for.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The shape's element count overflows, or a dimension exceeds 32 bits.
    #[error("the shape has too many elements to be sent")]
    ShapeTooLarge,
    /// This scheme does not apply to this element type.
    #[error("{} does not support {} tensors: use NoCompression for them", scheme.name(), dtype.name())]
    UnsupportedType {
        /// The scheme that refused.
        scheme: Scheme,
        /// The element type.
        dtype: DType,
    },
    /// Scaling works along the last axis, and a scalar has none.
    #[error("{} needs at least one dimension: use NoCompression for scalars", scheme.name())]
    Scalar {
        /// The scheme that refused.
        scheme: Scheme,
    },
}

/// The bytes are not what the scheme prescribes; the output was not touched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Too few or too many bytes.
    #[error("buffer: expected {expected} bytes, found {found}")]
    Length {
        /// Bytes that the element count asks for.
        expected: usize,
        /// Bytes received.
        found: usize,
    },
    /// A header field contradicts the element count or the format.
    #[error("{field}: expected {expected}, found {found}")]
    Field {
        /// The field at fault.
        field: &'static str,
        /// What the format prescribes.
        expected: u64,
        /// What was received.
        found: u64,
    },
    /// A scale or codebook entry is not finite, so that decoded values would not be.
    #[error("{field}: entry {index} is not finite or decodes to something that is not")]
    NotFinite {
        /// The field at fault.
        field: &'static str,
        /// Position in that field.
        index: usize,
    },
    /// A declared size is above the limit of the caller.
    #[error("{field}: {found} is above the limit of {limit}")]
    Limit {
        /// The field at fault.
        field: &'static str,
        /// The limit.
        limit: u64,
        /// What was declared.
        found: u64,
    },
    /// A field has a value that is not known here.
    #[error("{field}: unknown value {found:?}")]
    Unknown {
        /// The field at fault.
        field: &'static str,
        /// What was received (shortened).
        found: String,
    },
    /// The message is not valid protobuf at this field.
    #[error("{field}: malformed or cut short")]
    Malformed {
        /// The field at fault.
        field: &'static str,
    },
    /// The scheme does not apply to this element type.
    #[error("compression: {} does not apply to {} tensors", scheme.name(), dtype.name())]
    UnsupportedType {
        /// The declared scheme.
        scheme: Scheme,
        /// The declared element type.
        dtype: DType,
    },
}

/// Refuse a buffer of the wrong length.
pub(crate) fn check_length(expected: usize, found: usize) -> Result<(), DecodeError> {
    if expected == found { Ok(()) } else { Err(DecodeError::Length { expected, found }) }
}
