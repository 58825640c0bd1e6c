//! Sans-I/O. One direction of one peer's link: serves the flows that wait for it, a quantum at a time.
//!
//! Round robin with small frames first, as fq_codel does for sparse flows: a heartbeat waits for the quantum that is
//! being sent and for other small frames, not for the megabytes of its neighbours. Every fourth turn belongs to the
//! bulk flows even if small frames wait, so that neither starves.

use crate::flow::Chunk;
use std::collections::VecDeque;
use std::time::Duration;

/// Least that one turn sends, in bytes.
const QUANTUM_BYTES: u64 = 64 << 10;
/// On fast links a turn lasts this long instead, which bounds the number of events per second and link.
const QUANTUM_SECONDS: f64 = 0.002;
/// Small frames that are served in a row before bulk gets a turn.
const SPARSE_RUN_MAX: u32 = 3;

/// Which hop of which direction of which stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlowRef {
    pub(crate) stream: u64,
    pub(crate) dir: u8,
    pub(crate) hop: u8,
}

pub(crate) struct Pipe {
    bytes_per_second: f64,
    sparse: VecDeque<FlowRef>,
    bulk: VecDeque<FlowRef>,
    sparse_run: u32,
    /// What is being sent, until its `PipeDone` event.
    pub(crate) serving: Option<(FlowRef, Chunk)>,
}

impl Pipe {
    pub(crate) fn new(bytes_per_second: f64) -> Self {
        assert!(bytes_per_second > 0.0, "a link of {bytes_per_second} bytes per second carries nothing");
        Self {
            bytes_per_second,
            sparse: VecDeque::new(),
            bulk: VecDeque::new(),
            sparse_run: 0,
            serving: None,
        }
    }

    /// Most bytes that one turn sends.
    pub(crate) fn quantum(&self) -> u64 {
        QUANTUM_BYTES.max((self.bytes_per_second * QUANTUM_SECONDS) as u64)
    }

    pub(crate) fn duration(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_second)
    }

    /// Put a flow in line; `bytes` is the size of its next chunk.
    pub(crate) fn enqueue(&mut self, flow: FlowRef, bytes: u64) {
        if bytes * 4 <= self.quantum() {
            self.sparse.push_back(flow);
        } else {
            self.bulk.push_back(flow);
        }
    }

    /// Put a flow that has just had its turn at the end of the line.
    pub(crate) fn requeue(&mut self, flow: FlowRef) {
        self.bulk.push_back(flow);
    }

    /// Whose turn it is.
    pub(crate) fn next(&mut self) -> Option<FlowRef> {
        let sparse_turn =
            !self.sparse.is_empty() && (self.sparse_run < SPARSE_RUN_MAX || self.bulk.is_empty());
        if sparse_turn {
            self.sparse_run += 1;
            return self.sparse.pop_front();
        }
        self.sparse_run = 0;
        self.bulk.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(stream: u64) -> FlowRef {
        FlowRef { stream, dir: 0, hop: 0 }
    }

    #[test]
    fn small_frames_go_first_but_bulk_is_not_starved() {
        let mut pipe = Pipe::new(1e6);
        pipe.enqueue(flow(1), 4 << 20);
        for stream in 10..20 {
            pipe.enqueue(flow(stream), 100);
        }
        let order: Vec<u64> = std::iter::from_fn(|| pipe.next()).map(|flow| flow.stream).collect();
        assert_eq!(order, [10, 11, 12, 1, 13, 14, 15, 16, 17, 18, 19]);
    }

    #[test]
    fn a_turn_is_64_kib_on_slow_links_and_2_ms_on_fast_ones() {
        assert_eq!(Pipe::new(1e6).quantum(), 64 << 10);
        assert_eq!(Pipe::new(1e9).quantum(), 2_000_000);
    }
}
