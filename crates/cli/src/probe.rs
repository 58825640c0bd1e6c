//! `potluck probe`: join through a token, then either wait for callers or call one peer and say how the two are
//! connected. It is what the NAT test runs, and what a user runs who wonders why two machines do not meet.

use crate::failure::Failure;
use crate::stop::Stop;
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::Args as ClapArgs;
use clap::builder::RangedU64ValueParser;
use futures::StreamExt;
use futures::stream::{AbortHandle, Abortable, FuturesUnordered};
use potluck_net::{
    Env, Identity, Incoming, OpenError, Path, PeerId, Protocol, Stream, Tasks, Token, Transport,
};
use potluck_net_libp2p::{Config, Libp2pTransport};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

pub(crate) const PROTOCOL: &str = "/potluck/probe/1";
const FRAME_BYTES: usize = 64 << 10;
/// Callers that are served at the same time. Whoever does not read takes one place, for as long as [`ECHO_LIMIT`].
const CALLERS_MAX: usize = 8;
/// Callers that may wait for a place.
const BACKLOG: usize = 16;
/// Most that one caller sends and gets back.
const BYTES_MAX: usize = 16 << 20;
/// How long one caller may take in all, which is as long as its whole probe takes by default.
const ECHO_LIMIT: Duration = Duration::from_secs(60);

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
    /// Bytes to send to the called peer and back, at most 16 MiB
    #[arg(long, default_value_t = 4 << 20, value_parser = RangedU64ValueParser::<usize>::new().range(..=BYTES_MAX as u64))]
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

/// Several callers at a time, each peer once: its newest call ends the one before, so that one that is stuck keeps no
/// place from the others.
async fn echo_all(mut incoming: Incoming) {
    let mut callers = FuturesUnordered::new();
    let mut newest: BTreeMap<PeerId, AbortHandle> = BTreeMap::new();
    loop {
        tokio::select! {
            biased;
            Some(ended) = callers.next() => {
                // One that was ended for a newer one has left its name to that.
                if let Ok(peer) = ended {
                    newest.remove(&peer);
                }
            }
            next = incoming.next(), if callers.len() < CALLERS_MAX => {
                let Some(stream) = next else { return };
                let peer = stream.peer();
                let (end, ended) = AbortHandle::new_pair();
                callers.push(Abortable::new(serve_one(stream), ended));
                if let Some(older) = newest.insert(peer, end) {
                    older.abort();
                }
            }
        }
    }
}

/// Who was served, well or not.
async fn serve_one(mut stream: Stream) -> PeerId {
    let peer = stream.peer();
    let echoed = timeout(ECHO_LIMIT, echo(&mut stream)).await.context("the caller took too long");
    if let Err(error) = echoed.flatten() {
        tracing::info!(target: "potluck::net", %peer, "a caller was not answered: {error:#}");
    }
    peer
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
    let mut rest = BYTES_MAX;
    while let Some(frame) = stream.recv().await? {
        ensure!(frame.len() <= rest, "the caller sends more than {BYTES_MAX} bytes");
        rest -= frame.len();
        stream.send(frame).await?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_net_sim::{PeerSpec, SimNet, SimTransport, run};

    fn listening(net: &SimNet) -> (Arc<SimTransport>, Tasks) {
        let (node, tasks) = (net.add_peer(PeerSpec::default()), Tasks::new());
        answer(&*node, &tasks).unwrap();
        (node, tasks)
    }

    async fn open(from: &SimTransport, to: &SimTransport) -> Stream {
        from.open(to.local_peer(), Protocol::new(PROTOCOL)).await.unwrap()
    }

    fn frame() -> Bytes {
        Bytes::from(vec![7; FRAME_BYTES])
    }

    /// Send until the other side ends it, and never read.
    async fn never_read(mut stream: Stream) -> usize {
        let mut sent = 0;
        while stream.send(frame()).await.is_ok() {
            sent += 1;
        }
        sent
    }

    #[test]
    fn callers_that_do_not_read_keep_nobody_from_an_answer_and_are_let_go() {
        run(1, async |net| {
            let (node, _tasks) = listening(&net);
            // One of them would take every place alone.
            let stuck = net.add_peer(PeerSpec::default());
            let mut calls = FuturesUnordered::new();
            for _ in 0..2 * CALLERS_MAX {
                calls.push(never_read(open(&stuck, &node).await));
            }
            let others: Vec<_> = (2..CALLERS_MAX).map(|_| net.add_peer(PeerSpec::default())).collect();
            for other in &others {
                calls.push(never_read(open(other, &node).await));
            }
            let caller = net.add_peer(PeerSpec::default());
            let honest = async {
                let mut stream = open(&caller, &node).await;
                for _ in 0..3 {
                    stream.send(frame()).await?;
                    assert_eq!(stream.recv().await?, Some(frame()));
                }
                stream.finish().await?;
                assert_eq!(stream.recv().await?, None);
                anyhow::Ok(())
            };
            let mut ended = 0;
            tokio::pin!(honest);
            loop {
                tokio::select! {
                    biased;
                    answered = &mut honest => break answered.unwrap(),
                    Some(_sent) = calls.next() => ended += 1,
                }
            }
            assert_eq!(ended, 2 * CALLERS_MAX - 1, "only those whose peer had called again");
            while calls.next().await.is_some() {}
        });
    }

    #[test]
    fn a_caller_that_trickles_is_let_go() {
        run(1, async |net| {
            let (node, _tasks) = listening(&net);
            let caller = net.add_peer(PeerSpec::default());
            let mut stream = open(&caller, &node).await;
            let started = Instant::now();
            while stream.send(Bytes::from_static(b"x")).await.is_ok() && started.elapsed() < 10 * ECHO_LIMIT {
                tokio::time::sleep(ECHO_LIMIT / 3).await;
            }
            assert!(started.elapsed() < 2 * ECHO_LIMIT, "{:?} of virtual time", started.elapsed());
        });
    }

    #[test]
    fn as_many_bytes_as_a_probe_may_send_come_back_and_no_more() {
        run(1, async |net| {
            let (node, _tasks) = listening(&net);
            let caller = net.add_peer(PeerSpec::default());
            let mut stream = open(&caller, &node).await;
            for _ in 0..BYTES_MAX / FRAME_BYTES {
                stream.send(frame()).await.unwrap();
                assert_eq!(stream.recv().await.unwrap(), Some(frame()));
            }
            stream.send(Bytes::from_static(b"x")).await.unwrap();
            stream.recv().await.unwrap_err();
        });
    }
}
