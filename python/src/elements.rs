//! Memory that comes from Rust and that torch reads where it is: decoded tensors, states that arrived, and the bytes of
//! encoded tensors. The codecs write straight to it, because memory that is touched for the first time costs more than
//! decoding into it; a downloaded state is as large as the model and more.
#![expect(unsafe_code, reason = "memory that Python sees, too; every block states why it holds")]

use crate::dlpack::{DEVICE, Element, export};
use crate::error::Error;
use bytes::Bytes;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule, PyDict};
use std::any::Any;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

const U8: Element = Element { code: 1, bits: 8 };
/// Where tensors of torch begin, too.
const ALIGNMENT: usize = 64;
/// One block between these sizes waits for the next tensor when its own is gone: smaller ones cost nothing to get, and
/// larger ones are too much to sit on.
const KEPT_MIN: usize = 1 << 20;
const KEPT_MAX: usize = 128 << 20;

static KEPT: Mutex<Option<Vec<u8>>> = Mutex::new(None);

/// Initialised bytes, which go to [`KEPT`] in the end.
struct Block {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a block owns its bytes, as the vector that it was made of did.
unsafe impl Send for Block {}
// SAFETY: a shared block only tells where it is; who writes there answers for it.
unsafe impl Sync for Block {}

impl Block {
    fn new(length: usize) -> Self {
        let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner).take_if(|kept| {
            // Not a block far too large: its rest would be lost to everybody else.
            (length..=length.saturating_add(length / 4)).contains(&kept.len())
        });
        let mut bytes = kept.unwrap_or_else(|| {
            let fresh = vec![0; length];
            advise_large_pages(fresh.as_ptr(), length);
            fresh
        });
        // The whole capacity is part of the length, so that `drop` can make the vector again.
        bytes.resize(bytes.capacity(), 0);
        let bytes = Vec::leak(bytes);
        Self { start: NonNull::from(&mut *bytes).cast(), length: bytes.len() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: pointer, length and capacity of the vector in `new`, which nobody else frees.
        let bytes = unsafe { Vec::from_raw_parts(self.start.as_ptr(), self.length, self.length) };
        if (KEPT_MIN..=KEPT_MAX).contains(&bytes.len()) {
            let replaced = KEPT.lock().unwrap_or_else(PoisonError::into_inner).replace(bytes);
            // Freed after the lock.
            drop(replaced);
        }
    }
}

/// Elements in memory that Rust has filled: `torch.from_dlpack(elements)` is a tensor of them. A decoded tensor is the only
/// one on its memory; bytes of others are for reading only.
#[pyclass(frozen, module = "potluck._core")]
pub(crate) struct Elements {
    /// Keeps alive what `start` points to.
    memory: Arc<dyn Any + Send + Sync>,
    start: *mut u8,
    element: Element,
    shape: Vec<usize>,
}

// SAFETY: `start` points into `memory`, which any thread may own; Rust writes there only before this is made.
unsafe impl Send for Elements {}
// SAFETY: as above; shared, it only tells where it is.
unsafe impl Sync for Elements {}

impl Elements {
    /// Bytes that arrived, where they lie. They are for reading only, because they are also served to whoever asks for
    /// them; whoever wants to write copies the tensor.
    pub(crate) fn of_bytes(bytes: Bytes) -> Self {
        let (start, shape) = (bytes.as_ptr().cast_mut(), vec![bytes.len()]);
        Self { memory: Arc::new(bytes), start, element: U8, shape }
    }

    /// Memory for a tensor, filled by `fill`, which gets `length` bytes (of whatever was there).
    ///
    /// # Errors
    /// That of `fill`.
    pub(crate) fn filled<E>(
        length: usize,
        element: Element,
        shape: Vec<usize>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let block = Block::new(length + ALIGNMENT - 1);
        let offset = block.start.align_offset(ALIGNMENT).min(ALIGNMENT - 1);
        // SAFETY: `offset` lies within the block.
        let start = unsafe { block.start.as_ptr().add(offset) };
        // SAFETY: so does `length` behind it; the block's bytes are initialised, and nobody else has it yet.
        fill(unsafe { std::slice::from_raw_parts_mut(start, length) })?;
        Ok(Self { memory: Arc::new(block), start, element, shape })
    }
}

#[pymethods]
impl Elements {
    /// Number of elements.
    fn __len__(&self) -> usize {
        self.shape.iter().product()
    }

    /// A copy, as they lie in memory.
    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let length = self.__len__() * usize::from(self.element.bits).div_ceil(8);
        // SAFETY: `start` points to so many initialised bytes in `memory`. Exclusion against a tensor on them that is
        // written to is the caller's, as with any tensor that two threads share.
        PyBytes::new(py, unsafe { std::slice::from_raw_parts(self.start, length) })
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        DEVICE
    }

    #[pyo3(signature = (**kwargs))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        kwargs: Option<Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        export(py, kwargs.as_ref(), self.start.cast(), self.element, &self.shape, self.memory.clone())
    }
}

/// A `bytes` object of `length`, and what `fill` answers, which initialises all of it while other Python threads run.
///
/// # Errors
/// No memory, or that of `fill`.
pub(crate) fn bytes_filled<'py, T: Send>(
    py: Python<'py>,
    length: usize,
    fill: impl FnOnce(&mut [MaybeUninit<u8>]) -> Result<T, Error> + Send,
) -> Result<(Bound<'py, PyBytes>, T), Error> {
    let size = ffi::Py_ssize_t::try_from(length).map_err(|_| Error::Value("too many bytes".to_owned()))?;
    // SAFETY: without a source the call makes an object whose bytes may be written until somebody else sees it, which
    // nobody does before `fill` has succeeded. It has `length` of them behind the address that is asked for.
    let (object, room) = unsafe {
        let object =
            Bound::from_owned_ptr_or_err(py, ffi::PyBytes_FromStringAndSize(std::ptr::null(), size))?;
        let object = object.cast_into_unchecked::<PyBytes>();
        let start = ffi::PyBytes_AsString(object.as_ptr()).cast::<MaybeUninit<u8>>();
        (object, std::slice::from_raw_parts_mut(start, length))
    };
    advise_large_pages(room.as_ptr().cast(), length);
    let answer = py.detach(|| fill(room))?;
    Ok((object, answer))
}

/// Ask for large pages where nobody has touched the memory yet: a fault each 2 MiB instead of each 4 KiB. A hint.
fn advise_large_pages(start: *const u8, length: usize) {
    const LARGE: usize = 2 << 20;
    let skipped = start.align_offset(LARGE);
    if length < 2 * LARGE || skipped >= length {
        return;
    }
    let whole = (length - skipped) / LARGE * LARGE;
    #[cfg(target_os = "linux")]
    if whole > 0 {
        // SAFETY: the range lies within an allocation of the caller, and the advice changes no value in it.
        unsafe { libc::madvise(start.add(skipped).cast_mut().cast(), whole, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _no_such_advice_here = whole;
}
