//! One peer's side of the exchange: it answers whoever asks, and downloads for itself.

use crate::download::Download;
use crate::store::{Kind, Store, index_of};
use crate::wire::{Request, encode_bits};
use crate::work::WINDOW_MAX;
use crate::{CHUNK_BYTES, STATE_BYTES_MAX, Sequel, Snapshot};
use bytes::Bytes;
use potluck_net::{AcceptError, Env, Outcome, PeerFault, PeerId, Protocol, Tasks, Transport, rpc};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Requests that wait to be answered; more are refused, and the asker turns to another donor.
const BACKLOG: usize = 64;
/// Requests that are answered at the same time: bounds the donor's memory and what newcomers take of its uplink.
/// A newcomer has a window of chunks open and asks what else there is; the rest of the places is for others.
const SERVED: rpc::Places = rpc::Places { total: 24, per_peer: WINDOW_MAX + 4 };

/// Why no state was downloaded. Nothing has changed; trying again resumes where it stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// None of the peers that were asked has a state of that epoch.
    #[error("none of {asked} peers offers a state of epoch {epoch_min} or later")]
    NobodyOffers {
        /// How many were asked.
        asked: usize,
        /// What was asked for.
        epoch_min: u64,
        /// Who failed to answer, and how.
        faults: Vec<PeerFault>,
    },
    /// Every donor was lost, or time was up. What has arrived is kept for a while.
    #[error("state of epoch {epoch}: {done} of {chunks} chunks after {:.1} s, then {why}", elapsed.as_secs_f64())]
    Interrupted {
        /// The epoch of the snapshot.
        epoch: u64,
        /// Chunks that are here.
        done: usize,
        /// Chunks in all.
        chunks: usize,
        /// Since the start.
        elapsed: Duration,
        /// What ended it.
        why: &'static str,
        /// Who failed, and how.
        faults: Vec<PeerFault>,
    },
}

/// Bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeldBytes {
    /// Of states.
    pub states: u64,
    /// Of what led from one history to the next.
    pub sequels: u64,
}

/// Serves this peer's snapshots and downloads those of others. Clones share everything; the last one ends the serving.
#[derive(Clone)]
pub struct Exchange {
    pub(crate) inner: Arc<Inner>,
    _tasks: Tasks,
}

pub(crate) struct Inner {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) env: Env,
    pub(crate) protocol: Protocol,
    store: Mutex<Store>,
    /// One hashing at a time: the first asker after a publication pays, the others wait for it.
    hashing: tokio::sync::Mutex<()>,
}

impl Inner {
    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn hash_pending(&self) {
        let _one = self.hashing.lock().await;
        let Some(snapshot) = self.store().pending() else { return };
        let hashed = snapshot.clone();
        let index = self.env.offload(move || index_of(&hashed)).await;
        self.store().hashed(&snapshot, index, self.env.now());
    }

    /// Make and hash the sequel of a history, if there is one that nobody has asked for yet.
    async fn make_sequel(&self, before: &[u8; 32]) {
        if self.store().unmade(before).is_none() {
            return;
        }
        let _one = self.hashing.lock().await;
        let Some(sequel) = self.store().unmade(before) else { return };
        let source = sequel.clone();
        let making = move || {
            let snapshot = (source.make)();
            let index = index_of(&snapshot);
            (snapshot, index)
        };
        let (snapshot, index) = self.env.offload(making).await;
        self.store().made(&sequel, &snapshot, index, self.env.now());
    }

    async fn answer(&self, request: Bytes) -> Option<Bytes> {
        let now = self.env.now();
        match Request::decode(&request)? {
            Request::Offer { epoch_min } => {
                self.hash_pending().await;
                let mut store = self.store();
                Some(store.offer(epoch_min, now).map(|index| index.encode()).unwrap_or_default())
            }
            Request::Next { lineage } => {
                self.make_sequel(&lineage).await;
                Some(self.store().next(&lineage, now).map(|index| index.encode()).unwrap_or_default())
            }
            Request::Have { root } => self.store().have(&root, now).map(|bits| encode_bits(&bits)),
            Request::Chunk { root, index } => self.store().chunk(&root, index, now),
        }
    }
}

impl Exchange {
    /// Start to serve under the name of this run, to whoever asks.
    ///
    /// # Errors
    /// [`AcceptError`] if this process serves the run already.
    pub fn start(transport: Arc<dyn Transport>, env: Env, run: &str) -> Result<Self, AcceptError> {
        Self::start_for(transport, env, run, |_| true)
    }

    /// Start to serve under the name of this run, to peers that `admits` holds for: the name of a closed run is no
    /// secret, its state is. Others are refused as somebody busy would refuse them.
    ///
    /// # Errors
    /// [`AcceptError`] if this process serves the run already.
    pub fn start_for(
        transport: Arc<dyn Transport>,
        env: Env,
        run: &str,
        admits: impl Fn(&PeerId) -> bool + Send + Sync + 'static,
    ) -> Result<Self, AcceptError> {
        let hash = blake3::hash(run.as_bytes()).to_hex();
        let protocol = Protocol::new(format!("/potluck/state/1/{}", hash.get(..16).unwrap_or_default()));
        let incoming = transport.accept(protocol.clone(), BACKLOG)?;
        let (store, hashing) = (Mutex::default(), tokio::sync::Mutex::default());
        let inner = Arc::new(Inner { transport, env, protocol, store, hashing });
        let tasks = Tasks::new();
        let serving = inner.clone();
        rpc::serve(incoming, &tasks, SERVED, move |peer, request| {
            let inner = admits(&peer).then(|| serving.clone());
            async move {
                match inner {
                    Some(inner) => inner.answer(request).await,
                    None => None,
                }
            }
        });
        Ok(Self { inner, _tasks: tasks })
    }

    /// Offer this snapshot to newcomers instead of the one before. Returns at once: nothing is copied, and hashing
    /// waits until somebody asks.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        self.inner.store().publish(snapshot, self.inner.env.now());
    }

    /// Keep what led from one history to the next for whoever has missed it. Returns at once.
    pub fn remember(&self, sequel: Sequel) {
        self.inner.store().remember(sequel, self.inner.env.now());
    }

    /// Offer nothing any more, and let go of everything that is held here.
    pub fn withdraw(&self) {
        *self.inner.store() = Store::default();
    }

    /// What is held here, shared with whoever published it.
    pub fn held(&self) -> HeldBytes {
        self.inner.store().bytes()
    }

    /// Download the newest snapshot of at least `epoch_min` that any of `peers` offers, from as many of them as have it.
    ///
    /// # Errors
    /// [`DownloadError`]; what has arrived is kept, and the next call resumes.
    pub async fn download(
        &self,
        peers: &[PeerId],
        epoch_min: u64,
        timeout: Duration,
    ) -> Result<Outcome<Snapshot>, DownloadError> {
        let download = Download::new(self.inner.clone(), peers, STATE_BYTES_MAX, timeout);
        download.run(Request::Offer { epoch_min }, Kind::State).await
    }

    /// The same of this history, if anybody offers it, beside `others`, who offer no such snapshot but may be downloading it too:
    /// some of them are asked for chunks as well.
    ///
    /// # Errors
    /// As [`Self::download`].
    pub async fn download_of(
        &self,
        lineage: [u8; 32],
        peers: &[PeerId],
        others: &[PeerId],
        epoch_min: u64,
        timeout: Duration,
    ) -> Result<Outcome<Snapshot>, DownloadError> {
        let download = Download::new(self.inner.clone(), peers, STATE_BYTES_MAX, timeout);
        download.of(lineage).beside(others).run(Request::Offer { epoch_min }, Kind::State).await
    }

    /// Download what led on from this history, from as many of `peers` as know it. Its lineage and epoch are those after
    /// it, as its donors say. Offers of more than `bytes_max` bytes are passed over.
    ///
    /// # Errors
    /// [`DownloadError`]: nobody knows it ([`DownloadError::NobodyOffers`]), or it did not arrive.
    pub async fn download_next(
        &self,
        peers: &[PeerId],
        lineage: [u8; 32],
        bytes_max: u64,
        timeout: Duration,
    ) -> Result<Outcome<Snapshot>, DownloadError> {
        let download = Download::new(self.inner.clone(), peers, bytes_max, timeout);
        download.run(Request::Next { lineage }, Kind::Sequel).await
    }
}

/// Bytes that a request and its framing cost, for the deadline of a chunk.
pub(crate) const CHUNK_COST: f64 = CHUNK_BYTES as f64;
