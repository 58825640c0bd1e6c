//! `potluck node`: a peer that newcomers ask first, and that carries the connections of those behind NAT.

use crate::failure::Failure;
use crate::stop::Stop;
use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use potluck_dht::{Dht, DhtConfig};
use potluck_net::{EVERY_RUN, Env, Tasks, Token, Transport, Watermarks};
use potluck_net_libp2p::{Config, Libp2pTransport, identity_file};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a goodbye may take; the issue allows five seconds.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a start waits before it reports the bootstrap addresses that failed.
const BOOTSTRAP_REPORT_AFTER: Duration = Duration::from_secs(12);
/// How long it then waits at a time.
const LATER: Duration = Duration::from_secs(3600);

/// Addresses that a token takes, and those of the node itself among them.
const ADDRESSES_MAX: usize = 12;
const OWN_ADDRESSES_MAX: usize = 8;

pub(crate) const HELP: &str = "Stops politely at SIGINT and SIGTERM. Says so when it is alone, and dials those again that \
it knew. The token goes to everybody who is to join.\n\nExamples:\n  \
potluck node --run my-run\n  potluck node --listen /ip4/0.0.0.0/tcp/4001 --listen /ip4/0.0.0.0/udp/4001/quic-v1";
pub(crate) const RELAY_HELP: &str = "For a machine with a public address and these ports open. Same as `potluck node --relay`.\n\n\
Example:\n  potluck relay --listen /ip4/0.0.0.0/tcp/4001 --listen /ip4/0.0.0.0/udp/4001/quic-v1";

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// File that holds this machine's identity; made if absent [default: $POTLUCK_IDENTITY or the user's data folder]
    #[arg(long)]
    identity: Option<PathBuf>,
    /// Address to listen on, such as /ip4/0.0.0.0/tcp/4001; may be given several times [default: all, free ports]
    #[arg(long)]
    listen: Vec<String>,
    /// Address to tell others instead of those found, for a static port mapping; may be given several times
    #[arg(long)]
    announce: Vec<String>,
    /// Carry connections for peers that cannot be dialed
    #[arg(long)]
    relay: bool,
    /// Name of the run that the token is for; without it, the token is for every run
    #[arg(long, default_value = EVERY_RUN)]
    run: String,
    /// Join through this token; its run is then the node's run
    #[arg(long)]
    join: Option<Token>,
    /// Do not ask the router for a port mapping
    #[arg(long)]
    no_port_mapping: bool,
    /// Print one line of JSON instead of text
    #[arg(long)]
    json: bool,
}

impl Args {
    /// As `potluck relay` has it.
    pub(crate) fn relaying(self) -> Self {
        Self { relay: true, ..self }
    }
}

#[derive(Serialize)]
struct Started {
    peer: String,
    addresses: Vec<String>,
    token: String,
    run: String,
}

/// Say how the joining goes: that it worked, or how far each address got; it is tried on. Never ends.
async fn tell_joining(args: &Args, transport: &Libp2pTransport) {
    let mut limit = BOOTSTRAP_REPORT_AFTER;
    while args.join.is_some() {
        match transport.wait_bootstrapped(Instant::now() + limit).await {
            Ok(peer) => {
                if !args.json {
                    // Nobody may read any more what a node says; it serves all the same.
                    let _unread = writeln!(std::io::stdout().lock(), "joined {peer}");
                }
                break;
            }
            Err(attempts) if limit == BOOTSTRAP_REPORT_AFTER => {
                attempts.iter().for_each(|attempt| eprintln!("bootstrap {attempt}"));
                eprintln!(
                    "potluck: not joined yet; all addresses are tried again, for as long as this node runs"
                );
                limit = LATER;
            }
            Err(_) => {}
        }
    }
    std::future::pending::<()>().await;
}

/// Run until SIGINT or SIGTERM.
pub(crate) async fn run(args: Args) -> Result<()> {
    // Before anything else, so that a signal during the start is not lost.
    let mut stop = Stop::listen()?;
    run_until(&args, stop.asked()).await
}

/// Run until `stop`, which also ends a start that is not over.
async fn run_until(args: &Args, stop: impl Future<Output = ()>) -> Result<()> {
    tokio::pin!(stop);
    let env = Env::real();
    let path = args.identity.clone().unwrap_or_else(identity_file::default_path);
    let (identity, _held) = identity_file::load_or_create(&path, &env)?;
    let mut config = Config::new(identity);
    if !args.listen.is_empty() {
        config.listen.clone_from(&args.listen);
    }
    config.announce.clone_from(&args.announce);
    config.relay_server = args.relay;
    config.connections = Watermarks::NODE;
    config.port_mapping = !args.no_port_mapping;
    config.bootstrap = args.join.as_ref().map(|token| token.bootstrap.clone()).unwrap_or_default();
    let transport = tokio::select! {
        biased;
        // Nobody knows of this node yet who could be told goodbye.
        () = &mut stop => return Ok(()),
        started = Libp2pTransport::start(config, env.clone()) => started?,
    };
    let mut dht = None;
    let result = tokio::select! {
        biased;
        () = &mut stop => Ok(()),
        // Whoever goes on without its network looks alive and answers nobody.
        () = transport.ended() => Err(Failure::new(
            "the network of this node has ended",
            "this is an error of potluck: start it again, and report what POTLUCK_LOG=info shows",
        )
        .into()),
        result = serve(args, &transport, env, &mut dht) => result,
    };
    let leave = async {
        if let Some(dht) = dht {
            dht.shutdown().await;
        }
        transport.close().await;
    };
    if tokio::time::timeout(LEAVE_TIMEOUT, leave).await.is_err() {
        eprintln!("potluck: some peers did not take the goodbye in time");
    }
    result
}

/// Everything that a node does, on this transport; ends only if it cannot begin. Whoever drops it shuts the DHT down.
async fn serve(
    args: &Args,
    transport: &Arc<Libp2pTransport>,
    env: Env,
    started: &mut Option<Dht>,
) -> Result<()> {
    let config = DhtConfig { initial_peers: transport.bootstrap_peers(), ..DhtConfig::default() };
    *started = Some(Dht::start(transport.clone(), env, config).await.context("cannot start the DHT")?);
    // `potluck doctor` measures its way here.
    let serving = Tasks::new();
    potluck_collab::serve_speed(&**transport, &serving);
    crate::probe::answer(&**transport, &serving)?;

    let run = args.join.as_ref().map_or(&args.run, |token| &token.run_id);
    if args.join.is_none() {
        // Whoever comes from elsewhere needs the address that only the router knows.
        transport.wait_mapped().await;
    }
    let token = print_start(args, transport, run)?;
    let _notice = crate::nearby::post(run, token);
    tokio::join!(tell_joining(args, transport), crate::company::keep(&**transport, args.join.is_some()));
    Ok(())
}

/// Tell who this is; answers the token.
fn print_start(args: &Args, transport: &Arc<Libp2pTransport>, run: &str) -> Result<String> {
    let addresses = transport.addresses();
    // The token takes the first few; a peer has more only on machines with many interfaces. Whoever has the token of the
    // second node can also come in through the first.
    let joined = args.join.iter().flat_map(|token| &token.bootstrap);
    let bootstrap =
        addresses.iter().take(OWN_ADDRESSES_MAX).chain(joined).take(ADDRESSES_MAX).cloned().collect();
    let invite = args.join.as_ref().and_then(|token| token.invite.clone());
    let token = Token { run_id: run.to_owned(), bootstrap, invite };
    token.validate().context("cannot make a token")?;
    let started = Started {
        peer: transport.local_peer().to_string(),
        addresses,
        token: token.to_string(),
        run: run.to_owned(),
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&started)?)?;
    } else {
        writeln!(out, "peer   {}", started.peer)?;
        for address in &started.addresses {
            writeln!(out, "listen {address}")?;
        }
        writeln!(out, "token  {}", started.token)?;
    }
    out.flush()?;
    Ok(started.token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::future::{pending, ready};

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    #[tokio::test]
    async fn whoever_is_asked_to_stop_does_not_go_on_to_start() {
        let dir = tempfile::tempdir().unwrap();
        let identity = dir.path().join("key");
        // A start that goes on finds the port taken.
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().unwrap().port());
        let words =
            ["node", "--no-port-mapping", "--listen", &listen, "--identity", identity.to_str().unwrap()];
        let args = Command::parse_from(words).args;
        let error = run_until(&args, pending()).await.unwrap_err();
        assert!(error.to_string().contains(&listen), "{error:#}");
        run_until(&args, ready(())).await.unwrap();
    }
}
