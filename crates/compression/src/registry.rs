//! The one list of schemes: a new scheme is one file in `schemes/` and one line here.

use std::mem::MaybeUninit;

use serde::{Deserialize, Serialize};

use crate::codec::{Codec, Place, Scratch, Target};
use crate::out::Out;
use crate::schemes::{bfloat16, blockwise4, blockwise8, float16, none, quantile8, scaled_float16, uniform8};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport, Tally};

macro_rules! schemes {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $name:literal, $bits:literal, $codec:path;)*) => {
        /// Which buffer format a vector of values travels in.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Scheme { $($(#[$doc])* $variant,)* }

        impl Scheme {
            /// Every scheme, in order of its declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The stable number on the wire: hivemind's `CompressionType` below 64, potluck's own from 64.
            #[must_use]
            pub fn wire_id(self) -> u8 {
                match self { $(Self::$variant => $id,)* }
            }

            /// The scheme with this number on the wire.
            #[must_use]
            pub fn from_wire_id(id: u8) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)* _ => None }
            }

            /// The name of the Python class.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Bits per value, without headers and scales (hivemind computes part counts from this).
            #[must_use]
            pub fn bits_per_value(self) -> u32 {
                match self { $(Self::$variant => $bits,)* }
            }

            fn codec(self) -> &'static dyn Codec {
                match self { $(Self::$variant => &$codec,)* }
            }
        }
    };
}

schemes! {
    /// The values themselves.
    None = 0, "NoCompression", 32, none::None;
    /// IEEE half precision, clamped to its range.
    Float16 = 2, "Float16Compression", 16, float16::Float16;
    /// Half precision after subtracting the mean and dividing by the standard deviation.
    ScaledFloat16 = 1, "ScaledFloat16Compression", 16, scaled_float16::ScaledFloat16;
    /// 256 equally wide buckets over six standard deviations; each decodes to the mean of its values.
    Uniform8Bit = 4, "Uniform8BitQuantization", 8, uniform8::Uniform8Bit;
    /// 256 equally full buckets; each decodes to the mean of its values.
    Quantile8Bit = 3, "Quantile8BitQuantization", 8, quantile8::Quantile8Bit;
    /// Blocks of 4096, each scaled by its largest magnitude, on a fixed codebook that is finest near zero.
    Blockwise8Bit = 5, "BlockwiseQuantization", 8, blockwise8::Blockwise8Bit;
    /// The upper half of an f32.
    BFloat16 = 64, "BFloat16Compression", 16, bfloat16::BFloat16;
    /// Blocks of 64, each scaled by its largest magnitude, on 16 levels.
    Blockwise4Bit = 65, "Blockwise4BitQuantization", 4, blockwise4::Blockwise4Bit;
}

impl Scheme {
    /// Whether a hivemind peer can decode this scheme.
    #[must_use]
    pub fn is_hivemind(self) -> bool {
        self.wire_id() < 64
    }

    /// Exact size of the encoded buffer for `count` f32 values (`ScaledFloat16`: as one row).
    ///
    /// ```
    /// # use potluck_compression::Scheme;
    /// assert_eq!(Scheme::Float16.encoded_len(1000), 2000);
    /// ```
    #[must_use]
    pub fn encoded_len(self, count: usize) -> usize {
        self.codec().encoded_len(count)
    }

    /// Append exactly [`encoded_len`](Self::encoded_len) bytes to `out`. On an error `out` is as it was.
    ///
    /// # Errors
    /// [`EncodeError::NotFinite`] from the scaled, 8-bit and 4-bit schemes, which cannot express NaN or infinity, and
    /// [`EncodeError::TooWide`] from `ScaledFloat16`.
    pub fn encode(
        self,
        values: &[f32],
        out: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        self.encode_source(Source::plain(values), out, scratch)
    }

    /// [`encode`](Self::encode) `values[i] * factor`, clamped to the finite range, while they are read: the bytes are
    /// those of multiplying, clamping and encoding one after the other. Reducers turn a sum into a mean with it.
    ///
    /// # Errors
    /// As [`encode`](Self::encode); an infinity is clamped, so only NaN is refused.
    pub fn encode_scaled(
        self,
        values: &[f32],
        factor: f32,
        out: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        self.encode_source(Source::scaled(values, factor), out, scratch)
    }

    fn encode_source(
        self,
        source: Source<'_>,
        out: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        let length = self.encoded_len(source.len());
        out.reserve(length);
        let report = self.write(source, &mut out.spare_capacity_mut()[..length], scratch)?;
        // SAFETY: `write` has initialised the `length` bytes behind what was there.
        unsafe { out.set_len(out.len() + length) };
        Ok(report)
    }

    /// Initialise all of `room`, which is [`encoded_len`](Self::encoded_len) bytes long.
    pub(crate) fn write(
        self,
        source: Source<'_>,
        room: &mut [MaybeUninit<u8>],
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        let length = room.len();
        let mut out = Out::new(room);
        let report = self.codec().encode(source, &mut out, scratch)?;
        assert_eq!(out.len(), length, "{self:?} wrote less than it said");
        Ok(report)
    }

    /// Fill `values` (its length is the expected count) from the bytes of a stranger.
    ///
    /// # Errors
    /// The buffer is malformed; `values` is untouched.
    pub fn decode(self, bytes: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.decode_to(bytes, Target::Assign(values))
    }

    pub(crate) fn decode_to(self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        self.codec().decode(bytes, target)
    }

    /// `acc[i] += weight * x[i]` for the decoded `x`, in one pass, with the bits of decode-then-add.
    ///
    /// # Errors
    /// The buffer is malformed; `acc` is untouched.
    pub fn decode_add(self, bytes: &[u8], weight: f32, acc: &mut [f32]) -> Result<(), DecodeError> {
        self.codec().decode(bytes, Target::Add { weight, acc })
    }

    /// [`decode_add`](Self::decode_add), and the [`Tally`] of the decoded `x`, in the same pass. The sum has already
    /// taken `x` in when the tally shows that it should not have: see [`decode_sum`](Self::decode_sum).
    ///
    /// # Errors
    /// The buffer is malformed; `acc` is untouched.
    pub fn decode_add_tally(self, bytes: &[u8], weight: f32, acc: &mut [f32]) -> Result<Tally, DecodeError> {
        self.decode_tally(bytes, weight, Place::Within(acc))
    }

    /// `out[i] = sum[i] + weight * x[i]` and the [`Tally`] of the decoded `x`, in one pass, with the bits of
    /// [`decode_add`](Self::decode_add). `sum` stays: swap the two if the tally is plausible, forget `out` if not.
    ///
    /// ```
    /// # use potluck_compression::{Scheme, Scratch};
    /// let (mut bytes, mut sum, mut next) = (Vec::new(), vec![1.0_f32; 2], vec![0.0; 2]);
    /// Scheme::Float16.encode(&[3.0, -4.0], &mut bytes, &mut Scratch::new())?;
    /// let found = Scheme::Float16.decode_sum(&bytes, 2.0, &sum, &mut next)?;
    /// if found.first_non_finite.is_none() && found.square_sum <= 25.0 {
    ///     std::mem::swap(&mut sum, &mut next);
    /// }
    /// assert_eq!(sum, [7.0, -7.0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The buffer is malformed; `out` is untouched.
    ///
    /// # Panics
    /// If the lengths of `sum` and `out` differ.
    pub fn decode_sum(
        self,
        bytes: &[u8],
        weight: f32,
        sum: &[f32],
        out: &mut [f32],
    ) -> Result<Tally, DecodeError> {
        assert_eq!(sum.len(), out.len(), "lengths of one vector differ");
        self.decode_tally(bytes, weight, Place::Apart { sum, out })
    }

    fn decode_tally(self, bytes: &[u8], weight: f32, place: Place<'_>) -> Result<Tally, DecodeError> {
        let mut tally = Tally::default();
        self.codec().decode(bytes, Target::Tally { weight, place, tally: &mut tally })?;
        Ok(tally)
    }
}
