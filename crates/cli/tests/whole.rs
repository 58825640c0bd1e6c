//! Whole outputs of the commands that go on until they are stopped, and of those that measure.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use potluck_net::{Identity, PeerId, Token};
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;
use support::{
    LOOPBACK, Running, Trainer, checkpoints, golden, node, potluck, stopped, text, until, without_machine,
    without_repeats,
};
use tokio::time::Instant;

#[test]
fn nodes_and_relays_say_who_they_are_and_stop_politely() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    let common = ["--identity", text(&key), "--no-port-mapping", "--listen", LOOPBACK];
    for command in ["node", "relay"] {
        golden(command, &stopped(2, &[&[command][..], &common].concat()), &[], false);
    }
    golden("node-json", &stopped(2, &[&["node", "--json"][..], &common].concat()), &[], false);
    let first = Running::start(potluck(&[&["node"][..], &common].concat()));
    let token = first.line("token");
    let second = dir.path().join("second");
    let join =
        ["node", "--identity", text(&second), "--no-port-mapping", "--listen", LOOPBACK, "--join", &token];
    golden("node-joined", &until("joined", &join), &[], false);
    // A bootstrap peer that is not there yet: what failed and how far it got, and it goes on trying.
    let [port] = free_ports();
    let dead = format!("/ip4/127.0.0.1/tcp/{port}/p2p/{}", PeerId::from_ed25519(&[7; 32]));
    let nobody = Token { run_id: "demo".into(), bootstrap: vec![dead], invite: None }.to_string();
    let join = [&["node", "--join", &nobody][..], &common[2..], &["--identity", text(&second)]].concat();
    golden("node-nobody", &until("potluck: not joined yet", &join), &[], false);
    // Its token lets every program in and names no run to look at.
    golden("status-every-run", &potluck(&["status", &token, "--limit", "1"]).output().unwrap(), &[], false);
    let here = [(text(dir.path()), "DIR")];
    golden(
        "node-same-identity",
        &potluck(&[&["node"][..], &common].concat()).output().unwrap(),
        &here,
        false,
    );
    assert!(first.stop());
}

#[test]
fn a_node_that_is_told_to_stop_in_its_start_ends_and_leaves_nothing() {
    for said in [None, Some("token")] {
        let dir = tempfile::tempdir().unwrap();
        let (key, notices) = (dir.path().join("key"), dir.path().join("notices"));
        let start = || {
            let words = ["node", "--no-port-mapping", "--identity", text(&key), "--listen", LOOPBACK];
            let mut command = potluck(&words);
            command.env("POTLUCK_RUNTIME_DIR", &notices);
            Running::start(command)
        };
        let node = start();
        match said {
            Some(word) => drop(node.line(word)),
            // It listens to signals before it makes its identity.
            None => {
                let patience = Instant::now() + Duration::from_secs(90);
                while !key.exists() {
                    assert!(Instant::now() < patience, "it makes no identity");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        assert!(node.stop(), "0, as after any other stop");
        let left = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = left.filter(|name| name != "notices").collect();
        assert_eq!(left, ["key"]);
        assert_eq!(std::fs::read_dir(&notices).map_or(0, |entries| entries.count()), 0);
        // Nor is the identity held by anybody.
        let again = start();
        again.line("token");
        assert!(again.stop());
    }
}

/// Ports that were free a moment ago.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

#[test]
fn a_node_that_has_lost_everybody_says_so_and_dials_those_it_knew() {
    let dir = tempfile::tempdir().unwrap();
    let node = |port: u16, more: &[&str]| {
        let (key, listen) = (dir.path().join(port.to_string()), format!("/ip4/127.0.0.1/tcp/{port}"));
        let plain = ["node", "--no-port-mapping", "--identity", text(&key), "--listen", &listen];
        let command = potluck(&[&plain[..], more].concat());
        // What it says of its company, with its other output.
        let mut shell = std::process::Command::new("bash");
        shell.args(["-c", "exec \"$0\" \"$@\" 2>&1"]).arg(command.get_program()).args(command.get_args());
        shell.env("POTLUCK_RUNTIME_DIR", support::runtime_dir()).stdin(Stdio::null());
        Running::start(shell)
    };
    let [one, two] = free_ports();
    let first = node(one, &[]);
    let token = first.line("token");
    let second = node(two, &["--join", &token]);
    second.line("joined");
    first.line("potluck: somebody has come");
    second.end("-KILL");
    assert_eq!(
        first.line("potluck: ALONE"),
        ": every other peer is gone; dialling the last 1 of them, check this machine's network"
    );
    // It comes back, and knows nobody: only the first one can bring them together.
    let second = node(two, &[]);
    assert_eq!(first.line("potluck: not alone"), "any more: 1 peer is connected");
    assert!(second.stop() && first.stop());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_says_how_two_machines_are_connected() {
    let dir = tempfile::tempdir().unwrap();
    let (node, token) = node(dir.path(), "probed");
    let code = token.to_string();
    let plain = ["probe", "--join", &code, "--listen", LOOPBACK];
    golden("probe", &stopped(4, &[&plain[..], &["--patience", "1"]].concat()), &[], false);
    let id = token.bootstrap[0].rsplit('/').next().unwrap();
    let call = |id: &str, limit: &str| {
        let more = ["--call", id, "--bytes", "100000", "--patience", "1", "--limit", limit];
        potluck(&[&plain[..], &more].concat()).output().unwrap()
    };
    golden("probe-call", &call(id, "60"), &[], true);
    let nobody = PeerId::from_ed25519(&[9; 32]);
    golden("probe-nobody", &call(&nobody.to_string(), "3"), &[(&nobody.short(), "PEER")], true);
    drop(node);
    let no_answer = [&plain[..], &["--limit", "2"]].concat();
    golden("probe-no-answer", &potluck(&no_answer).output().unwrap(), &[], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_invited_look_at_a_closed_run() {
    let dir = tempfile::tempdir().unwrap();
    let (_node, token) = node(dir.path(), "closed");
    let owner = Identity::from_seed(&[5; 32]);
    let trainer = Trainer::join_closed(&token, Some(&owner)).await;
    let looks = move || {
        let code = token.to_string();
        let short = |output: &Output| {
            let said = support::stderr(output);
            said.split("peer ").nth(1).map_or(String::new(), |rest| rest.chars().take(6).collect())
        };
        let status = potluck(&["status", &code]).output().unwrap();
        golden("status-closed", &status, &[(&short(&status), "PEER")], false);
        let kept = dir.path().join("kept");
        let keeper =
            potluck(&["keeper", &code, "--dir", text(&kept), "--no-port-mapping", "--listen", LOOPBACK])
                .output()
                .unwrap();
        golden("keeper-closed", &keeper, &[(&short(&keeper), "PEER")], false);
        let doctor = without_machine(stopped(20, &["doctor", &code, "--listen", LOOPBACK]));
        let said = support::stdout(&doctor);
        assert!(said.contains("\"closed\" is closed") && doctor.status.code() == Some(2), "{said}");
    };
    tokio::task::spawn_blocking(looks).await.expect("the commands end");
    trainer.leave().await;
}

#[test]
fn the_bench_of_the_network_prints_json() {
    let one = ["--megabytes", "2", "--kind", "tcp-noise", "--rtt", "0", "--streams", "1"];
    let output = potluck(&[&["bench", "net"][..], &one].concat()).output().unwrap();
    golden("bench-net", &output, &[], true);
    // Several streams at a time, through the delaying relay of each kind.
    let delayed =
        ["--kind", "tcp-tls", "--kind", "quic", "--megabytes", "4", "--rtt", "20", "--streams", "2"];
    let output = potluck(&[&["bench", "net"][..], &delayed].concat()).output().unwrap();
    golden("bench-net-delayed", &output, &[], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_monitor_and_keeper_in_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let (_node, token) = node(dir.path(), "whole");
    let mut trainer = Trainer::join(&token).await;
    trainer.reach(2).await;
    let (code, here) = (token.to_string(), text(dir.path()).to_owned());
    let id = token.bootstrap[0].rsplit('/').next().unwrap();
    let short = id[id.len() - 6..].to_owned();
    let kept = format!("{here}/kept");
    let looks = move || {
        let doctor = without_machine(stopped(20, &["doctor", &code, "--listen", LOOPBACK]));
        // Whether the node has already tried to dial the doctor's peer is chance.
        let untried =
            "This machine reaches the run directly; nobody has yet found out whether others can dial it.";
        let redact = [
            (short.as_str(), "PEER"),
            ("unknown: no peer has tried yet", "others can dial this machine"),
            (untried, "This machine will be a direct peer: others can dial it."),
        ];
        golden("doctor", &doctor, &redact, true);
        golden("monitor", &stopped(4, &["monitor", &code, "--dashboard", "127.0.0.1:0"]), &[], false);
        watched(Path::new(&here), &code);
        let never = ["--every", "1000", "--no-port-mapping", "--listen", LOOPBACK, "--dir", &kept];
        let keep = || without_repeats(until("saved", &[&["keeper", &code][..], &never].concat()));
        golden("keeper", &keep(), &[(&here, "DIR")], true);
        golden("keeper-resumed", &keep(), &[(&here, "DIR")], true);
        refused(Path::new(&kept), &here, &code);
        cut_off(Path::new(&kept), &here);
    };
    tokio::task::spawn_blocking(looks).await.expect("the commands end");
    trainer.leave().await;
}

/// Everything that looks on and writes down, and what is said where it cannot.
fn watched(dir: &Path, code: &str) {
    let here = [(text(dir), "DIR")];
    let watch = ["status", code, "--watch", "--count", "1"];
    golden("status-watch", &potluck(&watch).output().unwrap(), &peers_of(code), true);
    let json = potluck(&["status", code, "--json"]).output().unwrap();
    golden("status-json", &without_lists(json), &[], true);
    let json = potluck(&["doctor", code, "--listen", LOOPBACK, "--json"]).output().unwrap();
    golden("doctor-json", &without_machine_json(json), &[], true);
    let log = dir.join("events.jsonl");
    let monitor = ["monitor", code, "--dashboard", "127.0.0.1:0", "--log"];
    golden("monitor-log", &stopped(4, &[&monitor[..], &[text(&log)]].concat()), &here, false);
    let replay = ["monitor", "--dashboard", "127.0.0.1:0", "--replay"];
    golden("replay", &stopped(2, &[&replay[..], &[text(&log)]].concat()), &here, false);
    let nowhere = dir.join("nowhere/events.jsonl");
    let unwritable = potluck(&[&monitor[..], &[text(&nowhere)]].concat()).output().unwrap();
    golden("monitor-unwritable-log", &unwritable, &here, false);
    // Its page is there and does not answer: it was stopped.
    let page = Running::start(potluck(&["monitor", code, "--dashboard", "127.0.0.1:0"]));
    page.line("dashboard");
    page.signal("-STOP");
    let silent = potluck(&["status", "whole", "--limit", "1"]).output().unwrap();
    page.signal("-CONT");
    golden("status-silent", &silent, &[], true);
    let (_second, _) = node(dir, "another");
    golden("status-which", &potluck(&["status", "--json"]).output().unwrap(), &[], false);
}

/// What is said about what cannot be done with a whole checkpoint.
fn refused(kept: &Path, here: &str, code: &str) {
    let here = [(here, "DIR")];
    let token: Token = code.parse().unwrap();
    let other = Token { run_id: "other".into(), ..token }.to_string();
    let common = ["--no-port-mapping", "--listen", LOOPBACK, "--dir", text(kept)];
    let keeper = potluck(&[&["keeper", &other][..], &common].concat()).output().unwrap();
    golden("keeper-other-run", &keeper, &here, true);
    let names = kept.join("names.txt");
    std::fs::write(&names, "one\ntwo\n").unwrap();
    let export = |more: &[&str]| potluck(&[&["export", text(kept)][..], more].concat()).output().unwrap();
    let output = kept.join("weights.pt");
    let missing = kept.join("missing");
    let to = text(&output);
    golden("export-names", &export(&["--output", to, "--names", text(&names)]), &here, false);
    golden("export-no-names", &export(&["--output", to, "--names", text(&missing)]), &here, false);
    golden("export-ending", &export(&["--output", text(&kept.join("weights.zip"))]), &here, false);
    golden("export-unwritable", &export(&["--output", text(&missing.join("weights.pt"))]), &here, false);
    assert!(!output.exists());
    let newest = checkpoints(kept).pop().unwrap().join("checkpoint.json");
    let facts = std::fs::read_to_string(&newest).unwrap();
    std::fs::write(&newest, facts.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let folder = newest.parent().unwrap();
    let newer = potluck(&["export", text(folder), "--output", to]).output().unwrap();
    golden("export-newer", &newer, &here, true);
    std::fs::write(&newest, facts).unwrap();
}

/// Short names of the peers, as the trainer of this test shows them.
fn peers_of(code: &str) -> Vec<(&'static str, &'static str)> {
    let json = potluck(&["status", code, "--json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let short = |peer: &serde_json::Value| {
        let id = peer["peer"].as_str().unwrap();
        (&*id[id.len() - 6..].to_owned().leak(), "PEER")
    };
    let mut names: Vec<_> = status["peers"].as_array().unwrap().iter().map(short).collect();
    names.push(("PEER*", "PEER"));
    names
}

/// Lists of numbers one below the other are one line.
fn without_lists(mut output: Output) -> Output {
    let mut value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    value["lineage"]["hash"] = "HASH".into();
    output.stdout = format!("{value:#}\n").into_bytes();
    output
}

/// What depends on this machine, and on whether somebody has tried to dial it already.
fn without_machine_json(mut output: Output) -> Output {
    let mut value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    value["machine"] = "MACHINE".into();
    value["exit_code"] = "CODE".into();
    value["advice"] = "ADVICE".into();
    value["network"]["reachability"] = "REACHABILITY".into();
    // A machine that is busy with other things may be too slow to be measured.
    value["network"]["speed"] = "SPEED".into();
    (value["role"], value["summary"]) = ("ROLE".into(), "SUMMARY".into());
    output.stdout = format!("{value:#}\n").into_bytes();
    output
}

/// A checkpoint of which a part is missing is named, nothing is made of it, and it stays as it is.
fn cut_off(kept: &std::path::Path, here: &str) {
    let newest = checkpoints(kept).pop().expect("the keeper has saved the first state it got");
    let state = newest.join("state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    let output = kept.join("weights.pt");
    let export = potluck(&["export", text(&newest), "--output", text(&output)]).output().unwrap();
    golden("export-damaged", &export, &[(here, "DIR")], true);
    assert!(!output.exists(), "nothing half-written stays");
    assert_eq!(std::fs::read(&state).unwrap().len(), bytes.len() / 2);
}
