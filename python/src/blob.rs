//! Bytes that arrived, as memory that torch reads where it is: a downloaded state is as large as the model and more.

use crate::dlpack::{DEVICE, Element, export};
use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule, PyDict};
use std::sync::Arc;

const U8: Element = Element { code: 1, bits: 8 };

/// Bytes of others: `torch.from_dlpack(blob)` is a tensor of them. It is for reading only, because they are also served
/// to whoever asks for them; whoever wants to write copies it.
#[pyclass(frozen, module = "potluck._core")]
pub(crate) struct Blob(pub(crate) Bytes);

#[pymethods]
impl Blob {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0)
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
        let start = self.0.as_ptr().cast_mut().cast();
        export(py, kwargs.as_ref(), start, U8, &[self.0.len()], Arc::new(self.0.clone()))
    }
}
