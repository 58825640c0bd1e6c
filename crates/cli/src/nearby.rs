//! Where a status comes from: a run that a token leads to, or a peer on this machine that has left a notice.

use crate::failure::Failure;
use crate::visit::Visit;
use anyhow::{Result, anyhow, bail};
use potluck_collab::Status;
use potluck_dashboard::{LocalRun, Notice, local_runs};
use potluck_net::{Token, TokenError};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest answer of a dashboard that is read: the status of some thousand peers.
const ANSWER_BYTES_MAX: u64 = 2 << 20;
const HINT: &str = "found are peers with a dashboard (dashboard=True), keepers, monitors and nodes of this user; of any other run, \
give the token";

/// Let `potluck status` on this machine find the run by its name.
pub(crate) fn post(run: &str, token: String) -> Option<Notice> {
    let posted = Notice::post(run, None, Some(token));
    posted.inspect_err(|error| tracing::debug!(target: "potluck", %error, "cannot be found by name")).ok()
}

/// What was asked for.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Token(Box<Token>),
    Run(String),
}

impl FromStr for Target {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        if text.starts_with("potluck1") {
            return text.parse().map(|token| Self::Token(Box::new(token)));
        }
        Ok(Self::Run(text.to_owned()))
    }
}

/// Where to look.
pub(crate) enum Source {
    Visit(Box<Visit>),
    /// A dashboard on this machine.
    Dashboard(LocalRun, SocketAddr),
}

impl Source {
    /// Everything that `target` means; `one` if more would not do.
    pub(crate) async fn find(target: Option<&Target>, one: bool) -> Result<Vec<Self>> {
        let wanted = match target {
            Some(Target::Token(token)) => return Ok(vec![Self::visit(token).await?]),
            Some(Target::Run(run)) => Some(run),
            None => None,
        };
        let found = nearest(local_runs(), wanted);
        if found.is_empty() {
            let message = match wanted {
                Some(run) => format!("no peer of a run {run:?} on this machine can be asked"),
                None => "no peer of any run on this machine can be asked".to_owned(),
            };
            return Err(Failure::new(message, HINT).into());
        }
        if one && found.len() > 1 {
            let names: Vec<&str> = found.iter().map(|run| run.run_id.as_str()).collect();
            let message = format!("{} runs have a peer on this machine: {}", names.len(), names.join(", "));
            return Err(Failure::new(message, "name one of them: potluck status RUN").into());
        }
        let mut sources = Vec::new();
        for run in found {
            sources.push(match (run.dashboard, &run.token) {
                (Some(address), _) => Self::Dashboard(run, address),
                (None, Some(token)) => Self::visit(&token.parse()?).await?,
                (None, None) => continue,
            });
        }
        Ok(sources)
    }

    async fn visit(token: &Token) -> Result<Self> {
        Ok(Self::Visit(Box::new(Visit::enter(token).await?)))
    }

    /// The newest status, within `limit`.
    pub(crate) async fn look(&self, limit: Duration) -> Result<Status> {
        match self {
            Self::Visit(visit) => Ok(visit.look(limit).await?.1.status),
            Self::Dashboard(run, address) => {
                let asked = timeout(limit, ask(*address)).await;
                asked.unwrap_or_else(|_| Err(anyhow!("no answer in time"))).map_err(|error| {
                    let message = format!(
                        "the peer of {:?} on this machine (process {}, {address}) does not answer: {error}",
                        run.run_id, run.pid
                    );
                    Failure::new(
                        message,
                        "its program hangs or was stopped; give the run's token to ask another peer",
                    )
                    .into()
                })
            }
        }
    }

    pub(crate) async fn leave(self) {
        if let Self::Visit(visit) = self {
            visit.leave().await;
        }
    }
}

/// One for each run that may be meant: with a dashboard, if there is one, because that costs no way through the network.
fn nearest(runs: Vec<LocalRun>, wanted: Option<&String>) -> Vec<LocalRun> {
    let mut best: BTreeMap<String, LocalRun> = BTreeMap::new();
    for run in runs.into_iter().filter(|run| wanted.is_none_or(|wanted| *wanted == run.run_id)) {
        let known = best.get(&run.run_id);
        if known.is_none_or(|known| known.dashboard.is_none() && run.dashboard.is_some()) {
            best.insert(run.run_id.clone(), run);
        }
    }
    best.into_values().collect()
}

async fn ask(address: SocketAddr) -> Result<Status> {
    let mut socket = TcpStream::connect(address).await?;
    let request = format!("GET /api/status HTTP/1.0\r\nHost: {address}\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    socket.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(serde_json::from_str(body)?),
        _ => bail!("what listens there is no dashboard"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dashboard_is_preferred_and_a_name_means_one_run() {
        let run = |name: &str, pid, port: Option<u16>| LocalRun {
            run_id: name.into(),
            pid,
            dashboard: port.map(|port| ([127, 0, 0, 1], port).into()),
            token: Some("t".into()),
        };
        let runs = vec![run("a", 1, None), run("a", 2, Some(80)), run("a", 3, Some(81)), run("b", 4, None)];
        let pids = |wanted: Option<&str>| -> Vec<u32> {
            let wanted = wanted.map(str::to_owned);
            nearest(runs.clone(), wanted.as_ref()).iter().map(|run| run.pid).collect()
        };
        assert_eq!(pids(None), [2, 4]);
        assert_eq!(pids(Some("b")), [4]);
        assert!(pids(Some("c")).is_empty());
    }

    #[test]
    fn a_damaged_token_is_no_name() {
        assert!("potluck1broken".parse::<Target>().is_err());
        assert!(matches!("my-run".parse(), Ok(Target::Run(run)) if run == "my-run"));
    }
}
