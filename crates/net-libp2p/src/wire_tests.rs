//! Tests of the framing on byte streams in memory, random bytes included.
#![expect(clippy::arithmetic_side_effects, reason = "small numbers in a test")]

use super::*;
use futures::io::Cursor;
use futures::{SinkExt, StreamExt};
use proptest::prelude::*;

struct Ignore;

impl<S> Owner<S> for Ignore {
    fn sent(&self, _: usize) {}
    fn received(&self, _: usize) {}
    fn refusal(&self, mark: u32) -> Option<StreamError> {
        (mark == REFUSED).then(refusal)
    }
    fn retire(&self, _: Left<S>) {}
}

/// The mark of a refusal, and what it means.
const REFUSED: u32 = 0x8000_0000;

fn refusal() -> StreamError {
    let peer = potluck_net::Identity::from_seed(&[1; 32]).peer_id();
    StreamError::Refused(potluck_net::OpenError::TimedOut { peer })
}

/// What reading `bytes` as frames gives, and how it ends.
fn read_all(bytes: Vec<u8>) -> (Vec<Bytes>, Option<StreamError>) {
    let (sink, mut stream) = frames(Cursor::new(bytes), Ignore, &Arc::default());
    let mut whole = Vec::new();
    let end = futures::executor::block_on(async {
        loop {
            match stream.next().await {
                Some(Ok(frame)) => whole.push(frame),
                Some(Err(error)) => return Some(error),
                None => return None,
            }
        }
    });
    drop(sink);
    (whole, end)
}

fn write_all(payloads: &[Vec<u8>]) -> Vec<u8> {
    futures::executor::block_on(async {
        let (mut sink, _stream) = frames(Cursor::new(Vec::new()), Ignore, &Arc::default());
        for payload in payloads {
            sink.feed(Bytes::from(payload.clone())).await.unwrap();
        }
        sink.close().await.unwrap();
        let bytes = sink.shared.lock().bytes.take().unwrap();
        bytes.into_inner()
    })
}

#[test]
fn frames_survive_whatever_their_size() {
    let sizes = [0, 1, GATHER_BYTES - 4, GATHER_BYTES, GATHER_BYTES + 1, UNPROVEN_BYTES_MAX + 7, 3, 1 << 20];
    let payloads: Vec<Vec<u8>> = sizes.iter().map(|&len| (0..len).map(|i| i as u8).collect()).collect();
    let (read, end) = read_all(write_all(&payloads));
    assert_eq!(end, None);
    assert!(read.iter().map(|frame| frame.to_vec()).eq(payloads));
}

#[test]
fn an_end_without_the_mark_is_a_reset() {
    let mut bytes = write_all(&[vec![1, 2, 3]]);
    bytes.truncate(bytes.len() - HEAD_BYTES);
    let (read, end) = read_all(bytes);
    assert_eq!(read.len(), 1);
    assert!(matches!(end, Some(StreamError::Reset { .. })));
}

#[test]
fn an_oversize_frame_is_refused_before_anything_is_allocated() {
    let len = FRAME_BYTES_MAX as u32 + 1;
    let (read, end) = read_all(len.to_be_bytes().to_vec());
    assert!(read.is_empty());
    assert_eq!(end, Some(StreamError::FrameTooLarge { len: FRAME_BYTES_MAX + 1, max: FRAME_BYTES_MAX }));
}

#[test]
fn a_refusal_is_one_in_the_place_of_the_first_frame_only() {
    let mark = REFUSED.to_be_bytes();
    assert_eq!(read_all(mark.to_vec()), (vec![], Some(refusal())));
    let (read, end) = read_all([&1_u32.to_be_bytes()[..], &[7], &mark].concat());
    assert_eq!(read, [Bytes::from_static(&[7])]);
    assert!(matches!(end, Some(StreamError::FrameTooLarge { .. })));
}

#[test]
fn a_stranger_cannot_make_us_allocate_what_it_does_not_send() {
    let mut body = Body::new(FRAME_BYTES_MAX, 0, &BufferPool::default());
    assert_eq!(body.rest().len(), UNPROVEN_BYTES_MAX);
    body.filled = UNPROVEN_BYTES_MAX;
    assert_eq!(body.rest().len(), FRAME_BYTES_MAX - UNPROVEN_BYTES_MAX);
    assert_eq!(
        Body::new(FRAME_BYTES_MAX, FRAME_BYTES_MAX, &BufferPool::default()).rest().len(),
        FRAME_BYTES_MAX
    );
}

#[test]
fn sending_after_finish_is_refused() {
    futures::executor::block_on(async {
        let (mut sink, _stream) = frames(Cursor::new(Vec::new()), Ignore, &Arc::default());
        sink.close().await.unwrap();
        assert_eq!(sink.send(Bytes::new()).await, Err(StreamError::Finished));
    });
}

/// No more comes out than went in, and an end that is none has a name.
fn is_sound(bytes: Vec<u8>) -> Result<usize, TestCaseError> {
    let len = bytes.len();
    let (read, end) = read_all(bytes);
    let taken: usize = read.iter().map(|frame| frame.len() + HEAD_BYTES).sum();
    prop_assert!(taken <= len);
    prop_assert!(end.is_some() || taken + HEAD_BYTES <= len);
    Ok(read.len())
}

proptest! {
    #[test]
    fn random_bytes_end_in_a_named_fault(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        is_sound(bytes)?;
    }

    /// Uniform bytes are hardly ever a frame; these are, but for a few.
    #[test]
    fn damaged_frames_end_in_a_named_fault(
        sizes in proptest::collection::vec(0..3000_usize, 1..6),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let whole = write_all(&sizes.iter().map(|&len| vec![7; len]).collect::<Vec<_>>());
        prop_assert_eq!(is_sound(whole.clone())?, sizes.len());
        let mut bytes = whole;
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            *bytes.get_mut(at).unwrap() = byte;
        }
        is_sound(bytes.clone())?;
        bytes.truncate(cut.index(bytes.len()));
        is_sound(bytes)?;
    }
}
