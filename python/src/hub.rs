//! Peers of one process, joined without a network: each round waits for everybody who is at its epoch. It gives tests
//! and notebooks the whole training loop, with sums in the order of peer ids like the real thing.

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use potluck_collab::{
    Channel, Dialect, DownloadFailed, Offered, PeerView, Purpose, Rates, Report, RoundCall, RoundFailed,
    RoundResult, RoundStats, Snapshot, Traffic,
};
use potluck_net::{Outcome, PeerId};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A member that never comes ends a round after this long, unless the caller set a limit.
const ROUND_SECONDS: Duration = Duration::from_secs(20);

/// A place where peers of this process meet.
#[pyclass(frozen, module = "potluck._core")]
pub(crate) struct Hub {
    pub(crate) runs: Arc<Mutex<BTreeMap<String, Arc<Run>>>>,
}

#[pymethods]
impl Hub {
    #[new]
    fn new() -> Self {
        Self { runs: Arc::default() }
    }
}

/// One run: who is in it, and the rounds that are gathering.
pub(crate) struct Run {
    state: Mutex<State>,
    news: watch::Sender<u64>,
}

impl Default for Run {
    fn default() -> Self {
        Self { state: Mutex::default(), news: watch::Sender::new(0) }
    }
}

#[derive(Default)]
struct State {
    members: BTreeMap<PeerId, Member>,
    rounds: BTreeMap<Key, Round>,
}

#[derive(Default)]
struct Member {
    report: Option<Report>,
    snapshot: Option<Snapshot>,
    auxiliary: bool,
    client: bool,
}

/// Which round: what is averaged, at which epoch of which history.
type Key = (Channel, u64, [u8; 32]);

/// What one peer puts into a round: values, weight, and what it hands to all.
type Input = (Vec<f32>, f64, Bytes);

/// The averaged vector, who is in it with what they handed to all, and the sum of the weights.
type Mean = (Vec<f32>, Vec<(PeerId, Bytes)>, f64);

#[derive(Default)]
struct Round {
    inputs: BTreeMap<PeerId, Input>,
    result: Option<Arc<Mean>>,
}

/// One peer of a run.
pub(crate) struct LocalDialect {
    run: Arc<Run>,
    me: PeerId,
    seen: tokio::sync::Mutex<watch::Receiver<u64>>,
}

impl LocalDialect {
    /// Enter a run.
    pub(crate) fn join(run: Arc<Run>, me: PeerId, auxiliary: bool, client: bool) -> Self {
        lock(&run.state).members.insert(me, Member { auxiliary, client, ..Member::default() });
        let seen = tokio::sync::Mutex::new(run.news.subscribe());
        let joined = Self { run, me, seen };
        joined.tell();
        joined
    }

    fn tell(&self) {
        self.run.news.send_modify(|version| *version += 1);
    }

    fn go(&self) {
        let mut state = lock(&self.run.state);
        let State { members, rounds } = &mut *state;
        members.remove(&self.me);
        // Whoever comes when all of a round have gone begins anew.
        rounds.retain(|_, round| {
            let result = round.result.as_ref();
            result.is_none_or(|result| result.1.iter().any(|(peer, _)| members.contains_key(peer)))
        });
        drop(state);
        self.tell();
    }

    /// Whether the round is over without us.
    fn is_over(&self, key: &Key) -> bool {
        let state = lock(&self.run.state);
        // Whoever only helps is waited for by nobody.
        let helps = state.members.get(&self.me).is_some_and(|member| member.auxiliary);
        let result = state.rounds.get(key).and_then(|round| round.result.as_ref()).filter(|_| !helps);
        result.is_some_and(|result| result.1.iter().all(|(peer, _)| *peer != self.me))
    }

    /// Put our values in, if given; the last of the expected members computes the mean.
    fn contribute(&self, key: Key, input: Option<Input>, late: bool) -> Option<RoundResult> {
        let mut state = lock(&self.run.state);
        let here = |member: &Member| {
            !member.auxiliary && member.report.as_ref().is_some_and(|report| report.epoch == key.1)
        };
        let expected: Vec<PeerId> =
            state.members.iter().filter(|(_, member)| here(member)).map(|(peer, _)| *peer).collect();
        let round = state.rounds.entry(key).or_default();
        if let Some(input) = input {
            round.inputs.insert(self.me, input);
        }
        if round.result.is_none() && (late || expected.iter().all(|peer| round.inputs.contains_key(peer))) {
            round.result = Some(Arc::new(weighted_mean(std::mem::take(&mut round.inputs))));
            // Older rounds can no longer be joined.
            state.rounds.retain(|other, _| other.1 + 2 > key.1);
        }
        let result = state.rounds.get(&key)?.result.clone()?;
        if result.1.len() == 1 {
            // Nobody came: it can be tried again.
            state.rounds.remove(&key);
        }
        let (vector, members, weight_total) = (*result).clone();
        let (members, gathered) = members.into_iter().unzip();
        let mut plan_hash = [0; 32];
        plan_hash[..8].copy_from_slice(&key.1.to_le_bytes());
        plan_hash[8..16].copy_from_slice(&weight_total.to_le_bytes());
        let stats = RoundStats { attempts: 1, bytes_plain: 4 * vector.len() as u64, ..RoundStats::default() };
        Some(RoundResult {
            vector,
            members,
            gathered,
            weight_total,
            plan_hash,
            unchanged: false,
            record: None,
            stats,
        })
    }
}

fn weighted_mean(inputs: BTreeMap<PeerId, Input>) -> Mean {
    let total: f64 = inputs.values().map(|(_, weight, _)| weight).sum();
    let length = inputs.values().map(|(vector, ..)| vector.len()).max().unwrap_or(0);
    let mut sum = vec![0.0_f64; length];
    for (vector, weight, _) in inputs.values().filter(|(_, weight, _)| *weight > 0.0) {
        for (slot, value) in sum.iter_mut().zip(vector) {
            *slot += f64::from(*value) * weight;
        }
    }
    let mean = sum.into_iter().map(|value| if total > 0.0 { (value / total) as f32 } else { 0.0 }).collect();
    (mean, inputs.into_iter().map(|(peer, (.., gather))| (peer, gather)).collect(), total)
}

impl Dialect for LocalDialect {
    fn local_peer(&self) -> PeerId {
        self.me
    }

    fn peers(&self) -> Vec<PeerView> {
        let state = lock(&self.run.state);
        let others = state.members.iter().filter(|(peer, _)| **peer != self.me);
        others
            .filter_map(|(peer, member)| {
                let report = member.report.clone()?;
                Some(PeerView {
                    peer: *peer,
                    epoch: report.epoch,
                    samples: report.samples,
                    samples_per_second: report.samples_per_second,
                    path: None,
                    rates: Rates::default(),
                    auxiliary: member.auxiliary,
                    client: member.client,
                    note: report.note,
                })
            })
            .collect()
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        async move {
            // The hub lives as long as its members: an error cannot happen, and would only end the wait.
            let _ended = self.seen.lock().await.changed().await;
        }
        .boxed()
    }

    fn round_open(&self, channel: Channel, epoch: u64) -> bool {
        let state = lock(&self.run.state);
        state.rounds.iter().any(|(key, round)| {
            key.0 == channel && key.1 == epoch && round.result.is_none() && !round.inputs.is_empty()
        })
    }

    fn report(&self, report: Report) {
        if let Some(member) = lock(&self.run.state).members.get_mut(&self.me) {
            member.report = Some(report);
        }
        self.tell();
    }

    fn average(
        &self,
        channel: Channel,
        call: RoundCall,
    ) -> BoxFuture<'_, Result<Outcome<RoundResult>, RoundFailed>> {
        async move {
            let key = (channel, call.epoch, call.lineage);
            let mut news = self.run.news.subscribe();
            let failed = |reason: &str, vector| RoundFailed {
                epoch: call.epoch,
                reason: reason.to_owned(),
                vector,
                faults: Vec::new(),
            };
            if self.is_over(&key) {
                return Err(failed("the round is over", call.vector));
            }
            let input = (call.vector, call.weight, call.gather);
            let mut result = self.contribute(key, Some(input), false);
            self.tell();
            let limit = call.timeout.unwrap_or(ROUND_SECONDS);
            let wait = async {
                while result.is_none() {
                    if news.changed().await.is_err() {
                        break;
                    }
                    result = self.contribute(key, None, false);
                }
            };
            // Past the limit the round ends with who is there.
            let _late = tokio::time::timeout(limit, wait).await;
            let result = result.or_else(|| self.contribute(key, None, true));
            self.tell();
            result.map(Outcome::clean).ok_or_else(|| failed("the round has gone", Vec::new()))
        }
        .boxed()
    }

    fn publish(&self, snapshot: Snapshot) {
        if let Some(member) = lock(&self.run.state).members.get_mut(&self.me) {
            member.snapshot = Some(snapshot);
        }
        self.tell();
    }

    fn download(
        &self,
        lineage: [u8; 32],
        epoch_min: u64,
        _timeout: Duration,
    ) -> BoxFuture<'_, Result<Outcome<Snapshot>, DownloadFailed>> {
        let state = lock(&self.run.state);
        let others = state.members.iter().filter(|(peer, _)| **peer != self.me);
        let newest = others
            .filter_map(|(_, member)| member.snapshot.clone())
            .filter(|snapshot| snapshot.epoch >= epoch_min)
            .max_by_key(|snapshot| (snapshot.lineage == lineage, snapshot.epoch));
        let found = newest.map(Outcome::clean).ok_or_else(|| DownloadFailed {
            epoch_min,
            offered: Offered::No,
            reason: "nobody offers it".to_owned(),
            faults: Vec::new(),
        });
        async move { found }.boxed()
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    fn memory(&self) -> BTreeMap<Purpose, u64> {
        let held = |snapshot: &Snapshot| snapshot.blobs.values().map(Bytes::len).sum::<usize>() as u64;
        let state = lock(&self.run.state);
        let snapshot =
            state.members.get(&self.me).and_then(|member| member.snapshot.as_ref()).map_or(0, held);
        BTreeMap::from([(Purpose::Snapshot, snapshot)])
    }

    fn leave(&self) -> BoxFuture<'_, ()> {
        self.go();
        async {}.boxed()
    }
}

impl Drop for LocalDialect {
    fn drop(&mut self) {
        self.go();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
