//! One reliable, ordered, bidirectional stream of frames. Dropped unfinished, it is reset on both sides.

use crate::{OpenError, PeerId, Protocol};
use bytes::Bytes;
use futures::{Sink, SinkExt, StreamExt};
use std::pin::Pin;

/// Largest frame, in bytes, that any transport carries: bounds the memory that a stranger can make us allocate.
///
/// Fits a chunk of 2^19 values (2 MiB as f32) with its header; larger data is cut into frames by its owner.
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// Why a stream ended before its time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The other side dropped the stream, or the connection broke. Open a new one or give the peer up.
    #[error("stream reset: {reason}")]
    Reset {
        /// What the transport knows about it.
        reason: String,
    },
    /// A frame is longer than [`FRAME_BYTES_MAX`]. The sender must cut it; a received one is the peer's fault.
    #[error("frame of {len} bytes exceeds the limit of {max} bytes")]
    FrameTooLarge {
        /// Declared or given length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The other side has not taken the stream: see [`Transport::open`](crate::Transport::open). It has read nothing of it.
    #[error(transparent)]
    Refused(OpenError),
    /// This side has already finished sending.
    #[error("frame sent after finish")]
    Finished,
}

type BoxedSink = Pin<Box<dyn Sink<Bytes, Error = StreamError> + Send>>;
type BoxedStream = Pin<Box<dyn futures::Stream<Item = Result<Bytes, StreamError>> + Send>>;

/// A framed stream to one peer under one protocol.
///
/// Contract for transports (checked by the conformance suite): frames arrive whole, in order; `finish` lets the other
/// side read everything sent before it and then the end; a side dropped without `finish` resets the stream; a slow
/// reader makes the writer wait.
pub struct Stream {
    sender: FrameSender,
    receiver: FrameReceiver,
}

/// The sending half of a [`Stream`].
pub struct FrameSender {
    peer: PeerId,
    protocol: Protocol,
    sink: BoxedSink,
}

/// The receiving half of a [`Stream`].
pub struct FrameReceiver {
    peer: PeerId,
    frames: BoxedStream,
}

impl Stream {
    /// Assemble a stream from a transport's two halves. Closing `sink` must mean "finish".
    pub fn new(
        peer: PeerId,
        protocol: Protocol,
        sink: impl Sink<Bytes, Error = StreamError> + Send + 'static,
        frames: impl futures::Stream<Item = Result<Bytes, StreamError>> + Send + 'static,
    ) -> Self {
        Self {
            sender: FrameSender { peer, protocol, sink: Box::pin(sink) },
            receiver: FrameReceiver { peer, frames: Box::pin(frames) },
        }
    }

    /// The peer at the other end, authenticated by the transport.
    pub fn peer(&self) -> PeerId {
        self.sender.peer
    }

    /// The protocol that both sides agreed to speak.
    pub fn protocol(&self) -> &Protocol {
        &self.sender.protocol
    }

    /// See [`FrameSender::send`].
    ///
    /// # Errors
    /// As there.
    pub async fn send(&mut self, frame: Bytes) -> Result<(), StreamError> {
        self.sender.send(frame).await
    }

    /// See [`FrameReceiver::recv`].
    ///
    /// # Errors
    /// As there.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, StreamError> {
        self.receiver.recv().await
    }

    /// See [`FrameSender::finish`].
    ///
    /// # Errors
    /// As there.
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.sender.finish().await
    }

    /// Send and receive from different tasks. Dropping either half unfinished resets the stream.
    pub fn split(self) -> (FrameSender, FrameReceiver) {
        (self.sender, self.receiver)
    }
}

impl FrameSender {
    /// The peer at the other end.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// Send one frame and flush it. Waits while the other side does not read (back-pressure).
    ///
    /// Not cancel-safe: a dropped call may have sent a part of the frame; drop the stream then.
    ///
    /// # Errors
    /// [`StreamError`] if the stream is gone or the frame too large.
    pub async fn send(&mut self, frame: Bytes) -> Result<(), StreamError> {
        check_len(frame.len())?;
        self.sink.send(frame).await
    }

    /// Send one frame without flushing; the transport may batch it with the next. [`FrameSender::flush`] ends a batch.
    ///
    /// # Errors
    /// As [`FrameSender::send`].
    pub async fn feed(&mut self, frame: Bytes) -> Result<(), StreamError> {
        check_len(frame.len())?;
        self.sink.feed(frame).await
    }

    /// Push out what was fed.
    ///
    /// # Errors
    /// [`StreamError::Reset`] if the stream is gone.
    pub async fn flush(&mut self) -> Result<(), StreamError> {
        self.sink.flush().await
    }

    /// Say that nothing more will be sent; the other side reads what is in flight, then the end. Receiving goes on.
    ///
    /// # Errors
    /// [`StreamError::Reset`] if the stream is gone.
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.sink.close().await
    }
}

impl FrameReceiver {
    /// The peer at the other end.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The next frame, or `None` once the other side has finished. Cancel-safe: no frame is lost.
    ///
    /// # Errors
    /// [`StreamError`] if the stream broke or the peer sent an oversize frame.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, StreamError> {
        self.frames.next().await.transpose()
    }
}

fn check_len(len: usize) -> Result<(), StreamError> {
    if len > FRAME_BYTES_MAX {
        return Err(StreamError::FrameTooLarge { len, max: FRAME_BYTES_MAX });
    }
    Ok(())
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stream({:?}, {})", self.sender.peer, self.sender.protocol)
    }
}

impl std::fmt::Debug for FrameSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameSender({:?}, {})", self.peer, self.protocol)
    }
}

impl std::fmt::Debug for FrameReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameReceiver({:?})", self.peer)
    }
}
