//! Frames on a byte stream: 4 bytes of length (big-endian), then the payload; the length `u32::MAX` says "finished".
//!
//! The end is said explicitly because a muxer's end-of-stream is also what a dropped QUIC stream looks like: an end
//! without the mark is a reset. Small frames are gathered into one write; large ones are written from the caller's
//! own bytes behind a first write that carries their head, so that nothing big is copied here.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{AsyncRead, AsyncWrite, Sink};
use potluck_net::{BufferPool, FRAME_BYTES_MAX, StreamError};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

/// The length that ends a stream.
const FINISHED: u32 = u32::MAX;
/// Bytes of the length.
const HEAD_BYTES: usize = 4;
/// Frames are gathered up to this size: one frame of the muxer, so that a small message costs one.
const GATHER_BYTES: usize = 16 << 10;
/// What is allocated for a frame before its sender has shown that it really sends such frames.
const UNPROVEN_BYTES_MAX: usize = 256 << 10;
/// Frames from this size on are received into memory that is used again.
const POOLED_BYTES_MIN: usize = 64 << 10;

/// Counts what passes; the owner of a stream decides what the figures are for.
pub(crate) trait Meter: Send + Sync + 'static {
    /// Bytes handed to the muxer.
    fn sent(&self, bytes: usize);
    /// Bytes taken from the muxer.
    fn received(&self, bytes: usize);
}

/// The byte stream below both halves. Gone once either half was dropped before its end, which resets it.
struct Shared<S> {
    state: Mutex<State<S>>,
    meter: Box<dyn Meter>,
}

struct State<S> {
    bytes: Option<S>,
    send_finished: bool,
    receive_ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl<S> Shared<S> {
    fn lock(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> State<S> {
    /// Drop the byte stream (its muxer tells the other side) and wake whoever waits on it.
    fn reset(&mut self) {
        self.bytes = None;
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

/// Frame a byte stream.
pub(crate) fn frames<S>(
    bytes: S,
    meter: impl Meter,
    buffers: &Arc<BufferPool>,
) -> (FrameSink<S>, FrameStream<S>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let state =
        State { bytes: Some(bytes), send_finished: false, receive_ended: false, reader: None, writer: None };
    let shared = Arc::new(Shared { state: Mutex::new(state), meter: Box::new(meter) });
    let sink =
        FrameSink { shared: shared.clone(), gathered: BytesMut::new(), body: Bytes::new(), marked: false };
    let (buffers, head) = (buffers.clone(), [0; HEAD_BYTES]);
    (sink, FrameStream { shared, buffers, head, head_len: 0, body: None, proven: 0, failed: None })
}

fn gone() -> StreamError {
    StreamError::Reset { reason: "the stream was dropped on this side".into() }
}

fn broken(error: &io::Error) -> StreamError {
    StreamError::Reset { reason: error.to_string() }
}

/// The sending half.
pub(crate) struct FrameSink<S> {
    shared: Arc<Shared<S>>,
    /// Heads, small frames, and the start of a large one.
    gathered: BytesMut,
    /// The rest of a large frame, to be written after `gathered`.
    body: Bytes,
    /// The end mark was put into `gathered`.
    marked: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> FrameSink<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let mut state = self.shared.lock();
        loop {
            let next: &[u8] = if self.gathered.is_empty() { &self.body } else { &self.gathered };
            if next.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let Some(bytes) = state.bytes.as_mut() else { return Poll::Ready(Err(gone())) };
            match Pin::new(bytes).poll_write(cx, next) {
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(broken(&io::ErrorKind::WriteZero.into())));
                }
                Poll::Ready(Ok(written)) => {
                    self.shared.meter.sent(written);
                    if self.gathered.is_empty() {
                        self.body.advance(written);
                    } else {
                        self.gathered.advance(written);
                    }
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(broken(&error))),
                Poll::Pending => {
                    state.writer = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        }
    }

    fn poll_bytes(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<()>>,
    ) -> Poll<Result<(), StreamError>> {
        let mut state = self.shared.lock();
        let Some(bytes) = state.bytes.as_mut() else { return Poll::Ready(Err(gone())) };
        let polled = poll(Pin::new(bytes), cx);
        if polled.is_pending() {
            state.writer = Some(cx.waker().clone());
        }
        polled.map_err(|error| broken(&error))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Sink<Bytes> for FrameSink<S> {
    type Error = StreamError;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let this = self.get_mut();
        if this.marked {
            return Poll::Ready(Err(StreamError::Finished));
        }
        if this.body.is_empty() && this.gathered.len() < GATHER_BYTES {
            return Poll::Ready(Ok(()));
        }
        this.poll_drain(cx)
    }

    fn start_send(self: Pin<&mut Self>, mut frame: Bytes) -> Result<(), StreamError> {
        let this = self.get_mut();
        let len = frame.len();
        let head = u32::try_from(len).ok().filter(|_| len <= FRAME_BYTES_MAX);
        let head = head.ok_or(StreamError::FrameTooLarge { len, max: FRAME_BYTES_MAX })?;
        this.gathered.put_u32(head);
        let gathered =
            if len <= GATHER_BYTES { len } else { GATHER_BYTES.saturating_sub(this.gathered.len()).min(len) };
        this.gathered.put(frame.split_to(gathered));
        this.body = frame;
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        this.poll_bytes(cx, |bytes, cx| bytes.poll_flush(cx))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let this = self.get_mut();
        if this.shared.lock().send_finished {
            return Poll::Ready(Ok(()));
        }
        if !this.marked {
            ready!(this.poll_drain(cx))?;
            this.gathered.put_u32(FINISHED);
            this.marked = true;
        }
        ready!(this.poll_drain(cx))?;
        ready!(this.poll_bytes(cx, |bytes, cx| bytes.poll_close(cx)))?;
        this.shared.lock().send_finished = true;
        Poll::Ready(Ok(()))
    }
}

impl<S> Drop for FrameSink<S> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if !state.send_finished {
            state.reset();
        }
    }
}

/// The receiving half.
pub(crate) struct FrameStream<S> {
    shared: Arc<Shared<S>>,
    buffers: Arc<BufferPool>,
    head: [u8; HEAD_BYTES],
    head_len: usize,
    /// The frame being read.
    body: Option<Body>,
    /// The largest frame that this sender has really sent.
    proven: usize,
    /// Why it ended before its time; said again to every later call.
    failed: Option<StreamError>,
}

/// A frame of `len` bytes, of which `filled` are there. `buffer` may be shorter until the sender has proven itself.
struct Body {
    buffer: Vec<u8>,
    filled: usize,
    len: usize,
}

impl Body {
    fn new(len: usize, proven: usize, buffers: &BufferPool) -> Self {
        let first = len.min(UNPROVEN_BYTES_MAX.max(proven));
        let buffer = if len < POOLED_BYTES_MIN { vec![0; first] } else { buffers.take_filled(first) };
        Self { buffer, filled: 0, len }
    }

    /// Where the next bytes belong. Empty when the frame is whole.
    fn rest(&mut self) -> &mut [u8] {
        if self.filled == self.buffer.len() && self.filled < self.len {
            self.buffer.resize(self.len, 0);
        }
        self.buffer.get_mut(self.filled..).unwrap_or_default()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> FrameStream<S> {
    /// Read into `buffer`; 0 is the end of the byte stream.
    fn poll_read(
        shared: &Shared<S>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, StreamError>> {
        let mut state = shared.lock();
        let Some(bytes) = state.bytes.as_mut() else { return Poll::Ready(Err(gone())) };
        match Pin::new(bytes).poll_read(cx, buffer) {
            Poll::Ready(Ok(0)) => {
                Poll::Ready(Err(StreamError::Reset { reason: "the peer dropped the stream".into() }))
            }
            Poll::Ready(Ok(count)) => {
                shared.meter.received(count);
                Poll::Ready(Ok(count))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(broken(&error))),
            Poll::Pending => {
                state.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        loop {
            if let Some(body) = self.body.as_mut() {
                let rest = body.rest();
                if !rest.is_empty() {
                    let count = ready!(Self::poll_read(&self.shared, cx, rest))?;
                    body.filled = body.filled.saturating_add(count);
                    continue;
                }
                self.proven = self.proven.max(body.len);
                let whole = std::mem::take(&mut body.buffer);
                let pooled = body.len >= POOLED_BYTES_MIN;
                let whole = if pooled { self.buffers.bytes(whole) } else { whole.into() };
                self.body = None;
                return Poll::Ready(Ok(Some(whole)));
            }
            while let Some(rest) = self.head.get_mut(self.head_len..).filter(|rest| !rest.is_empty()) {
                let count = ready!(Self::poll_read(&self.shared, cx, rest))?;
                self.head_len = self.head_len.saturating_add(count);
            }
            self.head_len = 0;
            let len = u32::from_be_bytes(self.head);
            if len == FINISHED {
                return Poll::Ready(Ok(None));
            }
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if len > FRAME_BYTES_MAX {
                return Poll::Ready(Err(StreamError::FrameTooLarge { len, max: FRAME_BYTES_MAX }));
            }
            self.body = Some(Body::new(len, self.proven, &self.buffers));
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> futures::Stream for FrameStream<S> {
    type Item = Result<Bytes, StreamError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(error) = &this.failed {
            return Poll::Ready(Some(Err(error.clone())));
        }
        if this.shared.lock().receive_ended {
            return Poll::Ready(None);
        }
        match ready!(this.poll_frame(cx)) {
            Ok(Some(frame)) => Poll::Ready(Some(Ok(frame))),
            Ok(None) => {
                this.shared.lock().receive_ended = true;
                Poll::Ready(None)
            }
            Err(error) => {
                this.failed = Some(error.clone());
                this.shared.lock().reset();
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

impl<S> Drop for FrameStream<S> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        // Whoever has finished sending may leave without reading on: its own frames must still arrive.
        if !state.receive_ended && !state.send_finished {
            state.reset();
        }
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
