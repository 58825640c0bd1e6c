//! Tensors to hivemind's `Tensor` message and back; which scheme a policy chooses.

use crate::dlpack::{Borrowed, Element, shape_tuple};
use crate::elements::{Elements, bytes_filled};
use crate::error::Error;
use potluck_compression::{
    DType, Decoding, Encoding, Limits, Policy, Scheme, Scratch, SerializedTensor, TensorInfo, TensorRole,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use std::cell::RefCell;

/// Every scheme as `(class name, number on the wire, bits per value)`.
#[pyfunction]
pub(crate) fn schemes() -> Vec<(&'static str, u8, u32)> {
    Scheme::ALL.iter().map(|scheme| (scheme.name(), scheme.wire_id(), scheme.bits_per_value())).collect()
}

/// The number of the scheme that `policy` (JSON) chooses for a tensor.
#[pyfunction]
pub(crate) fn scheme_for(policy: &str, key: String, shape: Vec<usize>, role: &str) -> Result<u8, Error> {
    let info = TensorInfo { key, shape, role: role_of(role)? };
    Ok(parse_policy(policy)?.scheme_for(&info).wire_id())
}

thread_local! {
    /// What encoders need besides, kept so that a warm call does not ask for it again.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// An encoded tensor: buffer, shape, dtype name, values that were clamped, values that are NaN.
type Encoded<'py> = (Bound<'py, PyBytes>, Bound<'py, PyTuple>, &'static str, usize, usize);

/// Encode a contiguous CPU tensor from where it is into the bytes that the message holds.
#[pyfunction]
pub(crate) fn encode<'py>(
    py: Python<'py>,
    tensor: &Bound<'py, PyAny>,
    scheme: u8,
) -> Result<Encoded<'py>, Error> {
    let tensor = Borrowed::new(tensor)?;
    let dtype = dtype_of(tensor.element)?;
    let encoding = Encoding::new(dtype, &tensor.shape, tensor.bytes(), scheme_of(scheme)?)?;
    let (buffer, report) = bytes_filled(py, encoding.encoded_len(), |room| {
        SCRATCH.with_borrow_mut(|scratch| Ok(encoding.write(room, scratch)?))
    })?;
    Ok((buffer, shape_tuple(py, &tensor.shape)?, dtype.name(), report.saturated, report.nan))
}

/// Decode what a stranger sent into the memory of the tensor that it becomes.
#[pyfunction]
pub(crate) fn decode(
    py: Python<'_>,
    buffer: &[u8],
    size: Vec<u32>,
    dtype: &str,
    scheme: u8,
) -> Result<Elements, Error> {
    let dtype = dtype_named(dtype)?;
    let decoding = Decoding::new(dtype, &size, scheme_of(scheme)?, buffer, &Limits::default())?;
    let shape = size.iter().map(|dim| *dim as usize).collect();
    let fill = |out: &mut [u8]| decoding.write(out);
    Ok(py.detach(|| Elements::filled(decoding.decoded_len(), element_of(dtype), shape, fill))?)
}

/// Decode what a stranger sent: the little-endian elements in C order.
#[pyfunction]
pub(crate) fn decode_bytes<'py>(
    py: Python<'py>,
    buffer: &[u8],
    size: Vec<u32>,
    dtype: &str,
    scheme: u8,
) -> Result<Bound<'py, PyBytes>, Error> {
    let decoding = Decoding::new(dtype_named(dtype)?, &size, scheme_of(scheme)?, buffer, &Limits::default())?;
    let fill =
        |room: &mut [u8]| py.detach(|| decoding.write(room)).map_err(|error| Error::from(error).into());
    Ok(PyBytes::new_with(py, decoding.decoded_len(), fill)?)
}

/// The protobuf form of a message.
#[pyfunction]
pub(crate) fn encode_message<'py>(
    py: Python<'py>,
    buffer: Vec<u8>,
    size: Vec<u32>,
    requires_grad: bool,
    dtype: &str,
    scheme: u8,
    chunks: u32,
) -> Result<Bound<'py, PyBytes>, Error> {
    Ok(PyBytes::new(py, &message(buffer, size, requires_grad, dtype, scheme, chunks)?.to_protobuf()))
}

/// Fields of a message in order of their numbers.
type Fields<'py> = (Bound<'py, PyBytes>, Vec<u32>, bool, &'static str, u8, u32);

/// Read the protobuf form of a stranger.
#[pyfunction]
pub(crate) fn decode_message<'py>(py: Python<'py>, message: &[u8]) -> Result<Fields<'py>, Error> {
    let SerializedTensor { buffer, size, requires_grad, dtype, compression, chunks } =
        SerializedTensor::from_protobuf(message, &Limits::default())?;
    Ok((PyBytes::new(py, &buffer), size, requires_grad, dtype.name(), compression.wire_id(), chunks))
}

/// A policy from its JSON form.
pub(crate) fn parse_policy(json: &str) -> Result<Policy, Error> {
    let policy: Policy = serde_json::from_str(json)
        .map_err(|error| Error::Value(format!("not a compression policy: {error}")))?;
    policy.validate().map_err(|error| Error::Value(error.to_string()))?;
    Ok(policy)
}

/// A role from its name.
pub(crate) fn role_of(role: &str) -> Result<TensorRole, Error> {
    Ok(match role {
        "ACTIVATION" => TensorRole::Activation,
        "PARAMETER" => TensorRole::Parameter,
        "GRADIENT" => TensorRole::Gradient,
        "OPTIMIZER" => TensorRole::Optimizer,
        "UNSPECIFIED" => TensorRole::Unspecified,
        other => return Err(Error::Value(format!("unknown tensor role {other:?}"))),
    })
}

fn message(
    buffer: Vec<u8>,
    size: Vec<u32>,
    requires_grad: bool,
    dtype: &str,
    scheme: u8,
    chunks: u32,
) -> Result<SerializedTensor, Error> {
    let dtype = dtype_named(dtype)?;
    Ok(SerializedTensor { buffer, size, requires_grad, dtype, compression: scheme_of(scheme)?, chunks })
}

fn scheme_of(id: u8) -> Result<Scheme, Error> {
    Scheme::from_wire_id(id).ok_or_else(|| Error::Value(format!("unknown compression number {id}")))
}

fn dtype_named(name: &str) -> Result<DType, Error> {
    DType::from_name(name).ok_or_else(|| Error::Value(format!("unknown element type {name:?}")))
}

/// How DLPack writes each element type.
fn element_of(dtype: DType) -> Element {
    let code = match dtype {
        DType::Int64 | DType::Int32 | DType::Int16 | DType::Int8 => 0,
        DType::UInt8 => 1,
        DType::Float32 | DType::Float64 | DType::Float16 => 2,
        DType::BFloat16 => 4,
        DType::Bool => 6,
    };
    Element { code, bits: dtype.size() as u8 * 8 }
}

fn dtype_of(element: Element) -> Result<DType, Error> {
    let found = DType::ALL.into_iter().find(|dtype| element_of(*dtype) == element);
    let Element { code, bits } = element;
    found.ok_or_else(|| Error::Type(format!("tensors of {bits} bits (DLPack code {code}) cannot be sent")))
}
