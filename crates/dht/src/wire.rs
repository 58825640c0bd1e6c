//! Sans-I/O. The native messages: big-endian, every length limited before anything is allocated, durations only.
//!
//! ```text
//! request  := addresses? kind body          addresses? := 0 (client: not to be remembered) | 1 addresses
//!   ping   := 1
//!   find   := 2 id[20] want_value:u8
//!   store  := 3 handed_on:u8 count:u16 record*
//! record   := key:bytes16 subkey? value:bytes32 left_ms:u64       subkey? := 0 | 1 bytes16
//! answer   := addresses body
//!   refused:= 0 reason:u8
//!   pong   := 1
//!   found  := 2 entry contacts:u8 (peer:bytes8 addresses)*
//!   stored := 3 count:u16 (verdict:u8 version:u64)*
//! entry    := 0 | 1 value:bytes32 left_ms:u64 | 2 count:u16 (subkey:bytes16 value:bytes32 left_ms:u64)*
//! addresses:= count:u8 bytes8*
//! ```
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::config::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::entry::Verdict;
use crate::id::DhtId;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use potluck_net::PeerId;
use std::sync::Arc;
use std::time::Duration;

/// The name of the protocol.
pub const PROTOCOL: &str = "/potluck/dht/1";
/// Longest message.
pub const MESSAGE_BYTES_MAX: usize = 2 << 20;
/// Everything under one key, as it is counted by the storage: leaves room in a message for contacts.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Records in one store request: each may cost its receiver a check of a signature. Senders cut what is more.
pub const RECORDS_MAX: usize = 256;
/// Subkeys in one answer: all that the storage keeps under one key.
pub const SUBKEYS_MAX: usize = 8192;
/// Contacts in one answer.
pub const CONTACTS_MAX: usize = 64;
/// Addresses of one peer.
pub const ADDRESSES_MAX: usize = 8;
/// Longest address.
pub const ADDRESS_BYTES_MAX: usize = 255;

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// It ends too early.
    #[error("the message ends inside {field}")]
    Short {
        /// Where.
        field: &'static str,
    },
    /// A length or count exceeds its limit.
    #[error("{field}: {found} exceeds the limit of {max}")]
    TooLarge {
        /// Where.
        field: &'static str,
        /// What was declared.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// A value that is not defined.
    #[error("{field}: {found} is not defined")]
    Unknown {
        /// Where.
        field: &'static str,
        /// What was found.
        found: u8,
    },
    /// Not a peer id.
    #[error("a contact is no peer id: {0}")]
    PeerId(#[from] potluck_net::PeerIdError),
    /// Not text.
    #[error("an address is not UTF-8")]
    NotText,
    /// More bytes than the message needs.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
}

/// A record on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireRecord {
    /// The key as it is, not hashed.
    pub key: Bytes,
    /// The subkey, if any.
    pub subkey: Option<Bytes>,
    /// The value, with its signature.
    pub value: Bytes,
    /// How long it still lives.
    pub left: Duration,
}

/// What a node is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Are you there?
    Ping,
    /// Who is near this id, and what do you keep under it?
    Find {
        /// Which one.
        id: DhtId,
        /// Whether the value is wanted too.
        want_value: bool,
    },
    /// Keep these.
    Store {
        /// Copies from another holder, not news from the owner.
        handed_on: bool,
        /// Which ones.
        records: Vec<WireRecord>,
    },
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The sender's addresses, or `None` if it is a client that is not to be remembered.
    pub sender: Option<Arc<[String]>>,
    /// The question.
    pub ask: Ask,
}

/// Why a node does not answer a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The request was no message.
    Malformed,
    /// Too many requests from this peer.
    Rate,
}

/// A value with the time that it has left, by subkey.
pub type WireItem = (Bytes, Duration);

/// A node and its addresses.
pub type WireContact = (PeerId, Arc<[String]>);

/// What a node keeps under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WireEntry {
    /// A single value.
    Regular(WireItem),
    /// Values by subkey.
    Dictionary(Vec<(Bytes, WireItem)>),
}

/// The body of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// No.
    Refused(Refusal),
    /// Here.
    Pong,
    /// What is here and who is nearer.
    Found {
        /// What is kept here.
        entry: Option<WireEntry>,
        /// Nodes near the id with their addresses, nearest first.
        contacts: Vec<WireContact>,
    },
    /// One verdict per record.
    Stored(Vec<Verdict>),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The responder's addresses.
    pub addresses: Arc<[String]>,
    /// What it says.
    pub reply: Reply,
}

impl Request {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        match &self.sender {
            None => out.put_u8(0),
            Some(addresses) => {
                out.put_u8(1);
                put_addresses(&mut out, addresses);
            }
        }
        match &self.ask {
            Ask::Ping => out.put_u8(1),
            Ask::Find { id, want_value } => {
                out.put_u8(2);
                out.put_slice(id.as_bytes());
                out.put_u8(u8::from(*want_value));
            }
            Ask::Store { handed_on, records } => {
                out.put_u8(3);
                out.put_u8(u8::from(*handed_on));
                put_u16(&mut out, records.len());
                for record in records {
                    put16(&mut out, &record.key);
                    out.put_u8(u8::from(record.subkey.is_some()));
                    if let Some(subkey) = &record.subkey {
                        put16(&mut out, subkey);
                    }
                    put_item(&mut out, &record.value, record.left);
                }
            }
        }
        out.freeze()
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`WireError`] says which field breaks the rules.
    pub fn decode(input: Bytes) -> Result<Self, WireError> {
        let mut input = Reader::new(input)?;
        let sender = if input.flag("sender")? { Some(input.addresses()?) } else { None };
        let ask = match input.u8("kind")? {
            1 => Ask::Ping,
            2 => Ask::Find { id: input.id()?, want_value: input.flag("want_value")? },
            3 => {
                let handed_on = input.flag("handed_on")?;
                let records = input.list("records", RECORDS_MAX, |input| {
                    let key = input.bytes16("key")?;
                    let subkey = if input.flag("subkey")? { Some(input.bytes16("subkey")?) } else { None };
                    let (value, left) = input.item()?;
                    Ok(WireRecord { key, subkey, value, left })
                })?;
                Ask::Store { handed_on, records }
            }
            found => return Err(WireError::Unknown { field: "kind", found }),
        };
        input.end()?;
        Ok(Self { sender, ask })
    }
}

impl Answer {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        put_addresses(&mut out, &self.addresses);
        match &self.reply {
            Reply::Refused(reason) => {
                out.put_u8(0);
                out.put_u8(match reason {
                    Refusal::Malformed => 1,
                    Refusal::Rate => 2,
                });
            }
            Reply::Pong => out.put_u8(1),
            Reply::Found { entry, contacts } => {
                out.put_u8(2);
                put_entry(&mut out, entry.as_ref());
                let count = contacts.len().min(CONTACTS_MAX);
                out.put_u8(u8::try_from(count).unwrap_or(0));
                for (peer, addresses) in contacts.iter().take(count) {
                    put8(&mut out, peer.as_bytes());
                    put_addresses(&mut out, addresses);
                }
            }
            Reply::Stored(verdicts) => {
                out.put_u8(3);
                put_u16(&mut out, verdicts.len());
                for verdict in verdicts {
                    let (code, version) = code(*verdict);
                    out.put_u8(code);
                    out.put_u64(version);
                }
            }
        }
        out.freeze()
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`WireError`] says which field breaks the rules.
    pub fn decode(input: Bytes) -> Result<Self, WireError> {
        let mut input = Reader::new(input)?;
        let addresses = input.addresses()?;
        let reply = match input.u8("kind")? {
            0 => match input.u8("reason")? {
                1 => Reply::Refused(Refusal::Malformed),
                2 => Reply::Refused(Refusal::Rate),
                found => return Err(WireError::Unknown { field: "reason", found }),
            },
            1 => Reply::Pong,
            2 => Reply::Found { entry: input.entry()?, contacts: input.contacts()? },
            3 => Reply::Stored(input.list("verdicts", RECORDS_MAX, |input| {
                let code = input.u8("verdict")?;
                verdict(code, input.u64("version")?)
            })?),
            found => return Err(WireError::Unknown { field: "kind", found }),
        };
        input.end()?;
        Ok(Self { addresses, reply })
    }
}

fn code(verdict: Verdict) -> (u8, u64) {
    match verdict {
        Verdict::Accepted => (0, 0),
        Verdict::Same => (1, 0),
        Verdict::Older { version } => (2, version),
        Verdict::Expired => (3, 0),
        Verdict::Full => (4, 0),
        Verdict::Invalid => (5, 0),
    }
}

fn verdict(code: u8, version: u64) -> Result<Verdict, WireError> {
    Ok(match code {
        0 => Verdict::Accepted,
        1 => Verdict::Same,
        2 => Verdict::Older { version },
        3 => Verdict::Expired,
        4 => Verdict::Full,
        5 => Verdict::Invalid,
        found => return Err(WireError::Unknown { field: "verdict", found }),
    })
}

/// Writers cut nothing: callers keep the limits, and a message beyond them would be refused by the receiver.
fn put_u16(out: &mut BytesMut, value: usize) {
    out.put_u16(u16::try_from(value).unwrap_or(u16::MAX));
}

fn put8(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u8(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
    out.put_slice(bytes);
}

fn put16(out: &mut BytesMut, bytes: &[u8]) {
    put_u16(out, bytes.len());
    out.put_slice(bytes);
}

fn put_item(out: &mut BytesMut, value: &[u8], left: Duration) {
    out.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
    out.put_slice(value);
    out.put_u64(u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
}

fn put_addresses(out: &mut BytesMut, addresses: &[String]) {
    let fit = addresses.iter().filter(|address| address.len() <= ADDRESS_BYTES_MAX).take(ADDRESSES_MAX);
    out.put_u8(u8::try_from(fit.clone().count()).unwrap_or(0));
    fit.for_each(|address| put8(out, address.as_bytes()));
}

fn put_entry(out: &mut BytesMut, entry: Option<&WireEntry>) {
    match entry {
        None => out.put_u8(0),
        Some(WireEntry::Regular((value, left))) => {
            out.put_u8(1);
            put_item(out, value, *left);
        }
        Some(WireEntry::Dictionary(items)) => {
            out.put_u8(2);
            put_u16(out, items.len());
            for (subkey, (value, left)) in items {
                put16(out, subkey);
                put_item(out, value, *left);
            }
        }
    }
}

/// Reads with limits; every slice shares the message's memory.
struct Reader {
    input: Bytes,
}

impl Reader {
    fn new(input: Bytes) -> Result<Self, WireError> {
        limit("message", input.len(), MESSAGE_BYTES_MAX)?;
        Ok(Self { input })
    }

    fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.input.try_get_u8().map_err(|_| WireError::Short { field })
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.input.try_get_u64().map_err(|_| WireError::Short { field })
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(WireError::Unknown { field, found }),
        }
    }

    fn id(&mut self) -> Result<DhtId, WireError> {
        let mut id = [0; crate::id::ID_BYTES];
        self.input.try_copy_to_slice(&mut id).map_err(|_| WireError::Short { field: "id" })?;
        Ok(DhtId::from_bytes(id))
    }

    fn take(&mut self, field: &'static str, len: usize, max: usize) -> Result<Bytes, WireError> {
        limit(field, len, max)?;
        if len > self.input.len() {
            return Err(WireError::Short { field });
        }
        Ok(self.input.split_to(len))
    }

    fn bytes8(&mut self, field: &'static str) -> Result<Bytes, WireError> {
        let len = usize::from(self.u8(field)?);
        self.take(field, len, usize::from(u8::MAX))
    }

    fn bytes16(&mut self, field: &'static str) -> Result<Bytes, WireError> {
        let len = self.input.try_get_u16().map_err(|_| WireError::Short { field })?;
        self.take(field, usize::from(len), KEY_BYTES_MAX)
    }

    fn item(&mut self) -> Result<WireItem, WireError> {
        let len = self.input.try_get_u32().map_err(|_| WireError::Short { field: "value" })?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let value = self.take("value", len, VALUE_BYTES_MAX)?;
        Ok((value, Duration::from_millis(self.u64("left_ms")?)))
    }

    fn list<T>(
        &mut self,
        field: &'static str,
        max: usize,
        mut element: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.input.try_get_u16().map_err(|_| WireError::Short { field })?;
        limit(field, usize::from(count), max)?;
        // No capacity is reserved on a stranger's word; each element costs it bytes.
        (0..count).map(|_| element(self)).collect()
    }

    fn addresses(&mut self) -> Result<Arc<[String]>, WireError> {
        let count = self.u8("addresses")?;
        limit("addresses", usize::from(count), ADDRESSES_MAX)?;
        (0..count)
            .map(|_| {
                let text = self.bytes8("address")?;
                std::str::from_utf8(&text).map(str::to_owned).map_err(|_| WireError::NotText)
            })
            .collect()
    }

    fn contacts(&mut self) -> Result<Vec<WireContact>, WireError> {
        let count = self.u8("contacts")?;
        limit("contacts", usize::from(count), CONTACTS_MAX)?;
        (0..count)
            .map(|_| {
                let peer = PeerId::from_bytes(&self.bytes8("contact")?)?;
                Ok((peer, self.addresses()?))
            })
            .collect()
    }

    fn entry(&mut self) -> Result<Option<WireEntry>, WireError> {
        Ok(match self.u8("entry")? {
            0 => None,
            1 => Some(WireEntry::Regular(self.item()?)),
            2 => Some(WireEntry::Dictionary(self.list("subkeys", SUBKEYS_MAX, |input| {
                let subkey = input.bytes16("subkey")?;
                Ok((subkey, input.item()?))
            })?)),
            found => return Err(WireError::Unknown { field: "entry", found }),
        })
    }

    fn end(&self) -> Result<(), WireError> {
        if self.input.is_empty() { Ok(()) } else { Err(WireError::Trailing(self.input.len())) }
    }
}

fn limit(field: &'static str, found: usize, max: usize) -> Result<(), WireError> {
    if found > max { Err(WireError::TooLarge { field, found, max }) } else { Ok(()) }
}
