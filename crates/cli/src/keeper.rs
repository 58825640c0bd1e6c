//! `potluck keeper`: a peer without a model that keeps the newest state on disk, and gives it to whoever comes when
//! everybody else has left.

use crate::checkpoint::{self, Checkpoint};
use crate::failure::Failure;
use crate::invite::text_of;
use crate::stop::Stop;
use crate::view;
use crate::visit::{DhtDirectory, Visit};
use anyhow::Result;
use clap::Args as ClapArgs;
use potluck_collab::{Directory, Keeper, KeeperConfig};
use potluck_net::{Env, Identity, Token, Transport};
use potluck_net_libp2p::{Config, identity_file};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

pub(crate) const HELP: &str = "Needs no GPU and no model: memory for three states, and disk for --keep of them and four more. \
Nobody waits for it. Beside the newest --keep, four checkpoints stay by their age: the youngest that is at least an hour old, \
the youngest that is at least a day old, and for each of them the one that will follow it. However many states come in a \
burst, one from before it stays. Restart it with the same --dir and it goes on with what is there; without a TOKEN it starts \
the run anew from its newest checkpoint and prints a token.\n\nExamples:\n  potluck keeper potluck1… --dir kept\n  \
potluck keeper --dir kept --listen /ip4/0.0.0.0/tcp/4001";

/// How long a run is looked for before the keeper says that it still waits.
const LOOK_LIMIT: Duration = Duration::from_secs(20);
/// How long one download may take; what has arrived is kept for the next.
const FETCH_LIMIT: Duration = Duration::from_secs(600);
/// How often it looks even if nothing seems to change.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Downloads that fail are worth a word when they have failed for so long: a state is told of a moment before it is
/// offered, and a peer may leave while it gives. After that, a word each time so much has passed.
const TROUBLE_AFTER: Duration = Duration::from_secs(30);
/// After news, so that a burst of them is one look.
const NEWS_PAUSE: Duration = Duration::from_millis(100);

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// The run's token; may be left out if --dir holds a checkpoint
    token: Option<Token>,
    /// Folder for the checkpoints
    #[arg(long)]
    dir: PathBuf,
    /// Save a checkpoint every so many epochs
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// Keep so many of the newest checkpoints, beside up to four that stay by their age
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    keep: u64,
    /// File that holds this peer's identity; made if absent [default: `identity` in --dir]
    #[arg(long)]
    identity: Option<PathBuf>,
    /// Address to listen on, such as /ip4/0.0.0.0/tcp/4001; may be given several times [default: all, free ports]
    #[arg(long)]
    listen: Vec<String>,
    /// Address to tell others instead of those found; may be given several times
    #[arg(long)]
    announce: Vec<String>,
    /// Do not ask the router for a port mapping
    #[arg(long)]
    no_port_mapping: bool,
}

/// Keep until SIGINT or SIGTERM.
pub(crate) async fn run(args: Args) -> Result<()> {
    let mut stop = Stop::listen()?;
    checkpoint::prepare(&args.dir)?;
    let found = newest(&args)?;
    let held = found.as_ref().map(|(_, held)| held.clone());
    let token = match (&args.token, &held) {
        (Some(token), Some(held)) if token.run_id != held.run_id => {
            let message = format!(
                "{} holds the run {:?}, the token is for {:?}",
                args.dir.display(),
                held.run_id,
                token.run_id
            );
            return Err(Failure::new(message, "give each run a folder of its own with --dir").into());
        }
        (Some(token), _) => token.clone(),
        (None, Some(held)) => Token { run_id: held.run_id.clone(), bootstrap: Vec::new(), invite: None },
        (None, None) => {
            let message = format!("{} holds no checkpoint, and there is no token", args.dir.display());
            return Err(
                Failure::new(message, "give the token of a run: potluck keeper TOKEN --dir DIR").into()
            );
        }
    };
    if let Some((path, held)) = found {
        println!("resumed {} (epoch {} of {:?})", path.display(), held.snapshot.epoch, held.run_id);
    }
    let env = Env::real();
    let path = args.identity.clone().unwrap_or_else(|| args.dir.join("identity"));
    let (identity, _lock) = identity_file::load_or_create(&path, &env)?;
    let visit = Visit::with(config(&args, identity), env, &token).await?;
    let result = tokio::select! {
        biased;
        () = stop.asked() => Ok(()),
        result = keep(&args, &visit, held) => result,
    };
    visit.leave().await;
    result
}

fn config(args: &Args, identity: Identity) -> Config {
    let mut config = Config::new(identity);
    if !args.listen.is_empty() {
        config.listen.clone_from(&args.listen);
    }
    config.announce.clone_from(&args.announce);
    config.port_mapping = !args.no_port_mapping;
    config
}

fn newest(args: &Args) -> Result<checkpoint::Found> {
    let (found, wrong) = checkpoint::newest(&args.dir)?;
    for error in &wrong {
        eprintln!("potluck: {error:#}; looking for an older one");
    }
    match found {
        Some(found) => Ok(Some(found)),
        None if wrong.is_empty() => Ok(None),
        None => {
            let message = format!("no checkpoint in {} can be read", args.dir.display());
            Err(Failure::new(message, "nothing was changed; name another --dir to begin anew").into())
        }
    }
}

async fn keep(args: &Args, visit: &Visit, held: Option<Checkpoint>) -> Result<()> {
    let (manifest, bootstrap) = match &held {
        Some(held) => (held.manifest.clone(), Vec::new()),
        None => first_sight(visit).await?,
    };
    let run_id = visit.token.run_id.clone();
    let keeper = Keeper::join(
        visit.transport.clone(),
        visit.env.clone(),
        KeeperConfig {
            run_id: run_id.clone(),
            manifest: manifest.clone(),
            bootstrap,
            directory: Some(Arc::new(DhtDirectory(visit.dht.clone())) as Arc<dyn Directory>),
            invite: text_of(&visit.token),
            held: held.as_ref().map(|held| held.snapshot.clone()),
        },
    )
    .await?;
    // Its own router has had time to answer, unless the run was joined at once.
    visit.transport.wait_mapped().await;
    let _notice = crate::nearby::post(&run_id, print_token(visit)?);
    let mut newest = held.map(|held| held.snapshot.epoch);
    let mut saved = newest;
    let mut company = false;
    let mut trouble = Trouble::default();
    loop {
        let trainers = keeper.trainers();
        if company && trainers.is_empty() {
            println!("everybody has left; the state of epoch {} waits here", newest.unwrap_or(0));
        }
        company = !trainers.is_empty();
        let ahead = trainers.iter().map(|(_, epoch)| *epoch).max();
        // The last one who trains may leave at any moment: then every epoch counts.
        let step = if trainers.len() <= 1 { 1 } else { args.every };
        if let Some(epoch) = ahead.filter(|epoch| is_due(*epoch, newest, step)) {
            match keeper.fetch(epoch, FETCH_LIMIT).await {
                Ok(outcome) => {
                    let snapshot = outcome.value;
                    let epoch = snapshot.epoch;
                    if let Err(reason) = keeper.hold(snapshot.clone()) {
                        eprintln!("potluck: {reason}");
                    } else {
                        newest = Some(epoch);
                        let due = is_due(epoch, saved, step);
                        let checkpoint =
                            Checkpoint { run_id: run_id.clone(), manifest: manifest.clone(), snapshot };
                        if due && save(args, visit, checkpoint).await {
                            saved = Some(epoch);
                        }
                    }
                }
                Err(error) => {
                    if let Some(since) = trouble.is_worth_a_word(Instant::now()) {
                        let seconds = since.as_secs();
                        eprintln!(
                            "potluck: no state has come for {seconds} s, it is tried on: {}",
                            error.reason
                        );
                        eprintln!("hint: {FETCH_HINT}");
                    }
                }
            }
        } else {
            trouble = Trouble::default();
        }
        let _news_or_time = tokio::time::timeout(LOOK_EVERY, keeper.changed()).await;
        tokio::time::sleep(NEWS_PAUSE).await;
    }
}

/// Whether `epoch`, which is whatever a peer says, is `step` or more beyond the last one.
fn is_due(epoch: u64, last: Option<u64>, step: u64) -> bool {
    last.is_none_or(|last| epoch.checked_sub(last).is_some_and(|ahead| ahead >= step))
}

const FETCH_HINT: &str =
    "the older states here are safe; what has arrived is kept, so a slow link needs only time";

/// Downloads that fail one after the other.
#[derive(Default)]
struct Trouble {
    since: Option<Instant>,
    said: Option<Instant>,
}

impl Trouble {
    /// Another one has failed. For how long they have, if it is time to say so.
    fn is_worth_a_word(&mut self, now: Instant) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        if now < self.said.unwrap_or(since) + TROUBLE_AFTER {
            return None;
        }
        self.said = Some(now);
        Some(now - since)
    }
}

/// Wait until somebody in the run says what the run is.
async fn first_sight(
    visit: &Visit,
) -> Result<(std::collections::BTreeMap<String, String>, Vec<potluck_net::PeerId>)> {
    visit.wait().await?;
    let mut told = false;
    loop {
        match visit.look(LOOK_LIMIT).await {
            Ok((peer, sight)) => return Ok((sight.manifest, vec![peer])),
            Err(error) if error.to_string().contains("is closed") => return Err(error),
            Err(error) if !std::mem::replace(&mut told, true) => {
                eprintln!("potluck: {error}; waiting for the first peer");
                if let Some(hint) = crate::failure::hint(&error) {
                    eprintln!("hint: {hint}");
                }
            }
            Err(_) => {}
        }
    }
}

/// Whether the checkpoint is safe. A full disk is no reason to stop serving what is in memory.
async fn save(args: &Args, visit: &Visit, checkpoint: Checkpoint) -> bool {
    let (dir, keep) = (args.dir.clone(), usize::try_from(args.keep).unwrap_or(usize::MAX));
    let (epoch, size) =
        (checkpoint.snapshot.epoch, checkpoint.snapshot.blobs.values().map(|b| b.len() as u64).sum());
    match visit.env.offload(move || checkpoint.save(&dir, keep)).await {
        Ok(path) => {
            println!("saved {} (epoch {epoch}, {})", path.display(), view::bytes(size));
            true
        }
        Err(error) => {
            eprintln!(
                "potluck: {error:#}; older checkpoints are untouched, the state of epoch {epoch} is kept in memory"
            );
            if let Some(hint) = crate::failure::hint(&error) {
                eprintln!("hint: {hint}");
            }
            false
        }
    }
}

/// What newcomers need when everybody else has left: this peer's own addresses.
fn print_token(visit: &Visit) -> Result<String> {
    let bootstrap = visit.transport.addresses().into_iter().take(8).collect();
    let token = Token { bootstrap, ..visit.token.clone() };
    token.validate()?;
    println!("keeping {:?} as peer {}", token.run_id, visit.transport.local_peer());
    println!("token {token}");
    Ok(token.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_state_is_due_a_step_after_the_last_whatever_epochs_peers_name() {
        assert!(is_due(0, None, 10) && is_due(u64::MAX, None, 10));
        assert_eq!([9, 10, 11].map(|epoch| is_due(epoch, Some(0), 10)), [false, true, true]);
        assert!(!is_due(3, Some(20), 1) && !is_due(20, Some(20), 1));
        assert!(is_due(u64::MAX, Some(20), 10));
        for epoch in [0, 5, u64::MAX] {
            assert!(!is_due(epoch, Some(u64::MAX), 1), "nothing comes after the last number");
        }
    }

    #[test]
    fn a_download_that_fails_is_no_news_until_it_has_failed_for_a_while() {
        let (mut trouble, begun) = (Trouble::default(), Instant::now());
        let said: Vec<u64> = (0..100)
            .filter(|&at| trouble.is_worth_a_word(begun + Duration::from_secs(at)).is_some())
            .collect();
        assert_eq!(said, [30, 60, 90]);
        let mut trouble = Trouble::default();
        assert_eq!(trouble.is_worth_a_word(begun), None);
        let long = Duration::from_secs(600);
        assert_eq!(trouble.is_worth_a_word(begun + long), Some(long), "one attempt may take that long");
    }
}
