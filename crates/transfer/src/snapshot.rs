//! One state at the start of one epoch: small facts and named buffers.

use bytes::Bytes;
use std::collections::BTreeMap;

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
