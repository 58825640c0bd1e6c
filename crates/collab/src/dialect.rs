//! What a session needs of a protocol: who is here, a round, the state of others. The native protocol and the
//! hivemind dialect each implement it, and so the same session runs in both kinds of run.

use crate::Purpose;
use bytes::Bytes;
use futures::future::BoxFuture;
pub use potluck_averaging::Record;
use potluck_net::{Outcome, Path, PeerFault, PeerId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Which vector a round averages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// Gradients, once per epoch.
    Gradients,
    /// Parameters (as differences to the last agreed ones).
    State,
}

/// What this peer tells the others about its progress.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The epoch it works on.
    pub epoch: u64,
    /// Samples that it has for this epoch.
    pub samples: u64,
    /// Its speed, measured.
    pub samples_per_second: f32,
    /// The epoch is full: the others should hear it now and not with the next heartbeat.
    pub urgent: bool,
    /// Bytes that only sessions read.
    pub note: Bytes,
}

/// What is known about another live peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerView {
    /// Who.
    pub peer: PeerId,
    /// The epoch it works on.
    pub epoch: u64,
    /// Samples that it has for this epoch.
    pub samples: u64,
    /// Its measured speed.
    pub samples_per_second: f32,
    /// How we are connected, if we are.
    pub path: Option<Path>,
    /// How fast its link is.
    pub rates: Rates,
    /// Whether it computes no gradients.
    pub auxiliary: bool,
    /// Whether it only dials out.
    pub client: bool,
    /// The bytes of its last report.
    pub note: Bytes,
}

/// How fast the link of a peer is, as it measured itself in rounds; `None` while it had nothing to measure by.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates {
    /// What its uplink carries when there is more to send, in bytes per second.
    pub up_bytes_per_second: Option<f32>,
    /// The most that it has received, in bytes per second: its downlink is at least as fast.
    pub down_bytes_per_second: Option<f32>,
}

impl Rates {
    /// From measurements in which 0 means none. What others tell may be no number at all.
    pub fn measured(up: f64, down: f64) -> Self {
        let known = |rate: f64| Some(rate as f32).filter(|rate| rate.is_finite() && *rate > 0.0);
        Self { up_bytes_per_second: known(up), down_bytes_per_second: known(down) }
    }
}

/// What this peer puts into a round.
#[derive(Debug)]
pub struct RoundCall {
    /// The epoch whose round this is.
    pub epoch: u64,
    /// The hash of this peer's history: only peers with the same one average together.
    pub lineage: [u8; 32],
    /// This peer's values.
    pub vector: Vec<f32>,
    /// How much they count.
    pub weight: f64,
    /// At most this long, if it must be bounded by hand.
    pub timeout: Option<Duration>,
    /// Handed to all members, at most [`Terms::GATHER_BYTES_MAX`] bytes.
    pub gather: Bytes,
}

/// What may be said about one round, beside its values.
#[derive(Debug, Clone, Default)]
pub struct Terms {
    /// Handed to all members, at most [`Self::GATHER_BYTES_MAX`] bytes.
    pub gather: Bytes,
    /// Limit of the call, whatever the session's own is.
    pub limit: Option<Duration>,
}

impl Terms {
    /// How much a peer may hand to all members: what the round protocol carries, less the hash of the history.
    pub const GATHER_BYTES_MAX: usize = potluck_averaging::GATHER_BYTES_MAX - 32;
}

/// What came out of a round.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundResult {
    /// The weighted mean, bit-identical at all members.
    pub vector: Vec<f32>,
    /// Who took part, in group order, this peer included.
    pub members: Vec<PeerId>,
    /// What each of them handed to all.
    pub gathered: Vec<Bytes>,
    /// The sum of the members' weights.
    pub weight_total: f64,
    /// The hash of the plan under which it was made; equal for equal results.
    pub plan_hash: [u8; 32],
    /// All members had the same vector, and this is it: nothing was averaged.
    pub unchanged: bool,
    /// The average as it travelled, if the protocol can give it to those who missed the round.
    pub record: Option<Record>,
    /// What it cost.
    pub stats: RoundStats,
}

/// A round that led from one history to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequel {
    /// The hash of the history before.
    pub before: [u8; 32],
    /// The epoch after it.
    pub epoch: u64,
    /// The hash of the history after it.
    pub after: [u8; 32],
    /// What was averaged.
    pub channel: Channel,
    /// The hash of the plan under which it was.
    pub plan_hash: [u8; 32],
    /// The samples in it.
    pub samples: u64,
    /// The average.
    pub record: Record,
}

/// A round of others that this peer has missed.
#[derive(Debug, Clone, PartialEq)]
pub struct MissedRound {
    /// What was averaged.
    pub channel: Channel,
    /// The hash of the plan under which it was.
    pub plan_hash: [u8; 32],
    /// The samples in it.
    pub samples: u64,
    /// The hash of the history after it, as its members say.
    pub after: [u8; 32],
    /// The average, bit-identical to that of its members.
    pub vector: Vec<f32>,
}

/// What a round cost this peer.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RoundStats {
    /// From the call to the result.
    pub seconds: f64,
    /// Of these: until the group was complete.
    pub gather_seconds: f64,
    /// Bytes that this peer sent for it.
    pub bytes_sent: u64,
    /// Bytes that this peer received for it.
    pub bytes_received: u64,
    /// Bytes that the vector has as f32.
    pub bytes_plain: u64,
    /// Bytes that the vector has as it was sent.
    pub bytes_encoded: u64,
    /// How many times the round was tried.
    pub attempts: u32,
    /// Values beyond the range of the compression that this peer clamped to its end, in what it sent and averaged.
    pub saturated: u64,
}

/// A round that gave no average: the vector comes back, with the reasons.
#[derive(Debug, thiserror::Error)]
#[error("no average for epoch {epoch}: {reason}")]
pub struct RoundFailed {
    /// Which epoch's round.
    pub epoch: u64,
    /// Why, for people.
    pub reason: String,
    /// What this peer had put in.
    pub vector: Vec<f32>,
    /// Who failed us.
    pub faults: Vec<PeerFault>,
}

/// No state could be downloaded.
#[derive(Debug, thiserror::Error)]
#[error("no state of epoch {epoch_min} or later could be downloaded: {reason}")]
pub struct DownloadFailed {
    /// The oldest epoch that would have done.
    pub epoch_min: u64,
    /// Whether anybody has one.
    pub offered: Offered,
    /// Why, for people.
    pub reason: String,
    /// Who failed us.
    pub faults: Vec<PeerFault>,
}

/// Whether a state that could not be downloaded was offered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Offered {
    /// By nobody.
    No,
    /// Not now: whoever may have it has too much to do.
    Busy,
    /// Somebody had begun to send it; this part of it (0 to 1) is here.
    Part(f32),
}

/// A complete copy of the training state at the start of an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The epoch that begins with this state.
    pub epoch: u64,
    /// The lineage's hash; set by the session.
    pub lineage: [u8; 32],
    /// Small facts: scheduler, scaler, lineage samples.
    pub meta: BTreeMap<String, String>,
    /// Named buffers: parameters, optimizer statistics, PowerSGD's Q.
    pub blobs: BTreeMap<String, Bytes>,
}

/// Bytes since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
}

/// A protocol that sessions can run on. Every future ends by its own deadline.
pub trait Dialect: Send + Sync + 'static {
    /// Who we are.
    fn local_peer(&self) -> PeerId;

    /// Everybody else who is alive, in the order of their ids.
    fn peers(&self) -> Vec<PeerView>;

    /// Peers, this one included, whose identity more than one machine uses at the moment.
    fn twice(&self) -> BTreeSet<PeerId> {
        BTreeSet::new()
    }

    /// Whether this peer, which is not among `peers`, has said farewell.
    fn has_left(&self, _peer: &PeerId) -> bool {
        false
    }

    /// Resolves when `peers` or `round_open` may have changed. Cancel-safe.
    fn changed(&self) -> BoxFuture<'_, ()>;

    /// Whether the protocol itself knows that somebody waits for us in the round of this epoch. (Sessions tell each
    /// other in their reports too.)
    fn round_open(&self, _channel: Channel, _epoch: u64) -> bool {
        false
    }

    /// Tell everybody where we are; at once if it completes the epoch, else with the next heartbeat.
    fn report(&self, report: Report);

    /// Take part in the round of an epoch.
    fn average(
        &self,
        channel: Channel,
        call: RoundCall,
    ) -> BoxFuture<'_, Result<Outcome<RoundResult>, RoundFailed>>;

    /// Offer a state to newcomers; replaces older ones. Never waits for anybody.
    fn publish(&self, snapshot: Snapshot);

    /// Download a state: of exactly this history if somebody offers it, else the newest of at least this epoch.
    fn download(
        &self,
        lineage: [u8; 32],
        epoch_min: u64,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Outcome<Snapshot>, DownloadFailed>>;

    /// Keep what led from one history to the next for those who have missed it. Never waits for anybody.
    fn remember(&self, _sequel: Sequel) {}

    /// What led on from `lineage`, from peers whose history is `winner` if there are any; `None` if nobody knows, or the
    /// protocol knows no such thing.
    fn missed(
        &self,
        _lineage: [u8; 32],
        _winner: [u8; 32],
        _timeout: Duration,
    ) -> BoxFuture<'_, Option<Outcome<MissedRound>>> {
        Box::pin(futures::future::ready(None))
    }

    /// Bytes so far.
    fn traffic(&self) -> Traffic;

    /// How fast our own link is.
    fn rates(&self) -> Rates {
        Rates::default()
    }

    /// Bytes of memory by purpose.
    fn memory(&self) -> BTreeMap<Purpose, u64>;

    /// Announce that we leave, and end everything. Idempotent.
    fn leave(&self) -> BoxFuture<'_, ()>;
}
