//! Floats that begin at a cache line, so that rows whose length is a multiple of one can be written past the caches line
//! by line.

use super::lines::LINE;
use std::ops::{Deref, DerefMut};

/// A vector of a fixed length.
#[derive(Debug, Default)]
pub(super) struct Aligned {
    values: Vec<f32>,
    /// Where the first cache line of `values` begins.
    start: usize,
    length: usize,
}

impl Aligned {
    /// Zeros, which take no memory before they are written to.
    pub(super) fn zeros(length: usize) -> Self {
        let values = vec![0.0_f32; length + LINE - 1];
        let start = values.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
        Self { values, start, length }
    }
}

impl Clone for Aligned {
    fn clone(&self) -> Self {
        let mut clone = Self::zeros(self.length);
        clone.copy_from_slice(self);
        clone
    }
}

impl Deref for Aligned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.values[self.start..][..self.length]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[self.start..][..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_aligned_and_equal_wherever_they_lie() {
        let mut clones: Vec<Aligned> = Vec::new();
        for length in 0..40 {
            let mut values = Aligned::zeros(length);
            values.iter_mut().zip(1_u8..).for_each(|(value, number)| *value = f32::from(number));
            let clone = values.clone();
            assert_eq!(*clone, *values);
            assert_eq!((clone.len(), clone.as_ptr().addr() % 64), (length, 0));
            clones.push(clone);
        }
    }
}
