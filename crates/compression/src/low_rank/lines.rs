//! Thin factors in the order in which the passes over the matrix read them: a cache line of columns at a time, four
//! factor columns together.

use crate::simd::Isa;

/// Floats of a cache line.
pub(super) const LINE: usize = 16;
/// Factor columns that are handled together.
pub(super) const GROUP: usize = 4;

/// One cache line, aligned as such: a load that crosses two costs as much as two.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [f32; LINE]);

impl Line {
    pub(super) const ZERO: Self = Self([0.0; LINE]);

    /// Up to a line of values, then zeros.
    #[inline(always)]
    pub(super) fn padded(values: &[f32]) -> Self {
        let mut line = Self::ZERO;
        line.0[..values.len()].copy_from_slice(values);
        line
    }

    /// All lanes, added up pairwise.
    #[inline(always)]
    pub(super) fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h]: [f32; 8] = std::array::from_fn(|j| self.0[j] + self.0[j + 8]);
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// `sum over the group of factor[k] * lines[k]`
#[inline(always)]
pub(super) fn products<I: Isa>(isa: I, factors: [I::Lanes; GROUP], lines: [I::Lanes; GROUP]) -> I::Lanes {
    let ([fa, fb, fc, fd], [a, b, c, d]) = (factors, lines);
    let (left, right) = (
        isa.add(isa.multiply(fa, a), isa.multiply(fb, b)),
        isa.add(isa.multiply(fc, c), isa.multiply(fd, d)),
    );
    isa.add(left, right)
}

/// A factor with one entry per column of the matrix, for each group of its columns line by line; zeros past both ends.
#[derive(Clone, Debug, Default)]
pub(super) struct Packed {
    lines: Vec<[Line; GROUP]>,
    length: usize,
}

impl Packed {
    /// Zeros for a factor of `length x rank`.
    pub(super) fn resize(&mut self, length: usize, rank: usize) {
        self.length = length;
        self.lines.resize(rank.div_ceil(GROUP) * length.div_ceil(LINE), [Line::ZERO; GROUP]);
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    pub(super) fn clear(&mut self) {
        self.lines.fill([Line::ZERO; GROUP]);
    }

    /// Take over a factor whose columns, each `length` long, stand one after the other.
    pub(super) fn pack(&mut self, factor: &[f32], length: usize) {
        self.resize(length, factor.len() / length);
        self.clear();
        for (number, column) in factor.chunks_exact(length).enumerate() {
            for (at, values) in column.chunks(LINE).enumerate() {
                self.lines_mut(number / GROUP, at)[0][number % GROUP] = Line::padded(values);
            }
        }
    }

    /// The inverse of [`pack`](Self::pack).
    pub(super) fn unpack(&self, factor: &mut [f32]) {
        for (number, column) in factor.chunks_exact_mut(self.length).enumerate() {
            for (at, values) in column.chunks_mut(LINE).enumerate() {
                values.copy_from_slice(&self.line(number / GROUP, at)[number % GROUP].0[..values.len()]);
            }
        }
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn groups(&self) -> usize {
        self.lines.len() / self.length.div_ceil(LINE)
    }

    /// The lines of a group from `start` on.
    #[inline(always)]
    pub(super) fn lines(&self, group: usize, start: usize) -> &[[Line; GROUP]] {
        let count = self.length.div_ceil(LINE);
        &self.lines[group * count + start..(group + 1) * count]
    }

    #[inline(always)]
    pub(super) fn lines_mut(&mut self, group: usize, start: usize) -> &mut [[Line; GROUP]] {
        let count = self.length.div_ceil(LINE);
        &mut self.lines[group * count + start..(group + 1) * count]
    }

    #[inline(always)]
    pub(super) fn line(&self, group: usize, at: usize) -> &[Line; GROUP] {
        &self.lines[group * self.length.div_ceil(LINE) + at]
    }
}

/// A factor by column with one entry per row of the matrix, as groups row by row; zeros past the rank.
pub(super) fn pack_rows(factor: &[f32], rank: usize, packed: &mut Vec<[f32; GROUP]>) {
    let (rows, groups) = (factor.len() / rank, rank.div_ceil(GROUP));
    packed.resize(rows * groups, [0.0; GROUP]);
    for (number, column) in factor.chunks_exact(rows).enumerate() {
        for (row, value) in packed.chunks_exact_mut(groups).zip(column) {
            row[number / GROUP][number % GROUP] = *value;
        }
    }
}

/// Those groups row-major, `rank` entries per row.
pub(super) fn unpack_rows(packed: &[[f32; GROUP]], rank: usize, matrix: &mut [f32]) {
    for (row, groups) in matrix.chunks_exact_mut(rank).zip(packed.chunks_exact(rank.div_ceil(GROUP))) {
        row.copy_from_slice(&groups.as_flattened()[..rank]);
    }
}
