//! The tensors of a state as a file of safetensors, and what the state's facts say about them. All of it may be a
//! stranger's: whatever it says, what is written can be read.

use anyhow::{Context, Result};
use bytes::Bytes;
use potluck_compression::{Limits, SerializedTensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The fact that lists which tensors are messages of `potluck-compression` instead of plain values.
pub(crate) const ENCODED: &str = "encoded";
/// What safetensors keeps something else under: it writes a tensor of this name, and then reads no file that has one.
pub(crate) const RESERVED: &str = "__metadata__";

/// How a tensor's bytes are to be read.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Shape {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
}

impl Shape {
    /// Bytes of such a tensor; none of a type that is not known, or if not even its strides can be counted.
    pub(crate) fn bytes(&self) -> Option<usize> {
        let (_, size) = dtype_of(&self.dtype)?;
        let steps =
            self.shape.iter().try_fold(size, |product, count| product.checked_mul((*count).max(1)))?;
        // What torch counts with has a sign.
        isize::try_from(steps).ok()?;
        Some(if self.shape.contains(&0) { 0 } else { steps })
    }

    /// Elements from one to the next in each dimension, of a shape that has [`bytes`](Self::bytes).
    pub(crate) fn strides(&self) -> Vec<usize> {
        let mut strides = vec![1; self.shape.len()];
        for at in (1..self.shape.len()).rev() {
            strides[at - 1] = strides[at] * self.shape[at].max(1);
        }
        strides
    }
}

/// Shapes of the tensors, as far as the training program said.
pub(crate) fn shapes(meta: &BTreeMap<String, String>) -> BTreeMap<String, Shape> {
    let read = |name: &str| meta.get(name).map(String::as_str).unwrap_or("{}");
    let mut shapes: BTreeMap<String, Shape> = serde_json::from_str(read("tensors")).unwrap_or_default();
    let optimizer: BTreeMap<String, BTreeMap<String, serde_json::Value>> =
        serde_json::from_str(read("optimizer")).unwrap_or_default();
    for (index, entries) in optimizer {
        for (name, facts) in entries {
            if let Ok(shape) = serde_json::from_value(facts) {
                shapes.insert(format!("opt.{index}.{name}"), shape);
            }
        }
    }
    shapes
}

/// The element type by torch's name, with the bytes of one element.
pub(crate) fn dtype_of(name: &str) -> Option<(Dtype, usize)> {
    Some(match name {
        "float64" => (Dtype::F64, 8),
        "float32" => (Dtype::F32, 4),
        "float16" => (Dtype::F16, 2),
        "bfloat16" => (Dtype::BF16, 2),
        "int64" => (Dtype::I64, 8),
        "int32" => (Dtype::I32, 4),
        "int16" => (Dtype::I16, 2),
        "int8" => (Dtype::I8, 1),
        "uint8" => (Dtype::U8, 1),
        "bool" => (Dtype::BOOL, 1),
        _ => return None,
    })
}

/// The file of these tensors.
pub(crate) fn write(meta: &BTreeMap<String, String>, blobs: &BTreeMap<String, Bytes>) -> Result<Vec<u8>> {
    anyhow::ensure!(!blobs.contains_key(RESERVED), "a tensor cannot be called {RESERVED:?}");
    let shapes = shapes(meta);
    let views = blobs.iter().map(|(name, blob)| (name, view(blob, shapes.get(name))));
    Ok(safetensors::serialize(views, None)?)
}

/// The tensors of a file.
pub(crate) fn read(file: &Bytes) -> Result<BTreeMap<String, Bytes>> {
    let tensors = SafeTensors::deserialize(file)?;
    Ok(tensors.iter().map(|(name, view)| (name.to_owned(), file.slice_ref(view.data()))).collect())
}

/// With its shape where that is known and fits; else as plain bytes.
fn view<'a>(blob: &'a Bytes, shape: Option<&Shape>) -> TensorView<'a> {
    // Asked before safetensors, which multiplies without looking.
    let known = shape.filter(|shape| shape.bytes() == Some(blob.len())).and_then(|shape| {
        let (dtype, _) = dtype_of(&shape.dtype)?;
        TensorView::new(dtype, shape.shape.clone(), blob).ok()
    });
    known.unwrap_or_else(|| {
        TensorView::new(Dtype::U8, vec![blob.len()], blob).expect("bytes are as many as they are")
    })
}

/// Turn tensors that travelled compressed (`load_state_compression`) back into plain ones.
pub(crate) fn decode(meta: &mut BTreeMap<String, String>, blobs: &mut BTreeMap<String, Bytes>) -> Result<()> {
    let Some(encoded) = meta.remove(ENCODED) else { return Ok(()) };
    let names: Vec<String> =
        serde_json::from_str(&encoded).with_context(|| format!("{ENCODED}: no list of names"))?;
    let limits = Limits::default();
    for name in names {
        let blob = blobs.get_mut(&name).with_context(|| format!("{name} is missing"))?;
        let plain = SerializedTensor::from_protobuf(blob, &limits)
            .and_then(|message| potluck_compression::deserialize(&message, &limits))
            .with_context(|| format!("{name} cannot be decoded"))?;
        *blob = Bytes::from(plain.bytes);
    }
    Ok(())
}
