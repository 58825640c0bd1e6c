//! The state of one stream: two directions, each with its hops, its window, its inbox and its end.

use crate::world::Node;
use bytes::Bytes;
use potluck_net::{Protocol, StreamError};
use std::collections::VecDeque;
use std::task::Waker;
use std::time::Duration;
use tokio::time::Instant;

/// What a frame costs on the wire beyond its bytes: length, authentication tag, multiplexer and packet headers.
pub(crate) const FRAME_OVERHEAD: u64 = 32;
/// Bounds of the window (bytes sent and not yet read) of one direction of a stream.
pub(crate) const WINDOW_BYTES: (f64, f64) = (256.0 * 1024.0, 4.0 * 1024.0 * 1024.0);

pub(crate) fn reset(reason: &str) -> StreamError {
    StreamError::Reset { reason: reason.to_owned() }
}

/// A frame, or a piece of one, on its way.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    pub(crate) bytes: u64,
    pub(crate) payload: Payload,
    /// Jitter and injected delay, added when the chunk crosses the first link.
    pub(crate) late: Duration,
    /// The rule at which the stream stalls, if it still stands when the chunk arrives.
    pub(crate) stall: Option<u64>,
}

/// What becomes whole when a chunk arrives.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    /// Nothing yet: more of the frame follows.
    Part,
    /// A frame.
    Frame(Bytes),
    /// The end of this direction.
    Finish,
}

/// One pipe on the way of a flow, with what waits for it.
pub(crate) struct Hop {
    pub(crate) pipe: usize,
    /// The link that is crossed to get to this pipe; equal ends if none.
    pub(crate) from: Node,
    pub(crate) to: Node,
    pub(crate) latency: Duration,
    pub(crate) queue: VecDeque<Chunk>,
    /// Whether the pipe has this hop in its line.
    pub(crate) queued: bool,
    /// What arrived while the link was cut or the flow stalled, in order.
    pub(crate) held: VecDeque<Chunk>,
    /// Nothing may arrive before what was sent before it.
    pub(crate) not_before: Option<Instant>,
}

/// One direction of a stream.
pub(crate) struct Flow {
    pub(crate) hops: Vec<Hop>,
    pub(crate) window: u64,
    pub(crate) in_flight: u64,
    /// The largest frame so far. A real decoder takes a frame that is larger than the window in pieces, so that the
    /// next one follows without a gap; here one such frame may be under way while the next is handed over.
    pub(crate) frame_bytes_max: u64,
    /// What the reader has taken, and when the sender learns of it.
    pub(crate) credits: VecDeque<(Instant, u64)>,
    pub(crate) inbox: VecDeque<Bytes>,
    pub(crate) frames: u64,
    pub(crate) finish_sent: bool,
    pub(crate) finish_arrived: bool,
    pub(crate) stalled_by: Option<u64>,
    pub(crate) send_error: Option<StreamError>,
    pub(crate) recv_error: Option<StreamError>,
    pub(crate) send_waker: Option<Waker>,
    pub(crate) recv_waker: Option<Waker>,
}

impl Flow {
    pub(crate) fn new(hops: Vec<Hop>, window: u64) -> Self {
        Self {
            hops,
            window,
            in_flight: 0,
            frame_bytes_max: 0,
            credits: VecDeque::new(),
            inbox: VecDeque::new(),
            frames: 0,
            finish_sent: false,
            finish_arrived: false,
            stalled_by: None,
            send_error: None,
            recv_error: None,
            send_waker: None,
            recv_waker: None,
        }
    }

    /// Time from one end to the other, without queueing.
    pub(crate) fn latency(&self) -> Duration {
        self.hops.iter().map(|hop| hop.latency).sum()
    }

    /// Count what the reader has taken by `now`.
    pub(crate) fn collect_credits(&mut self, now: Instant) {
        while let Some((_, bytes)) = self.credits.pop_front_if(|(at, _)| *at <= now) {
            self.in_flight = self.in_flight.saturating_sub(bytes);
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        self.in_flight < self.window || self.in_flight <= self.frame_bytes_max
    }

    /// Whether nothing of it is on its way.
    pub(crate) fn is_quiet(&self) -> bool {
        self.stalled_by.is_none() && self.hops.iter().all(|hop| hop.queue.is_empty() && hop.held.is_empty())
    }

    /// Whatever broke the sender's end.
    pub(crate) fn may_send(&self) -> Result<(), StreamError> {
        self.send_error.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn wake_sender(&mut self) {
        if let Some(waker) = self.send_waker.take() {
            waker.wake();
        }
    }

    pub(crate) fn wake_receiver(&mut self) {
        if let Some(waker) = self.recv_waker.take() {
            waker.wake();
        }
    }

    /// The sender's end is gone: what has not left is lost, what travels still arrives.
    pub(crate) fn break_sender(&mut self, reason: &'static str) {
        self.stop_sender(reset(reason));
    }

    /// The receiver's end is gone, with what was not read.
    pub(crate) fn break_receiver(&mut self, reason: &'static str) {
        self.stop_receiver(reset(reason));
    }

    pub(crate) fn stop_sender(&mut self, error: StreamError) {
        self.send_error.get_or_insert(error);
        if let Some(first) = self.hops.first_mut() {
            first.queue.clear();
        }
        self.wake_sender();
    }

    pub(crate) fn stop_receiver(&mut self, error: StreamError) {
        self.recv_error.get_or_insert(error);
        self.inbox.clear();
        self.wake_receiver();
    }
}

/// A stream between two peers; end 0 opened it. `flows[end]` carries what `end` sends.
pub(crate) struct StreamState {
    pub(crate) ends: [Node; 2],
    /// The connection that it runs on.
    pub(crate) conn: u64,
    pub(crate) relay: Option<Node>,
    pub(crate) protocol: Protocol,
    pub(crate) flows: [Flow; 2],
    /// Halves that somebody still holds; at zero the stream is forgotten.
    pub(crate) halves: u8,
    /// Something broke it, so that nothing can begin on it when it has ended.
    pub(crate) spoiled: bool,
}
