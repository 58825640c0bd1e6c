//! Tensors to hivemind's `Tensor` message and back; which scheme a policy chooses.

use crate::buffer::{Borrowed, shape_tuple};
use crate::error::Error;
use potluck_compression::{DType, Limits, Policy, Scheme, SerializedTensor, TensorInfo, TensorRole};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyTuple};

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

/// Encode a contiguous CPU tensor: `(buffer, shape, dtype name)`.
#[pyfunction]
pub(crate) fn encode<'py>(
    py: Python<'py>,
    tensor: &Bound<'py, PyAny>,
    scheme: u8,
) -> Result<(Bound<'py, PyBytes>, Bound<'py, PyTuple>, &'static str), Error> {
    let tensor = Borrowed::new(tensor)?;
    let dtype = dtype_of(&tensor)?;
    let (shape, raw, scheme) = (tensor.shape.as_slice(), tensor.bytes(), scheme_of(scheme)?);
    let message = py.detach(|| potluck_compression::serialize(dtype, shape, raw, scheme))?;
    Ok((PyBytes::new(py, &message.buffer), shape_tuple(py, shape)?, dtype.name()))
}

/// Decode what a stranger sent: the little-endian elements in C order.
#[pyfunction]
pub(crate) fn decode<'py>(
    py: Python<'py>,
    buffer: Vec<u8>,
    size: Vec<u32>,
    dtype: &str,
    scheme: u8,
) -> Result<Bound<'py, PyByteArray>, Error> {
    let message = message(buffer, size, false, dtype, scheme, 0)?;
    let raw = py.detach(|| potluck_compression::deserialize(&message, &Limits::default()))?;
    Ok(PyByteArray::new(py, &raw.bytes))
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
    let dtype =
        DType::from_name(dtype).ok_or_else(|| Error::Value(format!("unknown element type {dtype:?}")))?;
    Ok(SerializedTensor { buffer, size, requires_grad, dtype, compression: scheme_of(scheme)?, chunks })
}

fn scheme_of(id: u8) -> Result<Scheme, Error> {
    Scheme::from_wire_id(id).ok_or_else(|| Error::Value(format!("unknown compression number {id}")))
}

fn dtype_of(tensor: &Borrowed) -> Result<DType, Error> {
    Ok(match (tensor.element.code, tensor.element.bits) {
        (2, 32) => DType::Float32,
        (2, 64) => DType::Float64,
        (2, 16) => DType::Float16,
        (4, 16) => DType::BFloat16,
        (0, 64) => DType::Int64,
        (0, 32) => DType::Int32,
        (0, 16) => DType::Int16,
        (0, 8) => DType::Int8,
        (1, 8) => DType::UInt8,
        (6, 8) => DType::Bool,
        (code, bits) => {
            return Err(Error::Type(format!("tensors of {bits} bits (DLPack code {code}) cannot be sent")));
        }
    })
}
