//! What the state protocol says: an offer (which snapshot, which chunks) and chunks. Every length that a stranger
//! declares is checked against a limit before anything is allocated.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::{BufMut, Bytes, BytesMut};
use std::collections::BTreeMap;

/// Bytes of one chunk; the last of a blob may be shorter.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of a whole state, at most: 64 GiB.
pub const STATE_BYTES_MAX: u64 = 64 << 30;
/// Named buffers of a state, at most.
pub const BLOBS_MAX: usize = 16_384;
/// Bytes of a name or of a fact, at most.
const TEXT_BYTES_MAX: usize = 1 << 20;
const VERSION: u8 = 1;

/// What a peer asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// What do you have that is of this epoch or later?
    Offer { epoch_min: u64 },
    /// What led on from this history?
    Next { lineage: [u8; 32] },
    /// Which chunks of this snapshot do you have?
    Have { root: [u8; 32] },
    /// One chunk.
    Chunk { root: [u8; 32], index: u32 },
}

/// A snapshot without its buffers: what it holds and the hash of each chunk. Its own hash is the root.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Index {
    pub(crate) epoch: u64,
    pub(crate) lineage: [u8; 32],
    pub(crate) meta: BTreeMap<String, String>,
    pub(crate) blobs: BTreeMap<String, u64>,
    pub(crate) hashes: Vec<[u8; 32]>,
}

impl Request {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(40);
        out.put_u8(VERSION);
        match self {
            Self::Offer { epoch_min } => {
                out.put_u8(0);
                out.put_u64_le(*epoch_min);
            }
            Self::Have { root } => {
                out.put_u8(1);
                out.put_slice(root);
            }
            Self::Chunk { root, index } => {
                out.put_u8(2);
                out.put_slice(root);
                out.put_u32_le(*index);
            }
            Self::Next { lineage } => {
                out.put_u8(3);
                out.put_slice(lineage);
            }
        }
        out.freeze()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = Input(bytes);
        if input.u8()? != VERSION {
            return None;
        }
        let request = match input.u8()? {
            0 => Self::Offer { epoch_min: input.u64()? },
            1 => Self::Have { root: input.array()? },
            2 => Self::Chunk { root: input.array()?, index: input.u32()? },
            3 => Self::Next { lineage: input.array()? },
            _ => return None,
        };
        input.0.is_empty().then_some(request)
    }
}

impl Index {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.hashes.len().saturating_mul(32).saturating_add(4096));
        out.put_u8(VERSION);
        out.put_u64_le(self.epoch);
        out.put_slice(&self.lineage);
        out.put_u32_le(u32::try_from(self.meta.len()).unwrap_or(u32::MAX));
        for (name, fact) in &self.meta {
            put_text(&mut out, name);
            put_text(&mut out, fact);
        }
        out.put_u32_le(u32::try_from(self.blobs.len()).unwrap_or(u32::MAX));
        for (name, len) in &self.blobs {
            put_text(&mut out, name);
            out.put_u64_le(*len);
        }
        for hash in &self.hashes {
            out.put_slice(hash);
        }
        out.freeze()
    }

    /// `None` if the bytes are no index, or one that is larger than we would take.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = Input(bytes);
        if input.u8()? != VERSION {
            return None;
        }
        let (epoch, lineage) = (input.u64()?, input.array()?);
        let mut meta = BTreeMap::new();
        for _ in 0..input.count()? {
            meta.insert(input.text()?, input.text()?);
        }
        let mut blobs = BTreeMap::new();
        let mut total = 0u64;
        for _ in 0..input.count()? {
            let (name, len) = (input.text()?, input.u64()?);
            total = total.checked_add(len)?;
            blobs.insert(name, len);
        }
        if total > STATE_BYTES_MAX {
            return None;
        }
        // The hashes are the rest: exactly as many as the buffers have chunks, so nothing declared is believed.
        let count = chunk_count(&blobs);
        if input.0.len() != count.checked_mul(32)? {
            return None;
        }
        let hashes = input.0.chunks_exact(32).filter_map(|hash| hash.try_into().ok()).collect();
        Some(Self { epoch, lineage, meta, blobs, hashes })
    }

    /// Bytes of all buffers together.
    pub(crate) fn bytes(&self) -> u64 {
        self.blobs.values().fold(0, |sum, len| sum.saturating_add(*len))
    }

    /// The hash by which everybody names this snapshot.
    pub(crate) fn root(&self) -> [u8; 32] {
        *blake3::hash(&self.encode()).as_bytes()
    }
}

/// Chunks of all buffers together. A chunk never crosses a buffer, so that none has to be copied to serve it.
pub(crate) fn chunk_count(blobs: &BTreeMap<String, u64>) -> usize {
    let chunks = blobs.values().map(|len| len.div_ceil(CHUNK_BYTES as u64));
    chunks.fold(0u64, u64::saturating_add).try_into().unwrap_or(usize::MAX)
}

/// One bit per chunk.
pub(crate) fn encode_bits(bits: &[bool]) -> Bytes {
    let byte = |eight: &[bool]| eight.iter().rev().fold(0u8, |byte, bit| (byte << 1) | u8::from(*bit));
    bits.chunks(8).map(byte).collect()
}

/// `None` unless there are exactly `count` bits.
pub(crate) fn decode_bits(bytes: &[u8], count: usize) -> Option<Vec<bool>> {
    if bytes.len() != count.div_ceil(8) {
        return None;
    }
    Some(bytes.iter().flat_map(|byte| (0..8u32).map(move |bit| (byte >> bit) & 1 == 1)).take(count).collect())
}

fn put_text(out: &mut BytesMut, text: &str) {
    out.put_u32_le(u32::try_from(text.len()).unwrap_or(u32::MAX));
    out.put_slice(text.as_bytes());
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

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self) -> Option<usize> {
        usize::try_from(self.u32()?).ok().filter(|count| *count <= BLOBS_MAX)
    }

    fn text(&mut self) -> Option<String> {
        let len = usize::try_from(self.u32()?).ok().filter(|len| *len <= TEXT_BYTES_MAX)?;
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        String::from_utf8(head.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index() -> Index {
        let blobs = BTreeMap::from([("a".to_owned(), 5), ("b".to_owned(), 1_048_577), ("c".into(), 0)]);
        let hashes = vec![[7; 32]; chunk_count(&blobs)];
        let meta = BTreeMap::from([("scheduler".to_owned(), "{}".to_owned())]);
        Index { epoch: 9, lineage: [3; 32], meta, blobs, hashes }
    }

    #[test]
    fn messages_survive_the_wire_and_cut_ones_are_refused() {
        assert_eq!(index().hashes.len(), 3);
        let bytes = index().encode();
        assert_eq!(Index::decode(&bytes), Some(index()));
        for len in 0..bytes.len() {
            assert_eq!(Index::decode(bytes.get(..len).unwrap()), None, "cut at {len}");
        }
        for request in [
            Request::Offer { epoch_min: 4 },
            Request::Have { root: [1; 32] },
            Request::Chunk { root: [2; 32], index: 77 },
            Request::Next { lineage: [3; 32] },
        ] {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
    }

    proptest! {
        #[test]
        fn bits_survive(bits in proptest::collection::vec(any::<bool>(), 0..40)) {
            prop_assert_eq!(decode_bits(&encode_bits(&bits), bits.len()), Some(bits));
        }

        #[test]
        fn strangers_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _refused_or_valid = (Request::decode(&bytes), Index::decode(&bytes), decode_bits(&bytes, 77));
        }
    }
}
