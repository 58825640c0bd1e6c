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

/// Add the products of whole groups of lanes of one row with [`GROUP`] columns of a factor; the tail is the caller's.
/// `ahead` is what will be read next, as far away as these columns are long.
#[inline(always)]
fn dot_lanes<I: Isa>(
    isa: I,
    lanes: &mut [[f32; LANES]; GROUP],
    row: &[f32],
    columns: [&[f32]; GROUP],
    ahead: &[f32],
) {
    let mut sums = *lanes;
    let [a, b, c, d] = columns.map(|column| column.as_chunks::<LANES>().0);
    let groups = row.as_chunks::<LANES>().0.iter().zip(a).zip(b).zip(c).zip(d);
    for (number, ((((x, a), b), c), d)) in groups.enumerate() {
        isa.prefetch(ahead, number * LANES);
        for lane in 0..LANES {
            sums[0][lane] += x[lane] * a[lane];
            sums[1][lane] += x[lane] * b[lane];
            sums[2][lane] += x[lane] * c[lane];
            sums[3][lane] += x[lane] * d[lane];
        }
    }
    *lanes = sums;
}

/// `target[j] += sum over the group of factor[k] * columns[k][j]`; `ahead` as in [`dot_lanes`].
#[inline(always)]
fn add_columns<I: Isa>(
    isa: I,
    target: &mut [f32],
    factors: [f32; GROUP],
    columns: [&[f32]; GROUP],
    ahead: &[f32],
) {
    /// One cache line.
    const LINE: usize = 16;
    let [fa, fb, fc, fd] = factors;
    let (lines, rest) = target.as_chunks_mut::<LINE>();
    let tail = lines.len() * LINE;
    let [a, b, c, d] = columns.map(|column| column.as_chunks::<LINE>().0);
    for (number, ((((line, a), b), c), d)) in lines.iter_mut().zip(a).zip(b).zip(c).zip(d).enumerate() {
        isa.prefetch(ahead, number * LINE);
        // A copy, which nothing else can point to: without it this becomes no loop of vectors everywhere.
        let mut sums = *line;
        for j in 0..LINE {
            sums[j] += (fa * a[j] + fb * b[j]) + (fc * c[j] + fd * d[j]);
        }
        *line = sums;
    }
    let [a, b, c, d] = columns.map(|column| &column[tail..]);
    for ((((value, a), b), c), d) in rest.iter_mut().zip(a).zip(b).zip(c).zip(d) {
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

/// Values from which on a matrix is written around the caches: 16 MiB, more than most cores have for themselves.
const STREAMED_MIN: usize = 1 << 22;

/// Copy a piece to a matrix: past the caches, if nothing of it would still be there when the matrix is read again.
#[inline(always)]
fn put<I: Isa>(isa: I, is_streamed: bool, target: &mut [f32], piece: &[f32]) {
    if is_streamed {
        isa.stream(target, piece);
    } else {
        target.copy_from_slice(piece);
    }
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
    /// A column of zeros, which stands in for those past the rank.
    pub(super) zeros: &'a [f32],
    pub(super) rank: usize,
    pub(super) work: &'a mut [f32],
    pub(super) p: &'a mut [f32],
}

impl Kernel for Project<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        /// Rows and columns of a tile: pieces of eight factor columns stay in the L1 cache while eight rows use them.
        const TILE_ROWS: usize = 8;
        const TILE_COLUMNS: usize = 512;
        let Self { base, correction, grad, q, columns, zeros, rank, work, p } = self;
        let rows = p.len() / rank;
        let mut piece = [0.0_f32; TILE_COLUMNS];
        // Higher ranks read the row again below.
        let is_streamed = work.len() >= STREAMED_MIN && rank <= GROUP;
        for first in (0..rows).step_by(TILE_ROWS) {
            let rows_here = first..rows.min(first + TILE_ROWS);
            let mut lanes = [[[0.0_f32; LANES]; GROUP]; TILE_ROWS];
            for start in (0..columns).step_by(TILE_COLUMNS) {
                let tile = start..columns.min(start + TILE_COLUMNS);
                // The same rows further right, or the first columns of the next rows.
                let ahead = if tile.end < columns { tile.end } else { TILE_ROWS * columns };
                for row in rows_here.clone() {
                    let next = row * columns + ahead;
                    let [next_base, next_grad] = [base, grad].map(|input| input.get(next..).unwrap_or(zeros));
                    let span = row * columns + tile.start..row * columns + tile.end;
                    let target = &mut work[span.clone()];
                    let work = &mut piece[..target.len()];
                    let inputs = base[span.clone()].iter().zip(&grad[span]);
                    for (value, (old, new)) in work.iter_mut().zip(inputs) {
                        *value = old + new;
                    }
                    if let Some(Correction { p, q }) = correction {
                        for at in (0..rank).step_by(GROUP) {
                            let factors = entries(p, rows, at, row).map(|f| -f);
                            let pieces = group(q, columns, at, zeros).map(|column| &column[tile.clone()]);
                            add_columns(isa, work, factors, pieces, if at == 0 { next_base } else { zeros });
                        }
                    }
                    let pieces = group(q, columns, 0, zeros).map(|column| &column[tile.clone()]);
                    dot_lanes(isa, &mut lanes[row - first], work, pieces, next_grad);
                    put(isa, is_streamed, target, work);
                }
            }
            for row in rows_here {
                let work = &work[row * columns..(row + 1) * columns];
                let tail = columns - columns % LANES;
                for at in (0..rank).step_by(GROUP) {
                    let mut lanes = lanes[row - first];
                    let pieces = group(q, columns, at, zeros);
                    if at > 0 {
                        lanes = [[0.0; LANES]; GROUP];
                        dot_lanes(isa, &mut lanes, work, pieces, zeros);
                    }
                    for (k, piece) in pieces.into_iter().enumerate().take(rank - at) {
                        let rest = work[tail..].iter().zip(&piece[tail..]);
                        p[(at + k) * rows + row] = rest.fold(fold(lanes[k]), |sum, (x, y)| sum + x * y);
                    }
                }
            }
        }
        isa.stream_end();
    }
}

/// `q = work^T p`, in one pass over the rows; four rows at a time, so that the factor is loaded and stored once for
/// four.
pub(super) struct ProjectBack<'a> {
    pub(super) work: &'a [f32],
    pub(super) p: &'a [f32],
    pub(super) columns: usize,
    pub(super) zeros: &'a [f32],
    pub(super) rank: usize,
    pub(super) q: &'a mut [f32],
}

impl Kernel for ProjectBack<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        /// Columns of a tile: four pieces of rows and all factor pieces stay in the L1 cache.
        const TILE: usize = 512;
        let Self { work, p, columns, zeros, rank, q } = self;
        q.fill(0.0);
        let rows = p.len() / rank;
        for row in (0..rows).step_by(GROUP) {
            let four = group(work, columns, row, zeros);
            let next_four = group(work, columns, row + GROUP, zeros);
            for start in (0..columns).step_by(TILE) {
                let tile = start..columns.min(start + TILE);
                let pieces = four.map(|row| &row[tile.clone()]);
                let factor_columns = p.chunks_exact(rows).zip(q.chunks_exact_mut(columns));
                for (number, (p, q)) in factor_columns.enumerate() {
                    let factors = std::array::from_fn(|k| p.get(row + k).copied().unwrap_or(0.0));
                    let ahead = &next_four[number % GROUP][start..];
                    add_columns(isa, &mut q[tile.clone()], factors, pieces, ahead);
                }
            }
        }
    }
}

/// `out = p q^T`
pub(super) struct Reconstruct<'a> {
    pub(super) p: &'a [f32],
    pub(super) q: &'a [f32],
    pub(super) columns: usize,
    pub(super) zeros: &'a [f32],
    pub(super) rank: usize,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Reconstruct<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { p, q, columns, zeros, rank, out } = self;
        let rows = p.len() / rank;
        const TILE: usize = 512;
        let mut piece = [0.0_f32; TILE];
        let is_streamed = out.len() >= STREAMED_MIN;
        for (row, out) in out.chunks_exact_mut(columns).enumerate() {
            for (number, target) in out.chunks_mut(TILE).enumerate() {
                let out = &mut piece[..target.len()];
                out.fill(0.0);
                let tile = number * TILE..number * TILE + out.len();
                for at in (0..rank).step_by(GROUP) {
                    let pieces = group(q, columns, at, zeros).map(|column| &column[tile.clone()]);
                    add_columns(isa, out, entries(p, rows, at, row), pieces, zeros);
                }
                put(isa, is_streamed, target, out);
            }
        }
        isa.stream_end();
    }
}

/// `memory = base - correction`: what the next round would start from.
pub(super) struct Settle<'a> {
    pub(super) base: &'a [f32],
    pub(super) correction: Option<Correction<'a>>,
    pub(super) columns: usize,
    pub(super) zeros: &'a [f32],
    pub(super) rank: usize,
    pub(super) memory: &'a mut [f32],
}

impl Kernel for Settle<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { base, correction, columns, zeros, rank, memory } = self;
        memory.copy_from_slice(base);
        let Some(Correction { p, q }) = correction else { return };
        let rows = p.len() / rank;
        for (row, memory) in memory.chunks_exact_mut(columns).enumerate() {
            for at in (0..rank).step_by(GROUP) {
                let factors = entries(p, rows, at, row).map(|f| -f);
                add_columns(isa, memory, factors, group(q, columns, at, zeros), zeros);
            }
        }
    }
}
