//! Sans-I/O. Who may write what: validators sign records on their way out and check them on their way in.

use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// How a dialect expresses when a record ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Expiration {
    /// After this much time (native: no clock is compared). At a receiver it is what is left.
    In(Duration),
    /// At this Unix time in seconds (hivemind).
    At(f64),
}

/// One record as validators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The key before hashing (in hivemind's dialect, which sends only the hash, the 20 bytes of the hash).
    pub key: Bytes,
    /// The subkey, if there is one, in the form of the dialect (hivemind: msgpack).
    pub subkey: Option<Bytes>,
    /// The value, signed or not.
    pub value: Bytes,
    /// When it ends.
    pub expiration: Expiration,
}

/// A rule about records. hivemind's RSA and schema validators fit this trait as well as the native Ed25519 one.
pub trait RecordValidator: Send + Sync {
    /// The value to send in place of `record.value`: signed if the rule protects the record for us.
    fn sign(&self, record: &Record) -> Bytes {
        record.value.clone()
    }

    /// Whether the record may be stored or believed. Must not panic on any input.
    fn validate(&self, record: &Record) -> bool;

    /// The value without what [`RecordValidator::sign`] added.
    fn strip(&self, record: &Record) -> Bytes {
        record.value.clone()
    }

    /// The owner's counter in a valid signed record, or 0: the higher one wins.
    fn version(&self, _record: &Record) -> u64 {
        0
    }

    /// Some holder has this version of our record already; the next signature must go beyond it.
    fn observe(&self, _version: u64) {}

    /// Signing goes from the lowest priority to the highest; checking and stripping the other way.
    fn priority(&self) -> i32 {
        0
    }
}

/// Several validators as one.
#[derive(Clone, Default)]
pub struct Validators {
    /// Ascending priority.
    list: Vec<Arc<dyn RecordValidator>>,
}

impl Validators {
    /// Add a rule; equal priorities keep the order in which they were added.
    pub fn add(&mut self, validator: Arc<dyn RecordValidator>) {
        self.list.push(validator);
        self.list.sort_by_key(|validator| validator.priority());
    }
}

impl RecordValidator for Validators {
    fn sign(&self, record: &Record) -> Bytes {
        let mut record = record.clone();
        for validator in &self.list {
            record.value = validator.sign(&record);
        }
        record.value
    }

    fn validate(&self, record: &Record) -> bool {
        let mut record = record.clone();
        self.list.iter().rev().all(|validator| {
            let valid = validator.validate(&record);
            if valid {
                record.value = validator.strip(&record);
            }
            valid
        })
    }

    fn strip(&self, record: &Record) -> Bytes {
        let mut record = record.clone();
        for validator in self.list.iter().rev() {
            record.value = validator.strip(&record);
        }
        record.value
    }

    fn version(&self, record: &Record) -> u64 {
        let mut record = record.clone();
        let mut version = 0;
        for validator in self.list.iter().rev() {
            version = version.max(validator.version(&record));
            record.value = validator.strip(&record);
        }
        version
    }

    fn observe(&self, version: u64) {
        self.list.iter().for_each(|validator| validator.observe(version));
    }
}

impl std::fmt::Debug for Validators {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Validators({})", self.list.len())
    }
}
