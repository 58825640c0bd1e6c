//! Sans-I/O. How fast a link is, measured from what passed through it: no peer ever declares its bandwidth.
//!
//! Bytes are counted in short windows. What goes up is counted while somebody waits for room: whatever finds room at once
//! went into a buffer, which says nothing, and nothing to send is no slowness; the estimate follows upward quickly and
//! downward slowly. What comes down depends on what others send, so a downlink is at least as fast as the most that was
//! seen: an estimate that fell with the demand would lower the share of whoever has little to reduce, and so the demand.

use std::time::Duration;
use tokio::time::Instant;

/// Length of one window.
const WINDOW: Duration = Duration::from_millis(250);
/// What comes in from all others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Downlink {
    window: Option<(Instant, u64)>,
    rate: f64,
}

impl Downlink {
    /// `bytes` came just now.
    pub(crate) fn add(&mut self, now: Instant, bytes: usize) {
        let (start, sum) = self.window.get_or_insert((now, 0));
        *sum += bytes as u64;
        let elapsed = now.saturating_duration_since(*start);
        if elapsed >= WINDOW {
            self.rate = self.rate.max(*sum as f64 / elapsed.as_secs_f64());
            (*start, *sum) = (now, 0);
        }
    }

    /// Bytes per second; 0 while nothing was measured.
    pub(crate) fn bytes_per_second(&self) -> f64 {
        self.rate
    }
}

/// A writer that waits again within this time has not been idle.
const IDLE: Duration = Duration::from_millis(20);

/// What leaves while writers wait for room.
#[derive(Debug, Clone, Default)]
pub(crate) struct Uplink {
    waiting: u32,
    window: Option<(Instant, u64)>,
    /// The window is the first since the link was idle: buffers were empty, so more left than the link carries.
    first: bool,
    last: Option<Instant>,
    rate: f64,
    /// The rate is not that of a first window.
    certain: bool,
}

impl Uplink {
    /// Somebody begins to wait for room.
    pub(crate) fn wait(&mut self, now: Instant) {
        let idle = self.last.is_none_or(|last| now > last + IDLE);
        if self.waiting == 0 && idle {
            (self.window, self.first) = (Some((now, 0)), true);
        }
        self.waiting += 1;
    }

    /// It has got room for so many bytes (none, if it gave up).
    pub(crate) fn go_on(&mut self, now: Instant, bytes: usize) {
        self.waiting = self.waiting.saturating_sub(1);
        self.last = Some(now);
        let Some((start, sum)) = &mut self.window else { return };
        *sum += bytes as u64;
        let elapsed = now.saturating_duration_since(*start);
        if elapsed < WINDOW {
            return;
        }
        let seen = std::mem::take(sum) as f64 / elapsed.as_secs_f64();
        *start = now;
        let first = std::mem::take(&mut self.first);
        if first && self.rate > 0.0 {
            return;
        }
        let gain = if seen > self.rate { 0.5 } else { 0.05 };
        self.rate = if self.certain { self.rate + gain * (seen - self.rate) } else { seen };
        self.certain = !first;
    }

    /// Bytes per second; 0 while nothing was measured.
    pub(crate) fn bytes_per_second(&self) -> f64 {
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_downlink_is_as_fast_as_it_ever_was() {
        let mut downlink = Downlink::default();
        for bytes in [50_000, 10_000, 0] {
            for _ in 0..100 {
                tokio::time::advance(Duration::from_millis(50)).await;
                downlink.add(Instant::now(), bytes);
            }
            assert!((downlink.bytes_per_second() / 1e6 - 1.0).abs() < 0.25, "{downlink:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_uplink_is_as_fast_as_it_lets_those_who_wait_go_on() {
        let mut uplink = Uplink::default();
        for _ in 0..100 {
            uplink.wait(Instant::now());
            tokio::time::advance(Duration::from_millis(40)).await;
            uplink.go_on(Instant::now(), 40_000);
            // The next frame of this writer is made at once; between rounds nobody writes.
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!((uplink.bytes_per_second() / 1e6 - 1.0).abs() < 0.05, "{uplink:?}");
        tokio::time::advance(Duration::from_secs(60)).await;
        for bytes in [900_000, 300_000, 300_000] {
            uplink.wait(Instant::now());
            tokio::time::advance(Duration::from_millis(300)).await;
            uplink.go_on(Instant::now(), bytes);
        }
        assert!(
            (uplink.bytes_per_second() / 1e6 - 1.0).abs() < 0.05,
            "the pause is no slowness, buffers no speed: {uplink:?}"
        );
    }
}
