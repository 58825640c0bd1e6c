//! Sans-I/O. The finished averages of a round, encoded as they travelled, part by part from the first chunk on.

use crate::spans::{Chunk, Layout};
use crate::wire::{AVERAGE_HEAD_BYTES, average_head};
use bytes::Bytes;
use std::ops::Range;

/// One finished chunk, in the frame in which it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Average {
    /// Bit i: member i contributed.
    pub(crate) mask: u64,
    /// A frame as [`crate::wire::average_head`] begins it.
    frame: Bytes,
    /// Of the encoded values, taken while they were in the processor's cache.
    hash: [u8; 32],
    /// Why the values could not be decoded.
    fault: Option<String>,
}

impl Average {
    /// Decode the average that `frame` holds of `chunk` into `vector` (which is empty at auxiliary peers), and hash it.
    pub(crate) fn open(frame: Bytes, mask: u64, chunk: &Chunk, vector: &mut [f32]) -> Self {
        let mut average = Self { mask, frame, hash: [0; 32], fault: None };
        average.hash = *blake3::hash(average.bytes()).as_bytes();
        if let Some(target) = vector.get_mut(chunk.range.clone()) {
            let decoded = chunk.scheme.decode(average.bytes(), target);
            average.fault = decoded.err().map(|error| error.to_string());
        }
        average
    }

    /// The encoded values.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.frame.get(AVERAGE_HEAD_BYTES..).unwrap_or_default()
    }

    /// The encoded values, on the memory that they came in.
    fn encoded(&self) -> Bytes {
        self.frame.slice(AVERAGE_HEAD_BYTES.min(self.frame.len())..)
    }

    /// The frame for another member: the one that we have, unless its head must differ.
    pub(crate) fn frame(&self, part: u16, generation: u16, chunk: u32) -> Bytes {
        let head = average_head(part, generation, chunk, self.mask);
        if self.frame.starts_with(&head) { self.frame.clone() } else { [&head, self.bytes()].concat().into() }
    }
}

#[derive(Debug)]
pub(crate) struct Part {
    /// Chunks of the layout.
    pub(crate) range: Range<usize>,
    /// Who reduces it: see `Plan::reducer`.
    pub(crate) generation: u16,
    pub(crate) done: Vec<Average>,
}

#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) parts: Vec<Part>,
}

impl Store {
    pub(crate) fn new(ranges: Vec<Range<usize>>) -> Self {
        Self {
            parts: ranges.into_iter().map(|range| Part { range, generation: 0, done: Vec::new() }).collect(),
        }
    }

    /// Add the next chunk of a part; false if it is not the next or has the wrong length.
    pub(crate) fn push(&mut self, layout: &Layout, part: usize, chunk: u32, average: Average) -> bool {
        let fits = self.next(layout, part, chunk);
        if fits.is_none_or(|chunk| chunk.encoded_bytes() != average.bytes().len()) {
            return false;
        }
        let Some(part) = self.parts.get_mut(part) else { return false };
        part.done.push(average);
        true
    }

    /// The chunk that is added to a part next, if it is this one.
    pub(crate) fn next<'a>(&self, layout: &'a Layout, part: usize, chunk: u32) -> Option<&'a Chunk> {
        let part = self.parts.get(part)?;
        let due = part.done.len() == chunk as usize && !part.is_complete();
        if due { layout.chunks.get(part.range.start + part.done.len()) } else { None }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.parts.iter().all(Part::is_complete)
    }

    /// Everything, encoded, in the order of the vector.
    pub(crate) fn encoded(&self) -> Vec<Bytes> {
        self.parts.iter().flat_map(|part| part.done.iter().map(Average::encoded)).collect()
    }

    pub(crate) fn digests(&self) -> Vec<[u8; 32]> {
        self.parts.iter().map(Part::digest).collect()
    }

    /// Whether everything was decoded, or which chunk was not.
    pub(crate) fn check(&self, layout: &Layout) -> Result<(), String> {
        for part in &self.parts {
            for (chunk, average) in layout.chunks[part.range.clone()].iter().zip(&part.done) {
                if average.mask == 0 {
                    return Err(format!("no contribution to values {:?} survived", chunk.range));
                }
                if let Some(fault) = &average.fault {
                    return Err(format!("average of values {:?} does not decode: {fault}", chunk.range));
                }
            }
        }
        Ok(())
    }
}

impl Part {
    pub(crate) fn is_complete(&self) -> bool {
        self.done.len() == self.range.len()
    }

    /// Names mask, length and bytes of every chunk, by way of their hashes.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for average in &self.done {
            hasher.update(&average.mask.to_le_bytes());
            hasher.update(&(average.bytes().len() as u64).to_le_bytes());
            hasher.update(&average.hash);
        }
        *hasher.finalize().as_bytes()
    }
}
