//! What a user may choose about the DHT, with hivemind's numbers as defaults.

use potluck_net::PeerId;
use std::time::Duration;

/// Longest key or subkey, in bytes.
pub const KEY_BYTES_MAX: usize = 512;
/// Longest value, in bytes, signature included.
pub const VALUE_BYTES_MAX: usize = 64 << 10;
/// Longest life of a record.
pub const LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);

/// Settings of a [`crate::Dht`]. `DhtConfig::default()` fits almost everybody; set the initial peers.
#[derive(Debug, Clone, PartialEq)]
pub struct DhtConfig {
    /// Peers to join through. Their addresses must be known to the transport. May be empty for the first node.
    pub initial_peers: Vec<PeerId>,
    /// Ask others but answer nobody: store nothing, be in nobody's table. For peers that cannot be dialed.
    pub client_mode: bool,
    /// How many nodes keep each record.
    pub num_replicas: usize,
    /// Nodes per bucket, width of the search beam, nodes per answer.
    pub bucket_size: usize,
    /// A full bucket without our own id splits unless its depth is a multiple of this.
    pub depth_modulo: usize,
    /// How long one question to one node may take. So long it may also wait for its turn, where we ask that node much.
    pub rpc_timeout: Duration,
    /// Questions of one search that may be open at a time.
    pub parallel_rpcs: usize,
    /// After this long without an answer a search asks somebody else as well.
    pub stalled_after: Duration,
    /// How often a holder makes sure that a record has its replicas; the n-th nearest holder does so n times less often.
    pub republish_interval: Duration,
    /// How often the neighbourhood and a random region are looked up, to keep the table fresh.
    pub refresh_interval: Duration,
    /// How long a peer that did not answer is left alone; doubles with each further failure.
    pub blacklist_time: Duration,
    /// Bytes that are kept for others.
    pub storage_bytes_max: usize,
    /// Bytes that one peer may have stored here.
    pub storage_bytes_per_peer_max: usize,
    /// Records that are kept for others.
    pub storage_records_max: usize,
    /// Records that one peer may have stored here.
    pub storage_records_per_peer_max: usize,
    /// Requests per second that one peer may send in the long run. Sixteen records of a store count as one.
    pub requests_per_second: f64,
    /// Requests that one peer may send at once.
    pub requests_burst: f64,
}

impl Default for DhtConfig {
    fn default() -> Self {
        Self {
            initial_peers: Vec::new(),
            client_mode: false,
            num_replicas: 5,
            bucket_size: 20,
            depth_modulo: 5,
            rpc_timeout: Duration::from_secs(3),
            parallel_rpcs: 4,
            stalled_after: Duration::from_millis(750),
            republish_interval: Duration::from_secs(30),
            refresh_interval: Duration::from_secs(120),
            blacklist_time: Duration::from_secs(5),
            storage_bytes_max: 64 << 20,
            storage_bytes_per_peer_max: 16 << 20,
            storage_records_max: 32 << 10,
            storage_records_per_peer_max: 8 << 10,
            requests_per_second: 50.0,
            requests_burst: 500.0,
        }
    }
}

/// Why a DHT cannot start. That nobody answers is no such reason: it keeps trying.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting makes no sense.
    #[error("{field} = {value}: {allowed}")]
    Config {
        /// Which one.
        field: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        allowed: &'static str,
    },
    /// The protocol cannot be accepted: usually a second DHT on one transport.
    #[error("cannot answer DHT requests: {0}")]
    Accept(#[from] potluck_net::AcceptError),
}

impl DhtConfig {
    pub(crate) fn check(&self) -> Result<(), StartError> {
        let count = |field, value: usize, max: usize| {
            let allowed = "must be at least 1 and at most 1024 (replicas, buckets: 64)";
            let bad = StartError::Config { field, value: value.to_string(), allowed };
            if (1..=max).contains(&value) { Ok(()) } else { Err(bad) }
        };
        count("num_replicas", self.num_replicas, 64)?;
        count("bucket_size", self.bucket_size, 64)?;
        count("depth_modulo", self.depth_modulo, 160)?;
        count("parallel_rpcs", self.parallel_rpcs, 1024)?;
        let times = [
            ("rpc_timeout", self.rpc_timeout),
            ("stalled_after", self.stalled_after),
            ("republish_interval", self.republish_interval),
            ("refresh_interval", self.refresh_interval),
        ];
        for (field, value) in times {
            if value < Duration::from_millis(10) {
                let allowed = "must be at least 10 ms";
                return Err(StartError::Config { field, value: format!("{value:?}"), allowed });
            }
        }
        for (field, value) in
            [("requests_per_second", self.requests_per_second), ("requests_burst", self.requests_burst)]
        {
            if !(value.is_finite() && value >= 1.0) {
                let allowed = "must be a number of at least 1";
                return Err(StartError::Config { field, value: value.to_string(), allowed });
            }
        }
        Ok(())
    }
}
