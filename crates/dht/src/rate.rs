//! Sans-I/O. How often one peer may ask us for something: a token bucket per peer, for a bounded number of peers.

use crate::entry::Moment;
use potluck_net::PeerId;
use std::collections::BTreeMap;
use std::time::Duration;

/// Token buckets by peer.
#[derive(Debug)]
pub struct RateLimiter {
    per_second: f64,
    burst: f64,
    peers_max: usize,
    buckets: BTreeMap<PeerId, (f64, Moment)>,
}

impl RateLimiter {
    /// `per_second` requests in the long run, `burst` at once, remembered for at most `peers_max` peers.
    pub fn new(per_second: f64, burst: f64, peers_max: usize) -> Self {
        Self { per_second, burst, peers_max: peers_max.max(1), buckets: BTreeMap::new() }
    }

    /// Whether `peer` may have one more request.
    pub fn allow(&mut self, peer: PeerId, now: Moment) -> bool {
        if self.buckets.len() >= self.peers_max && !self.buckets.contains_key(&peer) {
            self.forget_full(now);
        }
        let (tokens, at) = self.buckets.entry(peer).or_insert((self.burst, now));
        let earned = now.saturating_sub(*at).as_secs_f64() * self.per_second;
        *tokens = (*tokens + earned).min(self.burst);
        *at = now;
        let allowed = *tokens >= 1.0;
        if allowed {
            *tokens -= 1.0;
        }
        allowed
    }

    /// The request that `peer` was allowed turned out to cost as much as `more` others besides. Its debt keeps it waiting.
    pub fn charge(&mut self, peer: PeerId, more: f64) {
        if let Some((tokens, _)) = self.buckets.get_mut(&peer) {
            *tokens -= more;
        }
    }

    /// Peers whose bucket would be full again need no memory; if that frees nothing, the longest silent one goes.
    fn forget_full(&mut self, now: Moment) {
        let full_after = Duration::from_secs_f64(self.burst / self.per_second.max(1e-3));
        self.buckets.retain(|_, (_, at)| now.saturating_sub(*at) < full_after);
        if self.buckets.len() >= self.peers_max
            && let Some(peer) = self.buckets.iter().min_by_key(|(_, (_, at))| *at).map(|(peer, _)| *peer)
        {
            self.buckets.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_allowed_and_then_the_rate() {
        let mut limiter = RateLimiter::new(2.0, 3.0, 8);
        let (peer, other) = (PeerId::from_ed25519(&[1; 32]), PeerId::from_ed25519(&[2; 32]));
        let now = Duration::from_secs(100);
        assert_eq!((0..9).filter(|_| limiter.allow(peer, now)).count(), 3);
        assert!(limiter.allow(other, now));
        let later = now + Duration::from_secs(1);
        assert_eq!((0..9).filter(|_| limiter.allow(peer, later)).count(), 2);
    }

    #[test]
    fn what_costs_more_is_paid_before_the_next() {
        let mut limiter = RateLimiter::new(2.0, 3.0, 8);
        let (peer, now) = (PeerId::from_ed25519(&[1; 32]), Duration::from_secs(100));
        assert!(limiter.allow(peer, now));
        limiter.charge(peer, 5.0);
        assert!(!limiter.allow(peer, now + Duration::from_secs(1)));
        assert!(limiter.allow(peer, now + Duration::from_secs(2)));
    }

    #[test]
    fn its_memory_is_bounded() {
        let mut limiter = RateLimiter::new(1.0, 3.0, 8);
        for key in 0..100 {
            limiter.allow(PeerId::from_ed25519(&[key; 32]), Duration::from_millis(u64::from(key)));
        }
        assert!(limiter.buckets.len() <= 8);
    }
}
