//! Tensors to bytes and back (see the README below): pure, synchronous, and the only crate with SIMD.
#![doc = include_str!("../README.md")]

mod codec;
mod dtype;
mod error;
mod error_feedback;
mod finite;
mod half_float;
pub mod low_rank;
mod out;
mod policy;
mod registry;
mod schemes;
pub mod simd;
mod source;
mod tally;
mod tensor;
mod wire;

pub use codec::Scratch;
pub use dtype::DType;
pub use error::{DecodeError, EncodeError, EncodeReport};
pub use error_feedback::ErrorFeedback;
pub use finite::first_non_finite;
pub use policy::{POLICY_DEPTH_MAX, Policy, PolicyTooDeep, TensorInfo, TensorRole};
pub use registry::Scheme;
pub use tally::{Tally, sum_values, tally};
pub use tensor::{Decoding, Encoding, Limits, RawTensor, SerializedTensor, deserialize, serialize};
