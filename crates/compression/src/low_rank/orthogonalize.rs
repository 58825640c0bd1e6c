//! Gram-Schmidt on the columns of a thin matrix.

use crate::simd::{self, Isa, Kernel};

const LANES: usize = 8;

/// Make the `rank` columns of `matrix` (row-major, `rows x rank`) orthonormal, in order: divide each by its norm (at
/// least 1e-8) and subtract its projection from the columns after it. hivemind's algorithm and arithmetic.
///
/// # Panics
/// If the length is no multiple of `rank`.
pub fn orthogonalize(matrix: &mut [f32], rank: usize) {
    let mut columns = Vec::new();
    to_columns(matrix, rank, &mut columns);
    orthogonalize_columns(&mut columns, rank);
    from_columns(&columns, rank, matrix);
}

/// The same on columns stored one after the other.
pub(super) fn orthogonalize_columns(columns: &mut [f32], rank: usize) {
    if rank > 0 && !columns.is_empty() {
        simd::dispatch(GramSchmidt { columns, rank });
    }
}

/// Row-major `rows x rank` to `rank` columns one after the other.
pub(super) fn to_columns(matrix: &[f32], rank: usize, columns: &mut Vec<f32>) {
    columns.resize(matrix.len(), 0.0);
    if rank > 0 {
        assert_eq!(matrix.len() % rank, 0, "the matrix is not {rank} columns wide");
        let rows = matrix.len() / rank;
        for (row, values) in matrix.chunks_exact(rank).enumerate() {
            for (column, value) in values.iter().enumerate() {
                columns[column * rows + row] = *value;
            }
        }
    }
}

/// The inverse of [`to_columns`].
pub(super) fn from_columns(columns: &[f32], rank: usize, matrix: &mut [f32]) {
    if let Some(rows) = matrix.len().checked_div(rank) {
        for (row, values) in matrix.chunks_exact_mut(rank).enumerate() {
            for (column, value) in values.iter_mut().enumerate() {
                *value = columns[column * rows + row];
            }
        }
    }
}

struct GramSchmidt<'a> {
    columns: &'a mut [f32],
    rank: usize,
}

impl Kernel for GramSchmidt<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let rows = self.columns.len() / self.rank;
        let mut rest = self.columns;
        while !rest.is_empty() {
            let (column, after) = rest.split_at_mut(rows);
            let norm = dot(column, column).sqrt().max(1e-8);
            column.iter_mut().for_each(|value| *value /= norm);
            for other in after.chunks_exact_mut(rows) {
                let projection = dot(column, other);
                subtract_scaled(other, projection, column);
            }
            rest = after;
        }
    }
}

/// Sum of products in eight lanes, then the tail in order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_groups, a_rest) = a.as_chunks::<LANES>();
    let (b_groups, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_groups.iter().zip(b_groups) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    let mut sum = ((a + e) + (c + g)) + ((b + f) + (d + h));
    for (x, y) in a_rest.iter().zip(b_rest) {
        sum += x * y;
    }
    sum
}

/// `target -= factor * source`
#[inline(always)]
fn subtract_scaled(target: &mut [f32], factor: f32, source: &[f32]) {
    for (value, other) in target.iter_mut().zip(source) {
        *value -= factor * other;
    }
}
