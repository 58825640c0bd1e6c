//! The passes over the big matrix, each fused so that it moves through memory once. Sums run in a fixed number of lanes,
//! whatever the CPU.
//!
//! A pass handles a cache line of columns at a time, and ranks four at a time: the accumulators of four columns fit the
//! vector registers. Its thin factors are repacked for that: see [`Packed`] and [`pack_rows`](super::lines::pack_rows).

use super::lines::{GROUP, LINE, Line, Packed, products};
use crate::simd::{Isa, Kernel};

/// Rows that use a tile of the factors before the next tile is loaded.
const TILE_ROWS: usize = 8;
/// Lines of a tile: of both factors they stay in the L1 cache.
const TILE_LINES: usize = 32;

/// Values from which on a matrix is written around the caches: 16 MiB, more than most cores have for themselves.
const STREAMED_MIN: usize = 1 << 22;

/// Lines of a tile when a row has this many groups of factor columns.
fn tile_lines(groups: usize) -> usize {
    (TILE_LINES / groups.max(1)).max(4)
}

/// Write a line: past the caches, if nothing of the matrix would still be there when it is read again.
#[inline(always)]
fn put<I: Isa>(isa: I, is_streamed: bool, target: &mut [f32; LINE], lanes: I::Lanes) {
    if is_streamed {
        isa.stream(target, lanes);
    } else {
        isa.store(target, lanes);
    }
}

/// Write the end of a row, shorter than a line.
#[inline(always)]
fn put_rest<I: Isa>(isa: I, target: &mut [f32], lanes: I::Lanes) {
    let mut line = Line::ZERO;
    isa.store(&mut line.0, lanes);
    target.copy_from_slice(&line.0[..target.len()]);
}

// No closures around what `isa` does: they are compiled without its instructions where they are not inlined.

#[inline(always)]
fn load<I: Isa>(isa: I, [a, b, c, d]: &[Line; GROUP]) -> [I::Lanes; GROUP] {
    [isa.load(&a.0), isa.load(&b.0), isa.load(&c.0), isa.load(&d.0)]
}

#[inline(always)]
fn splat<I: Isa>(isa: I, [a, b, c, d]: [f32; GROUP]) -> [I::Lanes; GROUP] {
    [isa.splat(a), isa.splat(b), isa.splat(c), isa.splat(d)]
}

/// `sums[k] += value * q[k]`
#[inline(always)]
fn add_products<I: Isa>(isa: I, sums: &mut [I::Lanes; GROUP], value: I::Lanes, q: &[Line; GROUP]) {
    for k in 0..GROUP {
        sums[k] = isa.add(sums[k], isa.multiply(value, isa.load(&q[k].0)));
    }
}

/// A finished round's approximation, not yet taken out of the memory: `p q^T`.
#[derive(Clone, Copy)]
pub(super) struct Correction<'a> {
    pub(super) p: &'a [[f32; GROUP]],
    pub(super) q: &'a Packed,
}

/// `work = base - sent + grad` and `p = work q`, in one pass over the rows.
pub(super) struct Project<'a> {
    pub(super) base: &'a [f32],
    pub(super) sent: Option<Correction<'a>>,
    pub(super) grad: &'a [f32],
    pub(super) q: &'a Packed,
    /// One entry per group of the rows of a tile.
    pub(super) sums: &'a mut Vec<[Line; GROUP]>,
    pub(super) work: &'a mut [f32],
    pub(super) p: &'a mut [[f32; GROUP]],
}

/// A piece of one row, where [`Project`] reads and writes.
struct Piece<'a> {
    old: &'a [f32],
    new: &'a [f32],
    out: &'a mut [f32],
    /// What is read next, as far away as this piece is long.
    next: [&'a [f32]; 2],
}

impl Kernel for Project<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { base, sent, grad, q, sums, work, p } = self;
        let (columns, groups) = (q.length(), q.groups());
        let rows = p.len() / groups;
        let is_streamed = work.len() >= STREAMED_MIN;
        let tile = tile_lines(groups) * LINE;
        sums.resize(TILE_ROWS * groups, [Line::ZERO; GROUP]);
        for first in (0..rows).step_by(TILE_ROWS) {
            let last = rows.min(first + TILE_ROWS);
            sums.fill([Line::ZERO; GROUP]);
            for start in (0..columns).step_by(tile) {
                let end = columns.min(start + tile);
                // The same rows further right, or the first columns of the next rows.
                let ahead = if end < columns { end } else { TILE_ROWS * columns };
                for (row, sums) in (first..last).zip(sums.chunks_exact_mut(groups)) {
                    let (from, to) = (row * columns + start, row * columns + end);
                    let next =
                        [base, grad].map(|input| input.get(row * columns + ahead..).unwrap_or_default());
                    let piece =
                        Piece { old: &base[from..to], new: &grad[from..to], out: &mut work[from..to], next };
                    let (p, sent) = match sent {
                        Some(Correction { p, q }) => (&p[row * groups..(row + 1) * groups], q),
                        None => (&[][..], q),
                    };
                    if let [sums] = sums {
                        let factors = p.first().map_or([0.0; GROUP], |p| p.map(|entry| -entry));
                        let q = [sent, q].map(|factor| factor.lines(0, start / LINE));
                        project_group(isa, is_streamed, piece, factors, q, sums);
                    } else {
                        project_groups(isa, is_streamed, piece, p, [sent, q], start / LINE, sums);
                    }
                }
            }
            let entries = p[first * groups..last * groups].iter_mut().zip(sums.iter());
            entries.for_each(|(p, sums)| *p = sums.map(Line::sum));
        }
        isa.stream_end();
    }
}

/// A piece of a row for ranks of one group.
#[inline(always)]
fn project_group<I: Isa>(
    isa: I,
    is_streamed: bool,
    piece: Piece<'_>,
    factors: [f32; GROUP],
    [sent, q]: [&[[Line; GROUP]]; 2],
    sums: &mut [Line; GROUP],
) {
    let Piece { old, new, out, next: [next_old, next_new] } = piece;
    let factors = splat(isa, factors);
    let mut kept = load(isa, sums);
    let (lines, rest) = out.as_chunks_mut::<LINE>();
    let whole = lines.len();
    let inputs = old.as_chunks::<LINE>().0.iter().zip(new.as_chunks::<LINE>().0);
    for (number, (((line, (old, new)), sent), q)) in lines.iter_mut().zip(inputs).zip(sent).zip(q).enumerate()
    {
        isa.prefetch(next_old, number * LINE);
        isa.prefetch(next_new, number * LINE);
        let both = isa.add(isa.load(old), isa.load(new));
        let value = isa.add(both, products(isa, factors, load(isa, sent)));
        add_products(isa, &mut kept, value, q);
        put(isa, is_streamed, line, value);
    }
    if let Some((sent, q)) = sent.get(whole).zip(q.get(whole)).filter(|_| !rest.is_empty()) {
        let [old, new] = [old, new].map(|input| Line::padded(&input[whole * LINE..]).0);
        let value = isa.add(isa.add(isa.load(&old), isa.load(&new)), products(isa, factors, load(isa, sent)));
        add_products(isa, &mut kept, value, q);
        put_rest(isa, rest, value);
    }
    for k in 0..GROUP {
        isa.store(&mut sums[k].0, kept[k]);
    }
}

/// A piece of a row for higher ranks: all groups, line by line.
#[inline(always)]
fn project_groups<I: Isa>(
    isa: I,
    is_streamed: bool,
    piece: Piece<'_>,
    p: &[[f32; GROUP]],
    [sent, q]: [&Packed; 2],
    start: usize,
    sums: &mut [[Line; GROUP]],
) {
    let Piece { old, new, out, next } = piece;
    for (number, out) in out.chunks_mut(LINE).enumerate() {
        for next in next {
            isa.prefetch(next, number * LINE);
        }
        let here = number * LINE..number * LINE + out.len();
        let [old, new] = [old, new].map(|input| Line::padded(&input[here.clone()]).0);
        let mut value = isa.add(isa.load(&old), isa.load(&new));
        for (group, p) in p.iter().enumerate() {
            let factors = splat(isa, p.map(|entry| -entry));
            value = isa.add(value, products(isa, factors, load(isa, sent.line(group, start + number))));
        }
        for (group, sums) in sums.iter_mut().enumerate() {
            let mut kept = load(isa, sums);
            add_products(isa, &mut kept, value, q.line(group, start + number));
            for k in 0..GROUP {
                isa.store(&mut sums[k].0, kept[k]);
            }
        }
        match out.as_mut_array() {
            Some(line) => put(isa, is_streamed, line, value),
            None => put_rest(isa, out, value),
        }
    }
}

/// `q = work^T p`, in one pass over the rows; four rows at a time, so that the factor is loaded and stored once for
/// four.
pub(super) struct ProjectBack<'a> {
    pub(super) work: &'a [f32],
    pub(super) p: &'a [[f32; GROUP]],
    pub(super) q: &'a mut Packed,
    /// A row of zeros, which stands in for those past the last.
    pub(super) zeros: &'a [f32],
}

impl Kernel for ProjectBack<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { work, p, q, zeros } = self;
        let (columns, groups) = (q.length(), q.groups());
        q.clear();
        let rows = p.len() / groups;
        let tile = tile_lines(groups);
        let row_at = |row: usize| work.get(row * columns..(row + 1) * columns).unwrap_or(zeros);
        for first in (0..rows).step_by(GROUP) {
            let four: [&[f32]; GROUP] = std::array::from_fn(|k| row_at(first + k));
            let next: [&[f32]; GROUP] = std::array::from_fn(|k| row_at(first + GROUP + k));
            for start in (0..columns.div_ceil(LINE)).step_by(tile) {
                let span = start * LINE..columns.min((start + tile) * LINE);
                for group in 0..groups {
                    let entries: [[f32; GROUP]; GROUP] = std::array::from_fn(|k| {
                        p.get((first + k) * groups + group).copied().unwrap_or_default()
                    });
                    // The factors of one column of q are those of four rows.
                    let factors = std::array::from_fn(|column| entries.map(|entry| entry[column]));
                    let rows = four.map(|row| &row[span.clone()]);
                    let next = if group == 0 { next.map(|row| &row[span.clone()]) } else { [&[][..]; GROUP] };
                    project_back(isa, rows, next, factors, q.lines_mut(group, start));
                }
            }
        }
    }
}

/// `q[k] += sum over four rows of factors[k] * row`
#[inline(always)]
fn add_rows<I: Isa>(
    isa: I,
    q: &mut [Line; GROUP],
    factors: [[I::Lanes; GROUP]; GROUP],
    rows: [I::Lanes; GROUP],
) {
    for (q, factors) in q.iter_mut().zip(factors) {
        let sum = isa.add(isa.load(&q.0), products(isa, factors, rows));
        isa.store(&mut q.0, sum);
    }
}

/// The same with a piece of these rows, for the four columns of a group.
#[inline(always)]
fn project_back<I: Isa>(
    isa: I,
    rows: [&[f32]; GROUP],
    next: [&[f32]; GROUP],
    factors: [[f32; GROUP]; GROUP],
    q: &mut [[Line; GROUP]],
) {
    let [fa, fb, fc, fd] = factors;
    let factors = [splat(isa, fa), splat(isa, fb), splat(isa, fc), splat(isa, fd)];
    let [a, b, c, d] = rows.map(|row| row.as_chunks::<LINE>());
    let whole = a.0.len();
    for (number, ((((q, a), b), c), d)) in q.iter_mut().zip(a.0).zip(b.0).zip(c.0).zip(d.0).enumerate() {
        for next in next {
            isa.prefetch(next, number * LINE);
        }
        add_rows(isa, q, factors, [isa.load(a), isa.load(b), isa.load(c), isa.load(d)]);
    }
    if let Some(q) = q.get_mut(whole).filter(|_| !a.1.is_empty()) {
        let [a, b, c, d] = [a, b, c, d].map(|row| Line::padded(row.1));
        add_rows(isa, q, factors, load(isa, &[a, b, c, d]));
    }
}

/// `out = p q^T`
pub(super) struct Reconstruct<'a> {
    pub(super) p: &'a [[f32; GROUP]],
    pub(super) q: &'a Packed,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Reconstruct<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { p, q, out } = self;
        let (columns, groups) = (q.length(), q.groups());
        // One factor, and nothing else that stays.
        let tile = 4 * tile_lines(groups);
        let is_streamed = out.len() >= STREAMED_MIN;
        let blocks = out.chunks_mut(TILE_ROWS * columns).zip(p.chunks(TILE_ROWS * groups));
        for (block, p) in blocks {
            for start in (0..columns.div_ceil(LINE)).step_by(tile) {
                let span = start * LINE..columns.min((start + tile) * LINE);
                for (out, p) in block.chunks_exact_mut(columns).zip(p.chunks_exact(groups)) {
                    let out = &mut out[span.clone()];
                    match p {
                        [p] => combine(isa, is_streamed, out, *p, q.lines(0, start)),
                        _ => combine_groups(isa, is_streamed, out, p, q, start),
                    }
                }
            }
        }
        isa.stream_end();
    }
}

/// `out[j] = sum over the group of factor[k] * q[k][j]`
#[inline(always)]
fn combine<I: Isa>(isa: I, is_streamed: bool, out: &mut [f32], factors: [f32; GROUP], q: &[[Line; GROUP]]) {
    let factors = splat(isa, factors);
    let (lines, rest) = out.as_chunks_mut::<LINE>();
    let whole = lines.len();
    for (line, q) in lines.iter_mut().zip(q) {
        put(isa, is_streamed, line, products(isa, factors, load(isa, q)));
    }
    if let Some(q) = q.get(whole).filter(|_| !rest.is_empty()) {
        put_rest(isa, rest, products(isa, factors, load(isa, q)));
    }
}

/// The same for higher ranks.
#[inline(always)]
fn combine_groups<I: Isa>(
    isa: I,
    is_streamed: bool,
    out: &mut [f32],
    p: &[[f32; GROUP]],
    q: &Packed,
    start: usize,
) {
    for (number, out) in out.chunks_mut(LINE).enumerate() {
        let mut value = isa.splat(0.0);
        for (group, p) in p.iter().enumerate() {
            value = isa.add(value, products(isa, splat(isa, *p), load(isa, q.line(group, start + number))));
        }
        match out.as_mut_array() {
            Some(line) => put(isa, is_streamed, line, value),
            None => put_rest(isa, out, value),
        }
    }
}

/// `memory -= correction`: what the next round would start from.
pub(super) struct Settle<'a> {
    pub(super) correction: Correction<'a>,
    pub(super) memory: &'a mut [f32],
}

impl Kernel for Settle<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { correction: Correction { p, q }, memory } = self;
        let (columns, groups) = (q.length(), q.groups());
        for (memory, p) in memory.chunks_exact_mut(columns).zip(p.chunks_exact(groups)) {
            for (number, memory) in memory.chunks_mut(LINE).enumerate() {
                let mut value = isa.load(&Line::padded(memory).0);
                for (group, p) in p.iter().enumerate() {
                    let factors = splat(isa, p.map(|entry| -entry));
                    value = isa.add(value, products(isa, factors, load(isa, q.line(group, number))));
                }
                put_rest(isa, memory, value);
            }
        }
    }
}
