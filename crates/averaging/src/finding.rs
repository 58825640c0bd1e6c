//! Finding the peers of a run: those that were named, and those that a directory knows.

use crate::link;
use crate::swarm::Inner;
use potluck_net::{AcceptError, FaultKind, PeerId};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Between the first look-ups and announcements in the directory; doubles up to `DIRECTORY_PERIOD`.
const DIRECTORY_PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Between look-ups and announcements in the directory.
const DIRECTORY_PERIOD: Duration = Duration::from_secs(20);

/// Why a run could not be joined.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// A peer of the run said no: wrong manifest, version, run or invite. Correct the configuration.
    #[error("peer {} refused us: {reason}", peer.short())]
    Refused {
        /// Who.
        peer: PeerId,
        /// The differing fields.
        reason: String,
    },
    /// No bootstrap peer answered; one line for each. Check addresses and firewall, then try again.
    #[error("no bootstrap peer could be reached:\n{}", attempts.join("\n"))]
    Unreachable {
        /// One line per peer.
        attempts: Vec<String>,
    },
    /// This process takes part in the run already.
    #[error(transparent)]
    Accept(#[from] AcceptError),
    /// The configuration is wrong.
    #[error("{field}: {reason}")]
    Config {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// Ask those whom the configuration and the directory name: returns with the first that lets us in, or when there is
/// nobody in this run to ask.
pub(crate) async fn contact(inner: &Arc<Inner>) -> Result<(), JoinError> {
    let mut known: BTreeSet<PeerId> = inner.config.bootstrap.iter().copied().collect();
    known.remove(&inner.me);
    let deadline = inner.env.now() + inner.config.join_timeout;
    let must_answer = !known.is_empty();
    if let Some(directory) = &inner.config.directory {
        let found = tokio::time::timeout(Duration::from_secs(5), directory.lookup(&inner.config.run)).await;
        for (peer, addresses) in found.unwrap_or_default() {
            inner.transport.add_addresses(peer, &addresses);
            known.insert(peer);
        }
        known.remove(&inner.me);
    }
    let mut attempts: futures::stream::FuturesUnordered<_> =
        known.iter().map(|peer| link::connect_patiently(inner, *peer, deadline)).collect();
    let mut lines = Vec::new();
    let mut reached = false;
    while let Some((peer, result)) = futures::StreamExt::next(&mut attempts).await {
        match result {
            Ok(()) => return Ok(()),
            Err(link::LinkError::Refused(reason)) => return Err(JoinError::Refused { peer, reason }),
            Err(link::LinkError::Failed(fault)) => {
                // It is there but not in this run: a bootstrap node, through which others will find us.
                reached |= matches!(fault.kind, FaultKind::Refused | FaultKind::Busy);
                lines.push(fault.to_string());
            }
        }
    }
    if must_answer && !reached { Err(JoinError::Unreachable { attempts: lines }) } else { Ok(()) }
}

/// Look for peers that we do not know, for ever: two halves of a run that never met have nobody who could tell them.
pub(crate) async fn keep_finding(inner: Arc<Inner>) {
    let (mut pause, mut turn) = (DIRECTORY_PAUSE_FIRST, 0);
    loop {
        let both = async {
            let Some(directory) = &inner.config.directory else { return Vec::new() };
            directory.announce(&inner.config.run, DIRECTORY_PERIOD * 3).await;
            directory.lookup(&inner.config.run).await
        };
        let found = tokio::time::timeout(DIRECTORY_PERIOD, both).await.unwrap_or_default();
        // At first, joining itself asks them.
        let known = if pause == DIRECTORY_PAUSE_FIRST { &[] } else { &inner.config.bootstrap[..] };
        let mut left = Vec::new();
        for (peer, addresses) in found.into_iter().chain(known.iter().map(|peer| (*peer, Vec::new()))) {
            inner.transport.add_addresses(peer, &addresses);
            let sought = {
                let state = inner.lock();
                left.extend(state.membership.has_left(&peer).then_some(peer));
                !state.links.contains_key(&peer) && (state.links.is_empty() || state.membership.seeks(&peer))
            };
            if peer != inner.me && sought {
                inner.connect_soon(peer);
            }
        }
        // Whoever has left may have come back to where it cannot dial us. Most have not, so one at a time.
        if let Some(peer) = left.get(turn % left.len().max(1)) {
            inner.connect_soon(*peer);
        }
        turn += 1;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(DIRECTORY_PERIOD);
    }
}
