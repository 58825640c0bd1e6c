//! Flat f32 memory shared with torch, both ways, through DLPack.
//!
//! Rust owns the memory of a [`FlatBuffer`]; a torch view keeps it alive. Rust touches it only inside short copies
//! (`copy_out`) made while the caller waits, so a tensor operation never overlaps one, and as an average that nobody
//! writes to any more (`sealed`).
#![expect(unsafe_code, reason = "memory that torch sees, too; every block states why it holds")]

use crate::dlpack::{DEVICE, Element, export};
use bytes::Bytes;
use potluck_collab::{Held, Ledger, Purpose};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const F32: Element = Element { code: 2, bits: 32 };

struct Memory {
    values: UnsafeCell<Vec<f32>>,
    /// In the ledger of the session that uses it.
    held: Mutex<Option<Held>>,
    /// Where the vector goes when nobody views it any more.
    home: Arc<Shelf>,
}

impl Memory {
    fn start(&self) -> *mut f32 {
        // SAFETY: nobody moves or resizes the vector while it is here; only its values change.
        unsafe { (*self.values.get()).as_mut_ptr() }
    }

    fn hold(&self, held: Option<Held>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }

    fn values(&self) -> &[f32] {
        // SAFETY: nobody writes meanwhile (see the header).
        unsafe { (*self.values.get()).as_slice() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.hold(None);
        self.home.put(std::mem::take(self.values.get_mut()));
    }
}

// SAFETY: access from Rust goes through `copy_out` and `sealed` only; exclusion against torch is the caller's waiting,
// as with any tensor that two threads share.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// A vector that went through a round is the memory of the next one: its pages need not be touched for the first time
/// again, which would cost more than the copy. One vector at a time, of a session that has not ended.
#[derive(Default)]
pub(crate) struct Shelf {
    ledger: Option<Ledger>,
    kept: Mutex<Option<(Vec<f32>, Held)>>,
    closed: AtomicBool,
}

impl Shelf {
    /// For the vectors of the session that has this ledger.
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger: Some(ledger), ..Self::default() }
    }

    fn hold(&self, bytes: usize) -> Option<Held> {
        Some(self.ledger.as_ref()?.hold(Purpose::Rounds, bytes as u64))
    }

    fn put(&self, values: Vec<f32>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.closed.load(Ordering::Relaxed) {
            *kept = self.hold(size_of_val(values.as_slice())).map(|held| (values, held));
        }
    }

    fn take(&self, len: usize) -> Vec<f32> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut values = kept
            .map(|(values, _held)| values)
            .filter(|kept| kept.capacity() == len)
            .unwrap_or_else(|| Vec::with_capacity(len));
        values.clear();
        values
    }

    /// No round follows: keep nothing.
    pub(crate) fn close(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Ordering::Relaxed);
        *kept = None;
    }
}

/// The bytes of an average, as they are.
struct Sealed(Arc<Memory>);

impl AsRef<[u8]> for Sealed {
    fn as_ref(&self) -> &[u8] {
        let values = self.0.values();
        // SAFETY: any f32 is four initialized bytes, and u8 needs no alignment; nobody writes any more.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
    }
}

/// A vector of f32 that Rust owns and torch views: `torch.from_dlpack(buffer)` is a one-dimensional tensor on it.
#[pyclass(frozen, module = "potluck._core")]
pub(crate) struct FlatBuffer {
    memory: Arc<Memory>,
}

impl FlatBuffer {
    /// A buffer holding `values`, which go to `home` in the end.
    pub(crate) fn from_vec(values: Vec<f32>, home: Arc<Shelf>) -> Self {
        let held = Mutex::new(home.hold(size_of_val(values.as_slice())));
        Self { memory: Arc::new(Memory { values: UnsafeCell::new(values), held, home }) }
    }

    /// Show the buffer in the status of the session that has this ledger, until its memory goes.
    pub(crate) fn hold(&self, ledger: &Ledger, purpose: Purpose) {
        self.memory.hold(Some(ledger.hold(purpose, size_of_val(self.memory.values()) as u64)));
    }

    /// A copy of the values, in memory from `shelf` if it has some.
    pub(crate) fn copy_out(&self, shelf: &Shelf) -> Vec<f32> {
        let values = self.memory.values();
        let mut copy = shelf.take(values.len());
        copy.extend_from_slice(values);
        copy
    }

    /// The values as bytes, without copying. Nobody may write to the buffer or its views from now on.
    pub(crate) fn sealed(&self) -> Bytes {
        // Whoever gets the bytes counts them.
        self.memory.hold(None);
        Bytes::from_owner(Sealed(self.memory.clone()))
    }
}

#[pymethods]
impl FlatBuffer {
    /// A buffer of `length` zeros.
    #[new]
    fn new(length: usize) -> PyResult<Self> {
        let mut values = Vec::new();
        values
            .try_reserve_exact(length)
            .map_err(|_| PyValueError::new_err(format!("cannot allocate {length} values of 4 bytes")))?;
        values.resize(length, 0.0);
        Ok(Self::from_vec(values, Arc::default()))
    }

    fn __len__(&self) -> usize {
        self.memory.values().len()
    }

    /// Bytes held.
    #[getter]
    fn nbytes(&self) -> usize {
        size_of_val(self.memory.values())
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
        let (start, shape) = (self.memory.start().cast(), [self.memory.values().len()]);
        export(py, kwargs.as_ref(), start, F32, &shape, self.memory.clone())
    }
}
