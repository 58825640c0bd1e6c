//! What happened, in order, as a hash over everything and the last lines in clear.

use potluck_net::{PeerId, Protocol};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Lines that are kept in clear; the hash covers all of them.
const LINES_MAX: usize = 1 << 16;
/// Bytes that are hashed at a time: blake3 takes many blocks side by side.
const HASHED_AT_ONCE: usize = 16 << 10;

/// A copy of the trace so far. Two runs with the same seed and program have equal traces, in any process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Blake3 over every line since the beginning, as hexadecimal text.
    pub hash: String,
    /// Number of lines since the beginning.
    pub total: u64,
    /// The last lines (at most 65,536): `seconds from -> to protocol bytes verdict`.
    pub lines: Vec<String>,
}

/// What tells traces apart, without their lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceName {
    /// As of [`Trace`].
    pub hash: String,
    /// As of [`Trace`].
    pub total: u64,
}

/// What is known about one frame or control message.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) at: Duration,
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) protocol: Option<Protocol>,
    pub(crate) bytes: u64,
    pub(crate) what: What,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum What {
    Sent,
    Delayed,
    Stalled,
    ResetByRule,
    Delivered,
    Finished,
    Reset,
    Opened,
    Busy,
    Unknown,
    Refused,
    Added,
    Crashed,
    Vanished,
    Restarted,
    Frozen,
    Thawed,
    TimedOut,
    GivenUp,
}

#[derive(Default)]
pub(crate) struct Log {
    hasher: blake3::Hasher,
    /// What it has not seen yet.
    unhashed: Vec<u8>,
    entries: VecDeque<Entry>,
    total: u64,
}

impl Log {
    pub(crate) fn push(&mut self, entry: Entry) {
        let mut head = [0u8; 25];
        head[..8].copy_from_slice(&(entry.at.as_nanos() as u64).to_le_bytes());
        head[8..12].copy_from_slice(&entry.from.to_le_bytes());
        head[12..16].copy_from_slice(&entry.to.to_le_bytes());
        head[16..24].copy_from_slice(&entry.bytes.to_le_bytes());
        head[24] = entry.what as u8;
        self.unhashed.extend_from_slice(&head);
        if let Some(protocol) = &entry.protocol {
            self.unhashed.extend_from_slice(protocol.as_str().as_bytes());
        }
        if self.unhashed.len() >= HASHED_AT_ONCE {
            self.hasher.update(&self.unhashed);
            self.unhashed.clear();
        }
        if self.entries.len() == LINES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
        self.total += 1;
    }

    pub(crate) fn name(&self) -> TraceName {
        let hash = self.hasher.clone().update(&self.unhashed).finalize();
        TraceName { hash: hash.to_hex().to_string(), total: self.total }
    }

    pub(crate) fn snapshot(&self, name: impl Fn(u32) -> PeerId) -> Trace {
        // Writing an id out costs more than all the rest of a line.
        let mut short = BTreeMap::new();
        for entry in &self.entries {
            for node in [entry.from, entry.to] {
                short.entry(node).or_insert_with(|| name(node).short());
            }
        }
        let line = |entry: &Entry| {
            format!(
                "{:.6} {} -> {} {} {} {:?}",
                entry.at.as_secs_f64(),
                short[&entry.from],
                short[&entry.to],
                entry.protocol.as_ref().map_or("-", Protocol::as_str),
                entry.bytes,
                entry.what,
            )
        };
        let TraceName { hash, total } = self.name();
        Trace { hash, total, lines: self.entries.iter().map(line).collect() }
    }
}
