//! Whole outputs of the commands that go on until they are stopped, and of those that measure.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use std::process::{Command, Output, Stdio};
use support::{Trainer, checkpoints, golden, node, potluck, runtime_dir, text};

const LOOPBACK: &str = "/ip4/127.0.0.1/tcp/0";

/// Run the command for some seconds, then stop it politely.
fn stopped(seconds: u32, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--preserve-status", "-s", "TERM", &seconds.to_string(), env!("CARGO_BIN_EXE_potluck")]);
    command.args(arguments).env("POTLUCK_RUNTIME_DIR", runtime_dir());
    command.env_remove("POTLUCK_IDENTITY").env_remove("POTLUCK_LOG").stdin(Stdio::null());
    command.output().expect("timeout is part of the system")
}

/// Without the lines that say what this machine is like.
fn without_machine(mut output: Output) -> Output {
    let said = support::stdout(&output);
    let of_machine = ["processors", "memory", "disk", "gpus", "clock", "advice       less than"];
    let kept = said.lines().filter(|line| !of_machine.iter().any(|start| line.starts_with(start)));
    output.stdout = kept.map(|line| format!("{line}\n")).collect::<String>().into_bytes();
    output
}

#[test]
fn nodes_and_relays_say_who_they_are_and_stop_politely() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    let common = ["--identity", text(&key), "--no-port-mapping", "--listen", LOOPBACK];
    for command in ["node", "relay"] {
        golden(command, &stopped(2, &[&[command][..], &common].concat()), &[], false);
    }
    golden("node-json", &stopped(2, &[&["node", "--json"][..], &common].concat()), &[], false);
}

#[test]
fn the_bench_of_the_network_prints_json() {
    let one = ["--megabytes", "2", "--kind", "tcp-noise", "--rtt", "0", "--streams", "1"];
    let output = potluck(&[&["bench", "net"][..], &one].concat()).output().unwrap();
    golden("bench-net", &output, &[], true);
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
        let never = ["--every", "1000", "--no-port-mapping", "--listen", LOOPBACK, "--dir", &kept];
        let keeper = stopped(6, &[&["keeper", &code][..], &never].concat());
        let first =
            support::stdout(&keeper).lines().take(2).map(|line| format!("{line}\n")).collect::<String>();
        // When the first state is saved is up to the run.
        golden("keeper", &Output { stdout: first.into_bytes(), ..keeper }, &[(&here, "DIR")], false);
        cut_off(std::path::Path::new(&kept), &here);
    };
    tokio::task::spawn_blocking(looks).await.expect("the commands end");
    trainer.leave().await;
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
