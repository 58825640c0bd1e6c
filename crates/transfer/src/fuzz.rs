//! The decoders of this crate for fuzz targets and property tests: each takes any bytes and asserts what must hold.

use crate::wire::{Index, Request, chunk_count, decode_bits, encode_bits};
use bytes::Bytes;

/// A request of a joiner; what decodes encodes to the same bytes.
pub fn request(input: &[u8]) {
    if let Some(request) = Request::decode(input) {
        assert_eq!(request.encode(), input);
    }
}

/// A donor's list of chunks; what decodes is within its limits and survives another round trip.
pub fn index(input: &[u8]) {
    if let Some(index) = Index::decode(input) {
        assert_eq!(index.hashes.len(), chunk_count(&index.blobs));
        assert_eq!(Index::decode(&index.encode()).as_ref(), Some(&index));
    }
}

/// Which chunks a donor has; the first two bytes are how many there are.
pub fn bits(input: &[u8]) {
    let Some((count, bytes)) = input.split_first_chunk() else { return };
    let count = usize::from(u16::from_le_bytes(*count));
    if let Some(bits) = decode_bits(bytes, count) {
        assert_eq!(bits.len(), count);
        assert_eq!(decode_bits(&encode_bits(&bits), count), Some(bits));
    }
}

/// Inputs that decode, for a corpus: a decoder's name and the bytes.
pub fn seeds() -> Vec<(&'static str, Bytes)> {
    let requests = [
        Request::Offer { epoch_min: 3 },
        Request::Have { root: [1; 32] },
        Request::Chunk { root: [1; 32], index: 2 },
        Request::Next { lineage: [7; 32] },
    ];
    let index = Index {
        epoch: 4,
        lineage: [5; 32],
        meta: [("optimizer".into(), "{}".into())].into(),
        blobs: [("weights".into(), 3 << 20), ("steps".into(), 8)].into(),
        hashes: vec![[6; 32]; 4],
    };
    let mut seeds: Vec<_> = requests.iter().map(|request| ("transfer_request", request.encode())).collect();
    seeds.push(("transfer_index", index.encode()));
    seeds.push(("transfer_bits", [&[11, 0][..], &encode_bits(&[true; 11])].concat().into()));
    seeds
}
