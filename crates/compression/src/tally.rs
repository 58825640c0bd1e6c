//! What a reducer must know of values before it lets them into a sum, found while they are read anyway.

use crate::codec::{PIECE, Place};
use crate::simd::{self, Isa, Kernel};

/// What was found in a vector: whether all of it is finite, and how large it is. The same bits on every CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// The sum of the squares of all finite values, in f64.
    pub square_sum: f64,
    /// Position of the first NaN or infinity.
    pub first_non_finite: Option<usize>,
}

impl Tally {
    /// Take in the values from number `at` on: [`PIECE`] of them, or fewer at the end of the vector.
    #[inline(always)]
    pub(crate) fn take(&mut self, at: usize, piece: &[f32]) {
        let squares = sum_lanes(
            piece,
            #[inline(always)]
            |value| value * value,
        );
        if squares.is_finite() {
            self.square_sum += squares;
        } else {
            self.take_non_finite(at, piece);
        }
    }

    /// The sum above cannot overflow an f64, so some value of this piece is not finite.
    #[cold]
    fn take_non_finite(&mut self, at: usize, piece: &[f32]) {
        let index = piece.iter().position(|value| !value.is_finite()).map(|index| at + index);
        self.first_non_finite = self.first_non_finite.or(index);
        let finite = piece.iter().filter(|value| value.is_finite());
        self.square_sum += finite.map(|value| f64::from(*value).powi(2)).sum::<f64>();
    }
}

/// The sum of what `map` makes of each value, in 16 fixed lanes of f64, added up in order. One sum per loop: a loop over
/// two sets of lanes would not become one of vectors.
#[inline(always)]
pub(crate) fn sum_lanes(values: &[f32], map: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0.0_f64; 16];
    let (groups, rest) = values.as_chunks::<16>();
    for group in groups {
        for (lane, value) in lanes.iter_mut().zip(group) {
            *lane += map(f64::from(*value));
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += map(f64::from(*value));
    }
    lanes.iter().sum()
}

struct Count<'a>(&'a [f32]);

impl Kernel for Count<'_> {
    type Output = Tally;
    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> Tally {
        let mut tally = Tally::default();
        for (number, piece) in self.0.chunks(PIECE).enumerate() {
            tally.take(number * PIECE, piece);
        }
        tally
    }
}

/// Check and measure `values` in one pass.
///
/// ```
/// let found = potluck_compression::tally(&[3.0, f32::NAN, 4.0]);
/// assert_eq!((found.square_sum, found.first_non_finite), (25.0, Some(1)));
/// ```
#[must_use]
pub fn tally(values: &[f32]) -> Tally {
    simd::dispatch(Count(values))
}

struct Sum<'a> {
    values: &'a [f32],
    weight: f32,
    place: Place<'a>,
}

impl Kernel for Sum<'_> {
    type Output = Tally;
    #[inline(always)]
    fn run<I: Isa>(mut self, _: I) -> Tally {
        let mut tally = Tally::default();
        for (number, piece) in self.values.chunks(PIECE).enumerate() {
            tally.take(number * PIECE, piece);
            self.place.add(number * PIECE, self.weight, piece);
        }
        tally
    }
}

/// `out[i] = sum[i] + weight * values[i]` and the tally of `values`, in one pass: for values that were never encoded
/// what [`Scheme::decode_sum`](crate::Scheme::decode_sum) is for bytes, with the same bits.
///
/// # Panics
/// If the lengths differ.
pub fn sum_values(values: &[f32], weight: f32, sum: &[f32], out: &mut [f32]) -> Tally {
    assert!(values.len() == sum.len() && sum.len() == out.len(), "lengths of one vector differ");
    simd::dispatch(Sum { values, weight, place: Place::Apart { sum, out } })
}
