//! `potluck bench net`: MB/s and processor seconds per GB between two processes, over each kind of connection.

use crate::{delay, raw_tcp};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::{Args as ClapArgs, ValueEnum};
use futures::future::join_all;
use potluck_net::{Env, Identity, PeerId, Protocol, Stream, Tasks, Transport};
use potluck_net_libp2p::{Config, Libp2pTransport, Security};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

const PROTOCOL: &str = "/potluck/bench/1";
pub(crate) const FRAME_BYTES: usize = 512 << 10;
/// One measurement may take this long.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) const HELP: &str = "Example:\n  potluck bench net > net.json";

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// MB to send per measurement
    #[arg(long, default_value_t = 400)]
    megabytes: usize,
    /// Kinds of connection to measure [default: all]
    #[arg(long, value_enum)]
    kind: Vec<Kind>,
    /// Round-trip times in milliseconds [default: 0 and 100]
    #[arg(long)]
    rtt: Vec<u64>,
    /// Numbers of streams at a time [default: 1 and 4]
    #[arg(long)]
    streams: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// Bare sockets, one for each stream: what the machine itself costs
    Tcp,
    /// TCP, encrypted by Noise
    TcpNoise,
    /// TCP, encrypted by TLS 1.3: what peers use where nothing is in the way
    TcpTls,
    /// UDP, encrypted by TLS 1.3
    Quic,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::TcpNoise => "tcp-noise",
            Self::TcpTls => "tcp-tls",
            Self::Quic => "quic",
        }
    }

    fn config(self, identity: Identity) -> Config {
        let mut config = Config::loopback(identity);
        let listen = if self == Self::Quic { "/ip4/127.0.0.1/udp/0/quic-v1" } else { "/ip4/127.0.0.1/tcp/0" };
        config.listen = vec![listen.to_owned()];
        config.security = if self == Self::TcpNoise { Security::NoiseOnly } else { Security::TlsOnly };
        config
    }
}

/// One line of the result.
#[derive(Serialize)]
struct Measurement {
    kind: Kind,
    rtt_ms: u64,
    streams: usize,
    megabytes: usize,
    megabytes_per_second: f64,
    cpu_seconds_per_gb: f64,
}

#[derive(ClapArgs)]
pub(crate) struct PeerArgs {
    #[arg(long, value_enum)]
    kind: Kind,
    /// Address to send to; without it, receive
    #[arg(long)]
    target: Option<String>,
    #[arg(long, default_value_t = 1)]
    streams: usize,
    #[arg(long, default_value_t = 1)]
    megabytes: usize,
}

/// What the sending process reports.
#[derive(Serialize, Deserialize)]
struct Sent {
    seconds: f64,
    cpu_seconds: f64,
}

/// Measure everything that was asked for; one JSON document.
pub(crate) async fn run(args: Args) -> Result<()> {
    let or =
        |given: &[u64], default: &[u64]| if given.is_empty() { default.to_vec() } else { given.to_vec() };
    let kinds = if args.kind.is_empty() { Kind::value_variants() } else { &args.kind };
    let streams = if args.streams.is_empty() { vec![1, 4] } else { args.streams.clone() };
    let mut results = Vec::new();
    for &kind in kinds {
        for rtt_ms in or(&args.rtt, &[0, 100]) {
            for &streams in &streams {
                let measured = measure(kind, rtt_ms, streams, args.megabytes).await;
                let result = measured.with_context(|| format!("{} at {rtt_ms} ms", kind.name()))?;
                eprintln!(
                    "{} {rtt_ms} ms {streams} streams: {:.0} MB/s",
                    kind.name(),
                    result.megabytes_per_second
                );
                results.push(result);
            }
        }
    }
    println!("{}", serde_json::to_string_pretty(&results)?);
    Ok(())
}

fn spawn(kind: Kind, arguments: &[String]) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "net-peer", "--kind", kind.name()]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    Ok(command.spawn()?)
}

async fn measure(kind: Kind, rtt_ms: u64, streams: usize, megabytes: usize) -> Result<Measurement> {
    let mut receiver = spawn(kind, &[])?;
    let mut lines = BufReader::new(receiver.stdout.take().context("the receiver has an output")?).lines();
    let address = timeout(LIMIT, lines.next_line()).await??.context("the receiver did not start")?;
    let tasks = Tasks::new();
    let target = if rtt_ms == 0 { address } else { delayed(&address, rtt_ms, &tasks).await? };
    let numbers = ["--streams".into(), streams.to_string(), "--megabytes".into(), megabytes.to_string()];
    let sender = spawn(kind, &[vec!["--target".into(), target], numbers.to_vec()].concat())?;
    let output = timeout(LIMIT, sender.wait_with_output()).await.context("took too long")??;
    if !output.status.success() {
        bail!("the sender failed");
    }
    // The end of its input tells the receiver to go.
    drop(receiver.stdin.take());
    timeout(LIMIT, receiver.wait()).await.context("the receiver does not end")??;
    tasks.shutdown().await;
    let sent: Sent = serde_json::from_slice(&output.stdout)?;
    let total = megabytes as f64;
    Ok(Measurement {
        kind,
        rtt_ms,
        streams,
        megabytes,
        megabytes_per_second: total / sent.seconds,
        cpu_seconds_per_gb: sent.cpu_seconds / (total / 1000.0),
    })
}

/// The same address with the delaying relay in front of it.
async fn delayed(address: &str, rtt_ms: u64, tasks: &Tasks) -> Result<String> {
    let parts: Vec<&str> = address.split('/').collect();
    let [_, "ip4", host, kind, port, ..] = parts[..] else { bail!("unexpected address {address}") };
    let target: SocketAddr = format!("{host}:{port}").parse()?;
    let one_way = Duration::from_millis(rtt_ms) / 2;
    let relay = match kind {
        "tcp" => delay::tcp(target, one_way, tasks).await?,
        _ => delay::udp(target, one_way, tasks).await?,
    };
    Ok(address.replacen(&format!("/{port}"), &format!("/{}", relay.port()), 1))
}

/// One end, on the runtime's own thread, where the tasks of a peer run, and not on the one beside it that waits for them.
pub(crate) async fn run_peer(args: PeerArgs) -> Result<()> {
    let (tasks, (done, result)) = (Tasks::new(), oneshot::channel());
    tasks.spawn(async move {
        // Nobody waits any more when this process is about to end.
        let _unheard = done.send(one_end(args).await);
    });
    result.await?
}

async fn one_end(args: PeerArgs) -> Result<()> {
    if args.kind == Kind::Tcp {
        return match &args.target {
            Some(target) => send(&args, |frames| raw_tcp::transfer(target, frames)).await,
            None => raw_tcp::receive().await,
        };
    }
    let env = Env::real();
    let mut config = args.kind.config(Identity::from_seed(&env.random_bytes()));
    config.client_mode = args.target.is_some();
    let transport = Libp2pTransport::start(config, env).await?;
    match &args.target {
        Some(target) => {
            let peer: PeerId = target.rsplit('/').next().context("no peer id")?.parse()?;
            transport.add_addresses(peer, std::slice::from_ref(target));
            send(&args, |frames| transfer(&transport, peer, frames)).await?;
        }
        None => receive(&transport).await?,
    }
    transport.close().await;
    Ok(())
}

async fn receive(transport: &Arc<Libp2pTransport>) -> Result<()> {
    let mut incoming = transport.accept(Protocol::new(PROTOCOL), 64)?;
    println!("{}", transport.addresses().first().context("no address")?);
    std::io::stdout().flush()?;
    let tasks = Tasks::new();
    until_input_ends(async {
        while let Some(stream) = incoming.next().await {
            tasks.spawn(async move {
                // The sender notices and reports it.
                let _failed = swallow(stream).await;
            });
        }
        Ok(())
    })
    .await
}

/// Whoever started this process ends it by closing its standard input.
pub(crate) async fn until_input_ends(receiving: impl Future<Output = Result<()>>) -> Result<()> {
    let (mut input, mut nothing) = (tokio::io::stdin(), [0]);
    tokio::select! {
        ended = receiving => ended,
        _ = input.read(&mut nothing) => Ok(()),
    }
}

/// Read everything, then answer with the processor time that this process has used.
async fn swallow(mut stream: Stream) -> Result<()> {
    while stream.recv().await?.is_some() {}
    stream.send(Bytes::copy_from_slice(&cpu_seconds()?.to_be_bytes())).await?;
    Ok(stream.finish().await?)
}

/// Time what `transfer` does with this many frames, on as many streams as were asked for; it returns the receiver's
/// processor seconds.
async fn send<F: Future<Output = Result<f64>>>(args: &PeerArgs, transfer: impl Fn(usize) -> F) -> Result<()> {
    // Connects, and tells what the receiver's start has cost.
    let receiver_start = transfer(0).await?;
    let (start, own_start) = (Instant::now(), cpu_seconds()?);
    let frames = (args.megabytes * 1_000_000).div_ceil(FRAME_BYTES * args.streams);
    let mut receiver_end = receiver_start;
    for end in join_all((0..args.streams).map(|_| transfer(frames))).await {
        receiver_end = receiver_end.max(end?);
    }
    let seconds = start.elapsed().as_secs_f64();
    let cpu_seconds = cpu_seconds()? - own_start + receiver_end - receiver_start;
    println!("{}", serde_json::to_string(&Sent { seconds, cpu_seconds })?);
    Ok(())
}

async fn transfer(transport: &Arc<Libp2pTransport>, peer: PeerId, frames: usize) -> Result<f64> {
    let mut stream = transport.open(peer, Protocol::new(PROTOCOL)).await?;
    let frame = Bytes::from(vec![7; FRAME_BYTES]);
    for _ in 0..frames {
        stream.send(frame.clone()).await?;
    }
    stream.finish().await?;
    let answer = stream.recv().await?.context("no answer")?;
    Ok(f64::from_be_bytes(answer.as_ref().try_into().context("not 8 bytes")?))
}

/// Processor seconds of this process, user and system.
pub(crate) fn cpu_seconds() -> Result<f64> {
    used_milliseconds()
        .map(|used| used as f64 / 1000.0)
        .context("the system does not say how much processor time this process has used")
}

fn used_milliseconds() -> Option<u64> {
    let own = sysinfo::get_current_pid().ok()?;
    let mut system = System::new().ok()?;
    let kinds = ProcessRefreshKind::nothing().with_cpu();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), false, kinds);
    Some(system.process(own)?.accumulated_cpu_time())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_counts_what_this_process_computes() {
        let before = cpu_seconds().unwrap();
        let start = Instant::now();
        let mut digest = [0; 32];
        // Computing for as long as it takes to be seen; the clock's tick is 10 ms.
        while cpu_seconds().unwrap() < before + 0.05 {
            for _ in 0..1000 {
                digest = *blake3::hash(&digest).as_bytes();
            }
            assert!(start.elapsed() < LIMIT, "no processor time in {LIMIT:?}");
        }
        let spent = cpu_seconds().unwrap() - before;
        let possible =
            start.elapsed().as_secs_f64() * std::thread::available_parallelism().unwrap().get() as f64;
        assert!(spent <= possible + 0.1, "{spent} s of processor time in {possible} s");
    }
}
