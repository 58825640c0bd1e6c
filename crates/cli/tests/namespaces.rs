//! Nodes on two machines of their own: network namespaces joined by a cable, as root. Without root or `ip` each test
//! says so and ends.

#![expect(clippy::print_stderr, reason = "a test that needs root says why it does nothing")]

mod support;

use potluck_net::{PeerId, Token};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;
use support::{Running, stderr, stdout, text};
use tokio::time::Instant;

/// Two namespaces; whatever runs in them ends with it.
struct Machines {
    names: [String; 2],
}

fn ip(arguments: &str) -> Output {
    Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 was there a moment ago")
}

fn must(arguments: &str) {
    let output = ip(arguments);
    assert!(output.status.success(), "ip {arguments}: {}", stderr(&output));
}

impl Machines {
    /// 203.0.113.1 and 203.0.113.2, and on the second one a way to 2001:db8::/32 on which everything is lost.
    fn connect(test: &str) -> Option<Self> {
        if !Command::new("ip").arg("netns").output().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: needs iproute2");
            return None;
        }
        let name = |end| format!("plt{}-{test}{end}", std::process::id());
        let machines = Self { names: [name(1), name(2)] };
        if !ip(&format!("netns add {}", machines.names[0])).status.success() {
            eprintln!("skipped: needs root for network namespaces");
            return None;
        }
        let [one, two] = &machines.names;
        must(&format!("netns add {two}"));
        must(&format!("link add eth0 netns {one} type veth peer name eth0 netns {two}"));
        for (number, name) in [(1, one), (2, two)] {
            must(&format!("-n {name} address add 203.0.113.{number}/24 dev eth0"));
            must(&format!("-n {name} link set eth0 up"));
            must(&format!("-n {name} link set lo up"));
        }
        // At the other end nobody has this hardware address, so what is sent there is lost without a word.
        must(&format!("link add hole netns {two} type veth peer name hole netns {one}"));
        must(&format!("-n {one} link set hole up"));
        must(&format!("-n {two} link set hole up"));
        must(&format!("-n {two} address add 2001:db8:1::1/64 dev hole nodad"));
        must(&format!("-n {two} route add 2001:db8::/32 dev hole"));
        must(&format!(
            "-n {two} neighbour add 2001:db8:dead::1 lladdr 02:00:00:00:00:77 dev hole nud permanent"
        ));
        Some(machines)
    }

    /// The command on the machine of this number.
    fn potluck(&self, machine: usize, arguments: &[&str]) -> Command {
        let plain = support::potluck(arguments);
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.names[machine - 1]])
            .arg(plain.get_program())
            .args(plain.get_args());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }

    fn node(&self, machine: usize, dir: &Path, more: &[&str]) -> Running {
        let identity = dir.join(format!("{machine}.key"));
        let plain = ["node", "--run", "two", "--no-port-mapping", "--identity", text(&identity)];
        Running::start(self.potluck(machine, &[&plain[..], more].concat()))
    }

    /// What listens on a machine, and which processes it has.
    fn left(&self, machine: usize) -> String {
        let name = &self.names[machine - 1];
        let mut left = stdout(&ip(&format!("netns pids {name}")));
        for table in ["tcp", "tcp6", "udp", "udp6"] {
            let read = ip(&format!("netns exec {name} cat /proc/net/{table}"));
            // State 0A is LISTEN; a UDP socket has no other than 07. A connection that closes politely may linger.
            let open = stdout(&read);
            let sockets = open.lines().filter(|line| line.contains(" 0A ") || line.contains(" 07 "));
            left.extend(sockets.map(|line| format!("{table}: {line}\n")));
        }
        left
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for name in &self.names {
            for pid in stdout(&ip(&format!("netns pids {name}"))).lines() {
                // Whatever has ended meanwhile is no loss.
                let _ended = Command::new("kill").args(["-KILL", pid]).output();
            }
            ip(&format!("netns del {name}"));
        }
    }
}

#[test]
fn two_nodes_find_each_other_by_token_and_leave_nothing_behind() {
    let Some(machines) = Machines::connect("a") else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = machines.node(1, dir.path(), &[]);
    let first_id = first.line("peer");
    let token = first.line("token");
    let second = machines.node(2, dir.path(), &["--join", &token]);
    let second_id = second.line("peer");
    let second_token: Token = second.line("token").parse().unwrap();
    assert_eq!(second.line("joined"), first_id);
    assert_eq!(second_token.run_id, "two");
    assert!(second_token.bootstrap.iter().any(|address| address.contains("203.0.113.2")), "{second_token:?}");

    // The token of the first names no address of the second: only the first can have told where that is.
    let call = ["probe", "--join", &token, "--call", &second_id, "--bytes", "100000"];
    let called = machines.potluck(1, &call).output().unwrap();
    assert!(called.status.success(), "{}", stderr(&called));
    let report: serde_json::Value = serde_json::from_str(&stdout(&called)).unwrap();
    assert_eq!(
        (report["peer"].as_str(), report["path"].as_str()),
        (Some(second_id.as_str()), Some("direct"))
    );

    for (machine, node, signal) in [(2, second, "-TERM"), (1, first, "-INT")] {
        let asked = Instant::now();
        assert!(node.end(signal), "{signal} ends a node with 0");
        assert!(asked.elapsed() < Duration::from_secs(5), "{signal} took {:?}", asked.elapsed());
        assert_eq!(machines.left(machine), "", "after {signal}");
    }
    let mut files: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["1.key", "2.key"], "the identities, and nothing else");
    let notices = std::fs::read_dir(support::runtime_dir()).map(Iterator::count);
    assert_eq!(notices.unwrap_or(0), 0, "notices go with their nodes");
}

#[test]
fn ipv6_alone_is_enough() {
    let Some(machines) = Machines::connect("c") else { return };
    for (number, name) in (1..).zip(&machines.names) {
        must(&format!("-n {name} address add 2001:db8:2::{number}/64 dev eth0 nodad"));
    }
    let dir = tempfile::tempdir().unwrap();
    let first = machines.node(1, dir.path(), &[]);
    let own: Token = first.line("token").parse().unwrap();
    // As it listens by default, on all interfaces.
    for transport in ["/tcp/", "/quic-v1"] {
        let mut token = own.clone();
        token.bootstrap.retain(|address| address.starts_with("/ip6/") && address.contains(transport));
        assert!(!token.bootstrap.is_empty(), "no {transport} of IPv6: {:?}", own.bootstrap);
        let second = machines.node(2, dir.path(), &["--join", &token.to_string()]);
        second.line("joined");
        assert!(second.end("-TERM"));
    }
}

#[test]
fn one_live_address_among_dead_ones_is_joined_within_five_seconds() {
    let Some(machines) = Machines::connect("b") else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = machines.node(1, dir.path(), &["--listen", "/ip4/203.0.113.1/tcp/4001"]);
    let mut token: Token = first.line("token").parse().unwrap();
    let live = token.bootstrap[0].clone();
    let somebody = PeerId::from_ed25519(&[7; 32]);
    let dead = [
        format!("/ip4/203.0.113.1/tcp/9/p2p/{somebody}"),
        format!("/ip4/203.0.113.1/tcp/4001/p2p/{somebody}"),
        format!("/ip6/2001:db8:dead::1/tcp/4001/p2p/{somebody}"),
        format!("/ip6/2001:db8:dead::1/udp/4001/quic-v1/p2p/{somebody}"),
    ];
    token.bootstrap = [&dead[..], std::slice::from_ref(&live)].concat();
    let code = token.to_string();
    let begun = Instant::now();
    let second = machines.node(2, dir.path(), &["--join", &code]);
    second.line("joined");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "joined after {took:?}");

    let begun = Instant::now();
    let doctor = machines.potluck(2, &["doctor", &code]).output().unwrap();
    let took = begun.elapsed();
    let said = stdout(&doctor);
    let stages = [
        ("/tcp/9/", "failed at connect: Connection refused"),
        (dead[1].as_str(), "failed at wrong identity: the peer there is "),
        ("dead::1/tcp/4001", "failed at connect: "),
        ("dead::1/udp/4001", "failed at connect: no answer in time"),
        (live.as_str(), "connected in "),
    ];
    for (address, stage) in stages {
        let line = said.lines().find(|line| line.starts_with("bootstrap") && line.contains(address));
        assert!(line.is_some_and(|line| line.contains(stage)), "{address}: {stage} is missing in\n{said}");
    }
    for fact in ["nat          none", "udp          unknown: the machine", "will be a direct peer"] {
        assert!(said.contains(fact), "{fact:?} is missing in\n{said}");
    }
    assert!(took < Duration::from_secs(15), "the doctor took {took:?}:\n{said}");

    token.bootstrap = dead.to_vec();
    let begun = Instant::now();
    let status = machines.potluck(2, &["status", &token.to_string()]).output().unwrap();
    let took = begun.elapsed();
    assert_eq!(status.status.code(), Some(1));
    let said = stderr(&status);
    let named =
        said.lines().filter(|line| line.starts_with("  /ip") && line.contains(": failed at ")).count();
    assert_eq!(named, dead.len(), "{said}");
    assert!(took < Duration::from_secs(20), "given up after {took:?}");
}
