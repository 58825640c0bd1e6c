//! How many bytes went where: the figures behind status lines, benchmarks and the NAT test.

use crate::shared::lock;
use potluck_net::{Path, PeerId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::OwnedSemaphorePermit;

/// Peers that are counted one by one; the total counts all.
const PEERS_MAX: usize = 4096;

/// Bytes that passed through streams, headers of frames included, encryption and multiplexing not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Sent to all peers.
    pub sent_bytes: u64,
    /// Received from all peers.
    pub received_bytes: u64,
    /// How much of both went through relays.
    pub relayed_bytes: u64,
    /// Sent and received, by peer. Bounded: the total may be more than the sum.
    pub peers: BTreeMap<PeerId, (u64, u64)>,
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

#[derive(Default)]
pub(crate) struct TrafficTable {
    total: Counters,
    relayed: AtomicU64,
    peers: Mutex<BTreeMap<PeerId, Arc<Counters>>>,
}

impl TrafficTable {
    /// A meter for one stream to `peer`. `place` is given back when the stream ends.
    pub(crate) fn meter(
        self: &Arc<Self>,
        peer: PeerId,
        path: Path,
        place: Option<OwnedSemaphorePermit>,
    ) -> StreamMeter {
        let mut peers = lock(&self.peers);
        if !peers.contains_key(&peer) && peers.len() >= PEERS_MAX {
            // Those without a live stream make room; their bytes stay in the total.
            peers.retain(|_, counters| Arc::strong_count(counters) > 1);
        }
        let counters = peers.entry(peer).or_default().clone();
        StreamMeter { table: self.clone(), peer: counters, relayed: path == Path::Relayed, _place: place }
    }

    /// Bytes sent to a peer and received from it.
    pub(crate) fn with(&self, peer: PeerId) -> u64 {
        let counters = lock(&self.peers).get(&peer).cloned().unwrap_or_default();
        counters.sent.load(Ordering::Relaxed) + counters.received.load(Ordering::Relaxed)
    }

    pub(crate) fn snapshot(&self) -> Traffic {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let peers = lock(&self.peers);
        Traffic {
            sent_bytes: get(&self.total.sent),
            received_bytes: get(&self.total.received),
            relayed_bytes: get(&self.relayed),
            peers: peers.iter().map(|(peer, c)| (*peer, (get(&c.sent), get(&c.received)))).collect(),
        }
    }

    fn relay(&self, bytes: u64, relayed: bool) {
        if relayed {
            self.relayed.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// Counts one stream.
pub(crate) struct StreamMeter {
    table: Arc<TrafficTable>,
    peer: Arc<Counters>,
    relayed: bool,
    _place: Option<OwnedSemaphorePermit>,
}

impl StreamMeter {
    /// Bytes handed to the muxer.
    pub(crate) fn sent(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.table.total.sent.fetch_add(bytes, Ordering::Relaxed);
        self.peer.sent.fetch_add(bytes, Ordering::Relaxed);
        self.table.relay(bytes, self.relayed);
    }

    /// Bytes taken from the muxer.
    pub(crate) fn received(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.table.total.received.fetch_add(bytes, Ordering::Relaxed);
        self.peer.received.fetch_add(bytes, Ordering::Relaxed);
        self.table.relay(bytes, self.relayed);
    }
}
