//! The decoders of this crate for fuzz targets and property tests: each takes any bytes and asserts what must hold. What
//! libp2p and UPnP decode themselves is tested by their authors.

use crate::kept::{BUSY, UNKNOWN, let_pass};
use crate::wire::{self, DROPPED, FINISHED, HEAD_BYTES, Left, Owner};
use bytes::Bytes;
use futures::{AsyncRead, AsyncWrite, FutureExt, SinkExt, StreamExt};
use potluck_net::{FRAME_BYTES_MAX, StreamError};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

/// A byte stream on which somebody wrote `theirs` and left.
struct Line {
    theirs: Vec<u8>,
    read: usize,
    /// So many of `theirs` have arrived.
    arrived: usize,
    /// So many come at a time.
    piece: usize,
    ours: Vec<u8>,
}

impl Line {
    fn new(theirs: &[u8], arrived: usize, piece: u8) -> Self {
        let arrived = arrived.min(theirs.len());
        Self { theirs: theirs.to_vec(), read: 0, arrived, piece: usize::from(piece).max(1), ours: Vec::new() }
    }
}

impl AsyncRead for Line {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, target: &mut [u8]) -> Poll<io::Result<usize>> {
        let line = self.get_mut();
        let there = line.theirs.get(line.read..line.arrived).unwrap_or_default();
        if there.is_empty() && line.arrived < line.theirs.len() {
            return Poll::Pending;
        }
        let count = there.len().min(line.piece).min(target.len());
        target.iter_mut().zip(there).take(count).for_each(|(to, from)| *to = *from);
        line.read += count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Line {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().ours.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Keeps what an ended stream leaves.
#[derive(Clone, Default)]
struct Heir(Arc<Mutex<Option<Left<Line>>>>);

impl Heir {
    fn take(&self) -> Option<Left<Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Owner<Line> for Heir {
    fn sent(&self, _: usize) {}
    fn received(&self, _: usize) {}
    fn refusal(&self, _: u32) -> Option<StreamError> {
        // As with a stream that the other side has opened.
        None
    }
    fn retire(&self, left: Left<Line>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(left);
    }
}

/// Whole frames at the start of `bytes`, as their payloads, and what is behind them.
fn split(mut bytes: &[u8]) -> (Vec<&[u8]>, &[u8]) {
    let mut frames = Vec::new();
    while let Some((head, tail)) = bytes.split_first_chunk::<HEAD_BYTES>() {
        let len = u32::from_be_bytes(*head) as usize;
        let Some((frame, rest)) = tail.split_at_checked(len) else { break };
        frames.push(frame);
        bytes = rest;
    }
    (frames, bytes)
}

/// Frames come out as they went in, and the end is what was written there. The first byte says how many bytes come at a
/// time.
pub fn frames(input: &[u8]) {
    let Some((piece, bytes)) = input.split_first() else { return };
    let line = Line::new(bytes, bytes.len(), *piece);
    let (_sink, mut stream) = wire::frames(line, Heir::default(), &Arc::default());
    let (frames, behind) = split(bytes);
    let mut next = || stream.next().now_or_never().expect("all has arrived");
    for frame in frames {
        assert_eq!(next().expect("another frame").expect("it is whole"), frame);
    }
    let end = next();
    match behind.first_chunk().map(|head| u32::from_be_bytes(*head)) {
        Some(FINISHED) => assert!(end.is_none()),
        Some(len) if len != DROPPED && len as usize > FRAME_BYTES_MAX => {
            assert!(matches!(end, Some(Err(StreamError::FrameTooLarge { .. }))));
        }
        _ => assert!(matches!(end, Some(Err(StreamError::Reset { .. })))),
    }
}

/// A stream that we drop while somebody is writing on it: either the next one begins behind the other side's end, or the
/// byte stream is given up. The first byte says how much has arrived by then and the second how many bytes come at a time;
/// an odd one, that we have sent all of ours.
pub fn kept(input: &[u8]) {
    let Some(([arrived, piece], bytes)) = input.split_first_chunk() else { return };
    let heir = Heir::default();
    let line = Line::new(bytes, usize::from(*arrived), *piece);
    let (mut sink, mut stream) = wire::frames(line, heir.clone(), &Arc::default());
    let finished = piece % 2 == 1;
    if finished {
        sink.close().now_or_never().expect("there is room").expect("it is open");
    }
    while let Some(Some(Ok(_))) = stream.next().now_or_never() {}
    drop((sink, stream));
    let (_, behind) = split(bytes);
    let is =
        |marks: [u32; 2]| behind.first_chunk().is_some_and(|head| marks.contains(&u32::from_be_bytes(*head)));
    let end = is([FINISHED, DROPPED]);
    if is([BUSY, UNKNOWN]) {
        // An end where frames are only skipped, and none for whoever has read so far: that peer has opened the stream.
        let _given_up = heir.take().map(|left| let_pass(left).now_or_never());
        return;
    }
    let Some(mut left) = heir.take() else {
        assert!(!end, "a stream whose end can be read was given up");
        return;
    };
    left.bytes.arrived = bytes.len();
    let Some(line) = let_pass(left).now_or_never().expect("all has arrived") else {
        assert!(!end, "a stream whose end can be read was given up");
        return;
    };
    assert!(end && line.read == bytes.len() - behind.len() + HEAD_BYTES);
    let mark = if finished { FINISHED } else { DROPPED };
    assert_eq!(line.ours, mark.to_be_bytes());
}

/// Inputs that decode, for a corpus: a decoder's name and the bytes.
pub fn seeds() -> Vec<(&'static str, Bytes)> {
    let frame = |payload: &[u8]| [&(payload.len() as u32).to_be_bytes()[..], payload].concat();
    let two = [frame(b"one"), frame(&[]), frame(&[2; 40])].concat();
    let ends = [FINISHED, DROPPED].map(|mark| [&two[..], &mark.to_be_bytes(), b"next"].concat());
    let mut seeds: Vec<(&'static str, Bytes)> = vec![
        ("net_libp2p_frames", [&[3][..], &two].concat().into()),
        ("net_libp2p_frames", [&[255][..], &frame(&[7; 300])].concat().into()),
    ];
    for end in &ends {
        seeds.push(("net_libp2p_frames", [&[1][..], end].concat().into()));
        seeds.extend(
            [0, 3, 6, 9, 10, 20, 255]
                .map(|arrived| ("net_kept", Bytes::from([&[arrived, 2 + arrived % 3][..], end].concat()))),
        );
    }
    seeds
}
