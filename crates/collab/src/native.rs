//! The native protocol under a session: potluck's membership, rounds and state transfer.

pub(crate) mod sequels;

use crate::dialect::{
    Channel, Dialect, DownloadFailed, MissedRound, Offered, PeerView, Rates, Report, RoundCall, RoundFailed,
    RoundResult, RoundStats, Sequel, Snapshot, Traffic,
};
use crate::factors::Factors;
use crate::wire::Note;
use crate::{JoinError, Purpose, SessionConfig, manifest};
use bytes::Bytes;
use futures::future::BoxFuture;
use potluck_averaging::{
    Averager, AveragerConfig, JoinError as SwarmError, Member, Progress, Round, RoundError, RoundErrorKind,
    RoundRequest, Swarm, SwarmConfig,
};
use potluck_compression::Policy;
use potluck_net::{Env, FaultKind, Outcome, PeerFault, PeerId, Transport};
use potluck_transfer::{DownloadError, Exchange, Snapshot as Stored};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Without a limit from the user: far above any round whose peers are alive, because what is lost is noticed earlier.
const ROUND_TIMEOUT: Duration = Duration::from_secs(600);

pub(crate) struct Native {
    swarm: Swarm,
    gradients: Averager,
    factors: Option<Arc<Factors>>,
    state: Averager,
    exchange: Exchange,
    sent: AtomicU64,
    received: AtomicU64,
    auxiliary: bool,
    epoch_ends_with_state: bool,
}

impl Native {
    pub(crate) async fn join(
        transport: Arc<dyn Transport>,
        env: Env,
        config: &SessionConfig,
        factors: Option<Arc<Factors>>,
    ) -> Result<Self, JoinError> {
        let mut swarm = SwarmConfig::new(config.run_id.clone(), config.bootstrap.clone());
        swarm.manifest = manifest(config);
        swarm.client_mode = config.client_mode;
        swarm.auxiliary = config.auxiliary;
        swarm.directory = config.directory.clone();
        swarm.owner = config.owner;
        swarm.invite =
            config.invite.as_deref().map(crate::Invite::from_text).transpose()?.map(|invite| invite.inner);
        let run_id = config.run_id.clone();
        let swarm =
            Swarm::join(transport.clone(), env.clone(), swarm).await.map_err(|error| match error {
                SwarmError::Refused { reason, .. } => {
                    JoinError::Mismatch { run_id, differences: vec![reason] }
                }
                other => JoinError::Network(other.to_string()),
            })?;
        let averager = |name: &str, tensors: &Vec<_>, compression: &Policy| {
            Averager::new(&swarm, name, AveragerConfig::new(tensors.clone(), compression.clone()))
        };
        let gradients = match &factors {
            None => averager("gradients", &config.tensors, &config.grad_compression),
            Some(factors) => {
                let mut phases = AveragerConfig::new(factors.first.clone(), config.grad_compression.clone());
                phases.second = Some(factors.second.clone());
                Averager::new(&swarm, "gradients", phases)
            }
        };
        let (closed, roll) = (config.owner.is_some(), swarm.roll());
        let admits = move |peer: &PeerId| !closed || roll.contains(peer);
        let exchange = Exchange::start_for(transport, env, &config.run_id, admits)
            .map_err(|error| JoinError::Network(error.to_string()))?;
        Ok(Self {
            gradients,
            factors,
            state: averager("state", &config.state_tensors, &config.state_compression),
            exchange,
            swarm,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            auxiliary: config.auxiliary,
            epoch_ends_with_state: config.policy.ends_epochs_with_state(),
        })
    }

    async fn round(&self, channel: Channel, call: RoundCall) -> Result<Outcome<RoundResult>, RoundFailed> {
        let averager = match channel {
            Channel::Gradients => &self.gradients,
            Channel::State => &self.state,
        };
        let epoch = call.epoch;
        let vector = if self.auxiliary { Vec::new() } else { call.vector };
        // Kept for the one case in which an average must be dropped.
        let kept = if channel == Channel::State { vector.clone() } else { Vec::new() };
        let bytes_plain = vector.len() as u64 * 4;
        let mut gather = call.lineage.to_vec();
        // Where it ends an epoch, the average is that of movements and weighs samples: equal ones still make history.
        let may_be_equal = channel == Channel::State && !self.epoch_ends_with_state;
        let vector = if may_be_equal && !self.auxiliary {
            let hashing = move || (hash_of(&vector), vector);
            let (hash, vector) = self.swarm.env().offload(hashing).await;
            gather.extend(hash.as_bytes());
            vector
        } else {
            gather.extend(&call.gather);
            vector
        };
        let mut request = RoundRequest::new(Some(epoch), vector, call.weight);
        request.gather = gather.into();
        request.gather_names_vector = may_be_equal;
        request.timeout = call.timeout.unwrap_or(ROUND_TIMEOUT);
        let stepped = match (channel, &self.factors) {
            (Channel::Gradients, Some(factors)) if !self.auxiliary => self.low_rank(factors, request).await,
            _ => averager.step(request).await,
        };
        let outcome = stepped.map_err(|error| RoundFailed {
            epoch,
            reason: error.kind.to_string(),
            vector: error.vector,
            faults: error.faults,
        })?;
        let stats = &outcome.value.stats;
        self.sent.fetch_add(stats.bytes_sent, Ordering::Relaxed);
        self.received.fetch_add(stats.bytes_received, Ordering::Relaxed);
        let round_stats = RoundStats {
            seconds: stats.gather_seconds + stats.transfer_seconds + stats.agree_seconds,
            gather_seconds: stats.gather_seconds,
            bytes_sent: stats.bytes_sent,
            bytes_received: stats.bytes_received,
            bytes_plain: if outcome.value.unchanged { 0 } else { bytes_plain },
            bytes_encoded: stats.encoded_bytes,
            attempts: outcome.value.attempt + 1,
            saturated: stats.saturated,
        };
        let of_one_history =
            outcome.value.members.iter().all(|member| member.gathered.starts_with(&call.lineage));
        if channel == Channel::State && !of_one_history {
            // Movements away from different states do not add up; every member sees the same list and drops it.
            return Err(RoundFailed {
                epoch,
                reason: "members of two histories met; the one that gives way loads the other's state"
                    .to_owned(),
                vector: kept,
                faults: outcome.faults,
            });
        }
        let Outcome { value: round, faults } = outcome;
        let value = RoundResult {
            vector: round.vector,
            members: round.members.iter().map(|member| member.peer).collect(),
            gathered: round.members.iter().map(|member| said(&member.gathered)).collect(),
            weight_total: round.weight_total,
            plan_hash: round.result_hash,
            unchanged: round.unchanged,
            record: round.record,
            stats: round_stats,
        };
        Ok(Outcome { value, faults })
    }

    /// More bytes than any sequel has: where a vector is cut, a codebook more may be sent.
    fn sequel_bytes_max(&self) -> u64 {
        let of = |averager: &Averager| averager.config().encoded_bytes() as u64;
        2 * of(&self.gradients).max(of(&self.state)) + (1 << 20)
    }

    /// A round of gradients whose matrices travel as factors. The factors' state is as before unless the session
    /// commits it later.
    async fn low_rank(
        &self,
        factors: &Arc<Factors>,
        request: RoundRequest,
    ) -> Result<Outcome<Round>, RoundError> {
        let env = self.swarm.env();
        let (mut request, vector) = (RoundRequest { vector: Vec::new(), ..request.clone() }, request.vector);
        let starting = factors.clone();
        let (begun, vector) = env
            .offload(move || {
                let begun = starting.begin(&vector);
                (begun, vector)
            })
            .await;
        let mut faults = Vec::new();
        if let Some(reason) = &begun.refused {
            let context = format!("{reason}: averaging without it");
            faults.push(PeerFault::new(self.swarm.local_peer(), FaultKind::NotFinite, context));
            request.weight = 0.0;
        }
        (request.vector, request.norm) = (begun.first, Some(begun.norm));
        let (round, next) = (begun.round, factors.clone());
        let between = Arc::new(move |average: &[f32]| next.between(round, average));
        let mut outcome = match self.gradients.step_twice(request, between).await {
            Ok(outcome) => outcome,
            Err(error) => {
                faults.extend(error.faults);
                return Err(RoundError { kind: error.kind, vector, faults });
            }
        };
        faults.append(&mut outcome.faults);
        let mut averaged = outcome.value;
        if averaged.members.len() <= 1 {
            factors.abort();
            if begun.refused.is_some() {
                return Err(RoundError { kind: RoundErrorKind::Empty, vector, faults });
            }
            averaged.vector = vector;
            return Ok(Outcome { value: averaged, faults });
        }
        let me = self.swarm.local_peer();
        let contributed = averaged.members.iter().any(|member| member.peer == me && member.weight > 0.0);
        let finishing = factors.clone();
        let (finished, averaged) = env
            .offload(move || {
                let vector = finishing.finish(round, &averaged.vector, &averaged.second, contributed);
                (vector, averaged)
            })
            .await;
        match finished {
            Ok(vector) => Ok(Outcome { value: Round { vector, ..averaged }, faults }),
            Err(reason) => Err(RoundError { kind: RoundErrorKind::Unusable { reason }, vector, faults }),
        }
    }
}

impl Dialect for Native {
    fn local_peer(&self) -> PeerId {
        self.swarm.local_peer()
    }

    fn peers(&self) -> Vec<PeerView> {
        let view_of = |(peer, member): (&PeerId, &Member)| PeerView {
            peer: *peer,
            epoch: member.epoch,
            samples: member.samples,
            samples_per_second: member.samples_per_second as f32,
            path: member.path,
            rates: rates(member),
            auxiliary: member.auxiliary,
            client: member.client,
            note: member.app.clone(),
        };
        self.swarm.look(|view| view.members.iter().filter(|(_, other)| !other.local).map(view_of).collect())
    }

    fn twice(&self) -> BTreeSet<PeerId> {
        let twice = |(peer, member): (&PeerId, &Member)| member.twice.then_some(*peer);
        self.swarm.look(|view| view.members.iter().filter_map(twice).collect())
    }

    fn has_left(&self, peer: &PeerId) -> bool {
        self.swarm.has_left(peer)
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.swarm.changed())
    }

    fn report(&self, report: Report) {
        let progress = Progress {
            epoch: report.epoch,
            samples: report.samples,
            samples_per_second: f64::from(report.samples_per_second),
            ready: true,
            app: report.note,
        };
        if report.urgent { self.swarm.report_now(progress) } else { self.swarm.report(progress) }
    }

    fn average(
        &self,
        channel: Channel,
        call: RoundCall,
    ) -> BoxFuture<'_, Result<Outcome<RoundResult>, RoundFailed>> {
        Box::pin(self.round(channel, call))
    }

    fn publish(&self, snapshot: Snapshot) {
        let Snapshot { epoch, lineage, meta, blobs } = snapshot;
        self.exchange.publish(Arc::new(Stored { epoch, lineage, meta, blobs }));
    }

    fn download(
        &self,
        lineage: [u8; 32],
        epoch_min: u64,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Outcome<Snapshot>, DownloadFailed>> {
        let (helpers, members): (Vec<PeerView>, Vec<PeerView>) =
            self.peers().into_iter().partition(|view| view.auxiliary);
        // Whoever is behind as well may have chunks of what we load.
        let others: Vec<PeerId> = members.iter().map(|view| view.peer).collect();
        let is_ahead = |view: &PeerView| view.epoch >= epoch_min;
        let ahead: Vec<PeerView> = members.into_iter().filter(is_ahead).collect();
        let mut donors = donors(&ahead, &lineage);
        if donors.is_empty() {
            // Of those who compute nothing, keepers have the state.
            donors = helpers.iter().filter(|view| is_ahead(view)).map(|view| view.peer).collect();
        }
        Box::pin(async move {
            let downloaded = self.exchange.download_of(lineage, &donors, &others, epoch_min, timeout).await;
            let outcome = downloaded.map_err(|error| download_failed(epoch_min, error))?;
            Ok(outcome.map(|Stored { epoch, lineage, meta, blobs }| Snapshot { epoch, lineage, meta, blobs }))
        })
    }

    fn remember(&self, sequel: Sequel) {
        self.exchange.remember(sequels::write(sequel));
    }

    fn missed(
        &self,
        lineage: [u8; 32],
        winner: [u8; 32],
        timeout: Duration,
    ) -> BoxFuture<'_, Option<Outcome<MissedRound>>> {
        // Helpers have no vectors.
        let members: Vec<PeerView> = self.peers().into_iter().filter(|view| !view.auxiliary).collect();
        let donors = donors(&members, &winner);
        Box::pin(async move {
            let bytes_max = self.sequel_bytes_max();
            // Half of the time is left for a state, if this does not come.
            let found = self.exchange.download_next(&donors, lineage, bytes_max, timeout / 2).await;
            let Outcome { value, faults } = found.ok()?;
            let read = sequels::Read::new(value)?;
            let (averager, factors) = match read.channel {
                Channel::Gradients => (&self.gradients, self.factors.clone()),
                Channel::State => (&self.state, None),
            };
            let config = averager.config().clone();
            let decode = move || read.decode(&config, factors.as_deref());
            match self.swarm.env().offload(decode).await {
                Ok(value) => Some(Outcome { value, faults }),
                Err(reason) => {
                    tracing::warn!(target: "potluck", "a round that we missed cannot be made up for: {reason}");
                    None
                }
            }
        })
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            bytes_sent: self.sent.load(Ordering::Relaxed),
            bytes_received: self.received.load(Ordering::Relaxed),
        }
    }

    fn rates(&self) -> Rates {
        let me = self.swarm.local_peer();
        self.swarm.look(|view| view.members.get(&me).map(rates).unwrap_or_default())
    }

    fn memory(&self) -> BTreeMap<Purpose, u64> {
        let held = self.exchange.held();
        BTreeMap::from([(Purpose::Snapshot, held.states), (Purpose::PastRounds, held.sequels)])
    }

    fn leave(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.swarm.leave().await;
            self.exchange.withdraw();
        })
    }
}

/// What a download that failed is to a session.
pub(crate) fn download_failed(epoch_min: u64, error: DownloadError) -> DownloadFailed {
    let reason = error.to_string();
    let (offered, faults) = match error {
        DownloadError::Interrupted { done, chunks, faults, .. } => {
            (Offered::Part(done as f32 / chunks.max(1) as f32), faults)
        }
        DownloadError::NobodyOffers { faults, .. } => {
            let busy = faults.iter().any(|fault| fault.kind == FaultKind::Busy);
            (if busy { Offered::Busy } else { Offered::No }, faults)
        }
        _ => (Offered::No, Vec::new()),
    };
    DownloadFailed { epoch_min, offered, reason, faults }
}

fn rates(member: &Member) -> Rates {
    Rates::measured(member.up_bytes_per_second, member.down_bytes_per_second)
}

/// What a member handed to all, behind the hash of its history.
fn said(gathered: &Bytes) -> Bytes {
    gathered.get(32..).map_or_else(Bytes::new, |said| gathered.slice_ref(said))
}

/// A hash over every bit, without a second copy of the values.
fn hash_of(values: &[f32]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(1 << 16);
    for some in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(some.iter().flat_map(|value| value.to_le_bytes()));
        hasher.update(&bytes);
    }
    hasher.finalize()
}

/// Of these, those with the history that won, as far as they say; else all.
fn donors(views: &[PeerView], winner: &[u8; 32]) -> Vec<PeerId> {
    let winners: Vec<PeerId> =
        views.iter().filter(|view| says_lineage(view, winner)).map(|view| view.peer).collect();
    if winners.is_empty() { views.iter().map(|view| view.peer).collect() } else { winners }
}

fn says_lineage(view: &PeerView, lineage: &[u8; 32]) -> bool {
    Note::decode(&view.note).is_some_and(|note| note.lineage.hash == *lineage)
}
