//! An ideal protocol in one process: what a session may expect of any dialect, with failures on request. It shows
//! whether a fault in a simulated run is the session's or the network's.

use bytes::Bytes;
use futures::future::BoxFuture;
use potluck_collab::{
    Channel, Dialect, DownloadFailed, Offered, PeerView, Purpose, Rates, Report, RoundCall, RoundFailed,
    RoundResult, RoundStats, Snapshot, Traffic,
};
use potluck_net::{Outcome, PeerId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How long a round waits for peers that are there but do not come.
const GATHER_TIMEOUT: Duration = Duration::from_secs(5);

/// The place where the peers of one run meet.
#[derive(Clone, Default)]
pub struct Hub {
    state: Arc<Mutex<State>>,
    news: Arc<Notify>,
}

#[derive(Default)]
struct State {
    peers: BTreeMap<PeerId, Option<Report>>,
    rounds: BTreeMap<(Channel, u64, [u8; 32]), Round>,
    snapshots: BTreeMap<PeerId, Snapshot>,
    /// Rounds of these epochs fail for everybody.
    failing: Vec<u64>,
}

#[derive(Default)]
struct Round {
    contributions: BTreeMap<PeerId, (Vec<f32>, f64, Bytes)>,
    result: Option<RoundResult>,
}

/// One peer's place at the hub.
pub struct HubPeer {
    hub: Hub,
    me: PeerId,
}

impl Hub {
    /// A peer arrives.
    pub fn join(&self, me: PeerId) -> HubPeer {
        self.lock().peers.insert(me, None);
        self.news.notify_waiters();
        HubPeer { hub: self.clone(), me }
    }

    /// A peer is gone, without a word.
    pub fn lose(&self, peer: PeerId) {
        let mut state = self.lock();
        state.peers.remove(&peer);
        state.snapshots.remove(&peer);
        drop(state);
        self.news.notify_waiters();
    }

    /// Rounds of this epoch give no average.
    pub fn fail_epoch(&self, epoch: u64) {
        self.lock().failing.push(epoch);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Round {
    fn finish(&mut self) -> RoundResult {
        let members: Vec<PeerId> = self.contributions.keys().copied().collect();
        let weight_total: f64 = self.contributions.values().map(|(_, weight, _)| weight).sum();
        let len = self.contributions.values().map(|(vector, ..)| vector.len()).max().unwrap_or(0);
        let mut vector = vec![0.0_f32; len];
        for (values, weight, _) in self.contributions.values().filter(|(_, weight, _)| *weight > 0.0) {
            let share = (weight / weight_total) as f32;
            vector.iter_mut().zip(values).for_each(|(sum, value)| *sum += share * value);
        }
        let mut hash = [0; 32];
        for (index, byte) in members.iter().flat_map(|peer| peer.as_bytes()).enumerate() {
            hash[index % 32] ^= byte.rotate_left(index as u32 % 7);
        }
        let stats = RoundStats { attempts: 1, ..RoundStats::default() };
        let gathered = self.contributions.values().map(|(.., gather)| gather.clone()).collect();
        let result = RoundResult {
            vector,
            members,
            gathered,
            weight_total,
            plan_hash: hash,
            unchanged: false,
            record: None,
            stats,
        };
        self.result = Some(result.clone());
        result
    }
}

impl HubPeer {
    /// The result, once everybody with this history is here or the time is over.
    fn poll_round(&self, key: (Channel, u64, [u8; 32]), over: bool) -> Option<RoundResult> {
        let mut state = self.hub.lock();
        let finishing = |peer: &PeerId| {
            let mut rounds = state.rounds.iter().filter(|(round, _)| round.1 + 1 == key.1);
            rounds.any(|(_, round)| round.result.is_some() && round.contributions.contains_key(peer))
        };
        // Whoever is here, and whoever has the last result but has not had time to say so.
        let expected: Vec<PeerId> = state
            .peers
            .iter()
            .filter_map(|(peer, report)| Some((peer, report.as_ref()?.epoch)))
            .filter(|(peer, epoch)| *epoch == key.1 || (*epoch + 1 == key.1 && finishing(peer)))
            .map(|(peer, _)| *peer)
            .collect();
        let round = state.rounds.entry(key).or_default();
        if round.result.is_some() {
            return round.result.clone();
        }
        let complete = expected.iter().all(|peer| round.contributions.contains_key(peer));
        (complete || over).then(|| round.finish())
    }
}

impl Dialect for HubPeer {
    fn local_peer(&self) -> PeerId {
        self.me
    }

    fn peers(&self) -> Vec<PeerView> {
        let state = self.hub.lock();
        let others = state.peers.iter().filter(|(peer, _)| **peer != self.me);
        others
            .filter_map(|(peer, report)| {
                let report = report.clone()?;
                Some(PeerView {
                    peer: *peer,
                    epoch: report.epoch,
                    samples: report.samples,
                    samples_per_second: report.samples_per_second,
                    path: None,
                    rates: Rates::default(),
                    auxiliary: false,
                    client: false,
                    note: report.note,
                })
            })
            .collect()
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.hub.news.notified())
    }

    fn round_open(&self, channel: Channel, epoch: u64) -> bool {
        let state = self.hub.lock();
        let mut rounds = state.rounds.iter().filter(|(key, _)| (key.0, key.1) == (channel, epoch));
        rounds.any(|(_, round)| round.result.is_none() && !round.contributions.contains_key(&self.me))
    }

    fn report(&self, report: Report) {
        // Without news nobody is woken: two peers that wait would otherwise wake each other for ever.
        let report = Some(report);
        if let Some(known) = self.hub.lock().peers.get_mut(&self.me).filter(|known| **known != report) {
            *known = report;
            self.hub.news.notify_waiters();
        }
    }

    fn average(
        &self,
        channel: Channel,
        call: RoundCall,
    ) -> BoxFuture<'_, Result<Outcome<RoundResult>, RoundFailed>> {
        Box::pin(async move {
            let key = (channel, call.epoch, call.lineage);
            if self.hub.lock().failing.contains(&call.epoch) {
                let reason = "this epoch fails on request".to_owned();
                return Err(RoundFailed {
                    epoch: call.epoch,
                    reason,
                    vector: call.vector,
                    faults: Vec::new(),
                });
            }
            let contribution = (call.vector.clone(), call.weight, call.gather.clone());
            let round_over = {
                let mut state = self.hub.lock();
                let round = state.rounds.entry(key).or_default();
                if round.result.is_none() {
                    round.contributions.insert(self.me, contribution);
                }
                !round.contributions.contains_key(&self.me)
            };
            if round_over {
                let reason = "the round is over".to_owned();
                return Err(RoundFailed {
                    epoch: call.epoch,
                    reason,
                    vector: call.vector,
                    faults: Vec::new(),
                });
            }
            self.hub.news.notify_waiters();
            let deadline = Instant::now() + GATHER_TIMEOUT;
            loop {
                let news = self.hub.news.notified();
                if let Some(result) = self.poll_round(key, Instant::now() >= deadline) {
                    self.hub.news.notify_waiters();
                    return Ok(Outcome::clean(result));
                }
                let _news_or_deadline = tokio::time::timeout_at(deadline, news).await;
            }
        })
    }

    fn publish(&self, snapshot: Snapshot) {
        self.hub.lock().snapshots.insert(self.me, snapshot);
    }

    fn download(
        &self,
        lineage: [u8; 32],
        epoch_min: u64,
        _timeout: Duration,
    ) -> BoxFuture<'_, Result<Outcome<Snapshot>, DownloadFailed>> {
        Box::pin(async move {
            let state = self.hub.lock();
            let donors = state.snapshots.iter().filter(|(peer, _)| **peer != self.me);
            let newest = donors
                .map(|(_, snapshot)| snapshot)
                .max_by_key(|snapshot| (snapshot.lineage == lineage, snapshot.epoch));
            match newest.filter(|snapshot| snapshot.epoch >= epoch_min) {
                Some(snapshot) => Ok(Outcome::clean(snapshot.clone())),
                None => Err(DownloadFailed {
                    epoch_min,
                    offered: Offered::No,
                    reason: "nobody has it".to_owned(),
                    faults: Vec::new(),
                }),
            }
        })
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn memory(&self) -> BTreeMap<Purpose, u64> {
        BTreeMap::new()
    }

    fn leave(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move { self.hub.lose(self.me) })
    }
}
