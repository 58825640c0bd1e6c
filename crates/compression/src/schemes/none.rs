//! The values themselves, little-endian. Error: none. NaN and infinity pass unchanged.

use crate::codec::{Codec, Reader, Scratch, Sink, Target, append_chunks};
use crate::error::check_length;
use crate::out::Out;
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport};

pub(crate) struct None;

impl Codec for None {
    fn encoded_len(&self, count: usize) -> usize {
        count.saturating_mul(4)
    }

    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        _: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        let clamped = simd::dispatch(Copy { source, out });
        Ok(EncodeReport { clamped, ..EncodeReport::default() })
    }

    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        check_length(self.encoded_len(target.len()), bytes.len())?;
        target.fill(Words(bytes));
        Ok(())
    }
}

struct Copy<'a, 'b> {
    source: Source<'a>,
    out: &'a mut Out<'b>,
}

impl Kernel for Copy<'_, '_> {
    type Output = usize;
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> usize {
        append_chunks(
            self.source,
            4,
            self.out,
            #[inline(always)]
            |chunk, piece| {
                for (word, value) in piece.chunks_exact_mut(4).zip(chunk) {
                    word.copy_from_slice(&value.to_le_bytes());
                }
            },
        )
    }
}

struct Words<'a>(&'a [u8]);

impl Reader for Words<'_> {
    #[inline(always)]
    fn read<I: Isa, S: Sink>(&self, _: I, at: usize, slots: &mut [f32], sink: S) {
        let (words, _) = self.0[4 * at..].as_chunks::<4>();
        for (slot, word) in slots.iter_mut().zip(words) {
            sink.put(slot, f32::from_le_bytes(*word));
        }
    }
}
