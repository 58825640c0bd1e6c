//! Sans-I/O. The finished averages of a round, encoded as they travelled, part by part from the first chunk on.

use crate::spans::Layout;
use bytes::Bytes;
use std::ops::Range;

/// One finished chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Average {
    /// Bit i: member i contributed.
    pub(crate) mask: u64,
    pub(crate) bytes: Bytes,
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
        let Some(part) = self.parts.get_mut(part) else { return false };
        if part.done.len() != chunk as usize || part.is_complete() {
            return false;
        }
        let fits = layout.chunks.get(part.range.start + part.done.len());
        if fits.is_none_or(|chunk| chunk.encoded_bytes() != average.bytes.len()) {
            return false;
        }
        part.done.push(average);
        true
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.parts.iter().all(Part::is_complete)
    }

    pub(crate) fn digests(&self) -> Vec<[u8; 32]> {
        self.parts.iter().map(Part::digest).collect()
    }

    /// Decode everything into `vector`, or say which chunk does not decode.
    pub(crate) fn decode(&self, layout: &Layout, vector: &mut [f32]) -> Result<(), String> {
        for part in &self.parts {
            for (chunk, average) in layout.chunks[part.range.clone()].iter().zip(&part.done) {
                if average.mask == 0 {
                    return Err(format!("no contribution to values {:?} survived", chunk.range));
                }
                let target = &mut vector[chunk.range.clone()];
                chunk.scheme.decode(&average.bytes, target).map_err(|error| {
                    format!("average of values {:?} does not decode: {error}", chunk.range)
                })?;
            }
        }
        Ok(())
    }
}

impl Part {
    pub(crate) fn is_complete(&self) -> bool {
        self.done.len() == self.range.len()
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for average in &self.done {
            hasher.update(&average.mask.to_le_bytes());
            hasher.update(&(average.bytes.len() as u64).to_le_bytes());
            hasher.update(&average.bytes);
        }
        *hasher.finalize().as_bytes()
    }
}
