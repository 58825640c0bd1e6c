//! A peer that computes nothing and keeps the newest state for those who come when everybody else has left.
//!
//! It is a member that is never ready for a round: nobody plans it in or waits for it, and its history, which is always
//! a little old, is evidence of nothing unless it is ahead.

use crate::native::download_failed;
use crate::wire::Note;
use crate::{DownloadFailed, Invite, JoinError, Lineage, Snapshot};
use potluck_averaging::{Directory, Member, Progress, Roll, Swarm, SwarmConfig};
use potluck_net::{Env, Outcome, PeerId, Transport};
use potluck_transfer::{Exchange, Snapshot as Stored};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Why a state is not kept.
const NO_LINEAGE: &str = "the state has no lineage: no session of potluck has published it";

/// How to join a run as its keeper.
#[derive(Clone, Default)]
pub struct KeeperConfig {
    /// The run.
    pub run_id: String,
    /// What is equal on all its peers; a [`Sight`](crate::Sight) or a checkpoint holds it.
    pub manifest: BTreeMap<String, String>,
    /// Peers that may be in the run.
    pub bootstrap: Vec<PeerId>,
    /// Where to find more.
    pub directory: Option<Arc<dyn Directory>>,
    /// The invite of a closed run, as text.
    pub invite: Option<String>,
    /// A state that is there already.
    pub held: Option<Snapshot>,
}

/// See the module. Ends when dropped; [`Keeper::leave`] says goodbye first.
pub struct Keeper {
    swarm: Swarm,
    exchange: Exchange,
}

impl Keeper {
    /// Join. With nobody there, that is the first peer of the run.
    ///
    /// # Errors
    /// [`JoinError`]: the invite, a differing manifest, or the network.
    pub async fn join(
        transport: Arc<dyn Transport>,
        env: Env,
        config: KeeperConfig,
    ) -> Result<Self, JoinError> {
        let mut swarm = SwarmConfig::new(config.run_id.clone(), config.bootstrap);
        swarm.owner = config.manifest.get("owner").and_then(|owner| owner.parse().ok());
        Invite::admit(swarm.owner, &config.run_id, config.invite.as_deref())?;
        swarm.invite =
            config.invite.as_deref().map(Invite::from_text).transpose()?.map(|invite| invite.inner);
        swarm.manifest = config.manifest;
        swarm.auxiliary = true;
        swarm.directory = config.directory;
        let network = |error: String| JoinError::Network(error);
        let (closed, known) = (swarm.owner.is_some(), Arc::new(OnceLock::<Roll>::new()));
        let members = known.clone();
        let admits = move |peer: &PeerId| !closed || members.get().is_some_and(|roll| roll.contains(peer));
        let exchange = Exchange::start_for(transport.clone(), env.clone(), &config.run_id, admits)
            .map_err(|error| network(error.to_string()))?;
        // From the first message on: nobody shall wait for us, and whoever comes shall see what we have.
        swarm.progress = match config.held {
            Some(snapshot) => offer(&exchange, snapshot).ok_or_else(|| network(NO_LINEAGE.to_owned()))?.1,
            None => Progress { ready: false, ..Progress::default() },
        };
        let swarm = Swarm::join(transport, env, swarm).await.map_err(|error| network(error.to_string()))?;
        known.get_or_init(|| swarm.roll());
        Ok(Self { swarm, exchange })
    }

    /// Peers that train, with the epoch that each works on.
    pub fn trainers(&self) -> Vec<(PeerId, u64)> {
        let trainer = |(peer, member): (&PeerId, &Member)| {
            (!member.local && !member.auxiliary).then_some((*peer, member.epoch))
        };
        self.swarm.look(|view| view.members.iter().filter_map(trainer).collect())
    }

    /// Resolves when `trainers` may have changed. Cancel-safe.
    pub async fn changed(&self) {
        self.swarm.changed().await;
    }

    /// Download the newest state, of `epoch_min` or later.
    ///
    /// # Errors
    /// [`DownloadFailed`]; what has arrived is kept for the next attempt.
    pub async fn fetch(
        &self,
        epoch_min: u64,
        timeout: Duration,
    ) -> Result<Outcome<Snapshot>, DownloadFailed> {
        let ahead = self.trainers().into_iter().filter(|(_, epoch)| *epoch >= epoch_min);
        let donors: Vec<PeerId> = ahead.map(|(peer, _)| peer).collect();
        let downloaded = self.exchange.download(&donors, epoch_min, timeout).await;
        let outcome = downloaded.map_err(|error| download_failed(epoch_min, error))?;
        Ok(outcome.map(|Stored { epoch, lineage, meta, blobs }| Snapshot { epoch, lineage, meta, blobs }))
    }

    /// Offer this state to whoever is behind it. Its history is told to everybody.
    ///
    /// # Errors
    /// Why it cannot be: it was not made by a session.
    pub fn hold(&self, snapshot: Snapshot) -> Result<Lineage, &'static str> {
        let (lineage, progress) = offer(&self.exchange, snapshot).ok_or(NO_LINEAGE)?;
        self.swarm.report_now(progress);
        Ok(lineage)
    }

    /// Say goodbye, and end everything.
    pub async fn leave(&self) {
        self.swarm.leave().await;
    }
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keeper({})", self.swarm.local_peer().short())
    }
}

/// Serve it, and what to tell the others about it.
fn offer(exchange: &Exchange, snapshot: Snapshot) -> Option<(Lineage, Progress)> {
    let lineage = Lineage::of(&snapshot)?;
    let Snapshot { epoch, lineage: hash, meta, blobs } = snapshot;
    exchange.publish(Arc::new(Stored { epoch, lineage: hash, meta, blobs }));
    let note = Note { lineage, contributed: 0, loss: None, state_due: None, sketch: None, waiting: None };
    let progress = Progress { epoch, samples: 0, samples_per_second: 0.0, ready: false, app: note.encode() };
    Some((lineage, progress))
}
