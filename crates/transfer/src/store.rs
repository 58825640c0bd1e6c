//! Sans-I/O. What this peer can serve: its newest snapshot, older ones that somebody still downloads, what it is
//! downloading itself, and what led from one history to the next. Bounded in number and bytes; buffers are shared with
//! whoever published them.

use crate::wire::{CHUNK_BYTES, Index, chunk_count};
use crate::{HeldBytes, Sequel, Snapshot};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long an older snapshot is kept after it was last asked for. A downloader asks several times a second.
const KEPT_IDLE: Duration = Duration::from_secs(20);
/// Older snapshots that are kept at the same time: memory is at most this many states more.
const KEPT_MAX: usize = 2;
/// Sequels that are kept while somebody downloads; together they are never larger than the state, which would then be
/// the shorter way.
const SEQUELS_MAX: usize = 64;

/// What a download is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    State,
    Sequel,
}

/// A snapshot with its index, complete or not.
pub(crate) struct Held {
    pub(crate) index: Index,
    pub(crate) chunks: Vec<Option<Bytes>>,
    kind: Kind,
    asked: Instant,
}

/// A sequel, until somebody asks for it, and then the name under which it is held.
enum Kept {
    Unmade(Arc<Sequel>),
    Made { before: [u8; 32], root: [u8; 32] },
}

impl Kept {
    fn before(&self) -> [u8; 32] {
        match self {
            Self::Unmade(sequel) => sequel.before,
            Self::Made { before, .. } => *before,
        }
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Store {
    held: BTreeMap<[u8; 32], Held>,
    newest: Option<[u8; 32]>,
    /// Published, not hashed yet: hashing waits until somebody asks.
    pending: Option<Arc<Snapshot>>,
    /// In the order in which they came about.
    sequels: VecDeque<Kept>,
    /// When anybody has asked for anything.
    asked: Option<Instant>,
}

impl Store {
    /// Offer this snapshot from now on. The one before becomes an older one: it stays only for who downloads it.
    pub(crate) fn publish(&mut self, snapshot: Arc<Snapshot>, now: Instant) {
        self.pending = Some(snapshot);
        self.forget(now);
    }

    /// The snapshot that has to be hashed before anything newer can be offered.
    pub(crate) fn pending(&self) -> Option<Arc<Snapshot>> {
        self.pending.clone()
    }

    /// Take up the hashed form of a pending snapshot.
    pub(crate) fn hashed(&mut self, snapshot: &Arc<Snapshot>, index: Index, now: Instant) {
        match &self.pending {
            Some(pending) if Arc::ptr_eq(pending, snapshot) => self.pending = None,
            // A newer one waits already; this one has been asked for.
            Some(_) => {}
            // Withdrawn meanwhile.
            None => return,
        }
        let root = index.root();
        let chunks = chunks_of(snapshot).map(Some).collect();
        self.held.insert(root, Held { index, chunks, kind: Kind::State, asked: now });
        self.newest = Some(root);
        self.forget(now);
    }

    /// The newest complete snapshot of at least this epoch.
    pub(crate) fn offer(&mut self, epoch_min: u64, now: Instant) -> Option<&Index> {
        self.asked = Some(now);
        let held = self.held.get_mut(&self.newest?)?;
        held.asked = now;
        (held.index.epoch >= epoch_min).then_some(&held.index)
    }

    /// Which chunks of a snapshot are here.
    pub(crate) fn have(&mut self, root: &[u8; 32], now: Instant) -> Option<Vec<bool>> {
        self.asked = Some(now);
        let held = self.held.get_mut(root)?;
        held.asked = now;
        Some(held.chunks.iter().map(Option::is_some).collect())
    }

    /// One chunk, if it is here.
    pub(crate) fn chunk(&mut self, root: &[u8; 32], index: u32, now: Instant) -> Option<Bytes> {
        self.asked = Some(now);
        let held = self.held.get_mut(root)?;
        held.asked = now;
        held.chunks.get(usize::try_from(index).ok()?)?.clone()
    }

    /// Keep a sequel of the newest history.
    pub(crate) fn remember(&mut self, sequel: Sequel, now: Instant) {
        self.sequels.retain(|kept| kept.before() != sequel.before);
        self.sequels.push_back(Kept::Unmade(Arc::new(sequel)));
        self.forget(now);
    }

    /// The sequel of a history, if it has to be made and hashed before it can be offered.
    pub(crate) fn unmade(&self, before: &[u8; 32]) -> Option<Arc<Sequel>> {
        self.sequels.iter().find_map(|kept| match kept {
            Kept::Unmade(sequel) if sequel.before == *before => Some(sequel.clone()),
            _ => None,
        })
    }

    /// Take up the hashed form of a sequel.
    pub(crate) fn made(&mut self, sequel: &Arc<Sequel>, snapshot: &Snapshot, index: Index, now: Instant) {
        let is_it = |kept: &&mut Kept| matches!(kept, Kept::Unmade(unmade) if Arc::ptr_eq(unmade, sequel));
        let Some(kept) = self.sequels.iter_mut().find(is_it) else { return };
        let root = index.root();
        *kept = Kept::Made { before: sequel.before, root };
        let chunks = chunks_of(snapshot).map(Some).collect();
        self.held.insert(root, Held { index, chunks, kind: Kind::Sequel, asked: now });
    }

    /// What led on from a history, if it is known here.
    pub(crate) fn next(&mut self, lineage: &[u8; 32], now: Instant) -> Option<&Index> {
        self.asked = Some(now);
        let root = self.sequels.iter().find_map(|kept| match kept {
            Kept::Made { before, root } if before == lineage => Some(*root),
            _ => None,
        })?;
        let held = self.held.get_mut(&root)?;
        held.asked = now;
        Some(&held.index)
    }

    /// Start, or go on with, a download; what is here already stays.
    pub(crate) fn begin(&mut self, index: &Index, kind: Kind, now: Instant) -> [u8; 32] {
        let root = index.root();
        let count = chunk_count(&index.blobs);
        let fresh = || Held { index: index.clone(), chunks: vec![None; count], kind, asked: now };
        self.held.entry(root).or_insert_with(fresh).asked = now;
        root
    }

    /// A chunk has arrived and matches its hash.
    pub(crate) fn insert(&mut self, root: &[u8; 32], index: usize, chunk: Bytes, now: Instant) {
        if let Some(held) = self.held.get_mut(root) {
            held.asked = now;
            if let Some(place) = held.chunks.get_mut(index) {
                *place = Some(chunk);
            }
        }
    }

    /// All chunks of a finished download, in order. They are given to whoever asks for them by name; offered is only what is
    /// published, as nobody has looked at this yet.
    pub(crate) fn complete(&mut self, root: &[u8; 32], now: Instant) -> Option<Vec<Bytes>> {
        let held = self.held.get(root)?;
        let chunks: Option<Vec<Bytes>> = held.chunks.iter().cloned().collect();
        self.forget(now);
        chunks
    }

    /// A finished download was put together: its pieces are served from there, and are not held a second time.
    pub(crate) fn joined(&mut self, root: &[u8; 32], snapshot: &Snapshot) {
        if let Some(held) = self.held.get_mut(root) {
            held.chunks = chunks_of(snapshot).map(Some).collect();
        }
    }

    /// Bytes of the buffers that are held here, shared ones included.
    pub(crate) fn bytes(&self) -> HeldBytes {
        let of = |kind: Kind| {
            let held = self.held.values().filter(move |held| held.kind == kind);
            held.flat_map(|held| held.chunks.iter().flatten()).map(|chunk| chunk.len() as u64).sum::<u64>()
        };
        let pending = self.pending.as_ref().map_or(0, |snapshot| snapshot.bytes());
        let unmade = self.sequels.iter().map(|kept| match kept {
            Kept::Unmade(sequel) => sequel.bytes,
            Kept::Made { .. } => 0,
        });
        HeldBytes { states: of(Kind::State) + pending, sequels: of(Kind::Sequel) + unmade.sum::<u64>() }
    }

    /// Sequels for whoever downloads the state meanwhile, and the last one for whoever has missed no more than it.
    fn forget_sequels(&mut self, now: Instant) {
        let downloads = self.asked.is_some_and(|asked| now.duration_since(asked) < KEPT_IDLE);
        let newest = self.newest.and_then(|newest| self.held.get(&newest)).map(Held::bytes);
        let state = self.pending.as_ref().map(|snapshot| snapshot.bytes()).or(newest).unwrap_or_default();
        let (mut kept, mut bytes) = (0, 0);
        for sequel in self.sequels.iter().rev() {
            bytes += match sequel {
                Kept::Unmade(sequel) => sequel.bytes,
                Kept::Made { root, .. } => self.held.get(root).map_or(0, Held::bytes),
            };
            if kept > 0 && (!downloads || kept >= SEQUELS_MAX || bytes > state) {
                break;
            }
            kept += 1;
        }
        self.sequels.drain(..self.sequels.len() - kept);
    }

    /// Let older snapshots go that nobody asks for any more. What is published and not hashed yet is the newest.
    fn forget(&mut self, now: Instant) {
        self.forget_sequels(now);
        let sequels = &self.sequels;
        let is_kept = |root: &[u8; 32]| {
            sequels.iter().any(|kept| matches!(kept, Kept::Made { root: made, .. } if made == root))
        };
        let newest = if self.pending.is_some() { None } else { self.newest };
        self.held.retain(|root, held| {
            Some(*root) == newest || now.duration_since(held.asked) < KEPT_IDLE || is_kept(root)
        });
        let older = self.held.iter().filter(|(root, _)| Some(**root) != newest && !is_kept(root));
        let mut asked: Vec<(Instant, [u8; 32])> = older.map(|(root, held)| (held.asked, *root)).collect();
        asked.sort_unstable();
        for (_, root) in asked.iter().rev().skip(KEPT_MAX) {
            self.held.remove(root);
        }
        self.newest = self.newest.filter(|root| self.held.contains_key(root));
    }
}

impl Held {
    fn bytes(&self) -> u64 {
        self.index.bytes()
    }
}

/// The chunks of a snapshot, in the order of the index: slices of its buffers, nothing is copied.
pub(crate) fn chunks_of(snapshot: &Snapshot) -> impl Iterator<Item = Bytes> {
    snapshot.blobs.values().flat_map(|blob| {
        let starts = (0..blob.len()).step_by(CHUNK_BYTES);
        starts.map(move |start| blob.slice(start..blob.len().min(start + CHUNK_BYTES)))
    })
}

/// Hash a snapshot: CPU work, to be off-loaded.
pub(crate) fn index_of(snapshot: &Snapshot) -> Index {
    Index {
        epoch: snapshot.epoch,
        lineage: snapshot.lineage,
        meta: snapshot.meta.clone(),
        blobs: snapshot.blobs.iter().map(|(name, blob)| (name.clone(), blob.len() as u64)).collect(),
        hashes: chunks_of(snapshot).map(|chunk| *blake3::hash(&chunk).as_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_hashed_too_late_is_not_held_again() {
        let blobs = BTreeMap::from([("w".to_owned(), Bytes::from_static(&[7; 9]))]);
        let (snapshot, now) = (Arc::new(Snapshot { blobs, ..Snapshot::default() }), Instant::now());
        let mut store = Store::default();
        store.publish(snapshot.clone(), now);
        assert_eq!(store.bytes().states, 9);
        store = Store::default();
        store.hashed(&snapshot, index_of(&snapshot), now);
        assert_eq!(
            (store.bytes(), store.offer(0, now).is_none()),
            (HeldBytes::default(), true),
            "withdrawn meanwhile"
        );
    }

    #[tokio::test]
    async fn a_finished_download_is_held_once() {
        let weights: Bytes = (0..3 * CHUNK_BYTES - 9).map(|at| at as u8).collect();
        let source = Snapshot { blobs: BTreeMap::from([("w".to_owned(), weights)]), ..Snapshot::default() };
        let (index, now) = (index_of(&source), Instant::now());
        let mut store = Store::default();
        let root = store.begin(&index, Kind::State, now);
        for (at, chunk) in chunks_of(&source).enumerate() {
            store.insert(&root, at, Bytes::copy_from_slice(&chunk), now);
        }
        let chunks = store.complete(&root, now).unwrap();
        let joined = Bytes::from(chunks.concat());
        let snapshot =
            Snapshot { blobs: BTreeMap::from([("w".to_owned(), joined.clone())]), ..Snapshot::default() };
        store.joined(&root, &snapshot);
        let served: Vec<Bytes> = (0..3).map(|at| store.chunk(&root, at, now).unwrap()).collect();
        assert_eq!(served.concat(), joined);
        assert_eq!(served[2].as_ptr(), joined[2 * CHUNK_BYTES..].as_ptr());
    }
}
