//! Tensors across the border to Python through DLPack: no copy and no dependency on torch's ABI.
#![expect(unsafe_code, reason = "DLPack is a C interface; every block states why it holds")]

use crate::error::Error;
use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyDict, PyTuple};
use std::any::Any;
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

const NAME: &CStr = c"dltensor";
const USED: &CStr = c"used_dltensor";
const CPU: i32 = 1;

/// `DLTensor` of dlpack.h, version 0.x (what an unversioned capsule holds).
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor` of dlpack.h.
#[repr(C)]
struct DlManaged {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManaged)>,
}

/// Where every exported tensor is: the CPU.
pub(crate) const DEVICE: (i32, i32) = (CPU, 0);

/// What keeps an exported view alive: the memory, and the shape that the tensor points to.
struct Export {
    managed: DlManaged,
    shape: Vec<i64>,
    _memory: Arc<dyn Any + Send + Sync>,
}

/// A capsule with a contiguous tensor on memory that `memory` owns: what `__dlpack__` returns.
///
/// # Errors
/// A copy is asked for in `kwargs`: that is left to who gets the view.
pub(crate) fn export<'py>(
    py: Python<'py>,
    kwargs: Option<&Bound<'py, PyDict>>,
    start: *mut c_void,
    element: Element,
    shape: &[usize],
    memory: Arc<dyn Any + Send + Sync>,
) -> PyResult<Bound<'py, PyCapsule>> {
    let copy = kwargs.and_then(|kwargs| kwargs.get_item("copy").ok().flatten());
    if copy.is_some_and(|copy| copy.is_truthy().unwrap_or(false)) {
        return Err(PyValueError::new_err("this memory is shared, not copied: copy the tensor instead"));
    }
    let mut export = Box::new(Export {
        managed: DlManaged {
            tensor: DlTensor {
                data: start,
                device_type: CPU,
                device_id: 0,
                ndim: i32::try_from(shape.len()).map_err(|_| PyValueError::new_err("too many dimensions"))?,
                code: element.code,
                bits: element.bits,
                lanes: 1,
                shape: std::ptr::null_mut(),
                strides: std::ptr::null_mut(),
                byte_offset: 0,
            },
            context: std::ptr::null_mut(),
            deleter: Some(delete_export),
        },
        shape: shape.iter().map(|size| *size as i64).collect(),
        _memory: memory,
    });
    export.managed.tensor.shape = export.shape.as_mut_ptr();
    let leaked = NonNull::from(Box::leak(export));
    // SAFETY: `leaked` is a live Export; its first use is here, and `delete_export` takes it back exactly once.
    unsafe {
        (*leaked.as_ptr()).managed.context = leaked.as_ptr().cast();
        let managed = NonNull::from(&mut (*leaked.as_ptr()).managed);
        PyCapsule::new_with_pointer_and_destructor(py, managed.cast(), NAME, Some(delete_capsule))
    }
}

unsafe extern "C" fn delete_export(managed: *mut DlManaged) {
    // SAFETY: `context` is the Box<Export> that `__dlpack__` leaked; the consumer calls this once.
    unsafe { drop(Box::from_raw((*managed).context.cast::<Export>())) };
}

unsafe extern "C" fn delete_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: called by Python on a capsule made below. A consumer that took the tensor has renamed the capsule, so
    // the old name still being valid means that nobody else frees it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast::<DlManaged>();
            if let Some(deleter) = (*managed).deleter {
                deleter(managed);
            }
        }
    }
}

/// The element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Element {
    /// 0 int, 1 unsigned, 2 float, 4 bfloat, 6 bool.
    pub(crate) code: u8,
    /// Bits per value.
    pub(crate) bits: u8,
}

/// A contiguous CPU tensor lent by Python for the time of one call.
pub(crate) struct Borrowed {
    managed: NonNull<DlManaged>,
    /// Its shape.
    pub(crate) shape: Vec<usize>,
    /// Its element type.
    pub(crate) element: Element,
}

impl Borrowed {
    /// Take a tensor (anything with `__dlpack__`) over, without copying.
    ///
    /// # Errors
    /// [`Error::Type`] if it is no such object; [`Error::Value`] if it is not on the CPU or not contiguous.
    pub(crate) fn new(object: &Bound<'_, PyAny>) -> Result<Self, Error> {
        let capsule = object
            .call_method0("__dlpack__")?
            .cast_into::<PyCapsule>()
            .map_err(|_| Error::Type("__dlpack__ did not return a capsule".to_owned()))?;
        let pointer = capsule.pointer_checked(Some(NAME))?.cast::<DlManaged>();
        // SAFETY: a capsule of this name holds a DLManagedTensor. Renaming it makes us its owner; `Drop` frees it.
        let tensor = unsafe {
            if ffi::PyCapsule_SetName(capsule.as_ptr(), USED.as_ptr()) != 0 {
                return Err(PyErr::fetch(object.py()).into());
            }
            &(*pointer.as_ptr()).tensor
        };
        let mut borrowed = Self {
            managed: pointer,
            shape: Vec::new(),
            element: Element { code: tensor.code, bits: tensor.bits },
        };
        let dims = usize::try_from(tensor.ndim).unwrap_or(0);
        let read = |at: *const i64| -> Vec<i64> {
            if dims == 0 || at.is_null() {
                return Vec::new();
            }
            // SAFETY: dlpack.h promises `ndim` entries.
            unsafe { std::slice::from_raw_parts(at, dims) }.to_vec()
        };
        let (shape, strides) = (read(tensor.shape), read(tensor.strides));
        borrowed.shape = shape.iter().map(|&size| usize::try_from(size).unwrap_or(0)).collect();
        if tensor.device_type != CPU || tensor.lanes != 1 {
            return Err(Error::Value("expected a tensor in CPU memory".to_owned()));
        }
        if !strides.is_empty() && !is_contiguous(&shape, &strides) {
            return Err(Error::Value("expected a contiguous tensor".to_owned()));
        }
        Ok(borrowed)
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The raw bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        let len = self.len() * usize::from(self.element.bits).div_ceil(8);
        if len == 0 {
            return &[];
        }
        // SAFETY: we own the tensor until drop; it is contiguous, on the CPU, and has this many bytes.
        unsafe {
            let tensor = &(*self.managed.as_ptr()).tensor;
            let start = tensor.data.cast::<u8>().add(usize::try_from(tensor.byte_offset).unwrap_or(0));
            std::slice::from_raw_parts(start, len)
        }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // SAFETY: we took the tensor over in `new`, so calling its deleter once is our duty.
        unsafe {
            if let Some(deleter) = (*self.managed.as_ptr()).deleter {
                deleter(self.managed.as_ptr());
            }
        }
    }
}

fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size == 0 {
            return true;
        }
        if size != 1 && stride != expected {
            return false;
        }
        expected *= size;
    }
    true
}

/// A torch-visible shape: a tuple of ints.
pub(crate) fn shape_tuple<'py>(py: Python<'py>, shape: &[usize]) -> PyResult<Bound<'py, PyTuple>> {
    PyTuple::new(py, shape)
}
