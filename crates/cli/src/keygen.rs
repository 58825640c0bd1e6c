//! `potluck keygen`: the identity of a machine, made before anything runs, for scripts and for owners of closed runs.

use anyhow::Result;
use clap::Args as ClapArgs;
use potluck_net::Env;
use potluck_net_libp2p::identity_file;
use serde::Serialize;
use std::path::PathBuf;

pub(crate) const HELP: &str =
    "Examples:\n  potluck keygen --identity owner.key\n  potluck keygen --identity owner.key --json";

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// File for the identity; made with mode 0600 if absent, else shown [default: $POTLUCK_IDENTITY or the user's data folder]
    #[arg(long)]
    identity: Option<PathBuf>,
    /// Print one line of JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Made {
    peer: String,
    file: PathBuf,
    new: bool,
}

/// Make or show.
pub(crate) fn run(args: &Args) -> Result<()> {
    let file = args.identity.clone().unwrap_or_else(identity_file::default_path);
    let new = !file.exists();
    let (identity, _held) = identity_file::load_or_create(&file, &Env::real())?;
    let made = Made { peer: identity.peer_id().to_string(), file, new };
    if args.json {
        println!("{}", serde_json::to_string(&made)?);
    } else {
        println!("peer {}", made.peer);
        println!(
            "file {} ({})",
            made.file.display(),
            if new { "new; keep it secret" } else { "was there already" }
        );
    }
    Ok(())
}
