//! The peers to ask first: all addresses dialed at once, each again for ever, and a line for each that says how far it
//! got.

use crate::convert;
use crate::shared::{Shared, lock};
use crate::stage::{self, Stage};
use libp2p::Multiaddr;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use potluck_net::PeerId;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// How far the last dial of one bootstrap address got.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootstrapAttempt {
    /// As it was given.
    pub address: String,
    /// The stage that was reached, or that failed.
    pub stage: Stage,
    /// What went wrong there; empty if nothing did.
    pub detail: String,
    /// Whether the peer is connected.
    pub ok: bool,
}

impl fmt::Display for BootstrapAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.ok, self.stage) {
            (true, _) => write!(f, "{}: connected", self.address),
            (false, Stage::Dialing) => write!(f, "{}: no answer yet", self.address),
            (false, stage) => write!(f, "{}: failed at {stage}: {}", self.address, self.detail),
        }
    }
}

/// What the callers see.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) attempts: Vec<BootstrapAttempt>,
    pub(crate) peers: Vec<PeerId>,
}

struct Target {
    address: Multiaddr,
    peer: libp2p::PeerId,
    dialing: Option<ConnectionId>,
    retry_at: Instant,
    backoff: Duration,
    /// The first dial has ended, one way or the other.
    tried: bool,
}

/// The dialing side; lives in the swarm's task.
pub(crate) struct Bootstrap {
    targets: Vec<Target>,
}

impl Bootstrap {
    /// `addresses` end in `/p2p/<id>`; checked at the start.
    pub(crate) fn new(addresses: Vec<(Multiaddr, libp2p::PeerId)>, shared: &Shared) -> Self {
        let mut report = lock(&shared.bootstrap);
        report.peers = addresses.iter().filter_map(|(_, peer)| convert::from_libp2p(peer)).collect();
        report.peers.sort();
        report.peers.dedup();
        report.attempts = addresses
            .iter()
            .map(|(address, _)| BootstrapAttempt {
                address: address.to_string(),
                stage: Stage::Dialing,
                detail: String::new(),
                ok: false,
            })
            .collect();
        let retry_at = Instant::now();
        let target = |(address, peer)| Target {
            address,
            peer,
            dialing: None,
            retry_at,
            backoff: RETRY_FIRST,
            tried: false,
        };
        Self { targets: addresses.into_iter().map(target).collect() }
    }

    pub(crate) fn contains(&self, peer: &libp2p::PeerId) -> bool {
        self.targets.iter().any(|target| target.peer == *peer)
    }

    /// Whether an address still waits for the answer to its first dial.
    pub(crate) fn beginning(&self) -> bool {
        self.targets.iter().any(|target| !target.tried)
    }

    /// The dials that are due.
    pub(crate) fn due(&mut self, now: Instant, connected: impl Fn(&libp2p::PeerId) -> bool) -> Vec<DialOpts> {
        let mut dials = Vec::new();
        for target in &mut self.targets {
            if target.dialing.is_some() || now < target.retry_at || connected(&target.peer) {
                continue;
            }
            // Each address on its own, so that a slow one holds up no other and each gets its own line.
            let dial = DialOpts::peer_id(target.peer)
                .addresses(vec![target.address.clone()])
                .condition(PeerCondition::Always)
                .build();
            target.dialing = Some(dial.connection_id());
            dials.push(dial);
        }
        dials
    }

    pub(crate) fn on_connected(&mut self, peer: &libp2p::PeerId, id: ConnectionId, shared: &Shared) {
        let mut report = lock(&shared.bootstrap);
        for (target, attempt) in self.targets.iter_mut().zip(&mut report.attempts) {
            if target.peer != *peer {
                continue;
            }
            if target.dialing == Some(id) {
                target.dialing = None;
            }
            target.backoff = RETRY_FIRST;
            target.tried = true;
            attempt.ok = true;
            attempt.stage = Stage::Connected;
            attempt.detail.clear();
        }
        drop(report);
        shared.bootstrap_changed.notify_waiters();
    }

    pub(crate) fn on_disconnected(&mut self, peer: &libp2p::PeerId, now: Instant, shared: &Shared) {
        let mut report = lock(&shared.bootstrap);
        for (target, attempt) in self.targets.iter_mut().zip(&mut report.attempts) {
            if target.peer == *peer {
                target.retry_at = now + target.backoff;
                attempt.ok = false;
                attempt.stage = Stage::Connect;
                attempt.detail = "the connection was lost".into();
            }
        }
    }

    pub(crate) fn on_failure(
        &mut self,
        id: ConnectionId,
        error: &DialError,
        now: Instant,
        connected: bool,
        shared: &Shared,
    ) {
        let mut report = lock(&shared.bootstrap);
        for (target, attempt) in self.targets.iter_mut().zip(&mut report.attempts) {
            if target.dialing != Some(id) {
                continue;
            }
            target.dialing = None;
            target.tried = true;
            target.retry_at = now + target.backoff;
            target.backoff = (target.backoff * 2).min(RETRY_MAX);
            // Another address of the same peer may have won meanwhile; then this one does not matter.
            if let Some(failed) = stage::attempts(error).pop()
                && !connected
            {
                attempt.ok = false;
                attempt.stage = failed.stage;
                attempt.detail = failed.detail;
                tracing::debug!(target: "potluck::net", "bootstrap {attempt}");
            }
        }
        drop(report);
        shared.bootstrap_changed.notify_waiters();
    }
}
