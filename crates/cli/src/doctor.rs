//! `potluck doctor`: what this machine will be in a run, before it joins, in under 15 seconds.

use crate::machine::Machine;
use crate::nat::{self, Nat};
use crate::view;
use crate::visit::Visit;
use anyhow::Result;
use clap::Args as ClapArgs;
use potluck_collab::Speed;
use potluck_net::{Env, Identity, Path, PeerId, Reachability, Token, Transport};
use potluck_net_libp2p::{BootstrapAttempt, Config, Libp2pTransport, Stage};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;
use tokio::time::Instant;

pub(crate) const HELP: &str = "Takes less than 15 seconds and changes nothing.\n\n\
Exit codes: 0 this machine can take part fully; 1 it can take part, with the limits named in the last lines; \
2 it cannot take part (no address of the token answers, the run is closed to it, or the network cannot be used at all).\n\n\
Examples:\n  potluck doctor\n  potluck doctor potluck1…\n  potluck doctor potluck1… --json";

/// How long the bootstrap addresses may take; they are tried at the same time.
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(5);
/// How long peers may take to find out whether they can dial us.
const REACHABILITY_LIMIT: Duration = Duration::from_secs(3);
/// How long bootstrap peers may take to say as which address they see us, over UDP and then over TCP.
pub(crate) const SEEN_LIMIT: Duration = Duration::from_millis(2500);
const SPEED_LIMIT: Duration = Duration::from_secs(4);
/// How long the run's peers are looked for, meanwhile.
const RUN_LIMIT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// The token of the run to join; without it, only the machine is looked at
    token: Option<Token>,
    /// Address to listen on, as the training program will; may be given several times [default: all, free ports]
    #[arg(long)]
    listen: Vec<String>,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    network: Option<Network>,
    role: &'static str,
    summary: String,
    advice: Vec<String>,
    exit_code: u8,
}

#[derive(Debug, Serialize)]
struct Network {
    reachability: Reachability,
    nat: Nat,
    /// Whether UDP gets through: `None` if the token holds no UDP address.
    udp: Option<bool>,
    addresses: Vec<String>,
    bootstrap: Vec<Attempt>,
    run: Run,
    speed: Option<Measured>,
    relayed: bool,
}

/// What was found of the run itself.
#[derive(Debug, Serialize)]
struct Run {
    run_id: String,
    /// Live peers; 0 if nobody of the run was found.
    peers: usize,
    epoch: Option<u64>,
    /// Only the invited may join, and the token holds no invite.
    closed: bool,
}

#[derive(Debug, Serialize)]
struct Attempt {
    address: String,
    ok: bool,
    stage: String,
    detail: String,
    seconds: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Measured {
    peer: PeerId,
    path: Option<Path>,
    #[serde(flatten)]
    speed: Speed,
}

/// Look, tell, and answer with the exit code.
pub(crate) async fn run(args: Args) -> Result<ExitCode> {
    let env = Env::real();
    let machine = Machine::look(env.unix_time().as_secs());
    let (machine, network) = match &args.token {
        Some(token) => {
            let (machine, network) = tokio::join!(machine, examine(token, &args.listen, &env));
            (machine, Some(network?))
        }
        None => (machine.await, None),
    };
    let report = conclude(machine, network);
    let text =
        if args.json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { text(&report) };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(ExitCode::from(report.exit_code))
}

async fn examine(token: &Token, listen: &[String], env: &Env) -> Result<Network> {
    // One address at a time has a peer of its own: on one peer, the first that connects would end the others.
    let dials = token.bootstrap.iter().map(|address| try_address(address, env));
    let seen = nat::find(&token.bootstrap, env);
    let (attempts, visit, nat) =
        tokio::join!(futures::future::join_all(dials), whole(token, listen, env), seen);
    let visit = visit?;
    let bootstrap = attempts.into_iter().collect::<Result<Vec<Attempt>>>()?;
    let mut network = Network {
        reachability: Reachability::Unknown,
        nat: nat?,
        udp: udp(&bootstrap),
        addresses: Vec::new(),
        bootstrap,
        run: Run { run_id: token.run_id.clone(), peers: 0, epoch: None, closed: false },
        speed: None,
        relayed: false,
    };
    if network.bootstrap.iter().any(|attempt| attempt.ok) {
        let patience = Instant::now() + REACHABILITY_LIMIT;
        let known = async {
            while visit.transport.reachability() == Reachability::Unknown && Instant::now() < patience {
                tokio::time::sleep(PAUSE).await;
            }
        };
        let ((), seen) = tokio::join!(known, visit.look(RUN_LIMIT));
        match seen {
            Ok((_, sight)) => {
                (network.run.peers, network.run.epoch) = (sight.status.peers.len(), Some(sight.status.epoch));
            }
            Err(error) => network.run.closed = error.to_string().contains("is closed"),
        }
        network.speed = measure(&visit.transport).await;
        network.reachability = visit.transport.reachability();
    }
    network.addresses = visit.transport.addresses();
    network.relayed = network.addresses.iter().any(|address| address.contains("/p2p-circuit"));
    visit.leave().await;
    Ok(network)
}

/// A peer as the training program will be.
async fn whole(token: &Token, listen: &[String], env: &Env) -> Result<Visit> {
    let mut config = Config::new(Identity::from_seed(&env.random_bytes()));
    if !listen.is_empty() {
        config.listen = listen.to_vec();
    }
    Visit::with(config, env.clone(), token).await
}

async fn try_address(address: &str, env: &Env) -> Result<Attempt> {
    let mut config = Config::new(Identity::from_seed(&env.random_bytes()));
    config.client_mode = true;
    config.port_mapping = false;
    config.bootstrap = vec![address.to_owned()];
    let begun = Instant::now();
    let transport = Libp2pTransport::start(config, env.clone()).await?;
    let connected = transport.wait_bootstrapped(begun + BOOTSTRAP_LIMIT).await.is_ok();
    let seconds = connected.then(|| begun.elapsed().as_secs_f64());
    let found = transport.bootstrap_report().pop();
    transport.abort();
    Ok(match found {
        Some(BootstrapAttempt { stage, detail, .. }) if !connected => {
            // Whoever has not answered by now is not there, or a firewall is in between.
            let stage = if stage == Stage::Dialing { Stage::Connect } else { stage };
            let detail = if detail.is_empty() { "no answer in time".to_owned() } else { detail };
            Attempt { address: address.to_owned(), ok: false, stage: stage.to_string(), detail, seconds }
        }
        _ => Attempt {
            address: address.to_owned(),
            ok: connected,
            stage: "connected".to_owned(),
            detail: String::new(),
            seconds,
        },
    })
}

fn udp(bootstrap: &[Attempt]) -> Option<bool> {
    let is_udp = |attempt: &&Attempt| attempt.address.contains("/udp/");
    let tried: Vec<&Attempt> = bootstrap.iter().filter(is_udp).collect();
    if tried.iter().any(|attempt| attempt.ok) {
        return Some(true);
    }
    // Nothing is known about UDP where TCP does not get to the same machine either.
    let machine = |attempt: &Attempt| attempt.address.split('/').nth(2).map(str::to_owned);
    let by_tcp: Vec<_> = bootstrap.iter().filter(|it| !is_udp(it) && it.ok).map(machine).collect();
    tried.into_iter().any(|attempt| by_tcp.contains(&machine(attempt))).then_some(false)
}

async fn measure(transport: &Libp2pTransport) -> Option<Measured> {
    for peer in transport.bootstrap_peers() {
        if transport.path(peer).is_none() {
            continue;
        }
        if let Ok(speed) = Speed::measure(transport, peer, SPEED_LIMIT).await {
            return Some(Measured { peer, path: transport.path(peer), speed });
        }
    }
    None
}

fn conclude(machine: Machine, network: Option<Network>) -> Report {
    let mut advice = machine.warnings();
    let Some(network) = network else {
        let summary = "Give the token of a run to see what this machine will be in it.".to_owned();
        let exit_code = u8::from(!advice.is_empty());
        return Report { machine, network: None, role: "unknown", summary, advice, exit_code };
    };
    if !network.bootstrap.iter().any(|attempt| attempt.ok) {
        let summary = "This machine cannot join: no address of the token answers.".to_owned();
        advice.insert(
            0,
            "check that the node behind the token is running, and this machine's network".to_owned(),
        );
        return Report { machine, network: Some(network), role: "cut_off", summary, advice, exit_code: 2 };
    }
    if network.run.closed {
        let summary =
            "This machine cannot join: the run is closed, and the token holds no invite.".to_owned();
        advice.insert(0, "ask the run's owner for a token made by `potluck invite`".to_owned());
        return Report {
            machine,
            network: Some(network),
            role: "not_invited",
            summary,
            advice,
            exit_code: 2,
        };
    }
    let (role, summary) = role(&network);
    let public = role == "direct";
    if !public && role != "direct_outwards" {
        advice.push(
            "forward a port to this machine and name it with --listen and --announce, to be direct".into(),
        );
        if !network.relayed {
            advice.push("no relay was found: run `potluck relay` on a machine with a public address".into());
        }
    }
    if network.nat == Nat::Symmetric && !public {
        advice.push("or switch the router's NAT to \"full cone\" or turn UPnP on, if it can".into());
    }
    if network.udp == Some(false) {
        advice.push(
            "UDP does not get through: let it out of the firewall, QUIC and hole punching need it".into(),
        );
    }
    let exit_code = u8::from(!advice.is_empty());
    Report { machine, network: Some(network), role, summary: summary.to_owned(), advice, exit_code }
}

/// What this machine will be, in a word and in a sentence.
fn role(network: &Network) -> (&'static str, &'static str) {
    let hidden = network.reachability == Reachability::Private || network.relayed;
    match (network.reachability, network.nat) {
        (Reachability::Public, _) => ("direct", "This machine will be a direct peer: others can dial it."),
        (_, Nat::Symmetric) => (
            "relayed",
            "This machine is behind a symmetric NAT, which takes a new port for every peer: it will be direct to open \
             peers, and others behind NAT mostly reach it through a relay.",
        ),
        _ if hidden && network.udp == Some(false) => (
            "relayed",
            "This machine is behind NAT or a firewall that lets no UDP through: it will be direct to open peers, and \
             others reach it by TCP hole punching, which often fails, or through a relay.",
        ),
        (_, Nat::Cone) => (
            "hole_punched",
            "This machine is behind a cone NAT, which has one port for all peers: others reach it by hole punching.",
        ),
        _ if hidden || network.nat == Nat::Some => (
            "hole_punched_or_relayed",
            "This machine is behind NAT: others reach it by hole punching, or through a relay where that fails.",
        ),
        _ => (
            "direct_outwards",
            "This machine reaches the run directly; nobody has yet found out whether others can dial it.",
        ),
    }
}

fn run_text(run: &Run) -> String {
    let name = &run.run_id;
    match (run.closed, run.peers, run.epoch) {
        (true, ..) => format!("{name:?} is closed: only the invited may join or look"),
        (_, peers, Some(epoch)) if peers > 0 => format!("{name:?}: peers {peers}, epoch {epoch}"),
        _ => format!("nobody who trains {name:?} was found (the first one starts it)"),
    }
}

/// What the machine has, a line each.
fn describe_machine(machine: &Machine, line: &mut impl FnMut(&str, String)) {
    line("processors", machine.processors.to_string());
    let (free, all) = (view::bytes(machine.memory_free_bytes), view::bytes(machine.memory_bytes));
    line("memory", format!("{free} free of {all}"));
    line(
        "disk",
        machine
            .disk_free_bytes
            .map_or("unknown".to_owned(), |free| format!("{} free here", view::bytes(free))),
    );
    let none = "none found (only NVIDIA's are looked for); training runs on the processor";
    line("gpus", if machine.gpus.is_empty() { none.to_owned() } else { machine.gpus.join("; ") });
    line(
        "clock",
        format!("{} seconds since 1970 (reported only: nothing depends on it)", machine.unix_seconds),
    );
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let mut line = |name: &str, text: String| {
        let _written = writeln!(out, "{name:<13}{text}");
    };
    describe_machine(&report.machine, &mut line);
    if let Some(network) = &report.network {
        for attempt in &network.bootstrap {
            let outcome = match (attempt.ok, attempt.seconds) {
                (true, Some(seconds)) => format!("connected in {}", view::seconds(seconds)),
                _ => format!("failed at {}: {}", attempt.stage, attempt.detail),
            };
            line("bootstrap", format!("{}: {outcome}", attempt.address));
        }
        line(
            "dialled",
            match network.reachability {
                Reachability::Public => "others can dial this machine".to_owned(),
                Reachability::Private => "others cannot dial this machine (NAT or firewall)".to_owned(),
                _ => "unknown: no peer has tried yet".to_owned(),
            },
        );
        line(
            "nat",
            match network.nat {
                Nat::None => "none: peers see this machine's own address",
                Nat::Cone => "cone: one port for all peers, hole punching works",
                Nat::Symmetric => "symmetric: a new port for every peer, hole punching mostly fails",
                Nat::Some => "yes; of which kind shows where the token names two peers or more",
                Nat::Unknown => "unknown: no peer has said as which address it sees this machine",
            }
            .to_owned(),
        );
        line(
            "udp",
            match network.udp {
                Some(true) => "gets through".to_owned(),
                Some(false) => "blocked".to_owned(),
                None if network.bootstrap.iter().any(|attempt| attempt.address.contains("/udp/")) => {
                    "unknown: the machine behind that address answers by TCP neither".to_owned()
                }
                None => "not tried: the token names no UDP address".to_owned(),
            },
        );
        line("run", run_text(&network.run));
        line(
            "speed",
            match &network.speed {
                Some(Measured { peer, speed, .. }) => format!(
                    "{:.0} Mbit/s up, {:.0} Mbit/s down, {} round trip, to peer {}",
                    speed.up_mbit_per_second,
                    speed.down_mbit_per_second,
                    view::seconds(speed.round_trip_seconds),
                    peer.short()
                ),
                None => "not measured: no bootstrap peer lets itself be measured".to_owned(),
            },
        );
    }
    line("", String::new());
    line(&report.summary, String::new());
    for advice in &report.advice {
        line("advice", advice.clone());
    }
    out.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(address: &str, ok: bool) -> Attempt {
        Attempt {
            address: address.into(),
            ok,
            stage: "connect".into(),
            detail: "refused".into(),
            seconds: None,
        }
    }

    fn machine() -> Machine {
        Machine {
            processors: 4,
            memory_bytes: 8 << 30,
            memory_free_bytes: 4 << 30,
            disk_free_bytes: None,
            gpus: Vec::new(),
            unix_seconds: 0,
        }
    }

    fn network(bootstrap: Vec<Attempt>, reachability: Reachability, relayed: bool) -> Network {
        let udp = udp(&bootstrap);
        Network {
            reachability,
            nat: Nat::Unknown,
            udp,
            addresses: Vec::new(),
            bootstrap,
            run: Run { run_id: "demo".into(), peers: 2, epoch: Some(7), closed: false },
            speed: None,
            relayed,
        }
    }

    #[test]
    fn udp_is_blocked_only_if_tcp_gets_there() {
        let (tcp, udp_address) = ("/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/udp/1/quic-v1");
        assert_eq!(udp(&[attempt(tcp, true), attempt(udp_address, false)]), Some(false));
        assert_eq!(udp(&[attempt(tcp, false), attempt(udp_address, false)]), None);
        assert_eq!(udp(&[attempt(udp_address, true)]), Some(true));
        assert_eq!(udp(&[attempt(tcp, true)]), None);
        let elsewhere = "/ip4/5.6.7.8/udp/1/quic-v1";
        assert_eq!(udp(&[attempt(tcp, true), attempt(elsewhere, false)]), None, "that one may be down");
    }

    #[test]
    fn the_exit_code_says_whether_it_can_join() {
        let cut_off = network(vec![attempt("/ip4/1.2.3.4/tcp/1", false)], Reachability::Unknown, false);
        assert_eq!(conclude(machine(), Some(cut_off)).exit_code, 2);
        let mut uninvited = network(vec![attempt("/ip4/1.2.3.4/tcp/1", true)], Reachability::Public, false);
        uninvited.run.closed = true;
        let report = conclude(machine(), Some(uninvited));
        assert_eq!((report.exit_code, report.role), (2, "not_invited"));
        assert!(text(&report).contains("run          \"demo\" is closed"), "{}", text(&report));
        let natted = network(vec![attempt("/ip4/1.2.3.4/tcp/1", true)], Reachability::Private, false);
        let report = conclude(machine(), Some(natted));
        assert_eq!((report.exit_code, report.role), (1, "hole_punched_or_relayed"));
        assert!(report.advice.iter().any(|advice| advice.contains("potluck relay")));
        assert_eq!(conclude(machine(), None).exit_code, 0);
    }

    #[test]
    fn one_sentence_says_what_this_machine_will_be() {
        let (tcp, quic) = ("/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/udp/1/quic-v1");
        let report = |nat, reachability, udp| {
            let mut network = network(vec![attempt(tcp, true), attempt(quic, udp)], reachability, true);
            network.nat = nat;
            conclude(machine(), Some(network))
        };
        let role = |nat, reachability, udp| report(nat, reachability, udp).role;
        assert_eq!(role(Nat::Cone, Reachability::Public, true), "direct", "a forwarded port");
        assert_eq!(role(Nat::Cone, Reachability::Private, true), "hole_punched");
        assert_eq!(role(Nat::Cone, Reachability::Private, false), "relayed", "without UDP");
        assert_eq!(role(Nat::Symmetric, Reachability::Private, true), "relayed");
        assert_eq!(role(Nat::Some, Reachability::Unknown, true), "hole_punched_or_relayed");
        let symmetric = report(Nat::Symmetric, Reachability::Private, true);
        assert_eq!(symmetric.exit_code, 1);
        assert!(symmetric.advice.iter().any(|advice| advice.contains("full cone")), "{:?}", symmetric.advice);
        assert!(text(&symmetric).contains("nat          symmetric"), "{}", text(&symmetric));
    }
}
