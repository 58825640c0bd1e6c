//! The protobuf form of [`SerializedTensor`]: hivemind's `runtime.proto` `Tensor`, by hand, because it is six fields
//! and the limits belong between reading a length and believing it.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::{DType, DecodeError, Limits, Scheme, SerializedTensor};

impl SerializedTensor {
    /// The protobuf message. Fields at their default are left out, as proto3 does.
    #[must_use]
    pub fn to_protobuf(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.buffer.len().saturating_add(64));
        put_bytes(&mut out, 1, &self.buffer);
        let mut size = Vec::new();
        self.size.iter().for_each(|dim| put_varint(&mut size, u64::from(*dim)));
        put_bytes(&mut out, 2, &size);
        put_number(&mut out, 3, u64::from(self.requires_grad));
        put_bytes(&mut out, 4, self.dtype.name().as_bytes());
        put_number(&mut out, 5, u64::from(self.compression.wire_id()));
        put_number(&mut out, 6, u64::from(self.chunks));
        out
    }

    /// Read a protobuf message of a stranger. Unknown fields are skipped; of a repeated field the last one counts.
    ///
    /// # Errors
    /// The message is malformed, or declares more than `limits` allow.
    pub fn from_protobuf(message: &[u8], limits: &Limits) -> Result<Self, DecodeError> {
        let mut input = Input(message);
        let mut buffer: &[u8] = &[];
        let mut size = Vec::new();
        let mut dtype = "";
        let (mut requires_grad, mut compression, mut chunks) = (0, 0, 0);
        while !input.0.is_empty() {
            match input.tag()? {
                (1, 2) => buffer = input.bytes("buffer", limits.buffer_bytes_max)?,
                (2, 2) => {
                    // Five bytes is the longest varint of a 32-bit number.
                    let packed_max = limits.dimensions_max.saturating_mul(5);
                    let mut packed = Input(input.bytes("size", packed_max)?);
                    while !packed.0.is_empty() {
                        push_dimension(&mut size, packed.varint("size")?, limits)?;
                    }
                }
                (2, 0) => push_dimension(&mut size, input.varint("size")?, limits)?,
                (3, 0) => requires_grad = input.varint("requires_grad")?,
                (4, 2) => {
                    dtype = std::str::from_utf8(input.bytes("dtype", 64)?)
                        .map_err(|_| DecodeError::Malformed { field: "dtype" })?;
                }
                (5, 0) => compression = input.varint("compression")?,
                (6, 0) => chunks = input.varint("chunks")?,
                (_, kind) => input.skip(kind)?,
            }
        }
        let scheme = u8::try_from(compression).ok().and_then(Scheme::from_wire_id);
        Ok(Self {
            buffer: buffer.to_vec(),
            size,
            requires_grad: requires_grad != 0,
            dtype: DType::from_name(dtype).ok_or_else(|| unknown("dtype", dtype))?,
            compression: scheme.ok_or_else(|| unknown("compression", &compression.to_string()))?,
            chunks: u32::try_from(chunks).map_err(|_| DecodeError::Malformed { field: "chunks" })?,
        })
    }
}

fn unknown(field: &'static str, found: &str) -> DecodeError {
    DecodeError::Unknown { field, found: found.chars().take(32).collect() }
}

fn push_dimension(size: &mut Vec<u32>, dim: u64, limits: &Limits) -> Result<(), DecodeError> {
    if size.len() >= limits.dimensions_max {
        let limit = limits.dimensions_max as u64;
        return Err(DecodeError::Limit { field: "size (dimensions)", limit, found: limit.saturating_add(1) });
    }
    size.push(u32::try_from(dim).map_err(|_| DecodeError::Malformed { field: "size" })?);
    Ok(())
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_number(out: &mut Vec<u8>, field: u8, value: u64) {
    if value != 0 {
        put_varint(out, u64::from(field) << 3);
        put_varint(out, value);
    }
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_varint(out, u64::from(field) << 3 | 2);
        put_varint(out, bytes.len() as u64);
        out.extend_from_slice(bytes);
    }
}

/// The rest of a message.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn varint(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(DecodeError::Malformed { field })?;
            self.0 = rest;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit.
            if shift == 63 && bits > 1 {
                return Err(DecodeError::Malformed { field });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(DecodeError::Malformed { field })
    }

    /// Field number and wire type.
    fn tag(&mut self) -> Result<(u64, u8), DecodeError> {
        let tag = self.varint("tag")?;
        let kind = (tag & 7) as u8;
        match tag >> 3 {
            0 => Err(DecodeError::Malformed { field: "tag" }),
            number => Ok((number, kind)),
        }
    }

    fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(DecodeError::Malformed { field })?;
        self.0 = rest;
        Ok(taken)
    }

    fn bytes(&mut self, field: &'static str, limit: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.varint(field)?;
        match usize::try_from(length) {
            Ok(count) if count <= limit => self.take(count, field),
            _ => Err(DecodeError::Limit { field, limit: limit as u64, found: length }),
        }
    }

    fn skip(&mut self, kind: u8) -> Result<(), DecodeError> {
        const FIELD: &str = "unknown field";
        match kind {
            0 => self.varint(FIELD).map(|_| ()),
            1 => self.take(8, FIELD).map(|_| ()),
            2 => self.bytes(FIELD, self.0.len()).map(|_| ()),
            5 => self.take(4, FIELD).map(|_| ()),
            _ => Err(DecodeError::Malformed { field: FIELD }),
        }
    }
}
