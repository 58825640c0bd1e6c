//! Element types as they are named on the wire, and their conversion to and from f32.

use std::borrow::Cow;

use crate::half_float::{from_bfloat16, to_bfloat16};

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum DType {
    Float32,
    Float64,
    Float16,
    BFloat16,
    Int64,
    Int32,
    Int16,
    Int8,
    UInt8,
    Bool,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 10] = [
        Self::Float32,
        Self::Float64,
        Self::Float16,
        Self::BFloat16,
        Self::Int64,
        Self::Int32,
        Self::Int16,
        Self::Int8,
        Self::UInt8,
        Self::Bool,
    ];

    /// The name in numpy, in torch and on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
            Self::Int64 => "int64",
            Self::Int32 => "int32",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
            Self::UInt8 => "uint8",
            Self::Bool => "bool",
        }
    }

    /// The type of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes per element in memory.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Float64 | Self::Int64 => 8,
            Self::Float32 | Self::Int32 => 4,
            Self::Float16 | Self::BFloat16 | Self::Int16 => 2,
            Self::Int8 | Self::UInt8 | Self::Bool => 1,
        }
    }

    /// Whether lossy schemes apply.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(self, Self::Float32 | Self::Float64 | Self::Float16 | Self::BFloat16)
    }

    /// Little-endian floats of this type as f32, rounded to nearest: where they are, if they can be read there. `None`
    /// for integers.
    pub(crate) fn values(self, raw: &[u8]) -> Option<Cow<'_, [f32]>> {
        if self == Self::Float32 && cfg!(target_endian = "little") {
            // SAFETY: any four bytes are an f32.
            let (before, values, after) = unsafe { raw.align_to::<f32>() };
            if before.is_empty() && after.is_empty() {
                return Some(Cow::Borrowed(values));
            }
        }
        Some(Cow::Owned(match self {
            Self::Float32 => raw.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
            Self::Float64 => raw.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            Self::Float16 => {
                let halves = raw.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b));
                halves.map(crate::half_float::from_half).collect()
            }
            Self::BFloat16 => {
                raw.as_chunks().0.iter().map(|b| from_bfloat16(u16::from_le_bytes(*b))).collect()
            }
            _ => return None,
        }))
    }

    /// The memory of little-endian elements as f32, if that is what they are and they can be written there.
    pub(crate) fn values_mut(self, raw: &mut [u8]) -> Result<&mut [f32], &mut [u8]> {
        let is_aligned =
            raw.as_ptr().cast::<f32>().is_aligned() && raw.len().is_multiple_of(size_of::<f32>());
        if self != Self::Float32 || cfg!(target_endian = "big") || !is_aligned {
            return Err(raw);
        }
        // SAFETY: any four bytes are an f32, and any f32 is four bytes.
        Ok(unsafe { raw.align_to_mut::<f32>() }.1)
    }

    /// Write f32 as little-endian floats of this type, rounded to nearest. Integers are left as they are.
    #[inline(always)]
    pub(crate) fn narrow(self, values: &[f32], raw: &mut [u8]) {
        match self {
            Self::Float32 => put(values, raw, f32::to_le_bytes),
            Self::Float64 => put(values, raw, |value| f64::from(value).to_le_bytes()),
            Self::Float16 => put(values, raw, |value| crate::half_float::to_half(value).to_le_bytes()),
            Self::BFloat16 => put(values, raw, |value| to_bfloat16(value).to_le_bytes()),
            _ => {}
        }
    }
}

#[inline(always)]
fn put<const N: usize>(values: &[f32], raw: &mut [u8], bytes_of: impl Fn(f32) -> [u8; N]) {
    for (slot, value) in raw.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *slot = bytes_of(*value);
    }
}
