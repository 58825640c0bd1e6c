//! Sans-I/O. hivemind's msgpack dialect: tuples are extension 0x40, floats are always 64 bits, integers shortest.

use bytes::Bytes;
use rmp::Marker;
use rmp::encode;

/// Extension code of a Python tuple.
const EXT_TUPLE: i8 = 0x40;
/// Deepest nesting that is read; each level costs the reader stack.
const DEPTH_MAX: usize = 32;

/// A value of the dialect.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// None.
    Nil,
    /// True or False.
    Bool(bool),
    /// An integer of 64 bits, signed or not.
    Int(i128),
    /// A float.
    Float(f64),
    /// Text.
    Str(String),
    /// bytes.
    Bin(Bytes),
    /// A list.
    List(Vec<Value>),
    /// A tuple: something else than a list, on purpose.
    Tuple(Vec<Value>),
    /// A dict in insertion order.
    Map(Vec<(Value, Value)>),
    /// Any other extension, undecoded.
    Ext(i8, Bytes),
}

/// Why bytes are no value, or a value has no bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsgpackError {
    /// It ends too early, or declares more than it holds.
    #[error("msgpack ends inside a value")]
    Short,
    /// A byte that starts nothing.
    #[error("msgpack marker {0:#04x} is not used")]
    Marker(u8),
    /// Text that is not UTF-8.
    #[error("msgpack text is not UTF-8")]
    NotText,
    /// Nested too deeply.
    #[error("msgpack nested deeper than {DEPTH_MAX}")]
    TooDeep,
    /// Bytes after the value.
    #[error("{0} bytes follow the msgpack value")]
    Trailing(usize),
    /// A tuple extension that holds no array.
    #[error("a msgpack tuple holds no array")]
    Tuple,
    /// An integer beyond 64 bits.
    #[error("the integer {0} does not fit msgpack")]
    Range(i128),
    /// Longer than 4 GiB.
    #[error("a length exceeds 32 bits")]
    Length,
}

impl Value {
    /// To bytes.
    ///
    /// # Errors
    /// [`MsgpackError`] for integers beyond 64 bits and lengths beyond 32.
    pub fn encode(&self) -> Result<Vec<u8>, MsgpackError> {
        let mut out = Vec::new();
        self.put(&mut out)?;
        Ok(out)
    }

    fn put(&self, out: &mut Vec<u8>) -> Result<(), MsgpackError> {
        // Writing into a Vec cannot fail.
        const FITS: &str = "a Vec takes every write";
        match self {
            Self::Nil => encode::write_nil(out).expect(FITS),
            Self::Bool(value) => encode::write_bool(out, *value).expect(FITS),
            Self::Int(value) => {
                if let Ok(value) = u64::try_from(*value) {
                    encode::write_uint(out, value).expect(FITS);
                } else {
                    let value = i64::try_from(*value).map_err(|_| MsgpackError::Range(*value))?;
                    encode::write_sint(out, value).expect(FITS);
                }
            }
            Self::Float(value) => encode::write_f64(out, *value).expect(FITS),
            Self::Str(text) => {
                len(text.len())?;
                encode::write_str(out, text).expect(FITS);
            }
            Self::Bin(bytes) => {
                len(bytes.len())?;
                encode::write_bin(out, bytes).expect(FITS);
            }
            Self::List(items) => put_list(out, items)?,
            Self::Tuple(items) => {
                let mut inner = Vec::new();
                put_list(&mut inner, items)?;
                put_ext(out, EXT_TUPLE, &inner)?;
            }
            Self::Map(items) => {
                encode::write_map_len(out, len(items.len())?).expect(FITS);
                for (key, value) in items {
                    key.put(out)?;
                    value.put(out)?;
                }
            }
            Self::Ext(code, bytes) => put_ext(out, *code, bytes)?,
        }
        Ok(())
    }

    /// From exactly these bytes.
    ///
    /// # Errors
    /// [`MsgpackError`] if they are not one value.
    pub fn decode(input: &[u8]) -> Result<Self, MsgpackError> {
        let mut rest = input;
        let value = Self::take(&mut rest, 0)?;
        if rest.is_empty() { Ok(value) } else { Err(MsgpackError::Trailing(rest.len())) }
    }

    /// Read one value off the front of `input`.
    ///
    /// # Errors
    /// [`MsgpackError`] if there is none.
    pub fn take_front(input: &mut &[u8]) -> Result<Self, MsgpackError> {
        Self::take(input, 0)
    }

    fn take(input: &mut &[u8], depth: usize) -> Result<Self, MsgpackError> {
        if depth > DEPTH_MAX {
            return Err(MsgpackError::TooDeep);
        }
        let marker = Marker::from_u8(take_bytes(input, 1)?[0]);
        Ok(match marker {
            Marker::Null => Self::Nil,
            Marker::True => Self::Bool(true),
            Marker::False => Self::Bool(false),
            Marker::FixPos(value) => Self::Int(value.into()),
            Marker::FixNeg(value) => Self::Int(value.into()),
            Marker::U8 => Self::Int(take_uint(input, 1)?.into()),
            Marker::U16 => Self::Int(take_uint(input, 2)?.into()),
            Marker::U32 => Self::Int(take_uint(input, 4)?.into()),
            Marker::U64 => Self::Int(take_uint(input, 8)?.into()),
            Marker::I8 => Self::Int(i128::from(take_uint(input, 1)? as i8)),
            Marker::I16 => Self::Int(i128::from(take_uint(input, 2)? as i16)),
            Marker::I32 => Self::Int(i128::from(take_uint(input, 4)? as i32)),
            Marker::I64 => Self::Int(i128::from(take_uint(input, 8)? as i64)),
            Marker::F32 => Self::Float(f32::from_bits(take_uint(input, 4)? as u32).into()),
            Marker::F64 => Self::Float(f64::from_bits(take_uint(input, 8)?)),
            Marker::FixStr(len) => take_str(input, len.into())?,
            Marker::Str8 => take_long(input, 1, take_str)?,
            Marker::Str16 => take_long(input, 2, take_str)?,
            Marker::Str32 => take_long(input, 4, take_str)?,
            Marker::Bin8 => take_long(input, 1, take_bin)?,
            Marker::Bin16 => take_long(input, 2, take_bin)?,
            Marker::Bin32 => take_long(input, 4, take_bin)?,
            Marker::FixArray(len) => Self::List(take_list(input, len.into(), depth)?),
            Marker::Array16 => {
                take_long(input, 2, |input, len| take_list(input, len, depth).map(Self::List))?
            }
            Marker::Array32 => {
                take_long(input, 4, |input, len| take_list(input, len, depth).map(Self::List))?
            }
            Marker::FixMap(len) => take_map(input, len.into(), depth)?,
            Marker::Map16 => take_long(input, 2, |input, len| take_map(input, len, depth))?,
            Marker::Map32 => take_long(input, 4, |input, len| take_map(input, len, depth))?,
            Marker::FixExt1 => take_ext(input, 1, depth)?,
            Marker::FixExt2 => take_ext(input, 2, depth)?,
            Marker::FixExt4 => take_ext(input, 4, depth)?,
            Marker::FixExt8 => take_ext(input, 8, depth)?,
            Marker::FixExt16 => take_ext(input, 16, depth)?,
            Marker::Ext8 => take_long(input, 1, |input, len| take_ext(input, len, depth))?,
            Marker::Ext16 => take_long(input, 2, |input, len| take_ext(input, len, depth))?,
            Marker::Ext32 => take_long(input, 4, |input, len| take_ext(input, len, depth))?,
            Marker::Reserved => return Err(MsgpackError::Marker(marker.to_u8())),
        })
    }
}

fn len(len: usize) -> Result<u32, MsgpackError> {
    u32::try_from(len).map_err(|_| MsgpackError::Length)
}

fn put_list(out: &mut Vec<u8>, items: &[Value]) -> Result<(), MsgpackError> {
    encode::write_array_len(out, len(items.len())?).expect("a Vec takes every write");
    items.iter().try_for_each(|item| item.put(out))
}

pub(crate) fn put_ext(out: &mut Vec<u8>, code: i8, bytes: &[u8]) -> Result<(), MsgpackError> {
    encode::write_ext_meta(out, len(bytes.len())?, code).expect("a Vec takes every write");
    out.extend_from_slice(bytes);
    Ok(())
}

fn take_bytes<'a>(input: &mut &'a [u8], len: usize) -> Result<&'a [u8], MsgpackError> {
    let (taken, rest) = input.split_at_checked(len).ok_or(MsgpackError::Short)?;
    *input = rest;
    Ok(taken)
}

fn take_uint(input: &mut &[u8], len: usize) -> Result<u64, MsgpackError> {
    Ok(take_bytes(input, len)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn take_long<T>(
    input: &mut &[u8],
    width: usize,
    body: impl FnOnce(&mut &[u8], usize) -> Result<T, MsgpackError>,
) -> Result<T, MsgpackError> {
    let len = usize::try_from(take_uint(input, width)?).map_err(|_| MsgpackError::Length)?;
    body(input, len)
}

fn take_str(input: &mut &[u8], len: usize) -> Result<Value, MsgpackError> {
    let text = std::str::from_utf8(take_bytes(input, len)?).map_err(|_| MsgpackError::NotText)?;
    Ok(Value::Str(text.to_owned()))
}

fn take_bin(input: &mut &[u8], len: usize) -> Result<Value, MsgpackError> {
    Ok(Value::Bin(Bytes::copy_from_slice(take_bytes(input, len)?)))
}

fn take_list(input: &mut &[u8], len: usize, depth: usize) -> Result<Vec<Value>, MsgpackError> {
    // Each element needs a byte at least, so that a declared length cannot make us reserve memory for nothing.
    if len > input.len() {
        return Err(MsgpackError::Short);
    }
    (0..len).map(|_| Value::take(input, depth + 1)).collect()
}

fn take_map(input: &mut &[u8], len: usize, depth: usize) -> Result<Value, MsgpackError> {
    if len > input.len() / 2 {
        return Err(MsgpackError::Short);
    }
    let items = (0..len).map(|_| Ok((Value::take(input, depth + 1)?, Value::take(input, depth + 1)?)));
    items.collect::<Result<_, _>>().map(Value::Map)
}

fn take_ext(input: &mut &[u8], len: usize, depth: usize) -> Result<Value, MsgpackError> {
    let code = take_bytes(input, 1)?[0] as i8;
    let mut body = take_bytes(input, len)?;
    if code != EXT_TUPLE {
        return Ok(Value::Ext(code, Bytes::copy_from_slice(body)));
    }
    match Value::take(&mut body, depth + 1)? {
        Value::List(items) if body.is_empty() => Ok(Value::Tuple(items)),
        _ => Err(MsgpackError::Tuple),
    }
}
