//! The way into a run for those who only look: through a token to its bootstrap peers, through the DHT to its peers,
//! and a question to each of them.

use crate::failure::Failure;
use crate::invite::text_of;
use anyhow::{Context, Result};
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use potluck_collab::{Directory, Sight};
use potluck_dht::{Dht, DhtConfig, rendezvous};
use potluck_net::{EVERY_RUN, Env, Identity, PeerFault, PeerId, Token, Transport};
use potluck_net_libp2p::{BootstrapAttempt, Config, Libp2pTransport, Stage};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// How long the bootstrap addresses may take.
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(10);
/// How long addresses are given that have already refused.
const REFUSED_LIMIT: Duration = Duration::from_secs(3);
/// How long the DHT may take to join before it is asked all the same.
const JOIN_LIMIT: Duration = Duration::from_secs(4);
/// How long one peer may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(4);
/// Between two searches for peers of the run.
const SEARCH_PAUSE: Duration = Duration::from_millis(300);
/// Peers that are asked at the same time: one answer tells all, more make it robust.
const ASKED_MAX: usize = 8;

/// A connection to the network of a run.
pub(crate) struct Visit {
    pub(crate) env: Env,
    pub(crate) transport: Arc<Libp2pTransport>,
    pub(crate) dht: Dht,
    pub(crate) token: Token,
    /// Who was looked at last: counters of one peer only ever rise, those of changing peers jump.
    shown: Mutex<Option<PeerId>>,
}

/// The DHT as the directory of runs.
pub(crate) struct DhtDirectory(pub(crate) Dht);

impl Directory for DhtDirectory {
    fn announce<'a>(&'a self, run: &'a str, _ttl: Duration) -> BoxFuture<'a, ()> {
        async move {
            // Nobody to keep it yet: it is announced again, and the DHT keeps joining meanwhile.
            let _stored = rendezvous::announce(&self.0, run.as_bytes(), b"").await;
        }
        .boxed()
    }

    fn lookup<'a>(&'a self, run: &'a str) -> BoxFuture<'a, Vec<(PeerId, Vec<String>)>> {
        async move {
            self.0.wait_joined(JOIN_LIMIT).await;
            let found = rendezvous::lookup(&self.0, run.as_bytes()).await.value;
            found.into_iter().map(|peer| (peer.peer, peer.addresses)).collect()
        }
        .boxed()
    }
}

impl Visit {
    /// Enter as a passer-by: nobody can dial us, we store nothing for others, and our identity ends with us.
    pub(crate) async fn enter(token: &Token) -> Result<Self> {
        let env = Env::real();
        let mut config = Config::new(Identity::from_seed(&env.random_bytes()));
        config.client_mode = true;
        config.port_mapping = false;
        let visit = Self::with(config, env, token).await?;
        visit.wait().await?;
        Ok(visit)
    }

    /// Enter as this config says.
    pub(crate) async fn with(mut config: Config, env: Env, token: &Token) -> Result<Self> {
        config.bootstrap.clone_from(&token.bootstrap);
        let client_mode = config.client_mode;
        let transport = Libp2pTransport::start(config, env.clone()).await?;
        let config =
            DhtConfig { initial_peers: transport.bootstrap_peers(), client_mode, ..DhtConfig::default() };
        let dht = Dht::start(transport.clone(), env.clone(), config).await.context("cannot start the DHT")?;
        Ok(Self { env, transport, dht, token: token.clone(), shown: Mutex::new(None) })
    }

    /// Wait for one bootstrap peer.
    pub(crate) async fn wait(&self) -> Result<()> {
        if self.token.bootstrap.is_empty() {
            let hint = "make a token on a machine that others can reach, with `potluck node`";
            return Err(Failure::new("the token holds no address", hint).into());
        }
        let begun = Instant::now();
        let first = self.transport.wait_bootstrapped(begun + REFUSED_LIMIT).await;
        // Where every address has failed for good, a longer wait would change nothing.
        let pending = |attempts: &[BootstrapAttempt]| attempts.iter().any(|it| it.stage == Stage::Dialing);
        let connected = match first {
            Err(attempts) if pending(&attempts) => {
                self.transport.wait_bootstrapped(begun + BOOTSTRAP_LIMIT).await
            }
            known => known,
        };
        match connected {
            Ok(_) => Ok(()),
            Err(attempts) => Err(no_answer(&attempts)),
        }
    }

    /// Ask the peers of the run until one answers or `limit` is over: the one that is furthest, and who it is.
    pub(crate) async fn look(&self, limit: Duration) -> Result<(PeerId, Sight)> {
        let deadline = Instant::now() + limit;
        let mut faults: Vec<PeerFault> = Vec::new();
        let mut asked = 0;
        loop {
            let peers = self.peers().await;
            asked = asked.max(peers.len());
            let invite = text_of(&self.token);
            let ask = |peer: PeerId| {
                let by = deadline.min(Instant::now() + ANSWER_LIMIT);
                let invite = invite.clone();
                async move { (peer, Sight::ask(&*self.transport, peer, &self.token.run_id, invite, by).await) }
            };
            let answers = join_all(peers.into_iter().take(ASKED_MAX).map(ask)).await;
            faults.clear();
            let mut sights = Vec::new();
            for (peer, answer) in answers {
                match answer {
                    Ok(sight) => sights.push((peer, sight)),
                    Err(fault) => faults.push(fault),
                }
            }
            if let Some(best) = self.choose(sights) {
                return Ok(best);
            }
            // Who is not invited now is not invited in some seconds either.
            let closed = faults.iter().any(is_closed);
            if closed || Instant::now() + SEARCH_PAUSE >= deadline {
                return Err(self.nobody(&faults));
            }
            tokio::time::sleep(SEARCH_PAUSE).await;
        }
    }

    fn choose(&self, sights: Vec<(PeerId, Sight)>) -> Option<(PeerId, Sight)> {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let best = choose(sights, *shown)?;
        *shown = Some(best.0);
        Some(best)
    }

    /// Everybody who may be in the run.
    async fn peers(&self) -> BTreeSet<PeerId> {
        let found = rendezvous::lookup(&self.dht, self.token.run_id.as_bytes()).await.value;
        let mut peers: BTreeSet<PeerId> = found.into_iter().map(|announced| announced.peer).collect();
        peers.extend(self.transport.bootstrap_peers());
        peers.remove(&self.transport.local_peer());
        peers
    }

    fn nobody(&self, faults: &[PeerFault]) -> anyhow::Error {
        if let Some(closed) = faults.iter().find(|fault| is_closed(fault)) {
            let hint = "ask the run's owner for a token made by `potluck invite`";
            return Failure::new(format!("the run {:?} is closed: {closed}", self.token.run_id), hint).into();
        }
        let lines: String = self
            .transport
            .bootstrap_report()
            .iter()
            .map(|attempt| format!("\n  {}", run_stage(attempt)))
            .collect();
        let message =
            format!("the network answers, but nobody there trains the run {:?}:{lines}", self.token.run_id);
        let hint = if self.token.run_id == EVERY_RUN {
            "this is the token of a node that was started without --run: training programs join through it, but it \
             names no run to look at. Start the node with --run and the run_id of the training program"
        } else {
            "is a training program running with this token? A new one is found within some seconds"
        };
        Failure::new(message, hint).into()
    }

    /// Leave politely, but not for long.
    pub(crate) async fn leave(self) {
        let leave = async {
            self.dht.shutdown().await;
            self.transport.close().await;
        };
        // Whoever misses the goodbye notices anyway.
        let _left = tokio::time::timeout(Duration::from_secs(2), leave).await;
    }
}

/// The error for that: one line per address.
pub(crate) fn no_answer(attempts: &[BootstrapAttempt]) -> anyhow::Error {
    let lines: Vec<String> = attempts.iter().map(|attempt| format!("  {attempt}")).collect();
    let message = format!("no address of the token answers:\n{}", lines.join("\n"));
    let hint = "is the node still running, and is this machine online? `potluck doctor TOKEN` looks closer";
    Failure::new(message, hint).into()
}

fn is_closed(fault: &PeerFault) -> bool {
    fault.to_string().contains("this run is closed")
}

/// How far an address got on the way to the run: the last stage is a peer that takes part in it or knows who does.
fn run_stage(attempt: &BootstrapAttempt) -> String {
    if attempt.ok {
        let address = &attempt.address;
        return format!(
            "{address}: failed at run: the peer there takes no part in it, and knows nobody who does"
        );
    }
    attempt.to_string()
}

/// The one that is furthest; the one that was shown before, unless it falls behind.
fn choose(sights: Vec<(PeerId, Sight)>, shown: Option<PeerId>) -> Option<(PeerId, Sight)> {
    let furthest = sights.iter().map(|(_, sight)| sight.status.epoch).max()?;
    let rank = |(peer, sight): &(PeerId, Sight)| {
        let status = &sight.status;
        (Some(*peer) == shown && status.epoch + 1 >= furthest, status.epoch, status.samples)
    };
    sights.into_iter().rev().max_by_key(rank)
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_collab::Status;

    #[test]
    fn one_peer_is_shown_until_it_falls_behind() {
        let peers: Vec<PeerId> = (1..4).map(|seed| PeerId::from_ed25519(&[seed; 32])).collect();
        let sights = |epochs: [u64; 3]| -> Vec<(PeerId, Sight)> {
            let status = |epoch| Status { epoch, ..Status::default() };
            let sight = |epoch| Sight { status: status(epoch), manifest: Default::default() };
            peers.iter().zip(epochs).map(|(peer, epoch)| (*peer, sight(epoch))).collect()
        };
        let chosen = |epochs, shown| choose(sights(epochs), shown).map(|(peer, _)| peer);
        assert_eq!(chosen([5, 5, 5], None), Some(peers[0]));
        assert_eq!(chosen([5, 6, 5], None), Some(peers[1]));
        assert_eq!(chosen([6, 6, 5], Some(peers[2])), Some(peers[2]), "the next epoch has just begun");
        assert_eq!(chosen([6, 7, 5], Some(peers[2])), Some(peers[1]));
        assert!(choose(Vec::new(), Some(peers[0])).is_none());
    }
}
