//! How to take part in a run, and where to find its peers.

use crate::finding::JoinError;
use crate::invite::Invite;
use crate::wire::Progress;
use futures::future::BoxFuture;
use potluck_net::PeerId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Where peers of a run find each other without knowing one; implemented for the DHT.
pub trait Directory: Send + Sync + 'static {
    /// Say that we are part of `run`, for `ttl` from now.
    fn announce<'a>(&'a self, run: &'a str, ttl: Duration) -> BoxFuture<'a, ()>;
    /// Peers that said so, with addresses if known.
    fn lookup<'a>(&'a self, run: &'a str) -> BoxFuture<'a, Vec<(PeerId, Vec<String>)>>;
}

/// What must be equal among all peers of a run: field by field, as text.
pub type Manifest = BTreeMap<String, String>;

/// How to take part in a run.
#[derive(Clone)]
pub struct SwarmConfig {
    /// The run's id.
    pub run: String,
    /// Peers to contact first; their addresses must be known to the transport. Empty for the first peer of a run.
    pub bootstrap: Vec<PeerId>,
    /// Where to find more peers.
    pub directory: Option<Arc<dyn Directory>>,
    /// Compared at joining; differing fields are told to both sides.
    pub manifest: Manifest,
    /// This peer dials out only.
    pub client_mode: bool,
    /// This peer has no vector and only helps reducing.
    pub auxiliary: bool,
    /// The owner of a closed run: peers without an invite signed by it are refused.
    pub owner: Option<PeerId>,
    /// Our invite to a closed run.
    pub invite: Option<Invite>,
    /// What we say of ourselves from the first message on, until the first report.
    pub progress: Progress,
    /// How long [`Swarm::join`](crate::Swarm::join) may take.
    pub join_timeout: Duration,
}

impl SwarmConfig {
    /// A configuration for an open run.
    pub fn new(run: impl Into<String>, bootstrap: Vec<PeerId>) -> Self {
        Self {
            run: run.into(),
            bootstrap,
            directory: None,
            manifest: Manifest::new(),
            client_mode: false,
            auxiliary: false,
            owner: None,
            invite: None,
            progress: Progress::default(),
            join_timeout: Duration::from_secs(15),
        }
    }

    /// Whether peers could agree to it.
    pub(crate) fn check(&self) -> Result<(), JoinError> {
        if self.run.is_empty() || self.run.len() > 256 {
            let reason = format!("{} bytes, 1 to 256 allowed", self.run.len());
            return Err(JoinError::Config { field: "run", reason });
        }
        if self.manifest.len() > 1024 {
            let reason = format!("{} fields, at most 1024 allowed", self.manifest.len());
            return Err(JoinError::Config { field: "manifest", reason });
        }
        Ok(())
    }
}
