//! One state at the start of one epoch, and what leads from one state to the next: small facts and named buffers.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt;

/// A complete copy of the training state, pinned to an epoch. Cloning shares the buffers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The epoch that begins with this state.
    pub epoch: u64,
    /// Hash of the history that made it.
    pub lineage: [u8; 32],
    /// Small facts as text: scheduler, scaler, samples.
    pub meta: BTreeMap<String, String>,
    /// Named buffers: parameters, optimizer statistics.
    pub blobs: BTreeMap<String, Bytes>,
}

impl Snapshot {
    /// Bytes of all buffers together.
    pub fn bytes(&self) -> u64 {
        self.blobs.values().map(|blob| blob.len() as u64).sum()
    }
}

/// What led from one history to the next, such as the average of a round: far smaller than the state that came of it.
pub struct Sequel {
    /// Hash of the history that it goes on from.
    pub before: [u8; 32],
    /// Bytes that are held for it.
    pub bytes: u64,
    /// Makes what is served: its `lineage` is the history after it. Runs when somebody asks.
    pub make: Box<dyn Fn() -> Snapshot + Send + Sync>,
}

impl fmt::Debug for Sequel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequel").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
