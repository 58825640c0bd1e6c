//! Sans-I/O. Is one peer alive? Silence makes it suspect, others are asked, and only then is it given up.
//!
//! Any frame from the peer counts as a sign of life, not only heartbeats, so that a saturated link kills nobody. Frames of
//! a round count for less, and are no reason to vouch for anybody: what the network had taken in before the peer froze
//! still arrives for a second or more.

use std::time::Duration;
use tokio::time::Instant;

/// Time between heartbeats.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// Silence after which a peer is suspect: one heartbeat may be lost with its stream, and the next be late.
const SUSPECT_AFTER: Duration = Duration::from_millis(1900);
/// Frames of a round keep up a peer whose heartbeats are late for so long after the last of them.
const BULK_COUNTS_FOR: Duration = Duration::from_millis(800);
/// After a broken connection the wait is shorter: something has happened to the peer.
const SUSPECT_AFTER_BREAK: Duration = Duration::from_millis(300);
/// Time for others to vouch for it, and for a new connection to it.
const VERDICT_AFTER: Duration = Duration::from_millis(700);
/// A report of another peer counts when that peer heard it no longer ago than this.
const VOUCH_AGE_MAX: Duration = Duration::from_millis(1500);

/// What to do about a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opinion {
    Fine,
    /// It has just become suspect: ask others, connect anew.
    Ask,
    /// Nobody has heard of it.
    Dead,
}

/// The detector for one peer.
#[derive(Debug, Clone)]
pub(crate) struct Detector {
    heard: Instant,
    /// The last frame of a round.
    bulk: Instant,
    broken: Option<Instant>,
    asked: Option<Instant>,
}

impl Detector {
    pub(crate) fn new(now: Instant) -> Self {
        Self { heard: now, bulk: now, broken: None, asked: None }
    }

    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = self.heard.max(now);
        self.asked = None;
        self.broken = None;
    }

    /// A frame of a round has come.
    pub(crate) fn heard_bulk(&mut self, now: Instant) {
        self.bulk = self.bulk.max(now);
        if now < self.suspect_at() {
            self.asked = None;
        }
    }

    pub(crate) fn link_broke(&mut self, now: Instant) {
        self.broken.get_or_insert(now);
    }

    /// Another peer heard it `age` ago.
    pub(crate) fn vouched(&mut self, now: Instant, age: Duration) {
        if age <= VOUCH_AGE_MAX {
            self.heard = self.heard.max(now.checked_sub(age).unwrap_or(now));
            self.asked = None;
            self.broken = None;
        }
    }

    /// How long ago it gave a sign of life.
    pub(crate) fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.heard)
    }

    /// Whether its link, if it broke at all, broke too recently for what others say of its death to count.
    pub(crate) fn is_heard(&self, now: Instant, linked: bool) -> bool {
        (linked || self.broken.is_some()) && self.silence(now) < SUSPECT_AFTER
    }

    pub(crate) fn judge(&mut self, now: Instant) -> Opinion {
        if let Some(asked) = self.asked {
            return if now >= asked + VERDICT_AFTER { Opinion::Dead } else { Opinion::Fine };
        }
        if now >= self.suspect_at() {
            self.asked = Some(now);
            return Opinion::Ask;
        }
        Opinion::Fine
    }

    fn suspect_at(&self) -> Instant {
        let silent = (self.heard + SUSPECT_AFTER).max(self.bulk + BULK_COUNTS_FOR);
        self.broken.map_or(silent, |broken| silent.min(broken.max(self.bulk) + SUSPECT_AFTER_BREAK))
    }

    pub(crate) fn next_wakeup(&self) -> Instant {
        self.asked.map_or_else(|| self.suspect_at(), |asked| asked + VERDICT_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_frozen_peer_is_out_within_three_seconds() {
        let start = Instant::now();
        let mut detector = Detector::new(start);
        assert_eq!(detector.judge(start + Duration::from_millis(1800)), Opinion::Fine);
        assert_eq!(detector.judge(start + Duration::from_millis(1900)), Opinion::Ask);
        assert_eq!(detector.judge(start + Duration::from_millis(2600)), Opinion::Dead);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_under_way_when_a_peer_froze_does_not_keep_it_alive() {
        let start = Instant::now();
        let mut detector = Detector::new(start);
        for tenth in 0..13 {
            detector.heard_bulk(start + Duration::from_millis(100 * tenth));
        }
        assert_eq!(detector.judge(start + Duration::from_millis(2000)), Opinion::Ask);
        assert_eq!(detector.judge(start + Duration::from_millis(2700)), Opinion::Dead);
        // A saturated link, on which heartbeats are late.
        let mut detector = Detector::new(start);
        for tenth in 0..50 {
            detector.heard_bulk(start + Duration::from_millis(100 * tenth));
            assert_eq!(detector.judge(start + Duration::from_millis(100 * tenth)), Opinion::Fine);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_voucher_or_a_frame_clears_the_suspicion() {
        let start = Instant::now();
        let mut detector = Detector::new(start);
        let later = start + Duration::from_secs(2);
        assert_eq!(detector.judge(later), Opinion::Ask);
        detector.vouched(later, Duration::from_secs(5));
        assert_eq!(detector.judge(later + VERDICT_AFTER), Opinion::Dead);
        detector.vouched(later, Duration::from_millis(200));
        assert_eq!(detector.judge(later + Duration::from_millis(800)), Opinion::Fine);
    }
}
