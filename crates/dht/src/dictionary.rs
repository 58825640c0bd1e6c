//! Sans-I/O. hivemind's `DictionaryDHTValue` as it travels: msgpack extension 0x50.

use crate::msgpack::{MsgpackError, Value, put_ext};
use bytes::Bytes;

/// Its extension code.
const EXT_DICTIONARY: i8 = 0x50;

/// Values by subkey, each with its own expiry, in hivemind's order of insertion.
#[derive(Debug, Clone, PartialEq)]
pub struct Dictionary {
    /// How many subkeys it may hold; infinite in practice.
    pub maxsize: f64,
    /// The latest expiry, in Unix seconds.
    pub latest_expiration: f64,
    /// Subkey, value bytes, expiry in Unix seconds.
    pub entries: Vec<(Value, Bytes, f64)>,
}

/// Why bytes are no dictionary.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DictionaryError {
    /// No msgpack at all.
    #[error(transparent)]
    Msgpack(#[from] MsgpackError),
    /// Something else.
    #[error("not a DictionaryDHTValue: {0}")]
    Shape(&'static str),
}

impl Dictionary {
    /// To bytes.
    ///
    /// # Errors
    /// [`MsgpackError`] if a subkey has no bytes.
    pub fn encode(&self) -> Result<Vec<u8>, MsgpackError> {
        let entry = |(subkey, value, expires): &(Value, Bytes, f64)| {
            Value::List(vec![subkey.clone(), Value::Bin(value.clone()), Value::Float(*expires)])
        };
        let entries = Value::List(self.entries.iter().map(entry).collect());
        let body =
            Value::List(vec![Value::Float(self.maxsize), Value::Float(self.latest_expiration), entries]);
        let mut out = Vec::new();
        put_ext(&mut out, EXT_DICTIONARY, &body.encode()?)?;
        Ok(out)
    }

    /// From exactly these bytes.
    ///
    /// # Errors
    /// [`DictionaryError`] says what is wrong with them.
    pub fn decode(input: &[u8]) -> Result<Self, DictionaryError> {
        let Value::Ext(EXT_DICTIONARY, body) = Value::decode(input)? else {
            return Err(DictionaryError::Shape("expected extension 0x50"));
        };
        let Value::List(fields) = Value::decode(&body)? else {
            return Err(DictionaryError::Shape("expected a list"));
        };
        let [maxsize, Value::Float(latest_expiration), Value::List(entries)] = <[Value; 3]>::try_from(fields)
            .map_err(|_| DictionaryError::Shape("expected [maxsize, latest expiration, entries]"))?
        else {
            return Err(DictionaryError::Shape("expected [number, float, list]"));
        };
        let maxsize = match maxsize {
            Value::Float(maxsize) => maxsize,
            Value::Int(maxsize) => maxsize as f64,
            _ => return Err(DictionaryError::Shape("maxsize is no number")),
        };
        let entry = |entry: Value| match entry {
            Value::List(parts) => match <[Value; 3]>::try_from(parts) {
                Ok([subkey, Value::Bin(value), Value::Float(expires)]) => Ok((subkey, value, expires)),
                _ => Err(DictionaryError::Shape("expected [subkey, bytes, float] entries")),
            },
            _ => Err(DictionaryError::Shape("an entry is no list")),
        };
        let entries = entries.into_iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Self { maxsize, latest_expiration, entries })
    }
}
