//! What a peer did wrong, as data. Faults are collected, counted and shown; they never abort an operation.

use crate::PeerId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// One peer failed us in one way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerFault {
    /// Who.
    pub peer: PeerId,
    /// How.
    pub kind: FaultKind,
    /// Where and with what figures: round, part, expected and found. For people; no decision reads it.
    pub context: String,
}

/// The ways in which a peer can fail us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FaultKind {
    /// No connection could be made, or it was refused.
    Unreachable,
    /// It was connected but did not answer before the deadline.
    Silent,
    /// The stream or the connection broke.
    Reset,
    /// It said something that the protocol does not allow.
    Malformed,
    /// Its contribution holds a NaN or an infinity.
    NotFinite,
    /// Its contribution is finite but out of all proportion to the group's.
    Implausible,
    /// It refused on purpose (wrong run, no invite, not here).
    Refused,
    /// It has too much to do, or we have asked for too much: later.
    Busy,
    /// Its bytes do not match the hash that was agreed on.
    Mismatch,
    /// It announced that it leaves.
    Left,
    /// Others did not get, or refused, some of what it should have sent.
    Missing,
}

impl PeerFault {
    /// A fault of `peer`, with the figures that explain it.
    pub fn new(peer: PeerId, kind: FaultKind, context: impl Into<String>) -> Self {
        Self { peer, kind, context: context.into() }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "unreachable",
            Self::Silent => "silent",
            Self::Reset => "reset",
            Self::Malformed => "malformed",
            Self::NotFinite => "not finite",
            Self::Implausible => "implausible",
            Self::Refused => "refused",
            Self::Busy => "busy",
            Self::Mismatch => "mismatch",
            Self::Left => "left",
            Self::Missing => "missing",
        })
    }
}

impl fmt::Display for PeerFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peer {}: {} ({})", self.peer.short(), self.kind, self.context)
    }
}

/// A result together with everything that peers did wrong on the way to it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "an outcome carries faults that somebody has to count"]
pub struct Outcome<T> {
    /// What was reached.
    pub value: T,
    /// Who failed us meanwhile, in the order in which it was noticed.
    pub faults: Vec<PeerFault>,
}

impl<T> Outcome<T> {
    /// A result without faults.
    pub fn clean(value: T) -> Self {
        Self { value, faults: Vec::new() }
    }

    /// Change the value, keep the faults.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Outcome<U> {
        Outcome { value: change(self.value), faults: self.faults }
    }
}
