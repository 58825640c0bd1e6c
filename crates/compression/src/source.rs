//! What an encoder reads: values as they are, or scaled on the way through the cache.

use crate::codec::{PIECE, Scratch};
use crate::{EncodeError, EncodeReport, first_non_finite};

/// The values of an encoder.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    values: &'a [f32],
    factor: Option<f32>,
}

/// One product, clamped to the finite range; NaN stays.
#[inline(always)]
fn scaled(value: f32, factor: f32) -> f32 {
    (value * factor).clamp(f32::MIN, f32::MAX)
}

impl<'a> Source<'a> {
    /// The values as they are.
    pub(crate) fn plain(values: &'a [f32]) -> Self {
        Self { values, factor: None }
    }

    /// The values times `factor`, clamped to the finite range.
    pub(crate) fn scaled(values: &'a [f32], factor: f32) -> Self {
        Self { values, factor: Some(factor) }
    }

    pub(crate) fn len(self) -> usize {
        self.values.len()
    }

    pub(crate) fn is_empty(self) -> bool {
        self.values.is_empty()
    }

    /// Value `index`.
    #[inline(always)]
    pub(crate) fn at(self, index: usize) -> f32 {
        match self.factor {
            Some(factor) => scaled(self.values[index], factor),
            None => self.values[index],
        }
    }

    /// Position of the first value that is not finite.
    pub(crate) fn first_non_finite(self) -> Option<usize> {
        match self.factor {
            Some(_) => (0..self.len()).find(|index| !self.at(*index).is_finite()),
            None => first_non_finite(self.values),
        }
    }

    /// Give `work` the values in pieces of `size` (at most [`PIECE`]), and return how many products were clamped.
    #[inline(always)]
    pub(crate) fn pieces(self, size: usize, mut work: impl FnMut(&[f32])) -> usize {
        let Some(factor) = self.factor else {
            for chunk in self.values.chunks(size) {
                work(chunk);
            }
            return 0;
        };
        let mut clamped = 0;
        let mut buffer = [0.0_f32; PIECE];
        for chunk in self.values.chunks(size) {
            let piece = &mut buffer[..chunk.len()];
            let mut outside = 0_u32;
            for (slot, value) in piece.iter_mut().zip(chunk) {
                outside += u32::from((value * factor).abs() == f32::INFINITY);
                *slot = scaled(*value, factor);
            }
            clamped += outside as usize;
            work(piece);
        }
        clamped
    }

    /// Give `work` all values at once (from the scratch, if they are scaled), and count clamped products in its report.
    pub(crate) fn whole(
        self,
        scratch: &mut Scratch,
        work: impl FnOnce(&[f32], &mut Scratch) -> Result<EncodeReport, EncodeError>,
    ) -> Result<EncodeReport, EncodeError> {
        if self.factor.is_none() {
            return work(self.values, scratch);
        }
        let mut values = std::mem::take(&mut scratch.scaled);
        values.clear();
        let clamped = self.pieces(PIECE, |piece| values.extend_from_slice(piece));
        let result = work(&values, scratch);
        scratch.scaled = values;
        result.map(|report| EncodeReport { clamped, ..report })
    }
}
