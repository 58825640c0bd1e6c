//! What a session shows: plain data, the one source for dashboards, Prometheus, JSON lines and Python.

use crate::{Lineage, Rates};
use potluck_net::{Path, PeerFault, PeerId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A session at one moment.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Status {
    /// The run.
    pub run_id: String,
    /// This peer, as text.
    pub peer: String,
    /// Shared optimizer steps so far.
    pub epoch: u64,
    /// Samples of this epoch over all live peers.
    pub samples: u64,
    /// Samples that end the epoch.
    pub target_batch_size: u64,
    /// Speed of all live peers together.
    pub samples_per_second: f32,
    /// Seconds until the epoch is full; `None` while nobody computes.
    pub eta_seconds: Option<f32>,
    /// Everybody who is alive, this peer first.
    pub peers: Vec<PeerStatus>,
    /// Those who gave samples and are here no more, as far as this peer has seen them; whoever gave most first.
    #[serde(default)]
    pub left: Vec<LeftPeer>,
    /// Nobody else is here.
    pub alone: bool,
    /// The last round, if there was one; one in which there was nothing to average only if there was no other.
    pub last_round: Option<RoundStatus>,
    /// Rounds with an average.
    pub rounds: u64,
    /// Of these: all members had the same state already, and nothing was sent.
    #[serde(default)]
    pub rounds_unchanged: u64,
    /// Rounds that ended without one while others were here.
    pub rounds_failed: u64,
    /// Faults of peers by kind.
    pub faults: BTreeMap<String, u64>,
    /// The history of the parameters.
    pub lineage: Option<Lineage>,
    /// Bytes since the start.
    pub bytes_sent: u64,
    /// Bytes since the start.
    pub bytes_received: u64,
    /// Bytes as f32 per byte on the wire, over all rounds; 1 without compression.
    pub compression_ratio: f32,
    /// Bytes of memory by purpose.
    pub memory: BTreeMap<String, u64>,
    /// The last loss that this peer's training program reported.
    pub loss: Option<f32>,
}

/// One live peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Who.
    pub peer: PeerId,
    /// Whether it is this peer.
    pub is_me: bool,
    /// The epoch it works on.
    pub epoch: u64,
    /// Its samples of that epoch.
    pub samples: u64,
    /// Its measured speed.
    pub samples_per_second: f32,
    /// How we are connected.
    pub path: Option<Path>,
    /// How fast its link is.
    #[serde(flatten)]
    pub rates: Rates,
    /// Its part of this epoch's samples, 0 to 1.
    pub share: f32,
    /// Samples that it put into finished rounds: since it joined, and of its sessions before what this peer has seen.
    pub contributed: u64,
    /// It computes no gradients.
    pub auxiliary: bool,
    /// It only dials out.
    #[serde(default)]
    pub client: bool,
    /// The last loss that it reported.
    pub loss: Option<f32>,
}

/// One peer that has left or died.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftPeer {
    /// Who.
    pub peer: PeerId,
    /// The epoch it worked on when it was seen last.
    pub epoch: u64,
    /// Samples that it put into finished rounds.
    pub contributed: u64,
}

/// One finished round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundStatus {
    /// Which epoch it ended.
    pub epoch: u64,
    /// What was averaged.
    pub channel: crate::Channel,
    /// Who took part, in group order.
    pub members: Vec<PeerId>,
    /// Samples that went into it.
    pub weight_total: f64,
    /// All members had the same state already: nothing was sent.
    #[serde(default)]
    pub unchanged: bool,
    /// What it cost this peer.
    #[serde(flatten)]
    pub stats: crate::RoundStats,
    /// Who failed meanwhile.
    pub faults: Vec<PeerFault>,
}
