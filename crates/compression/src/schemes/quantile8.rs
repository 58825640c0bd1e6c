//! hivemind's `QUANTILE_8BIT`: 256 buckets of equal population, each decoded to the mean of its values.
//!
//! Up to [`EXACT_MAX`] values the borders are the exact quantiles (linear interpolation). Above, they are the quantiles
//! of a fixed, jittered sample of that size: bucket populations then vary by about 256 / sqrt(sample) (relative).
//!
//! Error: every value decodes into the range of its own bucket, so by less than the distance of the two borders around
//! it; order is preserved. NaN and infinity are refused with the index of the first.

use crate::codec::{Codec, Scratch, Target};
use crate::finite::first_non_finite;
use crate::out::Out;
use crate::schemes::codebook;
use crate::simd::{self, Isa, Kernel};
use crate::source::Source;
use crate::{DecodeError, EncodeError, EncodeReport, Scheme};

/// Values whose quantiles are exact; also the size of the sample above it.
const EXACT_MAX: usize = 1 << 15;

pub(crate) struct Quantile8Bit;

impl Codec for Quantile8Bit {
    fn encoded_len(&self, count: usize) -> usize {
        codebook::encoded_len(count)
    }

    fn encode(
        &self,
        source: Source<'_>,
        out: &mut Out<'_>,
        scratch: &mut Scratch,
    ) -> Result<EncodeReport, EncodeError> {
        source.whole(scratch, |values, scratch| {
            if let Some(index) = first_non_finite(values) {
                return Err(EncodeError::NotFinite { scheme: Scheme::Quantile8Bit, index });
            }
            let borders = borders(values, scratch);
            let index = Index::new(&borders);
            simd::dispatch(Classify { source: Source::plain(values), borders: &borders, index: &index, out });
            Ok(EncodeReport::default())
        })
    }

    fn decode(&self, bytes: &[u8], target: Target<'_>) -> Result<(), DecodeError> {
        codebook::decode(bytes, target)
    }
}

/// The 255 inner quantiles of 257 evenly spaced levels, ascending, and one unused entry.
fn borders(values: &[f32], scratch: &mut Scratch) -> [f32; 256] {
    let mut borders = [f32::INFINITY; 256];
    if values.is_empty() {
        return borders;
    }
    sample(values, &mut scratch.keys);
    radix_sort(&mut scratch.keys, &mut scratch.keys_spare);
    let sorted = &scratch.keys;
    let last = sorted.len() - 1;
    for (level, border) in borders.iter_mut().take(255).enumerate() {
        let position = (level + 1) as f64 / 256.0 * last as f64;
        let below = position as usize;
        let low = f64::from(from_key(sorted[below]));
        let high = f64::from(from_key(sorted[last.min(below + 1)]));
        *border = (low + (high - low) * (position - below as f64)) as f32;
    }
    borders
}

/// All values, or one from each of `EXACT_MAX` equal stretches; the place within its stretch varies, so that a period
/// in the data does not line up with the sample.
fn sample(values: &[f32], keys: &mut Vec<u32>) {
    keys.clear();
    if values.len() <= EXACT_MAX {
        keys.extend(values.iter().map(|v| to_key(*v)));
        return;
    }
    let stretch = values.len() as u64 * 65536 / EXACT_MAX as u64;
    keys.extend((0..EXACT_MAX as u64).map(|number| {
        // splitmix64: well-mixed bits from a counter.
        let mut bits = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let jitter = ((bits >> 48) * (stretch >> 16)) >> 16;
        to_key(values[((number * stretch) >> 16) as usize + jitter as usize])
    }));
}

/// An integer that sorts as the float does.
fn to_key(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}

fn from_key(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & 0x7fff_ffff } else { !key })
}

/// Sort by three passes of 11 bits: the keys are 32 bits wide, so the number of passes does not grow with the sample.
fn radix_sort(keys: &mut Vec<u32>, spare: &mut Vec<u32>) {
    const BITS: usize = 11;
    const MASK: usize = (1 << BITS) - 1;
    if keys.len() < 256 {
        keys.sort_unstable();
        return;
    }
    spare.clear();
    spare.resize(keys.len(), 0);
    for pass in 0..3 {
        let shift = pass * BITS;
        let mut starts = [0_u32; 1 << BITS];
        for key in keys.iter() {
            starts[(*key >> shift) as usize & MASK] += 1;
        }
        let mut total = 0;
        for start in &mut starts {
            total += std::mem::replace(start, total);
        }
        for key in keys.iter() {
            let slot = &mut starts[(*key >> shift) as usize & MASK];
            spare[*slot as usize] = *key;
            *slot += 1;
        }
        std::mem::swap(keys, spare);
    }
}

/// Narrows the search for a value's bucket: the range of the borders cut into equal cells, with the number of borders
/// below each. The cell of a value never decreases as the value grows, so the borders in lower cells are below the
/// value, those in higher cells above it, and only the few in its own cell are compared.
struct Index {
    lowest: f32,
    /// Cells per unit of value.
    density: f32,
    below: [u8; CELLS],
    /// Halvings that the fullest cell needs.
    halvings: u32,
}

const CELLS: usize = 4096;

impl Index {
    fn new(borders: &[f32; 256]) -> Self {
        let (lowest, highest) = (borders[0], borders[254]);
        let density = (CELLS - 1) as f32 / (highest - lowest);
        // Borders that are all equal, or too far apart or too close for the arithmetic, share one cell.
        let density = if density.is_normal() { density } else { 0.0 };
        let mut index = Self { lowest, density, below: [0; CELLS], halvings: 0 };
        let mut fullest = 0;
        let mut done = 0;
        while done < 255 {
            let cell = index.cell(borders[done]);
            let here = borders[done..255].iter().take_while(|border| index.cell(**border) == cell).count();
            done += here;
            fullest = fullest.max(here);
            index.below[cell + 1..].fill(done as u8);
        }
        index.halvings = usize::BITS - fullest.leading_zeros();
        index
    }

    #[inline(always)]
    fn cell(&self, value: f32) -> usize {
        // Adding 2^23 rounds to an integer in the low mantissa bits. An infinite distance times zero is NaN, which both
        // comparisons turn into the first cell.
        let position = (value - self.lowest) * self.density;
        let low = if position > 0.0 { position } else { 0.0 };
        let clamped = if low < (CELLS - 1) as f32 { low } else { (CELLS - 1) as f32 };
        (clamped + 8_388_608.0).to_bits() as usize & (CELLS - 1)
    }
}

struct Classify<'a, 'b> {
    source: Source<'a>,
    borders: &'a [f32; 256],
    index: &'a Index,
    out: &'a mut Out<'b>,
}

impl Kernel for Classify<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // A constant number of halvings leaves no branch in the loop.
        match self.index.halvings {
            0 | 1 => self.search::<I, 1>(isa),
            2 => self.search::<I, 2>(isa),
            3 | 4 => self.search::<I, 4>(isa),
            _ => self.search::<I, 8>(isa),
        }
    }
}

impl Classify<'_, '_> {
    #[inline(always)]
    fn search<I: Isa, const HALVINGS: u32>(self, isa: I) {
        let Self { source, borders, index, out } = self;
        codebook::encode(
            isa,
            source,
            out,
            #[inline(always)]
            |chunk, indices| {
                let mut cells = [0_u16; codebook::CHUNK];
                for (cell, value) in cells.iter_mut().zip(chunk) {
                    *cell = index.cell(*value) as u16;
                }
                for ((slot, value), cell) in indices.iter_mut().zip(chunk).zip(cells) {
                    // The number of borders strictly below the value.
                    let mut below = usize::from(index.below[usize::from(cell) & (CELLS - 1)]);
                    for halving in (0..HALVINGS).rev() {
                        let step = 1 << halving;
                        let border = borders[(below + step - 1).min(255)];
                        below += if *value > border { step } else { 0 };
                    }
                    *slot = below as u8;
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use super::*;

    #[test]
    fn keys_order_and_return() {
        let values = [f32::MIN, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, f32::MAX];
        assert!(values.windows(2).all(|pair| to_key(pair[0]) < to_key(pair[1])));
        assert!(values.iter().all(|v| from_key(to_key(*v)).to_bits() == v.to_bits()));
    }

    #[test]
    fn the_index_finds_what_a_full_search_finds() {
        let spread = |map: &dyn Fn(f32) -> f32| {
            std::array::from_fn(|i| if i < 255 { map(i as f32) } else { f32::INFINITY })
        };
        let mut all: Vec<[f32; 256]> = vec![
            spread(&|i| i * 0.01 - 1.0),
            spread(&|i| (i - 127.0).powi(9)),
            spread(&|i| (i - 127.0) * 2e36),
            spread(&|i| f32::from_bits(i as u32)),
            spread(&|i| if i < 100.0 { -1.0 } else { 1.0 }),
            spread(&|_| 3.0),
            spread(&|i| if i < 254.0 { i * 1e-30 } else { f32::MAX }),
            spread(&|i| 1.0 + i * f32::EPSILON),
        ];
        all.iter_mut().for_each(|borders| borders[..255].sort_by(f32::total_cmp));
        for borders in &all {
            let index = Index::new(borders);
            let around = |border: &f32| [border.next_down(), *border, border.next_up()];
            let mut values: Vec<f32> = borders[..255].iter().flat_map(around).collect();
            values.extend([f32::MIN, f32::MAX, 0.0, -0.0, 1e-45, -1e-45]);
            values.retain(|value| value.is_finite());
            for level in [simd::Level::Portable, simd::Level::Avx512] {
                let mut room = vec![MaybeUninit::new(0); codebook::encoded_len(values.len())];
                let mut out = Out::new(&mut room);
                simd::with_level(level, || {
                    simd::dispatch(Classify {
                        source: Source::plain(&values),
                        borders,
                        index: &index,
                        out: &mut out,
                    });
                });
                for (value, found) in values.iter().zip(&out.written()[codebook::HEADER_BYTES..]) {
                    let expected = borders[..255].partition_point(|border| border < value);
                    assert_eq!(usize::from(*found), expected, "{value:e} in {borders:?}");
                }
            }
        }
    }

    #[test]
    fn radix_sort_sorts() {
        let mut keys: Vec<u32> = (0..5000_u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        let mut expected = keys.clone();
        expected.sort_unstable();
        radix_sort(&mut keys, &mut Vec::new());
        assert_eq!(keys, expected);
    }

    #[test]
    fn sampled_buckets_are_nearly_equally_full() {
        let count = 4 * EXACT_MAX + 17;
        let values: Vec<f32> =
            (0..count).map(|i| ((i * 7919 % count) as f32 / count as f32).powi(3)).collect();
        let borders = borders(&values, &mut Scratch::new());
        let mut room = vec![MaybeUninit::new(0); codebook::encoded_len(count)];
        let mut out = Out::new(&mut room);
        let index = Index::new(&borders);
        simd::dispatch(Classify {
            source: Source::plain(&values),
            borders: &borders,
            index: &index,
            out: &mut out,
        });
        let mut populations = [0_usize; 256];
        out.written()[codebook::HEADER_BYTES..]
            .iter()
            .for_each(|index| populations[usize::from(*index)] += 1);
        let fair = count / 256;
        assert!(populations.iter().all(|p| (fair / 2..fair * 2).contains(p)), "{populations:?}");
    }
}
