//! Reading ahead below the encryption: TLS asks the socket for 4 KiB at a time, four system calls for each of its
//! records. Here one call brings many records. What is kept grows only where much arrives.

use futures::{AsyncRead, AsyncWrite};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// What is read at once on a connection that carries little: enough for any message of control.
const FIRST_BYTES: usize = 4 << 10;
/// What is read at once on a connection that carries much: eight records.
const MOST_BYTES: usize = 128 << 10;

/// A socket whose bytes are fetched in large pieces. Writing passes through.
pub(crate) struct ReadAhead<C> {
    socket: C,
    buffer: Vec<u8>,
    at: usize,
    filled: usize,
}

impl<C> ReadAhead<C> {
    pub(crate) fn new(socket: C) -> Self {
        Self { socket, buffer: Vec::new(), at: 0, filled: 0 }
    }
}

impl<C: AsyncRead + Unpin> ReadAhead<C> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // It was filled to the brim the last time: more of the kind is to be expected.
        if self.filled == self.buffer.len() && self.buffer.len() < MOST_BYTES {
            self.buffer.resize((self.buffer.len() * 2).clamp(FIRST_BYTES, MOST_BYTES), 0);
        }
        (self.at, self.filled) = (0, 0);
        self.filled = ready!(Pin::new(&mut self.socket).poll_read(cx, &mut self.buffer))?;
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

    #[test]
    fn a_quiet_connection_keeps_little() {
        let mut ahead = ReadAhead::new(Source { next: 0, len: 100, reads: Arc::default() });
        let mut piece = [0; 4096];
        assert_eq!(block_on(ahead.read(&mut piece)).unwrap(), 100);
        assert_eq!(block_on(ahead.read(&mut piece)).unwrap(), 0);
        assert_eq!(ahead.buffer.len(), FIRST_BYTES);
    }
}
