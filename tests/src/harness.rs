//! A simulated run: sessions that train a toy model on a simulated network, and what is done to them.

use crate::hub::Hub;
use crate::models::Model;
use crate::record::{Entry, Record};
use crate::trainer::{Mischief, Trainer, Training};
use potluck_collab::{
    Policy, PolicyKind, PowerSgd, Session, SessionConfig, StateEvery, TensorInfo, TensorRole,
};
use potluck_net::{Env, PeerId, Tasks, Transport};
use potluck_net_sim::{FaultGuard, PeerSpec, SimNet, SimTransport};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What all peers of a run have in common.
#[derive(Debug, Clone)]
pub struct RunSpec {
    /// Seed of the data and of the initial parameters.
    pub seed: u64,
    /// What is trained.
    pub model: Model,
    /// When peers average.
    pub policy: PolicyKind,
    /// When parameters are averaged.
    pub state_every: StateEvery,
    /// How gradients and parameters travel.
    pub compression: Policy,
    /// Low-rank compression on top.
    pub powersgd: Option<PowerSgd>,
    /// Samples of an epoch.
    pub target: u64,
    /// Epochs to train.
    pub epochs: u64,
}

impl RunSpec {
    /// Least squares, synchronous, uncompressed: 64 samples per epoch, 10 epochs.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            model: Model::LeastSquares,
            policy: PolicyKind::Synchronous,
            state_every: StateEvery::Never,
            compression: Policy::default(),
            powersgd: None,
            target: 64,
            epochs: 10,
        }
    }

    /// The session's config of one peer.
    pub fn config(&self, bootstrap: Vec<PeerId>) -> SessionConfig {
        let tensors = |role| {
            let infos = self.model.tensors().into_iter();
            infos.map(|(name, shape)| TensorInfo { key: name.to_owned(), shape, role }).collect::<Vec<_>>()
        };
        let mut config = SessionConfig::new("toy", self.target, tensors(TensorRole::Gradient));
        config.state_tensors = tensors(TensorRole::Parameter);
        config.policy = self.policy;
        config.average_state_every = self.state_every;
        config.grad_compression = self.compression.clone();
        config.state_compression = self.compression.clone();
        config.powersgd = self.powersgd;
        config.bootstrap = bootstrap;
        config.load_state_timeout = Duration::from_secs(60);
        config
    }
}

/// What one peer is like.
#[derive(Debug, Clone)]
pub struct PeerPlan {
    /// Its machine and links.
    pub machine: PeerSpec,
    /// Samples of one step.
    pub batch: usize,
    /// Time of one step.
    pub step_time: Duration,
    /// It computes no gradients.
    pub auxiliary: bool,
    /// What it does to its contributions.
    pub mischief: Mischief,
    /// In so many of a hundred epochs its program fails over the average.
    pub fumbles: u64,
}

impl Default for PeerPlan {
    fn default() -> Self {
        Self {
            machine: PeerSpec::default(),
            batch: 8,
            step_time: Duration::from_millis(250),
            auxiliary: false,
            mischief: Mischief::None,
            fumbles: 0,
        }
    }
}

struct Peer {
    plan: PeerPlan,
    data_seed: u64,
    /// Dropping it ends the peer's program.
    tasks: Option<Tasks>,
    transport: Arc<SimTransport>,
}

/// A run in progress.
pub struct World {
    /// The network, for faults that have no method here.
    pub net: SimNet,
    /// What happened.
    pub record: Record,
    spec: RunSpec,
    hub: Option<Hub>,
    peers: BTreeMap<PeerId, Peer>,
    partitions: Vec<FaultGuard>,
}

impl World {
    /// A run without peers.
    pub fn new(net: SimNet, spec: RunSpec) -> Self {
        Self {
            net,
            record: Record::default(),
            spec,
            hub: None,
            peers: BTreeMap::new(),
            partitions: Vec::new(),
        }
    }

    /// A run over an ideal protocol: shows what is the session's own doing.
    pub fn with_hub(net: SimNet, spec: RunSpec, hub: Hub) -> Self {
        Self { hub: Some(hub), ..Self::new(net, spec) }
    }

    /// A new peer joins through everybody who is alive.
    pub fn start(&mut self, plan: PeerPlan) -> PeerId {
        let transport = self.net.add_peer(plan.machine.clone());
        let peer = transport.local_peer();
        let data_seed = self.spec.seed.wrapping_mul(1000).wrapping_add(self.peers.len() as u64);
        if plan.mischief != Mischief::None {
            self.inject(peer, "mischief");
        }
        self.peers.insert(peer, Peer { plan, data_seed, tasks: None, transport });
        self.launch(peer);
        peer
    }

    /// Peers that run.
    pub fn live(&self) -> Vec<PeerId> {
        self.peers.iter().filter(|(_, peer)| peer.tasks.is_some()).map(|(peer, _)| *peer).collect()
    }

    fn launch(&mut self, id: PeerId) {
        let bootstrap: Vec<PeerId> = self.live().into_iter().filter(|other| *other != id).collect();
        let mut config = self.spec.config(bootstrap);
        let peer = self.peers.get_mut(&id).expect("launch is called with peers of this world");
        config.auxiliary = peer.plan.auxiliary;
        let training = Training {
            model: self.spec.model,
            policy: self.spec.policy,
            batch: peer.plan.batch,
            step_time: peer.plan.step_time,
            data_seed: peer.data_seed,
            initial_seed: self.spec.seed,
            auxiliary: peer.plan.auxiliary,
            mischief: peer.plan.mischief,
            fumbles: peer.plan.fumbles,
            epochs: self.spec.epochs,
        };
        let (env, record, hub) = (self.net.env(id), self.record.clone(), self.hub.clone());
        let tasks = Tasks::new();
        tasks.spawn(program(peer.transport.clone(), env, config, training, record, hub));
        peer.tasks = Some(tasks);
    }

    fn inject(&self, peer: PeerId, what: &str) {
        self.record.push(Entry::Injected { peer, what: what.to_owned(), at: Instant::now() });
    }

    fn stop(&mut self, peer: PeerId) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.tasks = None;
        }
        if let Some(hub) = &self.hub {
            hub.lose(peer);
        }
    }

    /// Kill a peer's process.
    pub fn crash(&mut self, peer: PeerId) {
        self.inject(peer, "crash");
        self.net.crash(peer);
        self.stop(peer);
    }

    /// Cut a peer's power: nobody is told.
    pub fn vanish(&mut self, peer: PeerId) {
        self.inject(peer, "vanish");
        self.net.vanish(peer);
        self.stop(peer);
    }

    /// Start a dead peer again.
    pub fn restart(&mut self, peer: PeerId) {
        let transport = self.net.restart(peer);
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.transport = transport;
        }
        self.launch(peer);
    }

    /// Stop a peer's network without ending it.
    pub fn freeze(&mut self, peer: PeerId) {
        self.inject(peer, "freeze");
        self.net.freeze(peer);
    }

    /// Let a frozen peer go on.
    pub fn thaw(&mut self, peer: PeerId) {
        self.net.thaw(peer);
    }

    /// Nothing gets from these peers to the others, and back unless `one_way`, until `heal_partitions`.
    pub fn partition(&mut self, some: &[PeerId], one_way: bool) {
        let others: Vec<PeerId> = self.peers.keys().filter(|peer| !some.contains(peer)).copied().collect();
        for peer in self.peers.keys() {
            self.inject(*peer, "partition");
        }
        self.partitions.push(self.net.partition(some, &others, one_way));
    }

    /// End all partitions.
    pub fn heal_partitions(&mut self) {
        self.partitions.clear();
    }

    /// From here on nothing is broken any more.
    pub fn healed(&self) {
        self.record.push(Entry::Healed { at: Instant::now() });
    }

    /// Wait until all live peers have the same history, of at least this epoch. The time it took, or what was wrong
    /// when the time was over.
    ///
    /// # Errors
    /// Who is where.
    pub async fn until_agreed(&self, epoch: u64, limit: Duration) -> Result<Duration, String> {
        let begun = Instant::now();
        loop {
            match self.disagreement(epoch) {
                None => return Ok(begun.elapsed()),
                Some(reason) if begun.elapsed() >= limit => return Err(reason),
                Some(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    fn disagreement(&self, epoch: u64) -> Option<String> {
        let latest = self.record.latest();
        let live = self.live();
        let at = |peer: &PeerId| latest.get(peer).map(|(lineage, ..)| *lineage);
        let first = live.first().and_then(&at);
        let agreed =
            first.is_some_and(|first| first.epoch >= epoch) && live.iter().all(|peer| at(peer) == first);
        let lines: Vec<String> =
            live.iter().map(|peer| format!("{} at {:?}", peer.short(), at(peer))).collect();
        (!agreed).then(|| lines.join(", "))
    }

    /// The loss of a peer's parameters on data that nobody trained on.
    pub fn loss(&self, peer: PeerId) -> Option<f32> {
        let (_, _, values) = self.record.latest().remove(&peer)?;
        Some(crate::reference::test_loss(self.spec.model, &values))
    }

    /// End everything; the streams that are left are leaks.
    pub async fn finish(mut self) -> (Record, usize) {
        self.partitions.clear();
        for peer in self.peers.values_mut() {
            if let Some(tasks) = peer.tasks.take() {
                tasks.shutdown().await;
            }
            peer.transport.close().await;
        }
        // What is on its way arrives, and whoever waited for it goes.
        tokio::time::sleep(Duration::from_secs(60)).await;
        (self.record, self.net.streams())
    }
}

/// A peer's program: join (again and again, if nobody answers), then train.
async fn program(
    transport: Arc<SimTransport>,
    env: Env,
    config: SessionConfig,
    training: Training,
    record: Record,
    hub: Option<Hub>,
) {
    let peer = transport.local_peer();
    let session = loop {
        let joined = match &hub {
            Some(hub) => Session::with_dialect(Arc::new(hub.join(peer)), env.clone(), config.clone()),
            None => Session::join(transport.clone(), env.clone(), config.clone()).await,
        };
        match joined {
            Ok(session) => break session,
            Err(error) => record.push(Entry::JoinFailed { peer, reason: error.to_string() }),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    record.push(Entry::Started { peer });
    let mut events = session.events();
    let trainer = Trainer::new(session, env, training, record.clone());
    let listen = async {
        while let Ok(event) = events.recv().await {
            record.push(Entry::Event { peer, event, at: Instant::now() });
        }
    };
    tokio::pin!(listen);
    tokio::select! {
        biased;
        () = &mut listen => {}
        () = trainer.run() => {}
    }
}
