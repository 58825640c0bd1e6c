//! A run on a simulated network: the real session, averaging and compression, in virtual time, on links as they were
//! asked for. Nothing here is computed from a formula; what `potluck sim` prints is what these peers measured.

use potluck_collab::{
    Loaded, Policy, Scheme, Session, SessionConfig, Snapshot, Status, Step, TensorInfo, TensorRole,
};
use potluck_net::{Env, PeerId, Tasks, Transport};
use potluck_net_sim::{PeerSpec, SimNet, SimTransport, Traffic};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Steps of one epoch at each peer, and samples of a step.
const STEPS: u64 = 10;
const SAMPLES: u64 = 16;
/// How long everybody may take to find everybody, and a round to begin.
const JOIN_LIMIT: Duration = Duration::from_secs(120);
/// Virtual time after which a run that does not get on is given up, by epoch.
const EPOCH_LIMIT: Duration = Duration::from_secs(24 * 3600);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What is simulated.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) peers: usize,
    /// Values of the gradient vector, as simulated.
    pub(crate) values: usize,
    /// Bytes of the state that a newcomer loads, as simulated.
    pub(crate) state_bytes: usize,
    pub(crate) up_bytes_per_second: f64,
    pub(crate) down_bytes_per_second: f64,
    pub(crate) round_trip: Duration,
    pub(crate) scheme: Scheme,
    pub(crate) compute: Duration,
    /// Chance of each peer to be killed in an epoch.
    pub(crate) churn: f64,
    pub(crate) rounds: u64,
}

/// One peer's view of one round.
#[derive(Debug, Clone)]
pub(crate) struct Round {
    pub(crate) seconds: f64,
    pub(crate) gather_seconds: f64,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) frames_sent: u64,
    pub(crate) members: usize,
}

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Of all peers.
    pub(crate) rounds: Vec<Round>,
    pub(crate) failed: u64,
    pub(crate) faults: BTreeMap<String, u64>,
    /// Times that a peer was killed.
    pub(crate) killed: u64,
    /// Seconds that downloads of the state took, one for each.
    pub(crate) loads: Vec<f64>,
    /// Virtual seconds from the first sample to the last epoch.
    pub(crate) seconds: f64,
    /// Bytes of all peers over their links in that time.
    pub(crate) up_bytes: u64,
    pub(crate) down_bytes: u64,
    /// Epochs that came to an end.
    pub(crate) epochs: u64,
}

type Log = Arc<Mutex<Outcome>>;

struct Peer {
    transport: Arc<SimTransport>,
    /// Dropping it ends the peer's program.
    life: Option<(Tasks, Session)>,
}

/// Simulate; the same seed gives the same figures.
pub(crate) fn rehearse(seed: u64, plan: &Plan) -> Result<Outcome, String> {
    potluck_net_sim::run(seed, async |net| Stage::new(net, plan.clone()).play(seed).await)
}

struct Stage {
    net: SimNet,
    plan: Plan,
    peers: BTreeMap<PeerId, Peer>,
    log: Log,
    state: bytes::Bytes,
}

impl Stage {
    fn new(net: SimNet, plan: Plan) -> Self {
        let state = vec![0; plan.state_bytes].into();
        Self { net, plan, peers: BTreeMap::new(), log: Log::default(), state }
    }

    async fn play(mut self, seed: u64) -> Result<Outcome, String> {
        let spec = PeerSpec {
            up_bytes_per_second: self.plan.up_bytes_per_second,
            down_bytes_per_second: self.plan.down_bytes_per_second,
            latency: self.plan.round_trip / 4,
            ..PeerSpec::default()
        };
        for _ in 0..self.plan.peers {
            let transport = self.net.add_peer(spec.clone());
            let id = transport.local_peer();
            self.peers.insert(id, Peer { transport, life: None });
            self.join(id).await?;
        }
        self.meet().await?;
        let (begun, before) = (Instant::now(), self.traffic());
        let ids: Vec<PeerId> = self.peers.keys().copied().collect();
        ids.into_iter().for_each(|id| self.train(id));
        self.follow(seed).await?;
        let after = self.traffic();
        let mut outcome = std::mem::take(&mut *lock(&self.log));
        outcome.seconds = begun.elapsed().as_secs_f64();
        outcome.up_bytes = after.up_bytes - before.up_bytes;
        outcome.down_bytes = after.down_bytes - before.down_bytes;
        outcome.epochs = self.plan.rounds;
        for peer in self.peers.values() {
            if let Some((_, session)) = &peer.life {
                let status = session.status().borrow().clone();
                count(&mut outcome, &status);
            }
        }
        Ok(outcome)
    }

    async fn join(&mut self, id: PeerId) -> Result<(), String> {
        let others = self.peers.iter().filter(|(other, peer)| **other != id && peer.life.is_some());
        let tensor = TensorInfo::vector("values", self.plan.values, TensorRole::Gradient);
        let target = STEPS * SAMPLES * self.plan.peers as u64;
        let mut config = SessionConfig::new("rehearsal", target, vec![tensor]);
        config.grad_compression = Policy::Fixed(self.plan.scheme);
        config.bootstrap = others.map(|(other, _)| *other).collect();
        config.load_state_timeout = EPOCH_LIMIT;
        let Some(peer) = self.peers.get_mut(&id) else { return Ok(()) };
        let joined = Session::join(peer.transport.clone(), peer.transport.env(), config).await;
        let session = joined.map_err(|error| error.to_string())?;
        session.publish(snapshot(&self.state));
        peer.life = Some((Tasks::new(), session));
        Ok(())
    }

    /// Until everybody knows everybody: else the first rounds would be of a part only.
    async fn meet(&self) -> Result<(), String> {
        let until = Instant::now() + JOIN_LIMIT;
        let knows = |peer: &Peer| {
            let all = |session: &Session| session.status().borrow().peers.len() == self.plan.peers;
            peer.life.as_ref().is_some_and(|(_, session)| all(session))
        };
        while !self.peers.values().all(knows) {
            if Instant::now() >= until {
                return Err("the simulated peers do not find each other in two minutes".to_owned());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    fn train(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get(&id) else { return };
        let Some((tasks, session)) = &peer.life else { return };
        let program = Program {
            session: session.clone(),
            transport: peer.transport.clone(),
            net: self.net.clone(),
            plan: self.plan.clone(),
            log: self.log.clone(),
            state: self.state.clone(),
        };
        tasks.spawn(program.run());
    }

    fn epoch(&self) -> u64 {
        let sessions = self.peers.values().filter_map(|peer| peer.life.as_ref());
        sessions.map(|(_, session)| session.epoch()).max().unwrap_or(0)
    }

    /// Until the last epoch, killing peers and starting them again on the way.
    async fn follow(&mut self, seed: u64) -> Result<(), String> {
        let chance = Env::simulated(seed ^ 0x0063_6875_726e, Duration::ZERO);
        let (mut epoch, mut dead) = (0, BTreeSet::new());
        let mut until = Instant::now() + EPOCH_LIMIT;
        while self.epoch() < self.plan.rounds {
            if Instant::now() >= until {
                return Err(format!(
                    "epoch {epoch} has not ended after a day: these links are too slow for it"
                ));
            }
            tokio::time::sleep(LOOK_EVERY).await;
            if self.epoch() == epoch {
                continue;
            }
            (epoch, until) = (self.epoch(), Instant::now() + EPOCH_LIMIT);
            for id in std::mem::take(&mut dead) {
                let transport = self.net.restart(id);
                self.peers.insert(id, Peer { transport, life: None });
                self.join(id).await?;
                self.train(id);
            }
            for id in self.peers.keys().copied().collect::<Vec<_>>() {
                // One stays, whatever happens: a run without peers is another question.
                let last = dead.len() + 1 >= self.peers.len();
                if !last && (chance.random_u64() as f64 / u64::MAX as f64) < self.plan.churn {
                    self.kill(id);
                    dead.insert(id);
                }
            }
        }
        Ok(())
    }

    fn kill(&mut self, id: PeerId) {
        self.net.crash(id);
        let Some((_, session)) = self.peers.get_mut(&id).and_then(|peer| peer.life.take()) else { return };
        let status = session.status().borrow().clone();
        let mut log = lock(&self.log);
        log.killed += 1;
        count(&mut log, &status);
    }

    fn traffic(&self) -> Traffic {
        self.peers.keys().fold(Traffic::default(), |mut sum, id| {
            let traffic = self.net.traffic(*id);
            sum.up_bytes += traffic.up_bytes;
            sum.down_bytes += traffic.down_bytes;
            sum
        })
    }
}

fn count(outcome: &mut Outcome, status: &Status) {
    outcome.failed += status.rounds_failed;
    for (kind, count) in &status.faults {
        *outcome.faults.entry(kind.clone()).or_default() += count;
    }
}

fn lock(log: &Log) -> std::sync::MutexGuard<'_, Outcome> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

fn snapshot(state: &bytes::Bytes) -> Snapshot {
    Snapshot { blobs: BTreeMap::from([("state".to_owned(), state.clone())]), ..Snapshot::default() }
}

/// What one peer's training program does.
struct Program {
    session: Session,
    transport: Arc<SimTransport>,
    net: SimNet,
    plan: Plan,
    log: Log,
    state: bytes::Bytes,
}

impl Program {
    async fn run(self) {
        let (mut samples, mut gathered) = (0, 0);
        loop {
            let step = self.session.step(samples);
            gathered += std::mem::take(&mut samples);
            match step {
                Step::Accumulate => {
                    tokio::time::sleep(self.plan.compute / STEPS as u32).await;
                    samples = SAMPLES;
                }
                Step::Average => self.average(std::mem::take(&mut gathered)).await,
                Step::LoadState => {
                    let begun = Instant::now();
                    if self.session.load_state().await.value != Loaded::Nothing {
                        lock(&self.log).loads.push(begun.elapsed().as_secs_f64());
                    }
                    gathered = 0;
                }
                Step::AverageState | Step::Apply => {}
            }
        }
    }

    async fn average(&self, samples: u64) {
        let id = self.transport.local_peer();
        let frames = || self.net.traffic(id).frames_sent;
        let before = frames();
        let vector = self.gradient(id);
        let averaged = self.session.average_gradients(vector, samples as f64).await.value;
        if !averaged.alone {
            lock(&self.log).rounds.push(Round {
                seconds: averaged.stats.seconds,
                gather_seconds: averaged.stats.gather_seconds,
                bytes_sent: averaged.stats.bytes_sent,
                bytes_received: averaged.stats.bytes_received,
                frames_sent: frames() - before,
                members: averaged.members.len(),
            });
        }
        self.session.epoch_done(Some(snapshot(&self.state)));
    }

    /// Values that no compression finds easy: they decide nothing, but they are real bytes.
    fn gradient(&self, id: PeerId) -> Vec<f32> {
        let mut bits = id.as_bytes().iter().fold(self.session.epoch() | 1, |bits, byte| {
            (bits ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        }) | 1;
        let mut next = || {
            bits ^= bits << 13;
            bits ^= bits >> 7;
            bits ^= bits << 17;
            (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..self.plan.values).map(|_| next()).collect()
    }
}
