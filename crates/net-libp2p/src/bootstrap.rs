//! The peers to ask first: all addresses dialed at once, each again for ever, and a line for each that says how far it
//! got.

use crate::convert;
use crate::shared::{Shared, lock};
use crate::stage::{self, Stage};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use libp2p::{Multiaddr, identify};
use potluck_net::PeerId;
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// What peers of potluck say in identify that they speak; another number is another network.
pub(crate) const PROTOCOL_VERSION: &str = "/potluck/1";
/// Characters shown of what a stranger says of itself.
const SAID_MAX: usize = 40;
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

/// What a stranger said, for people.
pub(crate) fn short(said: &str) -> String {
    said.chars().filter(|c| !c.is_control()).take(SAID_MAX).collect()
}

/// What the callers see.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) attempts: Vec<BootstrapAttempt>,
    pub(crate) peers: Vec<PeerId>,
    /// Those of them that are connected and have said that they speak our version.
    pub(crate) joined: BTreeSet<PeerId>,
}

struct Target {
    address: Multiaddr,
    peer: libp2p::PeerId,
    dialing: Option<ConnectionId>,
    retry_at: Instant,
    backoff: Duration,
    connected_at: Instant,
    /// Before it is dialed again after the connection has ended.
    pause: Duration,
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
            connected_at: retry_at,
            pause: RETRY_FIRST,
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

    /// A connection is there; whether it is of use shows when the peer has said what it is.
    pub(crate) fn on_connected(&mut self, peer: &libp2p::PeerId, id: ConnectionId, now: Instant) {
        for target in self.targets.iter_mut().filter(|target| target.peer == *peer) {
            if target.dialing == Some(id) {
                target.dialing = None;
            }
            target.tried = true;
            target.connected_at = now;
        }
    }

    /// The peer has said what it speaks. False if that is not what we speak: then it is of no use.
    pub(crate) fn on_identified(
        &mut self,
        peer: &libp2p::PeerId,
        info: &identify::Info,
        shared: &Shared,
    ) -> bool {
        let same = info.protocol_version == PROTOCOL_VERSION;
        let detail = if same {
            String::new()
        } else {
            let (theirs, agent) = (short(&info.protocol_version), short(&info.agent_version));
            format!("the peer there speaks {theirs:?} ({agent}), not {PROTOCOL_VERSION:?}")
        };
        self.settle(peer, if same { Stage::Connected } else { Stage::Version }, &detail, shared);
        same
    }

    /// The peer is connected but does not say what it is.
    pub(crate) fn on_unidentified(&mut self, peer: &libp2p::PeerId, error: &str, shared: &Shared) {
        let known =
            convert::from_libp2p(peer).is_some_and(|peer| lock(&shared.bootstrap).joined.contains(&peer));
        if !known {
            self.settle(
                peer,
                Stage::Version,
                &format!("the peer there does not say what it is: {error}"),
                shared,
            );
        }
    }

    fn settle(&mut self, peer: &libp2p::PeerId, stage: Stage, detail: &str, shared: &Shared) {
        let mut report = lock(&shared.bootstrap);
        let ok = stage == Stage::Connected;
        let ours =
            self.targets.iter_mut().zip(&mut report.attempts).filter(|(target, _)| target.peer == *peer);
        let mut changed = false;
        for (target, attempt) in ours {
            if ok {
                target.backoff = RETRY_FIRST;
            }
            (attempt.ok, attempt.stage) = (ok, stage);
            detail.clone_into(&mut attempt.detail);
            changed = true;
        }
        if let (true, true, Some(peer)) = (changed, ok, convert::from_libp2p(peer)) {
            report.joined.insert(peer);
        }
        drop(report);
        if changed {
            shared.bootstrap_changed.notify_waiters();
        }
    }

    /// The last connection to the peer has ended; `alone`: there are none to others either. A peer that many join through
    /// gives up connections that nobody uses: as long as we know others, it is dialed less and less often.
    pub(crate) fn on_disconnected(
        &mut self,
        peer: &libp2p::PeerId,
        now: Instant,
        alone: bool,
        shared: &Shared,
    ) {
        let mut report = lock(&shared.bootstrap);
        for (target, attempt) in self.targets.iter_mut().zip(&mut report.attempts) {
            if target.peer != *peer {
                continue;
            }
            let lasting = now >= target.connected_at + RETRY_MAX;
            target.pause = if alone || lasting { RETRY_FIRST } else { (target.pause * 2).min(RETRY_MAX) };
            target.retry_at = now + target.backoff.max(target.pause);
            attempt.ok = false;
            // Why a peer was of no use is worth more than that it is gone.
            if attempt.stage == Stage::Version {
                target.backoff = (target.backoff * 2).min(RETRY_MAX);
            } else {
                attempt.stage = Stage::Connect;
                attempt.detail = "the connection was lost".into();
            }
        }
        if let Some(peer) = convert::from_libp2p(peer) {
            report.joined.remove(&peer);
        }
        drop(report);
        shared.bootstrap_changed.notify_waiters();
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

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_net::Identity;

    #[tokio::test(start_paused = true)]
    async fn a_bootstrap_peer_that_hangs_up_is_dialed_less_often_unless_we_know_nobody_else() {
        let shared = Shared::default();
        let peer = convert::to_libp2p(Identity::from_seed(&[1; 32]).peer_id());
        let mut bootstrap = Bootstrap::new(vec![("/ip4/127.0.0.1/tcp/1".parse().unwrap(), peer)], &shared);
        let step = Duration::from_millis(500);
        // How long until it is dialed again, after a connection that lasted so long.
        let mut pause_after = async |lasted: Duration, alone: bool| {
            let [dial] = &bootstrap.due(Instant::now(), |_| false)[..] else { panic!("one address") };
            bootstrap.on_connected(&peer, dial.connection_id(), Instant::now());
            tokio::time::advance(lasted).await;
            let ended = Instant::now();
            bootstrap.on_disconnected(&peer, ended, alone, &shared);
            while Instant::now() < bootstrap.targets[0].retry_at {
                assert!(bootstrap.due(Instant::now(), |_| false).is_empty());
                tokio::time::advance(step).await;
            }
            ended.elapsed().as_secs()
        };
        let short = Duration::from_secs(5);
        for expected in [2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(pause_after(short, false).await, expected);
        }
        assert_eq!(pause_after(short, true).await, 1, "nobody else is there");
        assert_eq!(pause_after(short, false).await, 2);
        assert_eq!(pause_after(RETRY_MAX, false).await, 1, "it was there for long");
    }
}
