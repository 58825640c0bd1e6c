//! `potluck invite`: the owner of a closed run signs a permission to join, and puts it into the run's token.

use crate::failure::Failure;
use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use potluck_collab::Invite;
use potluck_net::{Env, Token};
use potluck_net_libp2p::identity_file;
use serde::Serialize;
use std::path::PathBuf;

pub(crate) const HELP: &str = "The run must have been started with the owner's peer id as `owner`. Whoever holds the \
new token may join.\n\nExample:\n  potluck invite potluck1… --identity owner.key";

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// The run's token
    token: Token,
    /// The owner's identity (see `potluck keygen`)
    #[arg(long)]
    identity: PathBuf,
    /// Print one line of JSON instead of the token
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Issued {
    token: String,
    run: String,
    owner: String,
}

/// Sign and print.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.identity.exists() {
        let message = format!("there is no identity in {}", args.identity.display());
        return Err(Failure::new(message, "make one with `potluck keygen`, before the run starts").into());
    }
    let (owner, _held) = identity_file::load_or_create(&args.identity, &Env::real())?;
    let invite = Invite::issue(&owner, &args.token.run_id);
    let token = Token { invite: Some(invite.to_text().into_bytes()), ..args.token.clone() };
    token.validate().context("cannot make a token")?;
    let (token, owner) = (token.to_string(), owner.peer_id().to_string());
    if args.json {
        let issued = Issued { token, run: args.token.run_id.clone(), owner };
        println!("{}", serde_json::to_string(&issued)?);
    } else {
        println!("{token}");
    }
    Ok(())
}

/// The invite of a token as the text that sessions take.
pub(crate) fn text_of(token: &Token) -> Option<String> {
    token.invite.as_ref().and_then(|bytes| String::from_utf8(bytes.clone()).ok())
}
