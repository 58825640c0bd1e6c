//! Frames on a byte stream: 4 bytes of length (big-endian), then the payload; the length `u32::MAX` says "finished",
//! the one before it "dropped".
//!
//! The end is said explicitly because a muxer's end-of-stream is also what a dropped QUIC stream looks like: an end
//! without a mark is a reset. And it leaves the byte stream as it is: whoever of the two sides is done hands it on
//! ([`Owner::retire`]), unless it has stopped in the middle of a frame. Small frames are gathered into one write; large ones are written from the caller's
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
pub(crate) const FINISHED: u32 = u32::MAX;
/// The length that ends a stream whose other side was dropped.
pub(crate) const DROPPED: u32 = u32::MAX - 1;
/// Bytes of the length.
pub(crate) const HEAD_BYTES: usize = 4;
/// Frames are gathered up to this size: one frame of the muxer, so that a small message costs one.
const GATHER_BYTES: usize = 16 << 10;
/// What is allocated for a frame before its sender has shown that it really sends such frames.
const UNPROVEN_BYTES_MAX: usize = 256 << 10;
/// Frames from this size on are received into memory that is used again.
const POOLED_BYTES_MIN: usize = 64 << 10;

/// Whose streams they are.
pub(crate) trait Owner<S> {
    /// Bytes handed to the muxer.
    fn sent(&self, bytes: usize);
    /// Bytes taken from the muxer.
    fn received(&self, bytes: usize);
    /// What the first length of a stream says if it is the mark of a refusal.
    fn refusal(&self, mark: u32) -> Option<StreamError>;
    /// The stream has ended on this side. Dropping what is left of it resets it.
    fn retire(&self, left: Left<S>);
}

/// What an ended stream leaves behind: the byte stream, and what must pass before another may begin on it.
pub(crate) struct Left<S> {
    pub(crate) bytes: S,
    /// The mark that the other side must still get: how this one ended.
    pub(crate) untold: Option<u32>,
    /// How far the other side's frames were read, if its end has not been.
    pub(crate) unread: Option<Place>,
}

/// A place in the frames that arrive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The length that is being read, and how many of its bytes are there.
    pub(crate) head: [u8; HEAD_BYTES],
    pub(crate) head_len: usize,
    /// Bytes of the current frame that are still to come.
    pub(crate) rest: usize,
}

/// The byte stream below both halves. Gone once either half was dropped before its end.
struct Shared<S, O: Owner<S>> {
    state: Mutex<State<S>>,
    owner: O,
}

struct State<S> {
    bytes: Option<S>,
    /// A frame was handed to the muxer in part.
    amid_frame: bool,
    place: Place,
    /// A length has been read.
    heard: bool,
    refused: Option<StreamError>,
    send_finished: bool,
    receive_ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl<S, O: Owner<S>> Shared<S, O> {
    fn lock(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> State<S> {
    /// Take the byte stream away and wake whoever waits on it. Dropped, its muxer tells the other side.
    fn reset(&mut self) -> Option<S> {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
        self.bytes.take()
    }

    /// Give the byte stream up: to its owner, if what was sent ends with a frame.
    fn leave(&mut self, owner: &impl Owner<S>) {
        let Some(bytes) = self.reset() else { return };
        if !self.amid_frame {
            let unread = (!self.receive_ended).then_some(self.place);
            owner.retire(Left { bytes, untold: (!self.send_finished).then_some(DROPPED), unread });
        }
    }

    /// Why there is no byte stream.
    fn gone(&self) -> StreamError {
        let here = || StreamError::Reset { reason: "the stream was dropped on this side".into() };
        self.refused.clone().unwrap_or_else(here)
    }

    /// Nothing is left to do here once both directions have ended.
    fn leave_if_done(&mut self, owner: &impl Owner<S>) {
        if self.send_finished && self.receive_ended {
            self.leave(owner);
        }
    }
}

impl<S: AsyncRead + Unpin> State<S> {
    /// Read into `buffer`; the end of the byte stream is a reset.
    fn poll_read(
        &mut self,
        owner: &impl Owner<S>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, StreamError>> {
        let Some(bytes) = self.bytes.as_mut() else { return Poll::Ready(Err(self.gone())) };
        match Pin::new(bytes).poll_read(cx, buffer) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(dropped())),
            Poll::Ready(Ok(count)) => {
                owner.received(count);
                Poll::Ready(Ok(count))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(broken(&error))),
            Poll::Pending => {
                self.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// The next length, whose place stays as it is.
    fn poll_length(&mut self, owner: &impl Owner<S>, cx: &mut Context<'_>) -> Poll<Result<u32, StreamError>> {
        let mut head = self.place.head;
        while let Some(rest) = head.get_mut(self.place.head_len..).filter(|rest| !rest.is_empty()) {
            let count = ready!(self.poll_read(owner, cx, rest))?;
            self.place.head = head;
            self.place.head_len = self.place.head_len.saturating_add(count);
        }
        Poll::Ready(Ok(u32::from_be_bytes(head)))
    }

    /// Whether this length, if it is the first one, refuses the stream.
    fn refusal(&mut self, owner: &impl Owner<S>, length: u32) -> Option<StreamError> {
        self.refused = owner.refusal(length).filter(|_| !self.heard);
        self.refused.clone()
    }

    /// Why the other side takes nothing more. Whoever refuses says so before, and a sender need not be a reader.
    fn stopped(&mut self, owner: &impl Owner<S>, error: &io::Error) -> StreamError {
        if !self.heard {
            // The reader may be waiting in another task: its waker must not be replaced.
            let waker = self.reader.clone().unwrap_or_else(|| Waker::noop().clone());
            if let Poll::Ready(Ok(length)) = self.poll_length(owner, &mut Context::from_waker(&waker))
                && let Some(refusal) = self.refusal(owner, length)
            {
                return refusal;
            }
        }
        broken(error)
    }
}

impl<S, O: Owner<S>> Drop for Shared<S, O> {
    fn drop(&mut self) {
        self.state.get_mut().unwrap_or_else(PoisonError::into_inner).leave(&self.owner);
    }
}

/// Frame a byte stream.
pub(crate) fn frames<S, O: Owner<S>>(
    bytes: S,
    owner: O,
    buffers: &Arc<BufferPool>,
) -> (FrameSink<S, O>, FrameStream<S, O>) {
    let state = State {
        bytes: Some(bytes),
        amid_frame: false,
        place: Place::default(),
        heard: false,
        refused: None,
        send_finished: false,
        receive_ended: false,
        reader: None,
        writer: None,
    };
    let shared = Arc::new(Shared { state: Mutex::new(state), owner });
    let sink =
        FrameSink { shared: shared.clone(), gathered: BytesMut::new(), body: Bytes::new(), marked: false };
    (sink, FrameStream { shared, buffers: buffers.clone(), body: None, proven: 0, failed: None })
}

fn dropped() -> StreamError {
    StreamError::Reset { reason: "the peer dropped the stream".into() }
}

fn broken(error: &io::Error) -> StreamError {
    StreamError::Reset { reason: error.to_string() }
}

/// The sending half.
pub(crate) struct FrameSink<S, O: Owner<S>> {
    shared: Arc<Shared<S, O>>,
    /// Heads, small frames, and the start of a large one.
    gathered: BytesMut,
    /// The rest of a large frame, to be written after `gathered`.
    body: Bytes,
    /// The end mark was put into `gathered`.
    marked: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin, O: Owner<S>> FrameSink<S, O> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let mut state = self.shared.lock();
        loop {
            let next: &[u8] = if self.gathered.is_empty() { &self.body } else { &self.gathered };
            if next.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let Some(bytes) = state.bytes.as_mut() else { return Poll::Ready(Err(state.gone())) };
            match Pin::new(bytes).poll_write(cx, next) {
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(broken(&io::ErrorKind::WriteZero.into())));
                }
                Poll::Ready(Ok(written)) => {
                    self.shared.owner.sent(written);
                    if self.gathered.is_empty() {
                        self.body.advance(written);
                    } else {
                        self.gathered.advance(written);
                    }
                    // The end of a frame amid what was gathered is not looked for.
                    state.amid_frame = !(self.gathered.is_empty() && self.body.is_empty());
                }
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Err(state.stopped(&self.shared.owner, &error)));
                }
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
        let Some(bytes) = state.bytes.as_mut() else { return Poll::Ready(Err(state.gone())) };
        let polled = poll(Pin::new(bytes), cx);
        if polled.is_pending() {
            state.writer = Some(cx.waker().clone());
        }
        polled.map_err(|error| state.stopped(&self.shared.owner, &error))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin, O: Owner<S>> Sink<Bytes> for FrameSink<S, O> {
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
        ready!(this.poll_bytes(cx, |bytes, cx| bytes.poll_flush(cx)))?;
        let mut state = this.shared.lock();
        state.send_finished = true;
        state.leave_if_done(&this.shared.owner);
        Poll::Ready(Ok(()))
    }
}

impl<S, O: Owner<S>> Drop for FrameSink<S, O> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if !state.send_finished {
            // The mark may have left already: then it is too late to say something else.
            state.amid_frame |= self.marked;
            state.leave(&self.shared.owner);
        }
    }
}

/// The receiving half.
pub(crate) struct FrameStream<S, O: Owner<S>> {
    shared: Arc<Shared<S, O>>,
    buffers: Arc<BufferPool>,
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

impl<S: AsyncRead + AsyncWrite + Unpin, O: Owner<S>> FrameStream<S, O> {
    /// The length of the next frame, or the mark in its place.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<u32, StreamError>> {
        let mut state = self.shared.lock();
        let length = ready!(state.poll_length(&self.shared.owner, cx))?;
        state.place = Place::default();
        if let Some(refusal) = state.refusal(&self.shared.owner, length) {
            state.receive_ended = true;
            state.leave(&self.shared.owner);
            return Poll::Ready(Err(refusal));
        }
        state.heard = true;
        match length {
            FINISHED => {
                state.receive_ended = true;
                state.leave_if_done(&self.shared.owner);
            }
            DROPPED => {
                state.receive_ended = true;
                state.leave(&self.shared.owner);
            }
            _ => state.place.rest = usize::try_from(length).unwrap_or(usize::MAX),
        }
        Poll::Ready(Ok(length))
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        loop {
            if let Some(body) = self.body.as_mut() {
                let rest = body.rest();
                if !rest.is_empty() {
                    let mut state = self.shared.lock();
                    let count = ready!(state.poll_read(&self.shared.owner, cx, rest))?;
                    state.place.rest = state.place.rest.saturating_sub(count);
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
            let len = match ready!(self.poll_head(cx))? {
                FINISHED => return Poll::Ready(Ok(None)),
                DROPPED => return Poll::Ready(Err(dropped())),
                length => usize::try_from(length).unwrap_or(usize::MAX),
            };
            if len > FRAME_BYTES_MAX {
                return Poll::Ready(Err(StreamError::FrameTooLarge { len, max: FRAME_BYTES_MAX }));
            }
            self.body = Some(Body::new(len, self.proven, &self.buffers));
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin, O: Owner<S>> futures::Stream for FrameStream<S, O> {
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
            Ok(None) => Poll::Ready(None),
            Err(error) => {
                this.failed = Some(error.clone());
                drop(this.shared.lock().reset());
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

impl<S, O: Owner<S>> Drop for FrameStream<S, O> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        // Whoever has finished sending may leave without reading on: its own frames must still arrive.
        if !state.receive_ended && !state.send_finished {
            state.leave(&self.shared.owner);
        }
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
