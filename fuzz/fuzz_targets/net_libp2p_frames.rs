//! Any bytes as a stream of frames. The framing is taken by path, so that libp2p itself is not built with counters.
#![no_main]
#![allow(dead_code, reason = "the sending half is not needed here")]

#[path = "../../crates/net-libp2p/src/wire.rs"]
mod wire;

use futures::StreamExt;
use futures::executor::block_on;
use futures::io::Cursor;
use potluck_net::FRAME_BYTES_MAX;
use std::sync::Arc;

struct Ignore;

impl<S> wire::Owner<S> for Ignore {
    fn sent(&self, _: usize) {}
    fn received(&self, _: usize) {}
    fn retire(&self, _: wire::Left<S>) {}
}

// Frames come out as they went in, no more bytes than went in, and the stream ends.
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (_sink, mut stream) = wire::frames(Cursor::new(input.to_vec()), Ignore, &Arc::default());
    let mut rest = input;
    while let Some(Ok(frame)) = block_on(stream.next()) {
        assert!(frame.len() <= FRAME_BYTES_MAX);
        let (head, tail) = rest.split_first_chunk::<4>().expect("a frame has a head");
        assert_eq!(u32::from_be_bytes(*head) as usize, frame.len());
        let (body, tail) = tail.split_at(frame.len());
        assert_eq!(body, frame);
        rest = tail;
    }
});
