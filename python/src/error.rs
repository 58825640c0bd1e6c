//! The one place where errors of the Rust crates become Python exceptions.

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::{PyErr, create_exception};

create_exception!(
    _core,
    PeerError,
    PyOSError,
    "The network could not be used: no peer reached, address refused, or closed."
);

/// Everything that can go wrong behind a call from Python.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The caller's argument is wrong.
    #[error("{0}")]
    Value(String),
    /// The caller's argument has the wrong type.
    #[error("{0}")]
    Type(String),
    /// The network could not be used.
    #[error("{0}")]
    Peer(String),
    /// The object was shut down, or belongs to another process.
    #[error("{0}")]
    State(String),
    /// Python raised while we were waiting (Ctrl-C).
    #[error(transparent)]
    Python(#[from] PyErr),
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Value(_) => PyValueError::new_err(text),
            Error::Type(_) => PyTypeError::new_err(text),
            Error::Peer(_) => PeerError::new_err(text),
            Error::State(_) => PyRuntimeError::new_err(text),
            Error::Python(error) => error,
        }
    }
}

impl From<potluck_compression::EncodeError> for Error {
    fn from(error: potluck_compression::EncodeError) -> Self {
        Self::Value(error.to_string())
    }
}

impl From<potluck_compression::DecodeError> for Error {
    fn from(error: potluck_compression::DecodeError) -> Self {
        Self::Value(error.to_string())
    }
}
