//! Reading ahead below the encryption: TLS asks the socket for 4 KiB at a time, four system calls for each of its
//! records. Here one call brings many records. What is kept grows only where much arrives, and whoever waits for the bytes
//! gets a turn before the next ones are fetched.

use futures::{AsyncRead, AsyncWrite};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// What is read at once on a connection that carries little: enough for any message of control.
const FIRST_BYTES: usize = 4 << 10;
/// What is read at once on a connection that carries much: eight records.
const MOST_BYTES: usize = 128 << 10;
/// After so many bytes on end the task gives way, though there are more: else the streams of a fast connection fill up to their
/// windows before anybody takes from them, by then out of the processor's cache and in memory that is new each time.
const TURN_BYTES: usize = 128 << 10;

/// A socket whose bytes are fetched in large pieces. Writing passes through.
pub(crate) struct ReadAhead<C> {
    socket: C,
    buffer: Vec<u8>,
    at: usize,
    filled: usize,
    /// Bytes since the socket was last empty or the task last gave way.
    turn: usize,
}

impl<C> ReadAhead<C> {
    pub(crate) fn new(socket: C) -> Self {
        Self { socket, buffer: Vec::new(), at: 0, filled: 0, turn: 0 }
    }
}

impl<C: AsyncRead + Unpin> ReadAhead<C> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.turn >= TURN_BYTES {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // It was filled to the brim the last time: more of the kind is to be expected.
        if self.filled == self.buffer.len() && self.buffer.len() < MOST_BYTES {
            self.buffer.resize((self.buffer.len() * 2).clamp(FIRST_BYTES, MOST_BYTES), 0);
        }
        (self.at, self.filled) = (0, 0);
        let Poll::Ready(read) = Pin::new(&mut self.socket).poll_read(cx, &mut self.buffer) else {
            self.turn = 0;
            return Poll::Pending;
        };
        self.filled = read?;
        self.turn = self.turn.saturating_add(self.filled);
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for ReadAhead<C> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, target: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.at == this.filled {
            ready!(this.poll_fill(cx))?;
        }
        let count = target.len().min(this.filled - this.at);
        target[..count].copy_from_slice(&this.buffer[this.at..this.at + count]);
        this.at += count;
        Poll::Ready(Ok(count))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for ReadAhead<C> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write_vectored(cx, slices)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::AsyncReadExt;
    use futures::executor::block_on;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    /// Gives the bytes 0, 1, 2, … as many as are asked for, and counts how often it is asked.
    struct Source {
        next: usize,
        len: usize,
        reads: Arc<AtomicUsize>,
    }

    impl AsyncRead for Source {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            target: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let count = target.len().min(self.len - self.next);
            for slot in &mut target[..count] {
                *slot = self.next as u8;
                self.next += 1;
            }
            Poll::Ready(Ok(count))
        }
    }

    #[test]
    fn many_small_reads_are_few_large_ones_and_nothing_is_lost() {
        let reads = Arc::new(AtomicUsize::new(0));
        let len = (1 << 20) + 77;
        let mut ahead = ReadAhead::new(Source { next: 0, len, reads: reads.clone() });
        let mut got = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let count = block_on(ahead.read(&mut piece)).unwrap();
            if count == 0 {
                break;
            }
            got.extend_from_slice(&piece[..count]);
        }
        assert!(got.len() == len && got.iter().enumerate().all(|(at, byte)| *byte == at as u8));
        // 4, 8, … 64 KiB, then 128 KiB at a time, and the end.
        assert!(reads.load(Ordering::Relaxed) < 20, "{reads:?}");
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn others_get_a_turn_and_it_goes_on_by_itself() {
        let mut ahead = ReadAhead::new(Source { next: 0, len: 1 << 20, reads: Arc::default() });
        let woken = Arc::new(Woken::default());
        let waker = woken.clone().into();
        let mut cx = Context::from_waker(&waker);
        let (mut piece, mut on_end, mut turns) = (vec![0; 4096], 0, 0);
        loop {
            match Pin::new(&mut ahead).poll_read(&mut cx, &mut piece) {
                Poll::Ready(Ok(0)) => break,
                Poll::Ready(count) => on_end += count.unwrap(),
                Poll::Pending => {
                    turns += 1;
                    assert_eq!(woken.0.load(Ordering::Relaxed), turns);
                    assert!((TURN_BYTES..TURN_BYTES + MOST_BYTES).contains(&on_end), "{on_end}");
                    on_end = 0;
                }
            }
        }
        assert!(turns >= 4, "{turns}");
    }

    #[test]
    fn a_quiet_connection_keeps_little() {
        let mut ahead = ReadAhead::new(Source { next: 0, len: 100, reads: Arc::default() });
        let mut piece = [0; 4096];
        assert_eq!(block_on(ahead.read(&mut piece)).unwrap(), 100);
        assert_eq!(block_on(ahead.read(&mut piece)).unwrap(), 0);
        assert_eq!(ahead.buffer.len(), FIRST_BYTES);
    }
}
