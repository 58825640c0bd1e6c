//! The two halves of a simulated stream, as the seam wants them: a sink and a stream of frames.

use crate::flow::{Chunk, FRAME_OVERHEAD, Payload, reset};
use crate::pipe::FlowRef;
use crate::rule::{FrameInfo, Verdict};
use crate::sim::Inner;
use crate::trace::What;
use crate::world::{Event, FOREVER, World};
use bytes::Bytes;
use futures::Sink;
use potluck_net::{FRAME_BYTES_MAX, PeerId, Protocol, Stream, StreamError};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// The stream as `end` sees it.
pub(crate) fn assemble(inner: Arc<Inner>, stream: u64, end: u8, peer: PeerId, protocol: Protocol) -> Stream {
    let sender = Sender { inner: inner.clone(), stream, end };
    let receiver = Receiver { inner, stream, end, refused: None };
    Stream::new(peer, protocol, sender, receiver)
}

struct Sender {
    inner: Arc<Inner>,
    stream: u64,
    end: u8,
}

struct Receiver {
    inner: Arc<Inner>,
    stream: u64,
    end: u8,
    /// Length of an oversize frame, once there was one: nothing behind it is read.
    refused: Option<usize>,
}

impl Sink<Bytes> for Sender {
    type Error = StreamError;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.inner.lock().poll_window(self.stream, self.end, cx)
    }

    fn start_send(self: Pin<&mut Self>, frame: Bytes) -> Result<(), StreamError> {
        self.inner.send_frame(self.stream, self.end, frame)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        // What was handed over is on its way already, as in a socket's buffer.
        let world = self.inner.lock();
        let state = world.streams.get(self.stream);
        Poll::Ready(state.map_or(Ok(()), |state| state.flows[usize::from(self.end)].may_send()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        Poll::Ready(self.inner.lock().finish(self.stream, self.end))
    }
}

impl futures::Stream for Receiver {
    type Item = Result<Bytes, StreamError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let too_large = |len| StreamError::FrameTooLarge { len, max: FRAME_BYTES_MAX };
        if let Some(len) = self.refused {
            return Poll::Ready(Some(Err(too_large(len))));
        }
        let mut world = self.inner.lock();
        let polled = world.poll_frame(self.stream, self.end, cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) if frame.len() > FRAME_BYTES_MAX => {
                let len = frame.len();
                world.spoil(self.stream);
                world.reset(self.stream, self.end, true);
                drop(world);
                self.refused = Some(len);
                Poll::Ready(Some(Err(too_large(len))))
            }
            _ => polled,
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.inner.lock().drop_sender(self.stream, self.end);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.inner.lock().drop_receiver(self.stream, self.end);
    }
}

impl Inner {
    /// Ask the rules, then put a frame on its way. The rules run outside the world's lock, so that they may look at it.
    pub(crate) fn send_frame(&self, stream: u64, end: u8, frame: Bytes) -> Result<(), StreamError> {
        let verdict = if self.has_frame_rules() {
            let info = self.lock().frame_info(stream, end, &frame);
            info.and_then(|info| self.judge(&info))
        } else {
            None
        };
        self.lock().send_frame(stream, end, frame, verdict)
    }
}

impl World {
    fn poll_window(&mut self, stream: u64, end: u8, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let now = self.now;
        let Some(state) = self.streams.get_mut(stream) else {
            return Poll::Ready(Err(reset("the network is gone")));
        };
        let node = state.ends[usize::from(end)];
        let flow = &mut state.flows[usize::from(end)];
        if let Err(error) = flow.may_send() {
            return Poll::Ready(Err(error));
        }
        if flow.finish_sent {
            return Poll::Ready(Err(StreamError::Finished));
        }
        flow.collect_credits(now);
        if flow.has_room() && !self.peers[node as usize].frozen {
            return Poll::Ready(Ok(()));
        }
        flow.send_waker = Some(cx.waker().clone());
        if let Some(&(at, _)) = flow.credits.front() {
            self.schedule(at, Event::Credit(stream, end));
        }
        Poll::Pending
    }

    fn poll_frame(
        &mut self,
        stream: u64,
        end: u8,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, StreamError>>> {
        let now = self.now;
        let Some(state) = self.streams.get_mut(stream) else {
            return Poll::Ready(Some(Err(reset("the network is gone"))));
        };
        let node = state.ends[usize::from(end)];
        let dir = 1 - end;
        let flow = &mut state.flows[usize::from(dir)];
        if let Some(error) = &flow.recv_error {
            return Poll::Ready(Some(Err(error.clone())));
        }
        if self.peers[node as usize].frozen {
            flow.recv_waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if let Some(frame) = flow.inbox.pop_front() {
            // The credit travels back without a message of its own; only a sender that waits for it needs an event.
            let at = now + flow.latency();
            flow.credits.push_back((at, frame.len() as u64 + FRAME_OVERHEAD));
            if flow.send_waker.is_some() && flow.credits.len() == 1 {
                self.schedule(at, Event::Credit(stream, dir));
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        if flow.finish_arrived {
            return Poll::Ready(None);
        }
        flow.recv_waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn frame_info(&self, stream: u64, end: u8, frame: &Bytes) -> Option<FrameInfo> {
        let state = self.streams.get(stream)?;
        let [from, to] = [state.ends[usize::from(end)], state.ends[usize::from(1 - end)]];
        Some(FrameInfo {
            at: self.elapsed(),
            from: self.peer_id(from),
            to: self.peer_id(to),
            protocol: state.protocol.clone(),
            bytes: frame.len(),
            stream,
            index: state.flows[usize::from(end)].frames,
            from_opener: end == 0,
        })
    }

    pub(crate) fn send_frame(
        &mut self,
        stream: u64,
        end: u8,
        frame: Bytes,
        verdict: Option<(u64, Verdict)>,
    ) -> Result<(), StreamError> {
        let Some(state) = self.streams.get(stream) else { return Err(reset("the network is gone")) };
        let [from, to] = [state.ends[usize::from(end)], state.ends[usize::from(1 - end)]];
        let flow = &state.flows[usize::from(end)];
        flow.may_send()?;
        if flow.finish_sent {
            return Err(StreamError::Finished);
        }
        let protocol = state.protocol.clone();
        let (mut late, stalls, resets) = self.seeded_fate(from, to);
        let mut stall = stalls.then_some(FOREVER);
        let mut reset_now = resets;
        match verdict {
            Some((_, Verdict::Deliver(delay))) => late += delay,
            Some((rule, Verdict::Stall)) => stall = Some(rule),
            Some((_, Verdict::Reset)) => reset_now = true,
            Some((_, Verdict::Pass)) | None => {}
        }
        let bytes = frame.len() as u64;
        let what = match (reset_now, stall.is_some(), late.is_zero()) {
            (true, _, _) => What::ResetByRule,
            (_, true, _) => What::Stalled,
            (_, _, false) => What::Delayed,
            _ => What::Sent,
        };
        self.note(from, to, Some(&protocol), bytes, what);
        if reset_now {
            self.spoil(stream);
            self.reset(stream, end, true);
            return Err(reset("injected fault"));
        }
        self.peer_mut(from).traffic.frames_sent += 1;
        let Some(state) = self.streams.get_mut(stream) else { return Ok(()) };
        let flow = &mut state.flows[usize::from(end)];
        flow.frames += 1;
        flow.in_flight += bytes + FRAME_OVERHEAD;
        flow.frame_bytes_max = flow.frame_bytes_max.max(bytes + FRAME_OVERHEAD);
        let chunk = Chunk { bytes: bytes + FRAME_OVERHEAD, payload: Payload::Frame(frame), late, stall };
        self.enqueue(FlowRef { stream, dir: end, hop: 0 }, chunk);
        Ok(())
    }

    fn finish(&mut self, stream: u64, end: u8) -> Result<(), StreamError> {
        let Some(state) = self.streams.get_mut(stream) else { return Err(reset("the network is gone")) };
        let flow = &mut state.flows[usize::from(end)];
        flow.may_send()?;
        if std::mem::replace(&mut flow.finish_sent, true) {
            return Ok(());
        }
        let late = Duration::ZERO;
        let chunk = Chunk { bytes: FRAME_OVERHEAD, payload: Payload::Finish, late, stall: None };
        self.enqueue(FlowRef { stream, dir: end, hop: 0 }, chunk);
        Ok(())
    }
}
