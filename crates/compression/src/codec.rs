//! What a scheme implements, and the plumbing that lets one decoder loop serve both "assign" and "add weighted".

use crate::out::Out;
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::tally::Tally;
use crate::{DType, DecodeError, EncodeError, EncodeReport};

/// Values in flight between two steps of a fused loop: 16 KiB, which stay in the L1 cache. A multiple of the blocks of
/// every scheme.
pub(crate) const PIECE: usize = 4096;

/// Reusable memory of encoders: keep one per thread, and calls stop allocating once it is warm.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Sort keys of the quantile estimate.
    pub(crate) keys: Vec<u32>,
    /// The other half of the radix sort.
    pub(crate) keys_spare: Vec<u32>,
    /// Scaled values, for schemes that look at all of them more than once.
    pub(crate) scaled: Vec<f32>,
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
    /// Write the buffer, all of it, to `out`, which has that much room. What is there after an error does not matter.
    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError>;
    /// Check `bytes` (length and every header field) completely, then write to `target`.
    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError>;
}

/// Where decoded values go.
pub(crate) enum Target<'a> {
    Assign(&'a mut [f32]),
    /// Assign to little-endian floats of another type.
    Narrow {
        dtype: DType,
        out: &'a mut [u8],
    },
    Add {
        weight: f32,
        acc: &'a mut [f32],
    },
    /// Add, and count what was decoded.
    Tally {
        weight: f32,
        place: Place<'a>,
        tally: &'a mut Tally,
    },
}

/// Where a sum is, and where it goes.
pub(crate) enum Place<'a> {
    Within(&'a mut [f32]),
    Apart { sum: &'a [f32], out: &'a mut [f32] },
}

impl Place<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Within(acc) => acc.len(),
            Self::Apart { out, .. } => out.len(),
        }
    }

    /// Add `weight * piece` to the sum from number `at` on. Two roundings, as in [`Add`].
    #[inline(always)]
    pub(crate) fn add(&mut self, at: usize, weight: f32, piece: &[f32]) {
        let span = at..at + piece.len();
        match self {
            Self::Within(acc) => {
                for (slot, value) in acc[span].iter_mut().zip(piece) {
                    *slot += weight * value;
                }
            }
            Self::Apart { sum, out } => {
                for ((slot, old), value) in out[span.clone()].iter_mut().zip(&sum[span]).zip(piece) {
                    *slot = old + weight * value;
                }
            }
        }
    }
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
    /// Decode the values from number `at` on, a multiple of [`PIECE`], as many as there are `slots`.
    fn read<I: Isa, S: Sink>(&self, isa: I, at: usize, slots: &mut [f32], sink: S);
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
        self.reader.read(isa, 0, self.slots, self.sink);
    }
}

struct RunNarrow<'a, R> {
    reader: R,
    dtype: DType,
    out: &'a mut [u8],
}

impl<R: Reader> Kernel for RunNarrow<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut buffer = [0.0_f32; PIECE];
        for (number, out) in self.out.chunks_mut(PIECE * self.dtype.size()).enumerate() {
            let piece = &mut buffer[..out.len() / self.dtype.size()];
            self.reader.read(isa, number * PIECE, piece, Assign);
            self.dtype.narrow(piece, out);
        }
    }
}

struct RunTally<'a, R> {
    reader: R,
    weight: f32,
    place: Place<'a>,
    tally: &'a mut Tally,
}

impl<R: Reader> Kernel for RunTally<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let count = self.place.len();
        let mut buffer = [0.0_f32; PIECE];
        for at in (0..count).step_by(PIECE) {
            let piece = &mut buffer[..PIECE.min(count - at)];
            self.reader.read(isa, at, piece, Assign);
            self.tally.take(at, piece);
            self.place.add(at, self.weight, piece);
        }
    }
}

impl Target<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Assign(slots) => slots.len(),
            Self::Narrow { dtype, out } => out.len() / dtype.size(),
            Self::Add { acc, .. } => acc.len(),
            Self::Tally { place, .. } => place.len(),
        }
    }

    /// Run `reader` over all slots with the best instructions at hand.
    pub(crate) fn fill<R: Reader>(self, reader: R) {
        match self {
            Self::Assign(slots) => simd::dispatch(Run { reader, slots, sink: Assign }),
            Self::Narrow { dtype, out } => simd::dispatch(RunNarrow { reader, dtype, out }),
            Self::Add { weight, acc } => simd::dispatch(Run { reader, slots: acc, sink: Add(weight) }),
            Self::Tally { weight, place, tally } => {
                simd::dispatch(RunTally { reader, weight, place, tally });
            }
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

/// Write `width` bytes for each value, in cache-sized pieces: `fill(values, piece)` writes each piece right after it was
/// zeroed in the cache, so that memory is written once. Returns how many products were clamped.
#[inline(always)]
pub(crate) fn append_chunks(
    source: Source<'_>,
    width: usize,
    out: &mut Out<'_>,
    mut fill: impl FnMut(&[f32], &mut [u8]),
) -> usize {
    const CHUNK: usize = 2048;
    source.pieces(
        CHUNK,
        #[inline(always)]
        |chunk| fill(chunk, out.grow(chunk.len() * width)),
    )
}
