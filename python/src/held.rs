//! Memory of torch's that a session's status counts.

use pyo3::prelude::*;

/// Bytes that the status shows for as long as this lives: keep it beside what holds them.
#[pyclass(frozen, module = "potluck._core")]
pub(crate) struct Held {
    pub(crate) _held: potluck_collab::Held,
}
