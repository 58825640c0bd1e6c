//! The newcomer's side: agree on one snapshot, then fetch its chunks from everybody who has them.

use crate::exchange::{CHUNK_COST, DownloadError, Inner};
use crate::store::Kind;
use crate::wire::{Index, Request};
use crate::work::{Donor, REFRESH, WINDOW_MAX, Work};
use crate::{CHUNK_BYTES, Snapshot};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use potluck_net::{FaultKind, Outcome, PeerFault, PeerId, rpc};
use rand::seq::SliceRandom;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long an answer without data may take. A peer that needs longer is no good donor.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Once somebody has offered what was asked for, the others get as long again, and at least this: one who died a moment ago,
/// and whom nobody misses yet, never answers.
const OFFERS_PAUSE: Duration = Duration::from_millis(300);
/// The same once somebody has said that it does not know a sequel: those who do may still have to put it together.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(1);
/// Others, besides those who have the whole state, that are asked whether they have some of it.
const OTHERS_MAX: usize = 64;
/// Slowest donor that is still worth waiting for, in bytes per second.
const RATE_MIN: f64 = 50_000.0;

pub(crate) struct Download {
    inner: Arc<Inner>,
    peers: Vec<PeerId>,
    /// Who may be downloading the same, and is asked for nothing but what it has of it.
    others: Vec<PeerId>,
    /// The history that is loaded, where the caller knows it.
    lineage: Option<[u8; 32]>,
    bytes_max: u64,
    start: Instant,
    deadline: Instant,
    faults: Vec<PeerFault>,
}

enum Done {
    Chunk { peer: PeerId, index: usize, took: Duration, result: Result<Bytes, PeerFault> },
    Have { peer: PeerId, result: Result<Bytes, PeerFault> },
}

impl Download {
    pub(crate) fn new(inner: Arc<Inner>, peers: &[PeerId], bytes_max: u64, timeout: Duration) -> Self {
        let me = inner.transport.local_peer();
        let start = inner.env.now();
        let peers = peers.iter().copied().filter(|peer| *peer != me).collect();
        let (others, deadline) = (Vec::new(), start + timeout);
        Self { inner, peers, others, lineage: None, bytes_max, start, deadline, faults: Vec::new() }
    }

    /// Load this history rather than another.
    pub(crate) fn of(mut self, lineage: [u8; 32]) -> Self {
        self.lineage = Some(lineage);
        self
    }

    pub(crate) fn beside(mut self, others: &[PeerId]) -> Self {
        let me = self.inner.transport.local_peer();
        let new = others.iter().filter(|peer| **peer != me && !self.peers.contains(peer));
        self.others = new.copied().take(OTHERS_MAX).collect();
        self
    }

    /// Ask everybody for what is wanted, then fetch what most of them offer.
    pub(crate) async fn run(
        mut self,
        wanted: Request,
        kind: Kind,
    ) -> Result<Outcome<Snapshot>, DownloadError> {
        let epoch_min = if let Request::Offer { epoch_min } = wanted { epoch_min } else { 0 };
        let Some(index) = self.agree(&wanted, epoch_min).await else {
            return Err(DownloadError::NobodyOffers {
                asked: self.peers.len(),
                epoch_min,
                faults: self.faults,
            });
        };
        let root = self.inner.store().begin(&index, kind, self.inner.env.now());
        let why = self.fetch(&index, root).await;
        let now = self.inner.env.now();
        let chunks = self.inner.store().complete(&root, now);
        let Some(chunks) = chunks else {
            let held = self.inner.store().have(&root, now).unwrap_or_default();
            let done = held.iter().filter(|here| **here).count();
            let (epoch, elapsed) = (index.epoch, now - self.start);
            let chunks = index.hashes.len();
            return Err(DownloadError::Interrupted {
                epoch,
                done,
                chunks,
                elapsed,
                why,
                faults: self.faults,
            });
        };
        let snapshot = self.inner.env.offload(move || assemble(index, &chunks)).await;
        self.inner.store().joined(&root, &snapshot);
        Ok(Outcome { value: snapshot, faults: self.faults })
    }

    async fn ask(&self, peer: PeerId, request: Request, limit: Duration) -> Result<Bytes, PeerFault> {
        let deadline = self.deadline.min(self.inner.env.now() + limit);
        rpc::call(&*self.inner.transport, peer, &self.inner.protocol, request.encode(), deadline).await
    }

    /// What those who were asked offer, as far as they answer in time.
    async fn offers(&self, wanted: &Request) -> Vec<(PeerId, Result<Bytes, PeerFault>)> {
        let begun = self.inner.env.now();
        let mut asked: FuturesUnordered<_> = self
            .peers
            .iter()
            .map(|peer| async { (*peer, self.ask(*peer, wanted.clone(), ASK_TIMEOUT).await) })
            .collect();
        let (mut answers, mut until) = (Vec::new(), begun + ASK_TIMEOUT);
        while let Ok(Some(answer)) = tokio::time::timeout_at(until, asked.next()).await {
            let pause = match &answer.1 {
                Ok(offer) if !offer.is_empty() => Some(OFFERS_PAUSE),
                Ok(_) if matches!(wanted, Request::Next { .. }) => Some(UNKNOWN_PAUSE),
                _ => None,
            };
            if let Some(pause) = pause {
                let now = self.inner.env.now();
                until = until.min(now + pause.max(now - begun));
            }
            answers.push(answer);
        }
        answers
    }

    /// Of what is offered the history that is wanted; else, as whoever had it may have gone on, the newest epoch. Where donors
    /// disagree about it, what most of them say (then: smallest root).
    async fn agree(&mut self, wanted: &Request, epoch_min: u64) -> Option<Index> {
        let answers = self.offers(wanted).await;
        let mut offers: BTreeMap<(u64, [u8; 32]), (usize, Index)> = BTreeMap::new();
        for (peer, answer) in answers {
            match answer {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => match Index::decode(&bytes)
                    .filter(|index| index.epoch >= epoch_min && index.bytes() <= self.bytes_max)
                {
                    Some(index) => {
                        offers.entry((index.epoch, index.root())).or_insert((0, index)).0 += 1;
                    }
                    None => self.faults.push(PeerFault::new(
                        peer,
                        FaultKind::Malformed,
                        format!("state offer of {} bytes for epoch {epoch_min} or later", bytes.len()),
                    )),
                },
                Err(fault) => self.faults.push(fault),
            }
        }
        if self.lineage.is_some_and(|wanted| offers.values().any(|(_, index)| index.lineage == wanted)) {
            offers.retain(|_, (_, index)| Some(index.lineage) == self.lineage);
        }
        let newest = offers.keys().next_back()?.0;
        // There is one sequel of a history, whatever epoch somebody says that it leads to.
        let any_epoch = matches!(wanted, Request::Next { .. });
        let compared = offers.into_iter().filter(|((epoch, _), _)| any_epoch || *epoch == newest);
        compared
            .max_by_key(|((_, root), (votes, _))| (*votes, std::cmp::Reverse(*root)))
            .map(|(_, (_, index))| index)
    }

    /// Fetch until everything is here, nobody is left to ask, or time is up; says which.
    async fn fetch(&mut self, index: &Index, root: [u8; 32]) -> &'static str {
        let now = self.inner.env.now();
        let held = self.inner.store().have(&root, now).unwrap_or_default();
        let mut missing: Vec<usize> =
            (0..held.len()).filter(|chunk| !held.get(*chunk).copied().unwrap_or(false)).collect();
        missing.shuffle(&mut self.inner.env.fork_rng());
        let asked = self.peers.iter().chain(&self.others);
        let me = self.inner.transport.local_peer();
        // The last ones are asked for first.
        missing.sort_by_cached_key(|chunk| {
            asked.clone().all(|peer| comes_to(me, *chunk) < comes_to(*peer, *chunk))
        });
        let donors = asked.map(|peer| Donor::new(*peer, now)).collect();
        let mut work = Work::new(index.hashes.len(), missing, donors, now);
        let why = {
            let this = &*self;
            let mut running = FuturesUnordered::new();
            loop {
                let now = this.inner.env.now();
                for peer in work.due_questions(now) {
                    running.push(futures::future::Either::Left(async move {
                        Done::Have { peer, result: this.ask(peer, Request::Have { root }, ASK_TIMEOUT).await }
                    }));
                }
                work.ask_others_too(now);
                for (peer, chunk) in work.assign(now) {
                    let limit =
                        ASK_TIMEOUT + Duration::from_secs_f64(WINDOW_MAX as f64 * CHUNK_COST / RATE_MIN);
                    running.push(futures::future::Either::Right(async move {
                        let request =
                            Request::Chunk { root, index: u32::try_from(chunk).unwrap_or(u32::MAX) };
                        let result = this.ask(peer, request, limit).await;
                        Done::Chunk { peer, index: chunk, took: this.inner.env.now() - now, result }
                    }));
                }
                if let Some(why) = work.is_over(now) {
                    break why;
                }
                let wake = (now + REFRESH).min(this.deadline);
                tokio::select! {
                    biased;
                    Some(done) = running.next() => this.take(done, index, root, &mut work).await,
                    () = tokio::time::sleep_until(wake) => {
                        if this.inner.env.now() >= this.deadline {
                            break "time was up";
                        }
                    }
                }
            }
        };
        self.faults.extend(work.end(self.inner.env.now()));
        why
    }

    async fn take(&self, done: Done, index: &Index, root: [u8; 32], work: &mut Work) {
        let (peer, chunk, took, result) = match done {
            Done::Have { peer, result } => return work.listed(peer, index, result),
            Done::Chunk { peer, index, took, result } => (peer, index, took, result),
        };
        work.landed(peer, chunk);
        // Somebody else was faster.
        if result.is_ok() && !work.wants(chunk) {
            return;
        }
        let expected = index.hashes.get(chunk).copied().unwrap_or_default();
        let checked = self.checked(peer, chunk, expected, result).await;
        let now = self.inner.env.now();
        match checked {
            Ok(bytes) => {
                work.got(now, peer, chunk, bytes.len(), took);
                self.inner.store().insert(&root, chunk, bytes, now);
            }
            Err(fault) => work.failed(now, chunk, took, fault),
        }
    }

    async fn checked(
        &self,
        peer: PeerId,
        chunk: usize,
        expected: [u8; 32],
        result: Result<Bytes, PeerFault>,
    ) -> Result<Bytes, PeerFault> {
        let bytes = result?;
        let hashed = bytes.clone();
        let found = self.inner.env.offload(move || *blake3::hash(&hashed).as_bytes()).await;
        if found == expected {
            return Ok(bytes);
        }
        let context = format!("state chunk {chunk}: {} bytes do not match the agreed hash", bytes.len());
        Err(PeerFault::new(peer, FaultKind::Mismatch, context))
    }
}

/// A chunk is for the joiner with the lowest number to ask for first (rendezvous hashing, Thaler and Ravishankar 1998), so that
/// each of those who join at the same time soon has what the others lack, although no two of them may know the same peers.
fn comes_to(peer: PeerId, chunk: usize) -> u64 {
    let mut hasher = DefaultHasher::new();
    (peer.as_bytes(), chunk).hash(&mut hasher);
    hasher.finish()
}

/// Put the chunks together again. A buffer of one chunk is not copied.
fn assemble(index: Index, chunks: &[Bytes]) -> Snapshot {
    let mut rest = chunks.iter();
    let mut blobs = BTreeMap::new();
    for (name, len) in index.blobs {
        let count = usize::try_from(len.div_ceil(CHUNK_BYTES as u64)).unwrap_or(usize::MAX);
        let mut parts: Vec<Bytes> = rest.by_ref().take(count).cloned().collect();
        let blob = if parts.len() == 1 {
            parts.remove(0)
        } else {
            let mut joined = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
            parts.iter().for_each(|part| joined.extend_from_slice(part));
            joined.freeze()
        };
        blobs.insert(name, blob);
    }
    Snapshot { epoch: index.epoch, lineage: index.lineage, meta: index.meta, blobs }
}
