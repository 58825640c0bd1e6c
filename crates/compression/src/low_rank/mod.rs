//! PowerSGD (arXiv:1905.13727): a gradient matrix M (m x n) travels as two thin factors, P = M Q (m x r) and
//! Q = M^T P (n x r), averaged one after the other. What the rank loses stays in an error memory and is added to the next
//! gradient: M - P P^T M, each peer's own loss (the paper's algorithm 2). hivemind and torch keep M minus the *averaged*
//! approximation. The sum over all peers is the same, but there a peer that vanishes takes with it by how much its gradient
//! differed from the mean, and not only what its factors lost.
//!
//! Everything is pure arithmetic in a fixed order without fused multiply-add, so that peers on different CPUs who
//! averaged the same factors hold the same bits (a general matrix library picks its order, and FMA, by CPU). The factors
//! are so thin that the products run at memory speed anyway.

mod aligned;
mod kernels;
mod lines;
mod orthogonalize;
mod state;

pub use orthogonalize::orthogonalize;
pub use state::{LowRank, LowRankError};

/// The matrix that a tensor is flattened to: the adjacent pair of dimensions with the smallest product is merged until
/// two are left (hivemind's rule; of equal products the first). `None` for vectors and scalars, and if the element count
/// overflows.
///
/// ```
/// use potluck_compression::low_rank::matrix_shape;
/// assert_eq!(matrix_shape(&[2, 3, 4, 5]), Some((6, 20)));
/// assert_eq!(matrix_shape(&[64, 3, 7, 7]), Some((64, 147)));
/// assert_eq!(matrix_shape(&[3, 3, 3]), Some((9, 3)));
/// assert_eq!(matrix_shape(&[3]), None);
/// ```
#[must_use]
pub fn matrix_shape(shape: &[usize]) -> Option<(usize, usize)> {
    shape.iter().try_fold(1_usize, |count, dim| count.checked_mul(*dim))?;
    let mut dims = shape.to_vec();
    while dims.len() > 2 {
        let at = (0..dims.len() - 1).min_by_key(|at| dims[*at].saturating_mul(dims[at + 1]))?;
        dims[at] = dims[at].saturating_mul(dims.remove(at + 1));
    }
    match dims[..] {
        [rows, columns] => Some((rows, columns)),
        _ => None,
    }
}

/// Whether a tensor travels as factors: it has at least two dimensions, and the factors save at least
/// `min_compression_ratio` of its elements.
#[must_use]
pub fn is_compressed(shape: &[usize], rank: usize, min_compression_ratio: f64) -> bool {
    let Some((rows, columns)) = matrix_shape(shape) else { return false };
    let numel = rows.saturating_mul(columns);
    if numel == 0 || rank == 0 {
        return false;
    }
    let factors = rank as f64 * (rows as f64 + columns as f64);
    1.0 - factors / numel as f64 >= min_compression_ratio
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_rule() {
        assert!(is_compressed(&[4096, 4096], 4, 0.5));
        assert!(is_compressed(&[8, 8], 2, 0.5));
        assert!(!is_compressed(&[8, 8], 2, 0.51));
        assert!(!is_compressed(&[4096], 1, 0.0));
        assert!(!is_compressed(&[0, 8], 1, 0.0));
        assert_eq!(matrix_shape(&[usize::MAX, 2, 2]), None);
    }
}
