//! PowerSGD of a session: which tensors travel as thin factors, and the round in flight.
//!
//! A gradient round is one plan with two phases. The first averages P of every matrix, and the tensors that do not
//! shrink; the second averages Q. What the session keeps of it (Q as the next start, and in the error memory what the
//! factors lost) changes only when the average is applied. Q is a function of averaged bits, so all peers of one history
//! have the same; it travels with the state. The error memory is each peer's own.

use crate::{ConfigError, PowerSgd, SessionConfig};
use bytes::Bytes;
use potluck_compression::low_rank::{LowRank, LowRankError, is_compressed, matrix_shape};
use potluck_compression::{TensorInfo, first_non_finite};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How one tensor of the gradient vector travels.
#[derive(Clone, Copy)]
enum Slot {
    Plain { len: usize },
    Factors { rows: usize, columns: usize },
}

impl Slot {
    /// Values in the gradient vector.
    fn values(self) -> usize {
        match self {
            Self::Plain { len } => len,
            Self::Factors { rows, columns } => rows * columns,
        }
    }
}

/// What goes into the first phase.
pub(crate) struct Begun {
    /// Which round: calls for one that was replaced meanwhile are refused.
    pub(crate) round: u64,
    pub(crate) first: Vec<f32>,
    /// Bounds the norm of both phases' vectors.
    pub(crate) norm: f64,
    /// Why our values are not in it.
    pub(crate) refused: Option<String>,
}

/// The factors of one session.
pub(crate) struct Factors {
    slots: Vec<Slot>,
    rank: usize,
    /// The tensors of each phase.
    pub(crate) first: Vec<TensorInfo>,
    pub(crate) second: Vec<TensorInfo>,
    state: Mutex<State>,
    /// The committed Q of all matrices: can be read while a round computes.
    q: Mutex<Bytes>,
    /// What [`bytes`](Self::bytes) found last.
    bytes: Mutex<(u64, u64)>,
}

struct State {
    /// One per `Slot::Factors`; none at peers without gradients.
    matrices: Vec<LowRank>,
    round: u64,
    /// The round in flight has its result; whether our own values are in it.
    finished: Option<bool>,
}

impl State {
    fn expect(&self, round: u64) -> Result<(), String> {
        if self.round == round { Ok(()) } else { Err("another round was started meanwhile".to_owned()) }
    }
}

impl Factors {
    /// The factors of a session; none if no tensor is worth it.
    pub(crate) fn new(config: &SessionConfig) -> Result<Option<Arc<Self>>, ConfigError> {
        let Some(PowerSgd { rank, min_compression_ratio }) = config.powersgd else { return Ok(None) };
        let key = blake3::derive_key("potluck powersgd seed v1", config.run_id.as_bytes());
        let seed = key.iter().take(8).fold(0, |seed, byte| (seed << 8) | u64::from(*byte));
        let (mut slots, mut matrices) = (Vec::new(), Vec::new());
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for (index, tensor) in (0..).zip(&config.tensors) {
            let shrinks = is_compressed(&tensor.shape, rank, f64::from(min_compression_ratio));
            let Some((rows, columns)) = matrix_shape(&tensor.shape).filter(|_| shrinks) else {
                slots.push(Slot::Plain { len: tensor.numel() });
                first.push(tensor.clone());
                continue;
            };
            slots.push(Slot::Factors { rows, columns });
            first.push(TensorInfo { shape: vec![rows, rank], ..tensor.clone() });
            second.push(TensorInfo { shape: vec![columns, rank], ..tensor.clone() });
            if !config.auxiliary {
                let refused = |error: LowRankError| ConfigError::powersgd(&tensor.key, &error);
                matrices.push(LowRank::new(rows, columns, rank, seed, index).map_err(refused)?);
            }
        }
        if second.is_empty() {
            return Ok(None);
        }
        let q = Mutex::new(export(&matrices));
        let state = Mutex::new(State { matrices, round: 0, finished: None });
        Ok(Some(Arc::new(Self { slots, rank, first, second, state, q, bytes: Mutex::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Start a round with our gradients; one that was not applied is dropped.
    pub(crate) fn begin(&self, vector: &[f32]) -> Begun {
        let mut state = self.state();
        state.round += 1;
        state.finished = None;
        let round = state.round;
        let begun = match first_non_finite(vector) {
            Some(at) => Err(format!("our own value {at} is {}", vector[at])),
            None => self.project(&mut state, vector).map_err(|error| format!("our own values: {error}")),
        };
        let (first, norm, refused) = match begun {
            Ok((first, norm)) => (first, norm, None),
            Err(reason) => {
                // We contribute nothing, and yet learn what the others agree on.
                let zeros = vec![0.0; vector.len()];
                let len = self.first.iter().map(TensorInfo::numel).sum();
                let first =
                    self.project(&mut state, &zeros).map_or_else(|_| vec![0.0; len], |(first, _)| first);
                (first, 0.0, Some(reason))
            }
        };
        Begun { round, first, norm, refused }
    }

    fn project(&self, state: &mut State, vector: &[f32]) -> Result<(Vec<f32>, f64), LowRankError> {
        let mut first = Vec::with_capacity(self.first.iter().map(TensorInfo::numel).sum());
        let (mut square, mut at) = (0.0, 0);
        let mut matrices = state.matrices.iter_mut();
        for slot in &self.slots {
            let values = &vector[at..at + slot.values()];
            at += slot.values();
            let matrix = if matches!(slot, Slot::Factors { .. }) { matrices.next() } else { None };
            match matrix {
                Some(matrix) => {
                    first.extend_from_slice(matrix.begin(values)?);
                    square += matrix.square_norm();
                }
                None => first.extend_from_slice(values),
            }
        }
        square += first.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        Ok((first, square.sqrt()))
    }

    /// Our values of the second phase, from the average of the first.
    pub(crate) fn between(&self, round: u64, average: &[f32]) -> Result<Vec<f32>, String> {
        let mut state = self.state();
        state.expect(round)?;
        let mut second = Vec::with_capacity(self.second.iter().map(TensorInfo::numel).sum());
        let mut at = 0;
        let mut matrices = state.matrices.iter_mut();
        for slot in &self.slots {
            let Slot::Factors { rows, .. } = slot else {
                at += slot.values();
                continue;
            };
            let p = average.get(at..at + rows * self.rank).ok_or("the average is too short")?;
            at += p.len();
            let matrix = matrices.next().ok_or("this peer has no gradients")?;
            second.extend_from_slice(matrix.phase_p_done(p).map_err(|error| error.to_string())?);
        }
        Ok(second)
    }

    /// The averaged gradients, from the averages of both phases. Nothing is kept before [`commit`](Self::commit).
    pub(crate) fn finish(
        &self,
        round: u64,
        first: &[f32],
        second: &[f32],
        contributed: bool,
    ) -> Result<Vec<f32>, String> {
        let mut state = self.state();
        state.expect(round)?;
        let mut vector = vec![0.0; self.slots.iter().map(|slot| slot.values()).sum()];
        let mut rest = vector.as_mut_slice();
        let (mut p_at, mut q_at) = (0, 0);
        let mut matrices = state.matrices.iter_mut();
        for slot in &self.slots {
            let (out, after) = rest.split_at_mut(slot.values());
            rest = after;
            match *slot {
                Slot::Plain { len } => {
                    out.copy_from_slice(first.get(p_at..p_at + len).ok_or("the average is too short")?);
                    p_at += len;
                }
                Slot::Factors { rows, columns } => {
                    p_at += rows * self.rank;
                    let q = second.get(q_at..q_at + columns * self.rank).ok_or("the average is too short")?;
                    q_at += q.len();
                    let matrix = matrices.next().ok_or("this peer has no gradients")?;
                    matrix.finish(q, out).map_err(|error| error.to_string())?;
                }
            }
        }
        if let Some(at) = first_non_finite(&vector) {
            return Err(format!("value {at} of the averaged gradients is too large"));
        }
        state.finished = Some(contributed);
        Ok(vector)
    }

    /// The averaged gradients of a round that others made, from the averages of both its phases; what to keep of it is
    /// decided as for an own one, and nothing is owed for it.
    pub(crate) fn replay(&self, first: &[f32], second: &[f32]) -> Result<Vec<f32>, String> {
        let zeros = vec![0.0; self.slots.iter().map(|slot| slot.values()).sum()];
        let round = self.begin(&zeros).round;
        self.between(round, first)?;
        self.finish(round, first, second, false)
    }

    /// The average is applied: keep the new Q, and what the factors lost of our own values. Nothing happens if there is
    /// no result that waits for this.
    pub(crate) fn commit(&self) {
        let mut state = self.state();
        let Some(contributed) = state.finished.take() else { return };
        for matrix in &mut state.matrices {
            let kept = if contributed { matrix.commit() } else { matrix.commit_q() };
            kept.expect("`finished` is only set when every matrix has its result");
        }
        *self.q.lock().unwrap_or_else(PoisonError::into_inner) = export(&state.matrices);
    }

    /// The average, if there was one, is not applied: everything is as before the round.
    pub(crate) fn abort(&self) {
        let mut state = self.state();
        state.round += 1;
        state.finished = None;
        state.matrices.iter_mut().for_each(LowRank::abort);
    }

    /// The committed Q of all matrices, for newcomers.
    pub(crate) fn q(&self) -> Bytes {
        self.q.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes held for the error memory, and for factors. Never waits: while a round computes they are those of the last look.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let mut seen = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(state) = self.state.try_lock() {
            let sum = |of: fn(&LowRank) -> usize| state.matrices.iter().map(|m| of(m) as u64).sum::<u64>();
            *seen = (sum(LowRank::memory_bytes), sum(LowRank::factor_bytes) + self.q().len() as u64);
        }
        *seen
    }

    /// No round follows.
    pub(crate) fn let_go(&self) {
        let mut state = self.state();
        state.round += 1;
        (state.matrices, state.finished) = (Vec::new(), None);
        *self.q.lock().unwrap_or_else(PoisonError::into_inner) = Bytes::new();
    }

    /// Whether [`import`](Self::import) would take these bytes.
    pub(crate) fn check(&self, q: &[u8]) -> Result<(), String> {
        let expected = 4 * self.second.iter().map(TensorInfo::numel).sum::<usize>();
        if q.len() != expected {
            return Err(format!("the state's Q has {} bytes, {expected} expected", q.len()));
        }
        let words = q.as_chunks::<4>().0;
        match words.iter().all(|word| f32::from_le_bytes(*word).is_finite()) {
            true => Ok(()),
            false => Err("the state's Q is not finite".to_owned()),
        }
    }

    /// Go on with the Q of another history. The error memory stays: these gradients are still owed.
    pub(crate) fn import(&self, q: &Bytes) -> Result<(), String> {
        self.check(q)?;
        self.abort();
        let mut state = self.state();
        let values: Vec<f32> = q.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
        let mut rest = values.as_slice();
        for matrix in &mut state.matrices {
            let (_, columns, rank) = matrix.dimensions();
            let (ours, after) = rest.split_at_checked(columns * rank).ok_or("the state's Q is too short")?;
            rest = after;
            matrix.import_q(ours).map_err(|error| error.to_string())?;
        }
        *self.q.lock().unwrap_or_else(PoisonError::into_inner) = export(&state.matrices);
        Ok(())
    }

    /// The error memory of all matrices.
    #[cfg(test)]
    fn memory(&self) -> Vec<f32> {
        self.state().matrices.iter().flat_map(LowRank::export_memory).collect()
    }
}

fn export(matrices: &[LowRank]) -> Bytes {
    let values = matrices.iter().flat_map(LowRank::export_q);
    values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_compression::TensorRole;

    fn factors() -> Arc<Factors> {
        let matrix = TensorInfo { key: "w".into(), shape: vec![16, 24], role: TensorRole::Gradient };
        let bias = TensorInfo::vector("b", 3, TensorRole::Gradient);
        let mut config = SessionConfig::new("run", 1, vec![matrix, bias]);
        config.powersgd = Some(PowerSgd { rank: 2, min_compression_ratio: 0.5 });
        Factors::new(&config).unwrap().unwrap()
    }

    fn gradient(seed: usize) -> Vec<f32> {
        (0..16 * 24 + 3).map(|at| ((at * 37 + seed * 101) % 89) as f32 / 44.0 - 1.0).collect()
    }

    /// A round of one; nothing is kept yet.
    fn round(factors: &Factors, seed: usize, contributed: bool) -> Vec<f32> {
        let begun = factors.begin(&gradient(seed));
        let second = factors.between(begun.round, &begun.first).unwrap();
        factors.finish(begun.round, &begun.first, &second, contributed).unwrap()
    }

    #[test]
    fn only_a_commit_changes_anything() {
        let factors = factors();
        round(&factors, 1, true);
        factors.commit();
        let kept = (factors.q(), factors.memory());
        let stale = factors.begin(&gradient(2)).round;
        factors.abort();
        assert!(factors.between(stale, &[]).is_err());
        round(&factors, 3, true);
        factors.abort();
        factors.commit();
        round(&factors, 4, true);
        assert!(factors.begin(&[f32::NAN; 16 * 24 + 3]).refused.is_some());
        factors.commit();
        assert_eq!((factors.q(), factors.memory()), kept);
        round(&factors, 5, true);
        factors.commit();
        assert!(factors.q() != kept.0 && factors.memory() != kept.1);
    }

    #[test]
    fn whoever_contributed_nothing_learns_q_and_owes_nothing() {
        let (ours, theirs) = (factors(), factors());
        assert_eq!(ours.q(), theirs.q(), "the run's name gives the first Q");
        round(&ours, 1, false);
        round(&theirs, 1, true);
        ours.commit();
        theirs.commit();
        assert_eq!(ours.q(), theirs.q());
        assert!(ours.memory().iter().all(|value| *value == 0.0));
        assert!(theirs.memory().iter().any(|value| *value != 0.0));
    }

    #[test]
    fn a_round_that_was_missed_is_made_up_for() {
        let (member, late) = (factors(), factors());
        for seed in 1..4 {
            let begun = member.begin(&gradient(seed));
            let second = member.between(begun.round, &begun.first).unwrap();
            let average = member.finish(begun.round, &begun.first, &second, true).unwrap();
            member.commit();
            assert_eq!(late.replay(&begun.first, &second).unwrap(), average);
            late.commit();
            assert_eq!(late.q(), member.q());
        }
        assert!(late.memory().iter().all(|value| *value == 0.0));
        assert!(late.replay(&[], &[]).is_err());
    }

    #[test]
    fn bytes_are_those_of_the_matrices_and_wait_for_nobody() {
        let factors = factors();
        let matrix = 4 * 16 * 24;
        let (owed, thin) = factors.bytes();
        assert_eq!(owed, matrix, "the error memory alone");
        assert!(thin >= 2 * 4 * 24 * 2, "Q, and Q as it travels: {thin}");
        round(&factors, 1, true);
        factors.commit();
        let (owed, grown) = factors.bytes();
        assert_eq!(owed, 2 * matrix, "and what the round needed");
        assert!(grown >= thin + 2 * 4 * (16 + 24) * 2, "P and Q of the round and of the average: {grown}");
        let computing = factors.state();
        assert_eq!(factors.bytes(), (owed, grown));
        drop(computing);
        factors.let_go();
        assert_eq!(factors.bytes(), (0, 0));
    }

    #[test]
    fn a_foreign_q_is_checked_and_taken_over() {
        let (donor, joiner) = (factors(), factors());
        round(&donor, 1, true);
        donor.commit();
        assert!(joiner.import(&donor.q().slice(4..)).is_err());
        assert!(joiner.import(&vec![0xff; donor.q().len()].into()).is_err());
        joiner.import(&donor.q()).unwrap();
        assert_eq!(joiner.q(), donor.q());
    }
}
