//! What a Python program cannot do to others, for the hard days (`tests/hard_days/poisoner.py`):
//!
//! * `hostile member TOKEN LENGTH…` joins the run as an invited member whose gradients have tensors of these lengths. It is
//!   never ready for a round but for the one after a word on its input: `nan` contributes what is no number, unchecked, and
//!   `truncate` cuts the last bytes off every frame that it sends in the round.
//! * `hostile records TOKEN COUNT` asks the first peer that the token names to store so many values above the limit, and
//!   some messages above the limit.
//!
//! It prints a line of JSON for what it has done, and leaves when its input ends.
#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

use bytes::Bytes;
use potluck_averaging::{Averager, AveragerConfig, Invite, Progress, RoundRequest, Swarm, SwarmConfig, View};
use potluck_collab::{Policy, Sight, TensorInfo, TensorRole};
use potluck_dht::VALUE_BYTES_MAX;
use potluck_dht::wire::{Answer, Ask, MESSAGE_BYTES_MAX, PROTOCOL, Refusal, Reply, Request, WireRecord};
use potluck_net::{Env, Identity, PeerId, Protocol, Token, Transport, rpc};
use potluck_net_libp2p::{Config, Libp2pTransport};
use potluck_net_sim::{Mangle, Mangler};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Anything that should happen within seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at how far the others are, if nobody says anything.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What it says it has computed: as much as the others at the same time.
const SAMPLES: f64 = 32.0;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [role, token, numbers @ ..] = arguments.as_slice() else { panic!("usage: see the source") };
    let token: Token = token.parse().expect("TOKEN is a token");
    let numbers: Vec<usize> = numbers.iter().map(|text| text.parse().expect("a number")).collect();
    let env = Env::real();
    let mut config = Config::new(Identity::from_seed(&env.random_bytes()));
    config.bootstrap.clone_from(&token.bootstrap);
    config.port_mapping = false;
    let transport = Libp2pTransport::start(config, env.clone()).await.expect("this host has a network");
    let first = transport.wait_bootstrapped(Instant::now() + PATIENCE).await.expect("the token's peer is up");
    match role.as_str() {
        "member" => member(transport.clone(), env, &token, &numbers).await,
        "records" => records(&*transport, first, numbers[0]).await,
        other => panic!("no role is called {other:?}"),
    }
    transport.close().await;
}

/// Values above the limit, then messages above the limit; how each was answered.
async fn records(transport: &dyn Transport, node: PeerId, count: usize) {
    let mut answers: BTreeMap<&str, usize> = BTreeMap::new();
    let mut sent = 0;
    let sizes = (0..count).map(|at| if at % 8 == 7 { MESSAGE_BYTES_MAX + 1 } else { VALUE_BYTES_MAX + 1 });
    for (at, size) in sizes.enumerate() {
        let key = Bytes::from(format!("oversized {at}"));
        let value = Bytes::from(vec![7; size]);
        sent += size;
        let record = WireRecord { key, subkey: None, value, left: Duration::from_secs(3600) };
        let request = Request { sender: None, ask: Ask::Store { handed_on: false, records: vec![record] } };
        let deadline = Instant::now() + PATIENCE;
        let answer = rpc::call(transport, node, &Protocol::new(PROTOCOL), request.encode(), deadline).await;
        let answer = match answer.map(|bytes| Answer::decode(bytes).map(|answer| answer.reply)) {
            Ok(Ok(Reply::Refused(Refusal::Malformed))) => "malformed",
            Ok(Ok(Reply::Refused(Refusal::Rate))) => "rate",
            Ok(Ok(_)) => "accepted",
            Ok(Err(_)) => "unreadable",
            Err(_) => "no answer",
        };
        *answers.entry(answer).or_default() += 1;
    }
    println!("{{\"kind\": \"end\", \"sent\": {sent}, \"answers\": {answers:?}}}");
}

/// What it is told, a word a line.
fn orders() -> mpsc::Receiver<String> {
    let (said, orders) = mpsc::channel(8);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let _nobody_waits = said.blocking_send(line.trim().to_owned());
        }
    });
    orders
}

async fn member(transport: Arc<Libp2pTransport>, env: Env, token: &Token, lengths: &[usize]) {
    let invite = token.invite.as_ref().map(|text| String::from_utf8_lossy(text).into_owned());
    let peers = transport.bootstrap_peers();
    let deadline = Instant::now() + PATIENCE;
    let sight = Sight::ask(&*transport, peers[0], &token.run_id, invite.clone(), deadline).await;
    let manifest = sight.expect("a member answers the invited").manifest;
    let target: u64 = manifest["target_batch_size"].parse().expect("a number");
    let (cutting, spoilt) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mangle: Mangle = {
        let (cutting, spoilt) = (cutting.clone(), spoilt.clone());
        Arc::new(move |frame: Bytes| {
            if !cutting.load(Ordering::Relaxed) {
                return vec![frame];
            }
            spoilt.fetch_add(1, Ordering::Relaxed);
            vec![frame.slice(..frame.len().saturating_sub(2))]
        })
    };
    let mut config = SwarmConfig::new(token.run_id.clone(), peers);
    config.owner = manifest.get("owner").and_then(|owner| owner.parse().ok());
    config.invite = invite
        .as_deref()
        .and_then(|text| text.rsplit('-').next())
        .and_then(|text| Invite::from_bytes(&bs58::decode(text).into_vec().ok()?));
    config.manifest = manifest;
    config.progress = Progress { ready: false, ..Progress::default() };
    let mangler = Arc::new(Mangler::new(transport, "/round/", mangle));
    let swarm = Swarm::join(mangler, env, config).await.expect("the invited may join");
    let tensors = lengths.iter().enumerate();
    let tensors = tensors.map(|(at, len)| TensorInfo::vector(at.to_string(), *len, TensorRole::Gradient));
    let config =
        AveragerConfig { check_own: false, ..AveragerConfig::new(tensors.collect(), Policy::default()) };
    let averager = Averager::new(&swarm, "gradients", config);
    println!("{{\"kind\": \"ready\", \"peer\": \"{}\"}}", swarm.local_peer());
    let mut orders = orders();
    while let Some(order) = orders.recv().await {
        let value = if order == "nan" { f32::NAN } else { 1e-3 };
        cutting.store(order == "truncate", Ordering::Relaxed);
        let vector = vec![value; lengths.iter().sum()];
        let epoch = enter(&swarm, target).await;
        let request = RoundRequest { norm: Some(1.0), ..RoundRequest::new(Some(epoch), vector, SAMPLES) };
        let members = averager.step(request).await.map_or(0, |round| round.value.members.len());
        cutting.store(false, Ordering::Relaxed);
        swarm.report_now(Progress { epoch, ready: false, ..Progress::default() });
        let spoilt = spoilt.swap(0, Ordering::Relaxed);
        println!(
            "{{\"kind\": \"done\", \"how\": \"{order}\", \"epoch\": {epoch}, \"members\": {members}, \"frames\": {spoilt}}}"
        );
    }
    swarm.leave().await;
}

/// Be ready for the round of an epoch from its beginning; which, once the others have the samples for it.
async fn enter(swarm: &Swarm, target: u64) -> u64 {
    let before = swarm.look(View::epoch_max);
    let mut epoch = before;
    loop {
        let now = swarm.look(View::epoch_max);
        if now > epoch {
            epoch = now;
            swarm.report_now(Progress { epoch, ..Progress::default() });
        }
        if epoch > before && swarm.look(|view| view.samples(epoch)) >= target {
            return epoch;
        }
        let _news_or_time = tokio::time::timeout(LOOK_EVERY, swarm.changed()).await;
    }
}
