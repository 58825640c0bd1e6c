//! Sans-I/O. Who reduces how much: shares by measured rates.
//!
//! With share s a peer of a group with n senders moves `(1 - s) + s (n - 1)` encoded vectors in each direction. The
//! shares that let all peers finish at the same time follow from one number, the round's duration, found by bisection.

/// Shares are fractions of this.
pub(crate) const SHARE_UNIT: u32 = 1 << 20;
/// Rates closer together than this factor count as equal: their measurement is not better than that.
const RATE_NOISE: f64 = 1.3;

/// What is known of a member's links.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Capacity {
    /// The slower direction, in bytes per second; 0 when not measured yet.
    pub(crate) rate: f64,
    /// Whether it sends a vector (auxiliary peers only reduce).
    pub(crate) sends: bool,
}

/// The share of each member, in units of 1 / [`SHARE_UNIT`]; they add up to [`SHARE_UNIT`].
pub(crate) fn shares(members: &[Capacity]) -> Vec<u32> {
    if members.is_empty() {
        return Vec::new();
    }
    let mut known: Vec<f64> = members.iter().map(|member| member.rate).filter(|rate| *rate > 0.0).collect();
    known.sort_by(f64::total_cmp);
    let typical = known.get(known.len() / 2).copied().unwrap_or(1.0);
    let rates: Vec<f64> =
        members.iter().map(|member| if member.rate > 0.0 { member.rate } else { typical }).collect();
    let slowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let fastest = rates.iter().copied().fold(0.0, f64::max);
    let senders = members.iter().filter(|member| member.sends).count() as f64;
    // Two senders move the same bytes whatever the shares are, so equal ones balance the computing.
    let only_two = members.len() == 2 && senders == 2.0;
    if fastest <= slowest * RATE_NOISE || only_two {
        return quantize(&vec![1.0; members.len()]);
    }
    let share = |duration: f64, at: usize| {
        let budget = duration * rates[at];
        let share = if members[at].sends {
            (budget - 1.0) / (senders - 2.0).max(0.5)
        } else {
            budget / senders.max(1.0)
        };
        share.clamp(0.0, 1.0)
    };
    let (mut low, mut high) = (0.0, (senders + 1.0) / slowest);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        let total: f64 = (0..members.len()).map(|at| share(middle, at)).sum();
        if total < 1.0 { low = middle } else { high = middle }
    }
    quantize(&(0..members.len()).map(|at| share(high, at)).collect::<Vec<_>>())
}

/// Scale to [`SHARE_UNIT`]; the rounding remainder goes to the largest share.
fn quantize(weights: &[f64]) -> Vec<u32> {
    let total: f64 = weights.iter().sum();
    let mut shares: Vec<u32> =
        weights.iter().map(|weight| (weight / total * f64::from(SHARE_UNIT)) as u32).collect();
    let rest = SHARE_UNIT - shares.iter().sum::<u32>().min(SHARE_UNIT);
    if let Some(largest) = shares.iter_mut().rev().max_by_key(|share| **share) {
        *largest += rest;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sender(rate: f64) -> Capacity {
        Capacity { rate, sends: true }
    }

    #[test]
    fn equal_or_unknown_rates_give_equal_shares() {
        assert_eq!(shares(&[sender(0.0); 4]), [SHARE_UNIT / 4; 4]);
        assert_eq!(shares(&[sender(10.0), sender(11.0)]), [SHARE_UNIT / 2; 2]);
    }

    #[test]
    fn a_slow_peer_reduces_less_and_a_very_slow_one_nothing() {
        let given = shares(&[sender(10.0), sender(10.0), sender(10.0), sender(5.0)]);
        assert!(given[3] < given[0] / 2, "{given:?}");
        assert_eq!(given.iter().sum::<u32>(), SHARE_UNIT);
        let given = shares(&[sender(20.0), sender(20.0), sender(20.0), sender(1.0)]);
        assert_eq!(given[3], 0);
    }

    #[test]
    fn auxiliary_peers_take_work_off_the_senders() {
        let helper = Capacity { rate: 1000.0, sends: false };
        let given = shares(&[sender(10.0), sender(10.0), sender(10.0), helper]);
        assert!(given[3] > SHARE_UNIT / 2, "{given:?}");
    }
}
