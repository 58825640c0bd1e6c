//! Writes what `torch.save(state_dict)` writes: a zip archive of raw tensors and a pickle that names them. Only ever
//! written, never read: reading pickles is how machines get taken over.

use crate::tensors::Shape;
use anyhow::{Context, Result};
use bytes::Bytes;
use std::io::{Seek, Write};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// One tensor of a state dict.
pub(crate) struct Tensor<'a> {
    pub(crate) name: String,
    pub(crate) shape: &'a Shape,
    pub(crate) bytes: &'a Bytes,
}

/// Write the archive.
pub(crate) fn write(out: impl Write + Seek, tensors: &[Tensor<'_>]) -> Result<()> {
    let mut zip = ZipWriter::new(out);
    // Uncompressed and aligned, so that torch may map the file into memory.
    let plain = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(true)
        .with_alignment(64);
    let mut entry = |name: &str, bytes: &[u8]| -> Result<()> {
        zip.start_file(format!("archive/{name}"), plain)?;
        Ok(zip.write_all(bytes)?)
    };
    entry("data.pkl", &pickle(tensors)?)?;
    entry("byteorder", b"little")?;
    for (index, tensor) in tensors.iter().enumerate() {
        entry(&format!("data/{index}"), tensor.bytes)?;
    }
    entry("version", b"3\n")?;
    zip.finish()?.flush()?;
    Ok(())
}

fn pickle(tensors: &[Tensor<'_>]) -> Result<Vec<u8>> {
    let mut out = vec![0x80, 2];
    // An empty dict, and a mark before its items.
    out.extend(b"}(");
    for (index, tensor) in tensors.iter().enumerate() {
        let storage = storage_of(&tensor.shape.dtype)
            .with_context(|| format!("{}: torch's {} cannot be written", tensor.name, tensor.shape.dtype))?;
        let numel: usize = tensor.shape.shape.iter().product();
        text(&mut out, &tensor.name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{storage}\n").as_bytes());
        text(&mut out, &index.to_string());
        text(&mut out, "cpu");
        number(&mut out, numel);
        // A tuple, which names a storage; then where in it the tensor begins.
        out.extend(b"tQ");
        number(&mut out, 0);
        tuple(&mut out, tensor.shape.shape.iter().copied());
        tuple(&mut out, tensor.shape.strides().into_iter());
        // No gradient, no hooks.
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    Ok(out)
}

fn storage_of(dtype: &str) -> Option<&'static str> {
    Some(match dtype {
        "float64" => "DoubleStorage",
        "float32" => "FloatStorage",
        "float16" => "HalfStorage",
        "bfloat16" => "BFloat16Storage",
        "int64" => "LongStorage",
        "int32" => "IntStorage",
        "int16" => "ShortStorage",
        "int8" => "CharStorage",
        "uint8" => "ByteStorage",
        "bool" => "BoolStorage",
        _ => return None,
    })
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(text.as_bytes());
}

fn number(out: &mut Vec<u8>, number: usize) {
    match i32::try_from(number) {
        Ok(small) => {
            out.push(b'J');
            out.extend(small.to_le_bytes());
        }
        Err(_) => {
            // Nine bytes: the last keeps it positive.
            out.extend([0x8a, 9]);
            out.extend((number as u64).to_le_bytes());
            out.push(0);
        }
    }
}

fn tuple(out: &mut Vec<u8>, numbers: impl Iterator<Item = usize>) {
    out.push(b'(');
    numbers.for_each(|value| number(out, value));
    out.push(b't');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_those_of_a_contiguous_tensor() {
        let strides = |shape: &[usize]| Shape { dtype: "float32".into(), shape: shape.to_vec() }.strides();
        assert_eq!(strides(&[2, 3, 4]), [12, 4, 1]);
        assert_eq!(strides(&[]), Vec::<usize>::new());
    }

    #[test]
    fn the_archive_holds_the_bytes_and_a_pickle_that_names_them() {
        let shape = Shape { dtype: "float32".into(), shape: vec![1] };
        let bytes = Bytes::from_static(&[0, 0, 128, 63]);
        let mut out = std::io::Cursor::new(Vec::new());
        write(&mut out, &[Tensor { name: "layer.weight".into(), shape: &shape, bytes: &bytes }]).unwrap();
        let mut archive = zip::ZipArchive::new(out).unwrap();
        let mut read = |name: &str| {
            let mut found = Vec::new();
            std::io::Read::read_to_end(&mut archive.by_name(name).unwrap(), &mut found).unwrap();
            found
        };
        assert_eq!(read("archive/data/0"), &bytes[..]);
        let pickle = read("archive/data.pkl");
        assert!(pickle.windows(12).any(|window| window == b"layer.weight"));
        assert_eq!(pickle.last(), Some(&b'.'));
    }
}
