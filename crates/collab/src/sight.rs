//! Watching a run from outside: every session answers whoever asks with its status and its manifest.
//!
//! Whoever only watches is no member: no heartbeat, no vote, nobody waits for it, and it can be killed unnoticed.
//! Open runs answer everybody; closed ones only those who show the invite that joining takes.

use crate::{Invite, SessionConfig, Status, manifest};
use bytes::Bytes;
use potluck_net::{FaultKind, PeerFault, PeerId, Protocol, Tasks, Transport, rpc};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tokio::sync::watch;
use tokio::time::Instant;

/// Questions that wait to be answered, and those answered at a time.
const BACKLOG: usize = 16;
const ANSWERED: rpc::Places = rpc::Places { total: 4, per_peer: 2 };
/// Longest question: an invite and its envelope.
const QUESTION_BYTES_MAX: usize = 1024;
/// Longest answer that is read: the status of some thousand peers.
const ANSWER_BYTES_MAX: usize = 2 << 20;

/// What a watcher sees of a run, through one of its peers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sight {
    /// The status of the peer that answered; `is_me` marks that peer.
    pub status: Status,
    /// What is equal on all peers of the run.
    pub manifest: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
struct Question {
    invite: Option<String>,
}

fn protocol(run: &str) -> Protocol {
    let hash = blake3::hash(run.as_bytes()).to_hex();
    Protocol::new(format!("/potluck/sight/1/{}", hash.get(..16).unwrap_or_default()))
}

impl Sight {
    /// Ask one peer of the run `run`.
    ///
    /// # Errors
    /// The fault of that peer; ask another one.
    pub async fn ask(
        transport: &dyn Transport,
        peer: PeerId,
        run: &str,
        invite: Option<String>,
        deadline: Instant,
    ) -> Result<Self, PeerFault> {
        let question = serde_json::to_vec(&Question { invite }).expect("plain data always encodes");
        let answer = rpc::call(transport, peer, &protocol(run), question.into(), deadline).await?;
        let malformed = |what: String| PeerFault::new(peer, FaultKind::Malformed, what);
        if answer.is_empty() {
            let what = "this run is closed and the token holds no invite of its owner";
            return Err(PeerFault::new(peer, FaultKind::Refused, what));
        }
        if answer.len() > ANSWER_BYTES_MAX {
            return Err(malformed(format!("status of {} bytes", answer.len())));
        }
        serde_json::from_slice(&answer).map_err(|error| malformed(format!("status: {error}")))
    }
}

/// Answer watchers until `tasks` ends. Not being able to is no reason not to train.
pub(crate) fn serve(
    transport: &dyn Transport,
    tasks: &Tasks,
    config: &SessionConfig,
    status: watch::Receiver<Status>,
) {
    let incoming = match transport.accept(protocol(&config.run_id), BACKLOG) {
        Ok(incoming) => incoming,
        Err(error) => {
            tracing::warn!(target: "potluck", %error, "nobody can watch this peer");
            return;
        }
    };
    let (manifest, owner, run_id) = (manifest(config), config.owner, config.run_id.clone());
    rpc::serve(incoming, tasks, ANSWERED, move |_, question| {
        let answer = answer(
            &question,
            |invite| Invite::admit(owner, &run_id, invite).is_ok(),
            || Sight { status: status.borrow().clone(), manifest: manifest.clone() },
        );
        async move { answer }
    });
}

/// `None`: not a question. Empty: not for you.
pub(crate) fn answer(
    question: &[u8],
    admits: impl Fn(Option<&str>) -> bool,
    sight: impl Fn() -> Sight,
) -> Option<Bytes> {
    if question.len() > QUESTION_BYTES_MAX {
        return None;
    }
    let question: Question = serde_json::from_slice(question).ok()?;
    if !admits(question.invite.as_deref()) {
        return Some(Bytes::new());
    }
    serde_json::to_vec(&sight()).ok().map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight() -> Sight {
        let status = Status { run_id: "run".into(), epoch: 3, ..Status::default() };
        Sight { status, manifest: BTreeMap::from([("policy".into(), "Synchronous".into())]) }
    }

    #[test]
    fn a_question_is_answered_and_anything_else_is_not() {
        let ask = |question: &[u8], open| answer(question, |_| open, sight);
        let bytes = ask(br#"{"invite":null}"#, true).unwrap();
        assert_eq!(serde_json::from_slice::<Sight>(&bytes).unwrap(), sight());
        assert_eq!(ask(br#"{"invite":"x"}"#, false), Some(Bytes::new()), "a closed run tells nothing");
        assert_eq!(ask(b"hello", true), None);
        assert_eq!(ask(&vec![b' '; QUESTION_BYTES_MAX + 1], true), None);
    }
}
