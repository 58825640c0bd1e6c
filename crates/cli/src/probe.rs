//! `potluck probe`: join through a token, then either wait for callers or call one peer and say how the two are
//! connected. It is what the NAT test runs, and what a user runs who wonders why two machines do not meet.

use crate::failure::Failure;
use crate::stop::Stop;
use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Args as ClapArgs;
use potluck_net::{
    Env, Identity, Incoming, OpenError, Path, PeerId, Protocol, Stream, Tasks, Token, Transport,
};
use potluck_net_libp2p::{Config, Libp2pTransport};
use serde::Serialize;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

pub(crate) const PROTOCOL: &str = "/potluck/probe/1";
const FRAME_BYTES: usize = 64 << 10;
/// Callers that may wait while one is served.
const BACKLOG: usize = 16;

pub(crate) const HELP: &str = "Example, on two machines:\n  potluck probe --join potluck1…\n  \
potluck probe --join potluck1… --call 12D3KooW…";

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// Join through this token (see `potluck node`)
    #[arg(long)]
    join: Token,
    /// Peer to call; without it, wait for callers until stopped
    #[arg(long)]
    call: Option<PeerId>,
    /// Bytes to send to the called peer and back
    #[arg(long, default_value_t = 4 << 20)]
    bytes: usize,
    /// How long to wait for a direct connection before settling for a relayed one, and for a relay's before waiting for
    /// callers, in seconds
    #[arg(long, default_value_t = 15)]
    patience: u64,
    /// How long the whole probe may take, in seconds
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// Address to listen on; may be given several times [default: all, free ports]
    #[arg(long)]
    listen: Vec<String>,
}

/// What a probe found.
#[derive(Serialize)]
struct Report {
    peer: String,
    path: Path,
    sent_bytes: usize,
    relayed_bytes: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct Ready {
    peer: String,
    addresses: Vec<String>,
}

/// Wait for callers, or call.
pub(crate) async fn run(args: Args) -> Result<()> {
    let mut stop = Stop::listen()?;
    let env = Env::real();
    let mut config = Config::new(Identity::from_seed(&env.random_bytes()));
    config.bootstrap.clone_from(&args.join.bootstrap);
    config.port_mapping = false;
    if !args.listen.is_empty() {
        config.listen.clone_from(&args.listen);
    }
    let transport = Libp2pTransport::start(config, env).await?;
    let deadline = Instant::now() + Duration::from_secs(args.limit);
    if let Err(attempts) = transport.wait_bootstrapped(deadline).await {
        return Err(crate::visit::no_answer(&attempts));
    }
    let patience = Duration::from_secs(args.patience);
    let probe = async {
        match args.call {
            Some(peer) => call(&transport, peer, &args, deadline).await,
            None => serve(&transport, patience).await,
        }
    };
    let result = tokio::select! {
        biased;
        () = stop.asked() => Ok(()),
        result = probe => result,
    };
    transport.close().await;
    result
}

/// Answer callers as long as the tasks live, as every node does.
pub(crate) fn answer(transport: &dyn Transport, tasks: &Tasks) -> Result<()> {
    let incoming = transport.accept(Protocol::new(PROTOCOL), BACKLOG)?;
    tasks.spawn(echo_all(incoming));
    Ok(())
}

/// One caller after the other.
async fn echo_all(mut incoming: Incoming) {
    while let Some(mut stream) = incoming.next().await {
        if let Err(error) = echo(&mut stream).await {
            tracing::info!(target: "potluck::net", peer = %stream.peer(), "a caller was not answered: {error:#}");
        }
    }
}

async fn serve(transport: &Arc<Libp2pTransport>, patience: Duration) -> Result<()> {
    let incoming = transport.accept(Protocol::new(PROTOCOL), BACKLOG)?;
    // Reachable means: by a circuit, or by an address of our own that somebody confirmed. The first is quick.
    let patience = Instant::now() + patience.min(Duration::from_secs(10));
    while !transport.addresses().iter().any(|address| address.contains("/p2p-circuit"))
        && Instant::now() < patience
    {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let ready = Ready { peer: transport.local_peer().to_string(), addresses: transport.addresses() };
    let mut out = std::io::stdout();
    writeln!(out, "{}", serde_json::to_string(&ready)?)?;
    out.flush()?;
    echo_all(incoming).await;
    Ok(())
}

async fn echo(stream: &mut Stream) -> Result<()> {
    let limit = Duration::from_secs(30);
    while let Some(frame) = timeout(limit, stream.recv()).await.context("the caller fell silent")?? {
        timeout(limit, stream.send(frame)).await.context("the caller does not read")??;
    }
    Ok(stream.finish().await?)
}

async fn call(transport: &Arc<Libp2pTransport>, peer: PeerId, args: &Args, deadline: Instant) -> Result<()> {
    let start = Instant::now();
    let open = || transport.open(peer, Protocol::new(PROTOCOL));
    let gone = |error: OpenError| {
        Failure::new(
            error.to_string(),
            "is `potluck probe` or `potluck node` still running there, with this token?",
        )
    };
    // It only makes the connection: whoever answers does not wait for a silent caller.
    drop(open().await.map_err(gone)?);
    // A relayed connection is where a hole punch starts; give it time, then use the best there is.
    let settle = start + Duration::from_secs(args.patience);
    while transport.path(peer) == Some(Path::Relayed) && Instant::now() < settle {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut stream = open().await.map_err(gone)?;
    let mut sent_bytes = 0;
    let exchange = async {
        while sent_bytes < args.bytes {
            stream.send(Bytes::from(vec![7; FRAME_BYTES])).await?;
            stream.recv().await?.context("the other side ended early")?;
            sent_bytes += FRAME_BYTES;
        }
        stream.finish().await?;
        anyhow::Ok(())
    };
    timeout_at(deadline, exchange).await.context("the transfer did not end in time")??;
    let path = transport.path(peer).context("the connection is gone")?;
    let report = Report {
        peer: peer.to_string(),
        path,
        sent_bytes,
        relayed_bytes: transport.traffic().relayed_bytes,
        seconds: start.elapsed().as_secs_f64(),
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
