//! What a scheme implements, and the plumbing that lets one decoder loop serve both "assign" and "add weighted".

use crate::simd::{self, Isa, Kernel};
use crate::{DecodeError, EncodeError, EncodeReport};

/// Reusable memory of encoders: keep one per thread, and calls stop allocating once it is warm.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Sort keys of the quantile estimate.
    pub(crate) keys: Vec<u32>,
    /// The other half of the radix sort.
    pub(crate) keys_spare: Vec<u32>,
}

impl Scratch {
    /// An empty scratch; it grows on first use.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// One buffer format.
pub(crate) trait Codec: Sync {
    /// Bytes for `count` values; saturates instead of overflowing.
    fn encoded_len(&self, count: usize) -> usize;
    /// Append the buffer to `out`. On an error the caller truncates `out` again.
    fn encode(
        &self,
        values: &[f32],
        out: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError>;
    /// Check `bytes` (length and every header field) completely, then write to `target`.
    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError>;
}

/// Where decoded values go.
pub(crate) enum Target<'a> {
    Assign(&'a mut [f32]),
    Add { weight: f32, acc: &'a mut [f32] },
}

/// What to do with one decoded value.
pub(crate) trait Sink: Copy {
    fn put(self, slot: &mut f32, value: f32);
}

#[derive(Clone, Copy)]
struct Assign;
impl Sink for Assign {
    #[inline(always)]
    fn put(self, slot: &mut f32, value: f32) {
        *slot = value;
    }
}

#[derive(Clone, Copy)]
struct Add(f32);
impl Sink for Add {
    #[inline(always)]
    fn put(self, slot: &mut f32, value: f32) {
        // Two roundings, never fused: every CPU gives the same bits.
        *slot += self.0 * value;
    }
}

/// The loop of a decoder, after all checks. `read` must be `#[inline(always)]`.
pub(crate) trait Reader {
    fn read<I: Isa, S: Sink>(self, isa: I, slots: &mut [f32], sink: S);
}

struct Run<'a, R, S> {
    reader: R,
    slots: &'a mut [f32],
    sink: S,
}

impl<R: Reader, S: Sink> Kernel for Run<'_, R, S> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        self.reader.read(isa, self.slots, self.sink);
    }
}

impl Target<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Assign(slots) => slots.len(),
            Self::Add { acc, .. } => acc.len(),
        }
    }

    /// Run `reader` over all slots with the best instructions at hand.
    pub(crate) fn fill<R: Reader>(self, reader: R) {
        match self {
            Self::Assign(slots) => simd::dispatch(Run { reader, slots, sink: Assign }),
            Self::Add { weight, acc } => simd::dispatch(Run { reader, slots: acc, sink: Add(weight) }),
        }
    }
}

/// The little-endian f32 at `bytes[at..at + 4]`.
#[inline(always)]
pub(crate) fn f32_at(bytes: &[u8], at: usize) -> f32 {
    let mut word = [0_u8; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    f32::from_le_bytes(word)
}

/// The little-endian u64 at `bytes[at..at + 8]`.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0_u8; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Append `count` elements of `width` bytes in cache-sized pieces: `fill(first element, piece)` writes each piece
/// right after it was zeroed in the cache, so that memory is written once and no `unsafe` is needed.
#[inline(always)]
pub(crate) fn append_chunks<T>(
    values: &[T],
    width: usize,
    out: &mut Vec<u8>,
    mut fill: impl FnMut(&[T], &mut [u8]),
) {
    const CHUNK: usize = 2048;
    out.reserve(values.len() * width);
    for chunk in values.chunks(CHUNK) {
        let start = out.len();
        out.resize(start + chunk.len() * width, 0);
        fill(chunk, &mut out[start..]);
    }
}
