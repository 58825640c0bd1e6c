//! One tensor's PowerSGD state: the warm-started Q, the error memory, and the round in flight.

use super::aligned::Aligned;
use super::kernels::{Correction, Project, ProjectBack, Reconstruct, Settle};
use super::lines::{GROUP, Line, Packed, pack_rows, unpack_rows};
use super::orthogonalize::{from_columns, orthogonalize_columns, to_columns};
use crate::{first_non_finite, simd};

/// What [`LowRank`] refuses. The state is as it was before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LowRankError {
    /// Rank or a dimension is zero, or the matrix is too large for memory arithmetic.
    #[error("a {rows} x {columns} matrix cannot have factors of rank {rank}: each must be at least 1")]
    Shape {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        columns: usize,
        /// Columns of the factors.
        rank: usize,
    },
    /// A slice of the wrong length.
    #[error("{what} has {found} values, expected {expected}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// Values it must have.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A value is NaN or infinite: it would stay in the error memory for ever.
    #[error("{what}: value {index} is not finite, or too large for the products; abort this round")]
    NotFinite {
        /// Which argument.
        what: &'static str,
        /// Position of the first such value.
        index: usize,
    },
    /// The calls of a round came out of order.
    #[error("{called} must follow {expected} in the same round")]
    Order {
        /// The call that came too early.
        called: &'static str,
        /// The call that must come before.
        expected: &'static str,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    ProjectedP,
    ProjectedQ,
    Finished,
}

/// A matrix as the product of two thin factors.
#[derive(Clone, Debug, Default)]
struct Approximation {
    p: Vec<[f32; GROUP]>,
    q: Packed,
}

impl Approximation {
    fn correction(&self) -> Correction<'_> {
        Correction { p: &self.p, q: &self.q }
    }
}

/// Low-rank compression of one tensor, in two phases with a commit. Factors cross this interface row-major, as hivemind
/// sends them: P as `rows x rank`, Q as `columns x rank`.
///
/// `begin(grad) -> P`, average P, `phase_p_done(P) -> Q`, average Q, `finish(Q, out)`, `commit()`. A round that is
/// aborted, or followed by another `begin` without a commit, leaves no trace. The memory takes twice the tensor: the
/// committed state, and the round in flight.
///
/// ```
/// use potluck_compression::low_rank::LowRank;
/// let mut state = LowRank::new(2, 3, 1, 42, 0)?;
/// let grad = [1.0, 2.0, 3.0, 2.0, 4.0, 6.0]; // rank 1
/// let p = state.begin(&grad)?.to_vec(); // average it with the group here
/// let q = state.phase_p_done(&p)?.to_vec(); // and this
/// let mut out = [0.0; 6];
/// state.finish(&q, &mut out)?;
/// state.commit()?;
/// assert!(out.iter().zip(grad).all(|(a, b)| (a - b).abs() < 1e-5));
/// # Ok::<(), potluck_compression::low_rank::LowRankError>(())
/// ```
#[derive(Clone, Debug)]
pub struct LowRank {
    rows: usize,
    columns: usize,
    rank: usize,
    /// Warm start of the next round, by column.
    q: Vec<f32>,
    /// Error memory plus the last committed gradient; minus `sent`, it is the error memory.
    base: Aligned,
    /// Of what `base` holds, what went into the last committed average. Taking it out is left to the next `begin`, which reads
    /// `base` anyway: so a commit is free, and can be refused until the last moment.
    sent: Option<Approximation>,
    /// Memory plus gradient of the round in flight.
    work: Aligned,
    /// Factors of the round in flight, by column.
    round_p: Vec<f32>,
    round_q: Vec<f32>,
    /// What was last handed out, row-major.
    exchange: Vec<f32>,
    /// Factors as the passes over the matrix read them.
    round: Approximation,
    /// Our own Q of the round in flight, when `round` has the averaged one.
    own_q: Packed,
    /// `q` as they read it.
    start: Packed,
    /// Of `begin`, kept for the next.
    sums: Vec<[Line; GROUP]>,
    /// One row of zeros.
    zeros: Vec<f32>,
    stage: Stage,
}

impl LowRank {
    /// State for a matrix of `rows x columns`. All peers that pass the same `run_seed` and `tensor_index` start from the
    /// same Q.
    ///
    /// # Errors
    /// [`LowRankError::Shape`].
    pub fn new(
        rows: usize,
        columns: usize,
        rank: usize,
        run_seed: u64,
        tensor_index: u64,
    ) -> Result<Self, LowRankError> {
        let refused = LowRankError::Shape { rows, columns, rank };
        let sizes = rows.checked_mul(columns).zip(rows.max(columns).checked_mul(rank));
        let numel = match sizes {
            Some((numel, factor)) if numel > 0 && factor > 0 => numel,
            _ => return Err(refused),
        };
        let mut seed = mix(run_seed ^ mix(tensor_index));
        let mut q: Vec<f32> = (0..columns * rank).map(|_| symmetric_unit(&mut seed)).collect();
        // Orthonormal from the start: the product with a badly conditioned Q would lose digits of the matrix.
        orthogonalize_columns(&mut q, rank);
        orthogonalize_columns(&mut q, rank);
        Ok(Self {
            rows,
            columns,
            rank,
            q,
            base: Aligned::zeros(numel),
            sent: None,
            work: Aligned::default(),
            round_p: Vec::new(),
            round_q: Vec::new(),
            exchange: Vec::new(),
            round: Approximation::default(),
            own_q: Packed::default(),
            start: Packed::default(),
            sums: Vec::new(),
            zeros: vec![0.0; columns],
            stage: Stage::Idle,
        })
    }

    /// Rows, columns and rank.
    #[must_use]
    pub fn dimensions(&self) -> (usize, usize, usize) {
        (self.rows, self.columns, self.rank)
    }

    /// Bytes held as large as the matrix: the error memory, and since the first round the round in flight.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of_val::<[f32]>(&self.base) + size_of_val::<[f32]>(&self.work)
    }

    /// Bytes held beside those: factors, thin as they are, in the forms that they are handed out and worked on.
    #[must_use]
    pub fn factor_bytes(&self) -> usize {
        let plain = [&self.q, &self.round_p, &self.round_q, &self.exchange, &self.zeros];
        let approximations = self.sent.iter().chain([&self.round]);
        plain.iter().map(|values| size_of_val(values.as_slice())).sum::<usize>()
            + approximations.map(|held| size_of_val(held.p.as_slice()) + held.q.bytes()).sum::<usize>()
            + self.start.bytes()
            + self.own_q.bytes()
            + size_of_val(self.sums.as_slice())
    }

    /// Start a round (dropping one that was not committed): P = (memory + grad) Q, `rows x rank`.
    ///
    /// # Errors
    /// The gradient has the wrong length, or is not finite.
    pub fn begin(&mut self, grad: &[f32]) -> Result<&[f32], LowRankError> {
        check_length("grad", self.base.len(), grad)?;
        self.stage = Stage::Idle;
        if self.work.is_empty() {
            self.work = Aligned::zeros(self.base.len());
        }
        self.start.pack(&self.q, self.columns);
        self.round.p.resize(self.rows * self.start.groups(), [0.0; GROUP]);
        simd::dispatch(Project {
            base: &self.base,
            sent: self.sent.as_ref().map(Approximation::correction),
            grad,
            q: &self.start,
            sums: &mut self.sums,
            work: &mut self.work,
            p: &mut self.round.p,
        });
        self.exchange.resize(self.rows * self.rank, 0.0);
        unpack_rows(&self.round.p, self.rank, &mut self.exchange);
        // A value that is not finite makes its row's products so, unless the columns of Q are zero there: look then.
        let q_is_dense = self.q.chunks_exact(self.columns).any(|column| !column.contains(&0.0));
        if !q_is_dense || first_non_finite(&self.exchange).is_some() {
            check_finite("grad", grad)?;
            check_finite("memory + grad", &self.work)?;
            check_finite("P", &self.exchange)?;
        }
        self.stage = Stage::ProjectedP;
        Ok(&self.exchange)
    }

    /// The group's mean P has arrived: orthogonalise it, and return Q = (memory + grad)^T P, `columns x rank`.
    ///
    /// # Errors
    /// Wrong order or length, or P is not finite.
    pub fn phase_p_done(&mut self, averaged_p: &[f32]) -> Result<&[f32], LowRankError> {
        if self.stage != Stage::ProjectedP {
            return Err(LowRankError::Order { called: "phase_p_done", expected: "begin" });
        }
        check_length("P", self.rows * self.rank, averaged_p)?;
        check_finite("P", averaged_p)?;
        to_columns(averaged_p, self.rank, &mut self.round_p);
        // Twice: one pass leaves nearly dependent columns far from orthogonal, and the second repairs that.
        orthogonalize_columns(&mut self.round_p, self.rank);
        orthogonalize_columns(&mut self.round_p, self.rank);
        check_finite("P", &self.round_p)?;
        pack_rows(&self.round_p, self.rank, &mut self.round.p);
        self.round.q.resize(self.columns, self.rank);
        simd::dispatch(ProjectBack {
            work: &self.work,
            p: &self.round.p,
            q: &mut self.round.q,
            zeros: &self.zeros,
        });
        self.round_q.resize(self.columns * self.rank, 0.0);
        self.round.q.unpack(&mut self.round_q);
        check_finite("Q", &self.round_q)?;
        self.exchange.resize(self.round_q.len(), 0.0);
        from_columns(&self.round_q, self.rank, &mut self.exchange);
        self.stage = Stage::ProjectedQ;
        Ok(&self.exchange)
    }

    /// The group's mean Q has arrived: write the approximated mean gradient P Q^T to `out`.
    ///
    /// # Errors
    /// Wrong order or length, or Q is not finite.
    pub fn finish(&mut self, averaged_q: &[f32], out: &mut [f32]) -> Result<(), LowRankError> {
        if self.stage != Stage::ProjectedQ {
            return Err(LowRankError::Order { called: "finish", expected: "phase_p_done" });
        }
        check_length("Q", self.columns * self.rank, averaged_q)?;
        check_length("out", self.base.len(), out)?;
        check_finite("Q", averaged_q)?;
        to_columns(averaged_q, self.rank, &mut self.round_q);
        std::mem::swap(&mut self.round.q, &mut self.own_q);
        self.round.q.pack(&self.round_q, self.columns);
        simd::dispatch(Reconstruct { p: &self.round.p, q: &self.round.q, out });
        self.stage = Stage::Finished;
        Ok(())
    }

    /// The round succeeded everywhere it had to: keep the new Q, and what the factors lost of our own gradient.
    ///
    /// # Errors
    /// Nothing was finished.
    pub fn commit(&mut self) -> Result<(), LowRankError> {
        if self.stage != Stage::Finished {
            return Err(LowRankError::Order { called: "commit", expected: "finish" });
        }
        self.keep_q();
        std::mem::swap(&mut self.base, &mut self.work);
        let sent = self.sent.get_or_insert_default();
        std::mem::swap(&mut sent.p, &mut self.round.p);
        std::mem::swap(&mut sent.q, &mut self.own_q);
        self.stage = Stage::Idle;
        Ok(())
    }

    /// The round succeeded, but nothing of ours was in it: keep the new Q, and the memory as it was before `begin`.
    ///
    /// # Errors
    /// Nothing was finished.
    pub fn commit_q(&mut self) -> Result<(), LowRankError> {
        if self.stage != Stage::Finished {
            return Err(LowRankError::Order { called: "commit_q", expected: "finish" });
        }
        self.keep_q();
        self.stage = Stage::Idle;
        Ok(())
    }

    /// The averaged Q spans the next start. Made orthonormal, it keeps P at the scale of the gradient, where the product
    /// with Q itself would square it (and 16-bit factors of small gradients would vanish); the span is the same.
    fn keep_q(&mut self) {
        // What was handed out is no longer needed; its memory is.
        let next = &mut self.exchange;
        next.clone_from(&self.round_q);
        orthogonalize_columns(next, self.rank);
        orthogonalize_columns(next, self.rank);
        for (kept, new) in self.q.chunks_exact_mut(self.columns).zip(next.chunks_exact(self.columns)) {
            // A zero column would yield zero factors for ever: after a zero gradient, for one.
            if new.iter().any(|value| *value != 0.0) && first_non_finite(new).is_none() {
                kept.copy_from_slice(new);
            }
        }
    }

    /// The sum of squares of memory plus gradient of the round in flight; no factor of it is larger, up to rounding.
    #[must_use]
    pub fn square_norm(&self) -> f64 {
        // Pieces in f64: long sums of f32 squares would lose the small ones.
        let square = |value: &f32| f64::from(*value) * f64::from(*value);
        self.work.chunks(1024).map(|piece| piece.iter().map(square).sum::<f64>()).sum()
    }

    /// Drop the round in flight: memory and Q are as before `begin`.
    pub fn abort(&mut self) {
        self.stage = Stage::Idle;
    }

    /// The warm-started Q, `columns x rank` row-major: what a peer that joins downloads.
    #[must_use]
    pub fn export_q(&self) -> Vec<f32> {
        let mut q = vec![0.0; self.q.len()];
        from_columns(&self.q, self.rank, &mut q);
        q
    }

    /// Replace Q (from [`export_q`](Self::export_q) of another peer) and drop the round in flight.
    ///
    /// # Errors
    /// Wrong length, or not finite.
    pub fn import_q(&mut self, q: &[f32]) -> Result<(), LowRankError> {
        check_length("Q", self.q.len(), q)?;
        check_finite("Q", q)?;
        self.abort();
        to_columns(q, self.rank, &mut self.q);
        Ok(())
    }

    /// The error memory: what all committed approximations lost so far. For checkpoints.
    #[must_use]
    pub fn export_memory(&self) -> Vec<f32> {
        let mut memory = self.base.to_vec();
        if let Some(sent) = &self.sent {
            simd::dispatch(Settle { correction: sent.correction(), memory: &mut memory });
        }
        memory
    }

    /// Replace the error memory and drop the round in flight.
    ///
    /// # Errors
    /// Wrong length, or not finite.
    pub fn import_memory(&mut self, memory: &[f32]) -> Result<(), LowRankError> {
        check_length("memory", self.base.len(), memory)?;
        check_finite("memory", memory)?;
        self.abort();
        self.sent = None;
        self.base.copy_from_slice(memory);
        Ok(())
    }
}

fn check_length(what: &'static str, expected: usize, values: &[f32]) -> Result<(), LowRankError> {
    let found = values.len();
    if found == expected { Ok(()) } else { Err(LowRankError::Length { what, expected, found }) }
}

fn check_finite(what: &'static str, values: &[f32]) -> Result<(), LowRankError> {
    match first_non_finite(values) {
        Some(index) => Err(LowRankError::NotFinite { what, index }),
        None => Ok(()),
    }
}

/// splitmix64: well-mixed bits from a counter or a seed.
fn mix(value: u64) -> u64 {
    let mut bits = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The next number in (-1, 1), never zero. Any start is valid; hivemind's [0, 1) has nearly parallel columns.
fn symmetric_unit(seed: &mut u64) -> f32 {
    *seed = seed.wrapping_add(1);
    let bits = (mix(*seed) >> 42) as u32;
    (bits as f32 + 0.5) / (1 << 21) as f32 - 1.0
}
