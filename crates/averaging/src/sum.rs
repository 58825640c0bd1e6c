//! Sans-I/O. The arithmetic of one chunk: checks, the weighted sum in group order, and the encoded mean.
//!
//! Weights are divided by the largest one first, so that equal weights are exactly 1 and sums of them exact; the sum is
//! kept in f32, whose error grows as N times 2^-24 of the terms' magnitude: 4e-6 relative for 64 members.

use crate::spans::Chunk;
use potluck_compression::{Scratch, Tally, sum_values};
use potluck_net::FaultKind;

/// Slack for what a lossy encoding may add to a chunk's norm.
const NORM_SLACK: f64 = 4.0;

/// One contribution to a chunk.
pub(crate) enum Term<P> {
    /// Our own values.
    Own { sender: usize, weight: f64 },
    /// What a member sent, and the norm that it announced.
    Sent { sender: usize, weight: f64, norm: f64, payload: P },
}

/// Who was refused, and why.
pub(crate) type Refusal = (usize, FaultKind, String);

/// The running sum of one chunk.
#[derive(Default)]
pub(crate) struct ChunkSum {
    sum: Vec<f32>,
    /// Where the next sum is made: it counts only if what was added passes.
    next: Vec<f32>,
    scratch: Scratch,
    weight: f64,
    mask: u64,
}

impl ChunkSum {
    /// Check a contribution and add it, in one pass. On an error the sum is as it was.
    pub(crate) fn add<P: AsRef<[u8]>>(
        &mut self,
        chunk: &Chunk,
        term: &Term<P>,
        vector: &[f32],
    ) -> Result<(), Refusal> {
        self.begin(chunk);
        self.next.resize(chunk.range.len(), 0.0);
        let (sender, weight, checked) = match term {
            Term::Own { sender, weight } => {
                let values = &vector[chunk.range.clone()];
                let tally = sum_values(values, *weight as f32, &self.sum, &mut self.next);
                (*sender, *weight, check(chunk, f64::INFINITY, tally))
            }
            Term::Sent { sender, weight, norm, payload } => {
                let bytes = payload.as_ref();
                let tally = chunk.scheme.decode_sum(bytes, *weight as f32, &self.sum, &mut self.next);
                let tally = tally.map_err(|error| (FaultKind::Malformed, error.to_string()));
                (*sender, *weight, tally.and_then(|tally| check(chunk, *norm, tally)))
            }
        };
        checked.map_err(|(kind, reason)| (sender, kind, reason))?;
        std::mem::swap(&mut self.sum, &mut self.next);
        self.weight += weight;
        self.mask |= 1 << sender;
        Ok(())
    }

    fn begin(&mut self, chunk: &Chunk) {
        if self.mask == 0 {
            self.sum.clear();
            self.sum.resize(chunk.range.len(), 0.0);
        }
    }

    /// Append the encoded mean to `out`, which holds the frame's head already: the senders that are in it, and how many
    /// values were clamped. Ready for the next chunk. `None` if the mean cannot be encoded.
    pub(crate) fn finish(&mut self, chunk: &Chunk, out: &mut Vec<u8>) -> Option<(u64, usize)> {
        self.begin(chunk);
        let (weight, mask) = (std::mem::take(&mut self.weight), std::mem::take(&mut self.mask));
        let factor = if weight > 0.0 { (1.0 / weight) as f32 } else { 1.0 };
        // Finite terms can still add up to infinity, which some schemes cannot express: it is clamped.
        let report = chunk.scheme.encode_scaled(&self.sum, factor, out, &mut self.scratch).ok()?;
        Some((mask, report.saturated + report.clamped))
    }
}

/// Whether what was found in a contribution may be in the sum.
fn check(chunk: &Chunk, norm: f64, found: Tally) -> Result<(), (FaultKind, String)> {
    if let Some(at) = found.first_non_finite {
        return Err((FaultKind::NotFinite, format!("value {} is not finite", chunk.range.start + at)));
    }
    let found = found.square_sum.sqrt();
    if found > norm * NORM_SLACK + f64::from(f32::MIN_POSITIVE) {
        return Err((
            FaultKind::Implausible,
            format!("norm {found:e} in one chunk, {norm:e} announced for all"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_compression::Scheme;

    const LEN: usize = 3;

    fn chunk() -> Chunk {
        Chunk { range: 2..2 + LEN, scheme: Scheme::None }
    }

    fn sent(sender: usize, weight: f64, norm: f64, values: &[f32]) -> Term<Vec<u8>> {
        let payload = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Term::Sent { sender, weight, norm, payload }
    }

    fn finish(sum: &mut ChunkSum) -> (u64, Vec<f32>) {
        let mut out = vec![9];
        let (mask, _) = sum.finish(&chunk(), &mut out).unwrap();
        let mut values = vec![0.0; LEN];
        Scheme::None.decode(&out[1..], &mut values).unwrap();
        assert_eq!(out[0], 9, "the frame's head stays");
        (mask, values)
    }

    #[test]
    fn the_mean_is_weighted_and_what_is_refused_leaves_no_trace() {
        let own = [0.0, 0.0, 1.0, 2.0, 3.0];
        let mut sum = ChunkSum::default();
        // The first to come is refused, then one in the middle of the group.
        let (sender, kind, reason) =
            sum.add(&chunk(), &sent(0, 1.0, 9.0, &[1.0, f32::NAN, 0.0]), &own).unwrap_err();
        assert_eq!((sender, kind, reason.as_str()), (0, FaultKind::NotFinite, "value 3 is not finite"));
        sum.add(&chunk(), &Term::<Vec<u8>>::Own { sender: 1, weight: 1.0 }, &own).unwrap();
        let refused = sum.add(&chunk(), &sent(2, 1.0, 1.0, &[100.0, 0.0, 0.0]), &own).unwrap_err();
        assert_eq!((refused.0, refused.1), (2, FaultKind::Implausible));
        let refused = sum.add(&chunk(), &sent(3, 1.0, 9.0, &[1.0]), &own).unwrap_err();
        assert_eq!((refused.0, refused.1), (3, FaultKind::Malformed));
        sum.add(&chunk(), &sent(4, 0.5, 9.0, &[4.0, 5.0, 6.0]), &own).unwrap();
        assert_eq!(finish(&mut sum), (0b10010, vec![2.0, 3.0, 4.0]));
        // The next chunk starts from nothing.
        sum.add(&chunk(), &sent(4, 1.0, 9.0, &[4.0, 5.0, 6.0]), &own).unwrap();
        assert_eq!(finish(&mut sum), (0b10000, vec![4.0, 5.0, 6.0]));
        assert_eq!(finish(&mut sum), (0, vec![0.0; LEN]));
    }

    #[test]
    fn a_sum_that_overflows_stays_expressible() {
        let mut sum = ChunkSum::default();
        for sender in 0..2 {
            sum.add(&chunk(), &sent(sender, 1.0, f64::INFINITY, &[f32::MAX, f32::MIN, 1.0]), &[]).unwrap();
        }
        assert_eq!(finish(&mut sum), (0b11, vec![f32::MAX, f32::MIN, 1.0]));
    }
}
