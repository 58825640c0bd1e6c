//! `potluck monitor`: the dashboard of a run for people who only watch.

use crate::stop::Stop;
use crate::visit::Visit;
use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use potluck_collab::{Event, Status};
use potluck_dashboard::{Dashboard, Replay, write_log};
use potluck_net::{PeerId, Token};
use std::collections::BTreeSet;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{broadcast, watch};

pub(crate) const HELP: &str = "Whoever only looks is no member of the run: nobody waits for it.\n\nExamples:\n  \
potluck monitor potluck1…\n  potluck monitor potluck1… --dashboard 127.0.0.1:0 --log events.jsonl\n  \
potluck monitor --replay events.jsonl\n\n\
Prometheus reads http://ADDRESS/metrics.";

/// How often the run is asked.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long one look may take before the page says so.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
/// How long the last lines of the log may take.
const LOG_LIMIT: Duration = Duration::from_secs(2);
const EVENTS_WAITING_MAX: usize = 256;

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// The run's token
    #[arg(required_unless_present = "replay")]
    token: Option<Token>,
    /// Where to serve the page; port 0 is any free one
    #[arg(long, default_value = "127.0.0.1:8080")]
    dashboard: SocketAddr,
    /// Append every event to this file, one JSON object a line
    #[arg(long)]
    log: Option<PathBuf>,
    /// Show what such a file tells of a run, without looking for the run
    #[arg(long, value_name = "LOG", conflicts_with_all = ["token", "log"])]
    replay: Option<PathBuf>,
    /// How long to look for the run, in seconds
    #[arg(long, default_value_t = 20.0, value_parser = crate::status::positive)]
    limit: f64,
}

/// Serve until SIGINT or SIGTERM.
pub(crate) async fn run(args: Args) -> Result<()> {
    let mut stop = Stop::listen()?;
    let Some(token) = &args.token else {
        let replayed = replay(&args).await?;
        println!("dashboard {}", replayed.url());
        stop.asked().await;
        return Ok(());
    };
    let visit = Visit::enter(token).await?;
    let mut stopped = std::pin::pin!(stop.asked());
    let started = tokio::select! {
        biased;
        () = &mut stopped => Ok(None),
        started = start(&args, &visit) => started.map(Some),
    };
    let result = match started {
        Ok(Some(started)) => {
            feed(&args, &visit, started, stopped).await;
            Ok(())
        }
        other => other.map(|_| ()),
    };
    visit.leave().await;
    result
}

/// Follow the run until told to stop, and write how things stood then into the log.
async fn feed(args: &Args, visit: &Visit, started: Started, stopped: impl Future<Output = ()>) {
    let Started { statuses, events, _dashboard } = started;
    let (mut logging, mut ended) = (Box::pin(log(args, &statuses, &events)), false);
    let log_then_wait = async {
        logging.as_mut().await;
        ended = true;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        () = stopped => {}
        () = follow(visit, &statuses, &events) => {}
        () = log_then_wait => {}
    }
    drop(events);
    if !ended && tokio::time::timeout(LOG_LIMIT, logging).await.is_err() {
        eprintln!("potluck: the end of the log could not be written in time");
    }
}

/// What is fed, and the page that shows it.
struct Started {
    statuses: watch::Sender<Status>,
    events: broadcast::Sender<Event>,
    _dashboard: Dashboard,
}

async fn start(args: &Args, visit: &Visit) -> Result<Started> {
    let first = visit.look(Duration::from_secs_f64(args.limit)).await?.1.status;
    let (events, listener) = broadcast::channel(EVENTS_WAITING_MAX);
    let statuses = watch::Sender::new(as_outsider(first));
    let dashboard = Dashboard::serve_feed(statuses.subscribe(), listener, args.dashboard).await?;
    if let Some(log) = &args.log {
        check(log)?;
    }
    println!("dashboard {}", dashboard.url());
    Ok(Started { statuses, events, _dashboard: dashboard })
}

/// Write the log until nobody sends events any more. Without one, that is now.
fn log(
    args: &Args,
    statuses: &watch::Sender<Status>,
    events: &broadcast::Sender<Event>,
) -> impl Future<Output = ()> + use<> {
    let feeds = args.log.clone().map(|log| (log, statuses.subscribe(), events.subscribe()));
    async move {
        if let Some((log, statuses, events)) = feeds
            && let Err(error) = write_log(&log, statuses, events).await
        {
            eprintln!("potluck: {error}");
        }
    }
}

async fn replay(args: &Args) -> Result<Dashboard> {
    let log = args.replay.clone().context("neither a token nor a log")?;
    let replay = Replay::read(&log)?;
    println!("replaying {} of the run {:?}", log.display(), replay.run_id());
    Ok(Dashboard::serve_replay(replay, args.dashboard).await?)
}

/// A log that cannot be written is an error now, not in an hour.
fn check(log: &std::path::Path) -> Result<()> {
    let opened = std::fs::OpenOptions::new().create(true).append(true).open(log);
    opened.map(|_| ()).with_context(|| format!("cannot write the event log {}", log.display()))
}

async fn follow(visit: &Visit, statuses: &watch::Sender<Status>, events: &broadcast::Sender<Event>) {
    let mut silent = false;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        match visit.look(LOOK_LIMIT).await {
            Ok((_, sight)) => {
                if std::mem::take(&mut silent) {
                    eprintln!("potluck: the run is back");
                }
                let now = as_outsider(sight.status);
                let before = statuses.send_replace(now.clone());
                for event in differences(&before, &now) {
                    // The dashboard and the log listen; if neither does, that is fine.
                    let _listeners = events.send(event);
                }
            }
            Err(error) if !std::mem::replace(&mut silent, true) => {
                eprintln!("potluck: {error}; the page shows the last state, and it is tried again");
            }
            Err(_) => {}
        }
    }
}

/// None of the peers is the one that looks.
fn as_outsider(mut status: Status) -> Status {
    status.peers.iter_mut().for_each(|peer| peer.is_me = false);
    status
}

/// What happened between two looks.
fn differences(before: &Status, now: &Status) -> Vec<Event> {
    let ids = |status: &Status| -> BTreeSet<PeerId> { status.peers.iter().map(|peer| peer.peer).collect() };
    let (had, have) = (ids(before), ids(now));
    let peers = have.len();
    let joined = have.difference(&had).map(|peer| Event::Joined { peer: *peer, peers });
    let lost = had.difference(&have).map(|peer| Event::Lost { peer: *peer, peers, left: false });
    let mut events: Vec<Event> = joined.chain(lost).collect();
    if now.alone && !before.alone {
        events.push(Event::Alone { epoch: now.epoch, left: false });
    }
    if let Some(round) = now.last_round.as_ref().filter(|round| {
        before
            .last_round
            .as_ref()
            .is_none_or(|last| (last.epoch, last.channel) != (round.epoch, round.channel))
    }) {
        events.push(Event::Round(round.clone()));
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_collab::{PeerStatus, Rates};

    #[test]
    fn who_came_and_who_went_is_told_once() {
        let peer = |seed: u8| PeerStatus {
            peer: PeerId::from_ed25519(&[seed; 32]),
            is_me: true,
            epoch: 0,
            samples: 0,
            samples_per_second: 0.0,
            path: None,
            rates: Rates::default(),
            share: 0.0,
            contributed: 0,
            auxiliary: false,
            client: false,
            loss: None,
        };
        let before = as_outsider(Status { peers: vec![peer(1), peer(2)], ..Status::default() });
        let now = as_outsider(Status { peers: vec![peer(2), peer(3)], alone: true, ..Status::default() });
        assert!(now.peers.iter().all(|peer| !peer.is_me));
        let kinds: Vec<String> = differences(&before, &now)
            .iter()
            .map(|event| serde_json::to_value(event).unwrap()["event"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(kinds, ["joined", "lost", "alone"]);
        assert_eq!(differences(&now, &now), []);
    }
}
