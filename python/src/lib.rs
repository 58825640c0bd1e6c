//! The door between Python and the Rust crates. This file is a list; each class lives in the file of its name.
//!
//! Rules of this crate: Python drives and Rust never calls Python; every wait releases the GIL and looks for Ctrl-C
//! (`runtime::wait`); one file maps errors (`error`); only `dlpack`, `buffer` and `elements` (memory shared with torch) hold unsafe code.

mod buffer;
mod compression;
mod directory;
mod dlpack;
mod elements;
mod error;
mod held;
mod hub;
mod node;
mod runtime;
mod session;
mod trim;

/// The compiled half of `potluck`. Not a public interface: use the classes of the package.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use crate::buffer::FlatBuffer;
    #[pymodule_export]
    use crate::compression::{
        decode, decode_bytes, decode_message, encode, encode_message, scheme_for, schemes,
    };
    #[pymodule_export]
    use crate::elements::Elements;
    #[pymodule_export]
    use crate::error::PeerError;
    #[pymodule_export]
    use crate::held::Held;
    #[pymodule_export]
    use crate::hub::Hub;
    #[pymodule_export]
    use crate::node::Node;
    #[pymodule_export]
    use crate::session::Session;

    /// The version of the package, and how much `gather` of a round may be.
    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        use pyo3::types::PyModuleMethods;
        module.add("GATHER_BYTES_MAX", potluck_collab::Terms::GATHER_BYTES_MAX)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
