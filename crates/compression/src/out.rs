//! Where an encoder writes: memory of somebody else, which is touched once.

use std::mem::MaybeUninit;

/// Room for one buffer, and how much of it is written.
pub(crate) struct Out<'a> {
    /// The first `len` are initialised.
    room: &'a mut [MaybeUninit<u8>],
    len: usize,
}

impl<'a> Out<'a> {
    /// All of `room`, nothing of it written yet.
    pub(crate) fn new(room: &'a mut [MaybeUninit<u8>]) -> Self {
        Self { room, len: 0 }
    }

    /// Bytes written.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The next `count` bytes, zeroed.
    #[inline(always)]
    pub(crate) fn grow(&mut self, count: usize) -> &mut [u8] {
        let end = self.len + count;
        let next = &mut self.room[self.len..end];
        next.fill(MaybeUninit::new(0));
        self.len = end;
        // SAFETY: the line above has initialised all of them.
        unsafe { next.assume_init_mut() }
    }

    /// Write `bytes`.
    #[inline(always)]
    pub(crate) fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.grow(bytes.len()).copy_from_slice(bytes);
    }

    /// What is written so far, to fill in what was not known before.
    pub(crate) fn written(&mut self) -> &mut [u8] {
        // SAFETY: `grow` has initialised the first `len` bytes.
        unsafe { self.room[..self.len].assume_init_mut() }
    }
}
