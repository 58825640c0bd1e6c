//! What happened in a run, as the invariants need it.

use potluck_collab::{Averaged, Event, Lineage};
use potluck_net::{PeerFault, PeerId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// One thing that happened, in the order in which it did.
#[derive(Debug, Clone)]
pub enum Entry {
    /// A peer put this into a round.
    Contribution {
        /// Who.
        peer: PeerId,
        /// Which round.
        epoch: u64,
        /// Its weight.
        weight: f64,
        /// Its values.
        vector: Vec<f32>,
    },
    /// A peer got this out of a round.
    Round {
        /// Who.
        peer: PeerId,
        /// Which round.
        epoch: u64,
        /// What.
        averaged: Averaged,
        /// Who failed meanwhile.
        faults: Vec<PeerFault>,
    },
    /// A peer did not apply what a round of this epoch gave, or only in part: the epoch may be made again by the same peers.
    GaveUp {
        /// Who.
        peer: PeerId,
        /// Which epoch.
        epoch: u64,
    },
    /// A peer holds these parameters at the start of an epoch.
    Epoch {
        /// Who.
        peer: PeerId,
        /// With which history.
        lineage: Lineage,
        /// Hash of the parameters' bits.
        params: u64,
        /// The parameters.
        values: Vec<f32>,
        /// When.
        at: Instant,
    },
    /// A peer loaded the state of others.
    Loaded {
        /// Who.
        peer: PeerId,
        /// Its epoch before.
        from: u64,
        /// Its epoch after.
        to: u64,
    },
    /// A call of the session's interface returned.
    Call {
        /// Who called.
        peer: PeerId,
        /// What.
        call: &'static str,
        /// How long it took.
        took: Duration,
    },
    /// The harness did something to a peer.
    Injected {
        /// To whom.
        peer: PeerId,
        /// What, for people.
        what: String,
        /// When.
        at: Instant,
    },
    /// A peer's session began (again): its past does not bind it.
    Started {
        /// Who.
        peer: PeerId,
    },
    /// A session said so.
    Event {
        /// Whose session.
        peer: PeerId,
        /// What.
        event: Event,
        /// When.
        at: Instant,
    },
    /// A session could not start; the peer tries again.
    JoinFailed {
        /// Who.
        peer: PeerId,
        /// Why.
        reason: String,
    },
    /// Everything that was broken has been repaired.
    Healed {
        /// When.
        at: Instant,
    },
}

/// The list of entries of one run; cheap to clone.
#[derive(Clone, Default)]
pub struct Record {
    entries: Arc<Mutex<Vec<Entry>>>,
}

impl Record {
    /// Append an entry.
    pub fn push(&self, entry: Entry) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
    }

    /// Look at all entries.
    pub fn with<T>(&self, look: impl FnOnce(&[Entry]) -> T) -> T {
        look(&self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Take out what has been entered since the last call.
    pub fn take(&self) -> Vec<Entry> {
        std::mem::take(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The last known history and parameters of each peer.
    pub fn latest(&self) -> BTreeMap<PeerId, (Lineage, u64, Vec<f32>)> {
        self.with(|entries| {
            let mut latest = BTreeMap::new();
            for entry in entries {
                match entry {
                    Entry::Started { peer } => {
                        latest.remove(peer);
                    }
                    Entry::Epoch { peer, lineage, params, values, .. } => {
                        latest.insert(*peer, (*lineage, *params, values.clone()));
                    }
                    _ => {}
                }
            }
            latest
        })
    }

    /// The faults that peers found, with who found them.
    pub fn faults(&self) -> Vec<(PeerId, PeerFault)> {
        self.with(|entries| {
            let rounds = entries.iter().filter_map(|entry| match entry {
                Entry::Round { peer, faults, .. } => Some(faults.iter().map(|fault| (*peer, fault.clone()))),
                _ => None,
            });
            rounds.flatten().collect()
        })
    }
}

/// A hash of the bits of a vector (FNV-1a).
pub fn hash_of(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|value| value.to_bits().to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
