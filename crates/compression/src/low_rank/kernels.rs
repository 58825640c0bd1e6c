//! The three passes over the big matrix, each fused so that it moves through memory once. Sums run in a fixed number of
//! lanes, whatever the CPU.
//!
//! Thin factors are stored by column (`rank` vectors of `m` or `n` floats), and ranks are handled four at a time: the
//! accumulators of four dot products fit the vector registers.

use crate::simd::{Isa, Kernel};

const LANES: usize = 8;
/// Factor columns per pass over a row.
const GROUP: usize = 4;

/// Sum of products in eight lanes, then the tail in order.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_groups, a_rest) = a.as_chunks::<LANES>();
    let (b_groups, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_groups.iter().zip(b_groups) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let mut sum = fold(lanes);
    for (x, y) in a_rest.iter().zip(b_rest) {
        sum += x * y;
    }
    sum
}

/// `target -= factor * source`
#[inline(always)]
pub(super) fn subtract_scaled(target: &mut [f32], factor: f32, source: &[f32]) {
    for (value, other) in target.iter_mut().zip(source) {
        *value -= factor * other;
    }
}

/// Add up lanes pairwise.
#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// Dot products of one row with [`GROUP`] columns of a factor.
#[inline(always)]
fn dots(row: &[f32], columns: [&[f32]; GROUP]) -> [f32; GROUP] {
    let mut lanes = [[0.0_f32; LANES]; GROUP];
    let (groups, rest) = row.as_chunks::<LANES>();
    let [a, b, c, d] = columns.map(|column| column.as_chunks::<LANES>());
    for ((((x, a), b), c), d) in groups.iter().zip(a.0).zip(b.0).zip(c.0).zip(d.0) {
        for lane in 0..LANES {
            lanes[0][lane] += x[lane] * a[lane];
            lanes[1][lane] += x[lane] * b[lane];
            lanes[2][lane] += x[lane] * c[lane];
            lanes[3][lane] += x[lane] * d[lane];
        }
    }
    let mut sums = lanes.map(fold);
    for (sum, (_, tail)) in sums.iter_mut().zip([a, b, c, d]) {
        for (x, y) in rest.iter().zip(tail) {
            *sum += x * y;
        }
    }
    sums
}

/// `target[j] = base(j) + sum over the group of factor[k] * columns[k][j]`, where `base` reads what `target` holds.
#[inline(always)]
fn add_columns(target: &mut [f32], factors: [f32; GROUP], columns: [&[f32]; GROUP]) {
    let [a, b, c, d] = columns;
    let [fa, fb, fc, fd] = factors;
    for ((((value, a), b), c), d) in target.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        *value += (fa * a + fb * b) + (fc * c + fd * d);
    }
}

/// Columns `at..at + GROUP` of a factor with `length` floats per column; columns past the rank are `zeros`.
#[inline(always)]
fn group<'a>(factor: &'a [f32], length: usize, at: usize, zeros: &'a [f32]) -> [&'a [f32]; GROUP] {
    std::array::from_fn(|k| factor.get((at + k) * length..(at + k + 1) * length).unwrap_or(zeros))
}

/// Entry `row` of each of these columns; zero past the rank.
#[inline(always)]
fn entries(factor: &[f32], length: usize, at: usize, row: usize) -> [f32; GROUP] {
    std::array::from_fn(|k| factor.get((at + k) * length + row).copied().unwrap_or(0.0))
}

/// A finished round's approximation, not yet taken out of the memory: `p q^T`, factors by column.
#[derive(Clone, Copy)]
pub(super) struct Correction<'a> {
    pub(super) p: &'a [f32],
    pub(super) q: &'a [f32],
}

/// `work = base - correction + grad` and `p = work q`, in one pass over the rows.
pub(super) struct Project<'a> {
    pub(super) base: &'a [f32],
    pub(super) correction: Option<Correction<'a>>,
    pub(super) grad: &'a [f32],
    pub(super) q: &'a [f32],
    pub(super) columns: usize,
    pub(super) rank: usize,
    pub(super) work: &'a mut [f32],
    pub(super) p: &'a mut [f32],
}

impl Kernel for Project<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { base, correction, grad, q, columns, rank, work, p } = self;
        let rows = p.len() / rank;
        let zeros = vec![0.0; columns];
        let inputs = base.chunks_exact(columns).zip(grad.chunks_exact(columns));
        for (row, (work, (base, grad))) in work.chunks_exact_mut(columns).zip(inputs).enumerate() {
            for (value, (old, new)) in work.iter_mut().zip(base.iter().zip(grad)) {
                *value = old + new;
            }
            if let Some(Correction { p, q }) = correction {
                for at in (0..rank).step_by(GROUP) {
                    let factors = entries(p, rows, at, row).map(|f| -f);
                    add_columns(work, factors, group(q, columns, at, &zeros));
                }
            }
            for at in (0..rank).step_by(GROUP) {
                let sums = dots(work, group(q, columns, at, &zeros));
                for (k, sum) in sums.into_iter().enumerate().take(rank - at) {
                    p[(at + k) * rows + row] = sum;
                }
            }
        }
    }
}

/// `q = work^T p`, in one pass over the rows; four rows at a time, so that the factor is loaded and stored once for
/// four.
pub(super) struct ProjectBack<'a> {
    pub(super) work: &'a [f32],
    pub(super) p: &'a [f32],
    pub(super) columns: usize,
    pub(super) rank: usize,
    pub(super) q: &'a mut [f32],
}

impl Kernel for ProjectBack<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { work, p, columns, rank, q } = self;
        q.fill(0.0);
        let rows = p.len() / rank;
        let zeros = vec![0.0; columns];
        for row in (0..rows).step_by(GROUP) {
            let four = group(work, columns, row, &zeros);
            for (p, q) in p.chunks_exact(rows).zip(q.chunks_exact_mut(columns)) {
                let factors = std::array::from_fn(|k| p.get(row + k).copied().unwrap_or(0.0));
                add_columns(q, factors, four);
            }
        }
    }
}

/// `out = p q^T`
pub(super) struct Reconstruct<'a> {
    pub(super) p: &'a [f32],
    pub(super) q: &'a [f32],
    pub(super) columns: usize,
    pub(super) rank: usize,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Reconstruct<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { p, q, columns, rank, out } = self;
        let rows = p.len() / rank;
        let zeros = vec![0.0; columns];
        for (row, out) in out.chunks_exact_mut(columns).enumerate() {
            out.fill(0.0);
            for at in (0..rank).step_by(GROUP) {
                add_columns(out, entries(p, rows, at, row), group(q, columns, at, &zeros));
            }
        }
    }
}

/// `memory = base - correction`: what the next round would start from.
pub(super) struct Settle<'a> {
    pub(super) base: &'a [f32],
    pub(super) correction: Option<Correction<'a>>,
    pub(super) columns: usize,
    pub(super) rank: usize,
    pub(super) memory: &'a mut [f32],
}

impl Kernel for Settle<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { base, correction, columns, rank, memory } = self;
        memory.copy_from_slice(base);
        let Some(Correction { p, q }) = correction else { return };
        let rows = p.len() / rank;
        let zeros = vec![0.0; columns];
        for (row, memory) in memory.chunks_exact_mut(columns).enumerate() {
            for at in (0..rank).step_by(GROUP) {
                let factors = entries(p, rows, at, row).map(|f| -f);
                add_columns(memory, factors, group(q, columns, at, &zeros));
            }
        }
    }
}
