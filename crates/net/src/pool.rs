//! Buffers that go round: memory that bulk data has touched is used again for the next, because the first touch of a
//! page costs more than copying into it.

use bytes::Bytes;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What nobody needed while so many times the bytes that may be kept were taken is given back.
const TRIM_AFTER: usize = 4;

/// Buffers that nobody uses at the moment, up to a number of bytes; none before [`BufferPool::keep`] says how many.
#[derive(Debug, Default)]
pub struct BufferPool {
    shelf: Mutex<Shelf>,
}

#[derive(Debug, Default)]
struct Shelf {
    free: Vec<Vec<u8>>,
    bytes: usize,
    bytes_max: usize,
    /// Bytes taken since the last trim, and the fewest buffers that lay here meanwhile.
    taken: usize,
    idle: usize,
}

impl Shelf {
    /// The oldest buffers, if they have only lain here for long: a burst is over, or the peers of it have left.
    fn trim(&mut self, taken: usize) -> Vec<Vec<u8>> {
        self.taken = self.taken.saturating_add(taken);
        self.idle = self.idle.min(self.free.len());
        if self.taken < self.bytes_max.saturating_mul(TRIM_AFTER) {
            return Vec::new();
        }
        let idle: Vec<Vec<u8>> = self.free.drain(..self.idle).collect();
        self.bytes -= idle.iter().map(Vec::capacity).sum::<usize>();
        (self.taken, self.idle) = (0, self.free.len());
        idle
    }
}

/// A buffer on loan.
struct Lent {
    buffer: Vec<u8>,
    pool: Arc<BufferPool>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut shelf = self.pool.shelf();
        if buffer.capacity() > shelf.bytes_max {
            return;
        }
        shelf.bytes += buffer.capacity();
        shelf.free.push(buffer);
        // The newest has the length that is in use now: groups change, and pieces with them.
        while shelf.bytes > shelf.bytes_max {
            let oldest = shelf.free.remove(0);
            shelf.bytes -= oldest.capacity();
        }
    }
}

impl BufferPool {
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keep up to so many bytes from now on, or more if more was said before.
    pub fn keep(&self, bytes: usize) {
        let mut shelf = self.shelf();
        shelf.bytes_max = shelf.bytes_max.max(bytes);
    }

    /// An empty buffer with room for `len` bytes.
    pub fn take(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.find(len);
        buffer.clear();
        buffer
    }

    /// A buffer of `len` bytes to be overwritten: zeros, or what was in it before.
    pub fn take_filled(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.find(len);
        buffer.resize(len, 0);
        buffer
    }

    fn find(&self, len: usize) -> Vec<u8> {
        let mut shelf = self.shelf();
        // Pieces of bulk data differ little in length, so that the last buffer nearly always fits. None that is far too
        // large: it would be missed where it is needed.
        let fits = |buffer: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&buffer.capacity());
        let fits = shelf.free.iter().rposition(fits);
        let found = fits.map(|at| shelf.free.remove(at));
        shelf.bytes -= found.as_ref().map_or(0, Vec::capacity);
        let idle = shelf.trim(len);
        // Memory is given back and got without the lock.
        drop(shelf);
        drop(idle);
        found.unwrap_or_else(|| Vec::with_capacity(len))
    }

    /// Share a buffer; it comes back when the last user has dropped it.
    pub fn bytes(self: &Arc<Self>, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { buffer, pool: self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_last_slice_is_gone() {
        let pool = Arc::new(BufferPool::default());
        pool.keep(1 << 20);
        let mut buffer = pool.take(1000);
        buffer.extend_from_slice(&[7; 1000]);
        let memory = buffer.as_ptr();
        let whole = pool.bytes(buffer);
        let slice = whole.slice(10..20);
        drop(whole);
        let other = pool.take(1000);
        assert_ne!(other.as_ptr(), memory, "still in use");
        assert_eq!(slice, [7; 10][..]);
        drop(slice);
        let again = pool.take(900);
        assert!(again.is_empty() && again.as_ptr() == memory);
    }

    #[test]
    fn no_more_is_kept_than_was_asked_for() {
        let pool = Arc::new(BufferPool::default());
        pool.keep(2500);
        let lent: Vec<Bytes> = (0..5).map(|_| pool.bytes(Vec::with_capacity(1000))).collect();
        drop(lent);
        let shelf = pool.shelf();
        assert_eq!((shelf.free.len(), shelf.bytes), (2, 2000));
    }

    #[test]
    fn what_a_burst_needed_is_given_back_when_it_is_over() {
        let pool = Arc::new(BufferPool::default());
        pool.keep(100_000);
        let burst: Vec<Bytes> = (0..50).map(|_| pool.bytes(pool.take(1000))).collect();
        drop(burst);
        for _ in 0..1000 {
            let both = (pool.bytes(pool.take(1000)), pool.bytes(pool.take(1000)));
            drop(both);
        }
        let shelf = pool.shelf();
        assert_eq!((shelf.free.len(), shelf.bytes), (2, 2000));
    }

    #[test]
    fn buffers_of_a_length_that_is_no_longer_used_make_room() {
        let pool = Arc::new(BufferPool::default());
        pool.keep(2500);
        let old: Vec<Bytes> = (0..20).map(|_| pool.bytes(Vec::with_capacity(100))).collect();
        drop(old);
        let new: Vec<Bytes> = (0..2).map(|_| pool.bytes(Vec::with_capacity(1000))).collect();
        drop(new);
        let capacities: Vec<usize> = pool.shelf().free.iter().map(Vec::capacity).collect();
        assert_eq!(capacities, [100, 100, 100, 100, 100, 1000, 1000]);
    }
}
