//! Sans-I/O. How fast a link is, measured from what passed through it: no peer ever declares its bandwidth.
//!
//! Bytes are counted in short windows. A window counts only when the link was busy through all of it, so that waiting
//! for others does not look like a slow link; the estimate follows upward quickly and downward slowly.

use std::time::Duration;
use tokio::time::Instant;

/// Length of one window.
const WINDOW: Duration = Duration::from_millis(250);
/// A window with fewer bytes says nothing about capacity.
const WINDOW_BYTES_MIN: u64 = 16 << 10;

/// One direction of one peer's connection to all others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter {
    window: Option<(Instant, u64)>,
    rate: f64,
}

impl Meter {
    /// A meter that has seen nothing.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// `bytes` passed just now.
    pub(crate) fn add(&mut self, now: Instant, bytes: usize) {
        let (start, sum) = self.window.get_or_insert((now, 0));
        *sum += bytes as u64;
        let elapsed = now.saturating_duration_since(*start);
        if elapsed < WINDOW {
            return;
        }
        let sum = std::mem::take(sum);
        *start = now;
        // A gap: the link idled for most of this time.
        if elapsed > WINDOW * 4 || sum < WINDOW_BYTES_MIN {
            return;
        }
        let seen = sum as f64 / elapsed.as_secs_f64();
        let gain = if seen > self.rate { 0.5 } else { 0.05 };
        self.rate = if self.rate == 0.0 { seen } else { self.rate + gain * (seen - self.rate) };
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
    async fn a_steady_link_is_measured_and_idling_is_not() {
        let mut meter = Meter::new();
        for _ in 0..100 {
            tokio::time::advance(Duration::from_millis(50)).await;
            meter.add(Instant::now(), 50_000);
        }
        assert!((meter.bytes_per_second() / 1e6 - 1.0).abs() < 0.25, "{meter:?}");
        let before = meter.bytes_per_second();
        tokio::time::advance(Duration::from_secs(60)).await;
        meter.add(Instant::now(), 100);
        assert!(meter.bytes_per_second() >= before * 0.99);
    }
}
