//! Sans-I/O. How a flat vector is cut into parts, one for each reducer, and those into chunks: the unit that is encoded,
//! framed, checked and summed.
//!
//! Consecutive tensors with the same elementwise scheme merge into one span; schemes that derive a codebook or a scale
//! from their values stay within one tensor, so that no tensor spoils another's codebook. Parts end where the shares say,
//! also within a tensor: a part that is a chunk too long would cost everybody the time of that chunk. Every peer computes
//! the same cut from the same tensors, policy and plan; [`Layout::hash`] of the whole proves the first two.

use potluck_compression::{Policy, Scheme, TensorInfo};
use std::ops::Range;

/// Values in the largest chunk: 512 KiB as f32.
const CHUNK_VALUES_MAX: usize = 128 << 10;
/// Values in the smallest chunk that cutting may make: below this, headers would cost over 1 %.
const CHUNK_VALUES_MIN: usize = 4 << 10;
/// The same of schemes with a codebook of its own for each chunk.
const CODEBOOK_VALUES_MIN: usize = 64 << 10;
/// Block length of the block-wise schemes.
const BLOCK_VALUES: usize = 4096;
/// Encoded bytes that a plan may ask for in a chunk.
pub(crate) const CHUNK_BYTES: std::ops::RangeInclusive<u32> = 16 << 10..=512 << 10;

/// One chunk of the vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Its values.
    pub range: Range<usize>,
    /// How they travel.
    pub scheme: Scheme,
}

impl Chunk {
    /// Bytes of the encoded chunk.
    pub fn encoded_bytes(&self) -> usize {
        self.scheme.encoded_len(self.range.len())
    }
}

/// All chunks of a vector, in order, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The chunks.
    pub chunks: Vec<Chunk>,
    /// Number of values.
    pub values: usize,
}

/// Whether a scheme treats every value by itself.
fn elementwise(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::None | Scheme::Float16 | Scheme::BFloat16)
}

/// Cuts fall on multiples of this.
fn grain(scheme: Scheme) -> usize {
    match scheme {
        Scheme::Blockwise8Bit | Scheme::Blockwise4Bit => BLOCK_VALUES,
        _ => 1,
    }
}

/// Consecutive values that travel alike.
type Span = (Range<usize>, Scheme);

fn spans(lengths: impl IntoIterator<Item = (usize, Scheme)>) -> Vec<Span> {
    let mut merged: Vec<Span> = Vec::new();
    let mut values = 0;
    for (len, scheme) in lengths {
        let range = values..values + len;
        values += len;
        match merged.last_mut() {
            _ if len == 0 => {}
            Some((last, same)) if *same == scheme && elementwise(scheme) => last.end = range.end,
            _ => merged.push((range, scheme)),
        }
    }
    merged
}

impl Layout {
    /// The layout of these tensors for one reducer.
    pub fn new(tensors: &[TensorInfo], policy: &Policy) -> Self {
        Self::cut(tensors, policy, &[1], *CHUNK_BYTES.end()).0
    }

    /// The layout of these tensors for reducers with these shares, in chunks of about so many encoded bytes, and the
    /// chunks of each reducer.
    pub(crate) fn cut(
        tensors: &[TensorInfo],
        policy: &Policy,
        shares: &[u32],
        chunk_bytes: u32,
    ) -> (Self, Vec<Range<usize>>) {
        let lengths =
            tensors.iter().map(|tensor| (tensor.shape.iter().product::<usize>(), policy.scheme_for(tensor)));
        Self::cut_spans(lengths, shares, chunk_bytes)
    }

    /// As [`Self::cut`], of consecutive `(length, scheme)` spans.
    pub(crate) fn cut_spans(
        lengths: impl IntoIterator<Item = (usize, Scheme)>,
        shares: &[u32],
        chunk_bytes: u32,
    ) -> (Self, Vec<Range<usize>>) {
        let spans = spans(lengths);
        let values = spans.last().map_or(0, |(range, _)| range.end);
        let ends = part_ends(&spans, values, shares);
        let mut chunks = Vec::new();
        for (span, scheme) in &spans {
            let inside = ends.iter().copied().filter(|end| span.start < *end && *end < span.end);
            let mut start = span.start;
            for end in inside.chain([span.end]) {
                let length = chunk_values(*scheme, values, shares.len(), chunk_bytes);
                chunks.extend(equal_chunks(start..end, *scheme, length));
                start = end;
            }
        }
        let mut parts = Vec::with_capacity(shares.len());
        let mut at = 0;
        for end in ends {
            let start = at;
            at += chunks[start..].partition_point(|chunk: &Chunk| chunk.range.start < end);
            parts.push(start..at);
        }
        (Self { chunks, values }, parts)
    }

    /// Encoded bytes of the whole vector.
    pub fn encoded_bytes(&self) -> usize {
        self.chunks.iter().map(Chunk::encoded_bytes).sum()
    }

    /// What two peers must agree on before they average.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for chunk in &self.chunks {
            hasher.update(&(chunk.range.start as u64).to_le_bytes());
            hasher.update(&(chunk.range.end as u64).to_le_bytes());
            hasher.update(&[chunk.scheme.wire_id()]);
        }
        *hasher.finalize().as_bytes()
    }
}

/// Where each part ends: as close to the shares as cuts may fall. They never fall so close to the end of a span that a
/// tiny chunk is left, and a small vector is cut coarsely.
fn part_ends(spans: &[Span], values: usize, shares: &[u32]) -> Vec<usize> {
    let total: f64 = spans.iter().map(|(range, scheme)| scheme.encoded_len(range.len()) as f64).sum();
    let units: f64 = shares.iter().map(|share| f64::from(*share)).sum();
    let coarse = if values < 4 * CHUNK_VALUES_MIN * shares.len() { CHUNK_VALUES_MIN } else { 1 };
    let (mut ends, mut given) = (Vec::with_capacity(shares.len()), 0.0);
    let (mut span, mut before) = (0, 0.0);
    for share in shares {
        given += f64::from(*share);
        let goal = total * given / units.max(1.0);
        while let Some((range, scheme)) = spans.get(span)
            && before + (scheme.encoded_len(range.len()) as f64) < goal
        {
            before += scheme.encoded_len(range.len()) as f64;
            span += 1;
        }
        ends.push(spans.get(span).map_or(values, |(range, scheme)| {
            let fraction = (goal - before) / scheme.encoded_len(range.len()) as f64;
            let grain = grain(*scheme).max(coarse);
            let offset = (range.len() as f64 * fraction / grain as f64).round() as usize * grain;
            range.start + off_the_edges(offset, range.len())
        }));
    }
    // Whatever rounding left belongs to the last one that reduces at all.
    let last = shares.iter().rposition(|share| *share > 0).unwrap_or(0);
    ends.iter_mut().skip(last).for_each(|end| *end = values);
    ends
}

/// The nearest place to cut a span that leaves no tiny piece.
fn off_the_edges(offset: usize, len: usize) -> usize {
    let near = CHUNK_VALUES_MIN / 2;
    if offset < near.min(len.div_ceil(2)) {
        0
    } else if offset + near > len {
        len
    } else {
        offset
    }
}

/// Equal chunks of about this length: parts of equally fast reducers then take equally long.
fn equal_chunks(piece: Range<usize>, scheme: Scheme, length: usize) -> impl Iterator<Item = Chunk> {
    let count = (piece.len() as f64 / length as f64).round().max(1.0) as usize;
    let grain = grain(scheme);
    let length = (piece.len().div_ceil(count).div_ceil(grain) * grain).max(1);
    let starts = piece.clone().step_by(length);
    starts.map(move |at| Chunk { range: at..(at + length).min(piece.end), scheme })
}

/// Chunk length: about four chunks for each reducer, as long as that is neither too many bytes nor too few values.
fn chunk_values(scheme: Scheme, values: usize, reducers: usize, chunk_bytes: u32) -> usize {
    let bytes_per_value = scheme.encoded_len(CHUNK_VALUES_MAX) as f64 / CHUNK_VALUES_MAX as f64;
    let wanted = (f64::from(chunk_bytes) / bytes_per_value) as usize;
    let codebook = matches!(scheme, Scheme::Uniform8Bit | Scheme::Quantile8Bit);
    let least = if codebook { CODEBOOK_VALUES_MIN } else { CHUNK_VALUES_MIN };
    let four = (values / (4 * reducers.max(1))).clamp(CHUNK_VALUES_MIN, CHUNK_VALUES_MAX);
    four.min(wanted.clamp(least, CHUNK_VALUES_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: u32 = 512 << 10;

    #[test]
    fn elementwise_spans_merge_and_codebooks_do_not() {
        let lengths = [
            (10, Scheme::Float16),
            (20, Scheme::Float16),
            (5, Scheme::Uniform8Bit),
            (5, Scheme::Uniform8Bit),
        ];
        let (layout, _) = Layout::cut_spans(lengths, &[1, 1], LARGE);
        let ranges: Vec<_> = layout.chunks.iter().map(|chunk| chunk.range.clone()).collect();
        assert_eq!(ranges, [0..30, 30..35, 35..40]);
    }

    #[test]
    fn chunks_and_parts_cover_everything_once() {
        for scheme in Scheme::ALL {
            for len in [0, 1, 4095, 4096, 100_000, 1_000_000] {
                for shares in [&[1][..], &[1, 1], &[0, 7, 0], &[3, 0, 1, 9, 0], &[5; 16], &[1; 64]] {
                    for bytes in [16 << 10, LARGE] {
                        let lengths = [(len / 3, *scheme), (len - len / 3, *scheme)];
                        let (layout, parts) = Layout::cut_spans(lengths, shares, bytes);
                        let (mut at, mut chunk_at) = (0, 0);
                        for chunk in &layout.chunks {
                            assert_eq!(chunk.range.start, at);
                            assert!(!chunk.range.is_empty() && chunk.range.len() <= 3 * CHUNK_VALUES_MAX / 2);
                            at = chunk.range.end;
                        }
                        for (part, share) in parts.iter().zip(shares) {
                            assert_eq!(part.start, chunk_at);
                            assert!(*share > 0 || part.is_empty(), "{part:?} of {shares:?}");
                            chunk_at = part.end;
                        }
                        assert_eq!((at, chunk_at, parts.len()), (len, layout.chunks.len(), shares.len()));
                    }
                }
            }
        }
    }

    #[test]
    fn parts_are_as_long_as_their_shares() {
        let tensors = [(333_333, Scheme::Uniform8Bit), (666_667, Scheme::Uniform8Bit)];
        for shares in [&[1; 16][..], &[4, 2, 1, 1], &[10, 1]] {
            let (layout, parts) = Layout::cut_spans(tensors, shares, LARGE);
            let all: u32 = shares.iter().sum();
            for (part, share) in parts.into_iter().zip(shares) {
                let found: usize = layout.chunks[part].iter().map(Chunk::encoded_bytes).sum();
                let wanted = layout.encoded_bytes() as f64 * f64::from(*share) / f64::from(all);
                assert!((found as f64 / wanted - 1.0).abs() < 0.05, "{found} for {wanted}: {shares:?}");
            }
        }
    }

    #[test]
    fn slow_links_get_small_chunks() {
        let chunks = |scheme, bytes| Layout::cut_spans([(4_000_000, scheme)], &[1; 4], bytes).0.chunks.len();
        assert_eq!(chunks(Scheme::None, LARGE), 32);
        assert_eq!(chunks(Scheme::None, 64 << 10), 244);
        assert_eq!(chunks(Scheme::Uniform8Bit, 16 << 10), 60, "codebooks would cost more than they save");
    }
}
