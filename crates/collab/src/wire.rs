//! The bytes that sessions add to a peer's report: lineage, contribution, loss, drift sketch, the epoch of the next
//! state average. From strangers: lengths are checked first, and anything odd makes the whole note absent.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::lineage::EPOCH_MAX;
use crate::sketch::{SKETCH_LEN, Sketch};
use crate::{Channel, Lineage};
use bytes::{BufMut, Bytes, BytesMut};

const VERSION: u8 = 2;
/// Larger notes are not looked at.
const NOTE_BYTES_MAX: usize = 512;

/// What a session adds to its peer's report.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Note {
    pub(crate) lineage: Lineage,
    /// Samples that this peer put into finished rounds, since it joined.
    pub(crate) contributed: u64,
    /// The last loss that the training program reported.
    pub(crate) loss: Option<f32>,
    /// The epoch at whose start the parameters are to be averaged, if this peer asks for it.
    pub(crate) state_due: Option<u64>,
    pub(crate) sketch: Option<Sketch>,
    /// This peer waits for the others in the round of its epoch.
    pub(crate) waiting: Option<Channel>,
}

impl Note {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(NOTE_BYTES_MAX);
        out.put_u8(VERSION);
        out.put_u64_le(self.lineage.epoch);
        out.put_u64_le(self.lineage.samples);
        out.put_u64_le(self.lineage.state_averages);
        out.put_slice(&self.lineage.hash);
        out.put_u64_le(self.contributed);
        put_option(&mut out, self.loss, |out, loss| out.put_f32_le(loss));
        put_option(&mut out, self.state_due, |out, epoch| out.put_u64_le(epoch));
        put_option(&mut out, self.sketch.as_ref(), |out, sketch| {
            out.put_u64_le(sketch.epoch);
            for value in sketch.values {
                out.put_f32_le(value);
            }
        });
        out.put_u8(match self.waiting {
            None => 0,
            Some(Channel::Gradients) => 1,
            Some(Channel::State) => 2,
        });
        out.freeze()
    }

    /// `None` if the bytes are not a note: the peer then counts as one that says nothing.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > NOTE_BYTES_MAX {
            return None;
        }
        let mut input = Input(bytes);
        if input.u8()? != VERSION {
            return None;
        }
        let (epoch, samples, state_averages) = (input.u64()?, input.u64()?, input.u64()?);
        let lineage = Lineage { epoch, samples, state_averages, hash: input.array()? };
        if epoch > EPOCH_MAX {
            return None;
        }
        let contributed = input.u64()?;
        let loss = input.option(Input::finite_f32)?;
        let state_due = input.option(Input::u64)?;
        let sketch = input.option(|input| {
            let epoch = input.u64()?;
            let mut values = [0.0; SKETCH_LEN];
            for value in &mut values {
                *value = input.finite_f32()?;
            }
            Some(Sketch { epoch, values })
        })?;
        let waiting = match input.u8()? {
            0 => None,
            1 => Some(Channel::Gradients),
            2 => Some(Channel::State),
            _ => return None,
        };
        input.0.is_empty().then_some(Self { lineage, contributed, loss, state_due, sketch, waiting })
    }
}

fn put_option<T>(out: &mut BytesMut, value: Option<T>, put: impl FnOnce(&mut BytesMut, T)) {
    out.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(u8::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn finite_f32(&mut self) -> Option<f32> {
        self.array().map(f32::from_le_bytes).filter(|value| value.is_finite())
    }

    /// Outer `None`: malformed.
    fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.u8()? {
            0 => Some(None),
            1 => read(self).map(Some),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note() -> Note {
        Note {
            lineage: Lineage::genesis("run", &[3; 32]).next_epoch(&[1; 32], 77),
            contributed: 12,
            loss: Some(0.5),
            state_due: Some(9),
            sketch: Some(Sketch { epoch: 4, values: [1.5; SKETCH_LEN] }),
            waiting: Some(Channel::State),
        }
    }

    #[test]
    fn a_note_survives_the_wire_and_a_cut_one_is_absent() {
        let bytes = note().encode();
        assert_eq!(Note::decode(&bytes), Some(note()));
        for len in 0..bytes.len() {
            assert_eq!(Note::decode(bytes.get(..len).unwrap()), None, "cut at {len}");
        }
        let bare = Note { loss: None, state_due: None, sketch: None, ..note() };
        assert_eq!(Note::decode(&bare.encode()), Some(bare));
        let nan = Note { loss: Some(f32::NAN), ..note() };
        assert_eq!(Note::decode(&nan.encode()), None);
    }

    proptest! {
        #[test]
        fn strangers_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _absent_or_valid = Note::decode(&bytes);
        }
    }
}
