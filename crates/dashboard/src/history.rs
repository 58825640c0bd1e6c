//! Sans-I/O. What the curves show: one point per change of the status, thinned so that memory stays bounded.

use potluck_collab::Status;
use serde::Serialize;

/// Points that are kept. When they are reached every second one goes, so that the whole run stays visible.
const POINTS_MAX: usize = 2048;

/// The figures of one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// Seconds since the dashboard started.
    pub seconds: f64,
    /// Shared optimizer steps so far.
    pub epoch: u64,
    /// Mean of the losses that live peers report, weighted alike.
    pub loss: Option<f32>,
    /// Speed of all live peers together, in samples per second.
    pub samples_per_second: f32,
    /// Live peers, this one included.
    pub peers: usize,
    /// Bytes that this peer has sent.
    pub bytes_sent: u64,
    /// Bytes that this peer has received.
    pub bytes_received: u64,
}

/// The points of a run so far.
#[derive(Debug, Clone, Default)]
pub struct History {
    points: Vec<Point>,
    /// Take only every n-th status, doubled each time the points are thinned.
    stride: usize,
    skipped: usize,
}

impl History {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self { points: Vec::new(), stride: 1, skipped: 0 }
    }

    /// Take up a status; a new epoch is always taken.
    pub fn push(&mut self, seconds: f64, status: &Status) {
        let new_epoch = self.points.last().is_none_or(|last| last.epoch != status.epoch);
        self.skipped += 1;
        if !new_epoch && self.skipped < self.stride {
            return;
        }
        self.skipped = 0;
        self.points.push(Point {
            seconds,
            epoch: status.epoch,
            loss: mean_loss(status),
            samples_per_second: status.samples_per_second,
            peers: status.peers.len().max(1),
            bytes_sent: status.bytes_sent,
            bytes_received: status.bytes_received,
        });
        if self.points.len() >= POINTS_MAX {
            let mut index = 0;
            self.points.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.stride *= 2;
        }
    }

    /// The points, oldest first.
    pub fn points(&self) -> &[Point] {
        &self.points
    }
}

/// The mean of what peers report; this peer's own if nobody else does.
fn mean_loss(status: &Status) -> Option<f32> {
    let reported: Vec<f32> = status.peers.iter().filter_map(|peer| peer.loss).collect();
    if reported.is_empty() {
        return status.loss;
    }
    Some(reported.iter().sum::<f32>() / reported.len() as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_the_whole_run_stays_visible() {
        let mut history = History::new();
        for second in 0..100_000u32 {
            let status = Status { epoch: u64::from(second / 1000), ..Status::default() };
            history.push(f64::from(second), &status);
        }
        assert!(history.points().len() < POINTS_MAX);
        assert_eq!(history.points()[0].epoch, 0);
        assert_eq!(history.points().last().map(|point| point.epoch), Some(99));
        assert!(history.points().windows(2).all(|pair| pair[0].seconds < pair[1].seconds));
    }
}
