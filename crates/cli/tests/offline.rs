//! Whole outputs of the commands that need no run: help, keys, invites, and what is said about bad input.

mod support;

use potluck_collab::Invite;
use potluck_net::{PeerId, Token};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use support::{golden, potluck, run, stderr, stdout, text, without_machine};

fn token(addresses: &[&str]) -> String {
    let bootstrap = addresses.iter().map(|&address| address.to_owned()).collect();
    Token { run_id: "demo".into(), bootstrap, invite: None }.to_string()
}

/// A port of loopback at which nobody listens.
fn dead_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let port = listener.local_addr().expect("it is bound").port();
    format!("/ip4/127.0.0.1/tcp/{port}/p2p/{}", PeerId::from_ed25519(&[7; 32]))
}

#[test]
fn help_of_every_command() {
    golden("help", &run(&["--help"]), &[], false);
    let commands = [
        "doctor",
        "status",
        "monitor",
        "keeper",
        "export",
        "node",
        "relay",
        "keygen",
        "invite",
        "sim",
        "bench",
        "probe",
        "version",
        "completions",
        "man",
    ];
    for command in commands {
        golden(&format!("help-{command}"), &run(&[command, "--help"]), &[], false);
    }
    golden("help-bench-net", &run(&["bench", "net", "--help"]), &[], false);
}

#[test]
fn version_as_text_and_json() {
    let this = [(std::env::consts::OS, "SYSTEM"), (std::env::consts::ARCH, "PROCESSOR")];
    golden("version", &run(&["version"]), &this, false);
    golden("version-json", &run(&["version", "--json"]), &this, false);
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        golden(&format!("completions-{shell}"), &run(&["completions", shell]), &[], false);
    }
    golden("man", &run(&["man"]), &[], false);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let unwritable = run(&["man", "--dir", text(&file.join("man1"))]);
    golden("man-unwritable", &unwritable, &[(text(dir.path()), "DIR")], false);
    let pages = dir.path().join("man1");
    let mut written = run(&["man", "--dir", text(&pages)]);
    assert_eq!(stdout(&written), "");
    let mut files: Vec<_> = std::fs::read_dir(&pages).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        written.stdout.extend(format!("=== {name}\n{}", std::fs::read_to_string(&file).unwrap()).bytes());
    }
    golden("man-dir", &written, &[], false);
}

/// Commands, and those below them, as the help of each lists them.
fn commands_below(above: &[&str], found: &mut Vec<String>) {
    let help = stdout(&run(&[above, &["--help"]].concat()));
    let Some((_, list)) = help.split_once("Commands:\n") else {
        found.push(above.join("-"));
        return;
    };
    for line in list.lines().take_while(|line| !line.is_empty()) {
        let name = line.split_whitespace().next().expect("a line of the list has a name");
        if name != "help" {
            commands_below(&[above, &[name]].concat(), found);
        }
    }
}

#[test]
fn every_command_has_a_golden_file_of_its_help_and_of_what_it_prints() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<(String, String)> = files
        .map(|path| {
            (path.file_stem().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(path).unwrap())
        })
        .collect();
    let mut commands = Vec::new();
    commands_below(&[], &mut commands);
    assert!(commands.len() > 14 && commands.contains(&"bench-net".to_owned()), "{commands:?}");
    for command in commands {
        let help = format!("help-{command}");
        assert!(files.iter().any(|(name, _)| *name == help), "no {help}");
        let of_command = |name: &str| name == command || name.starts_with(&format!("{command}-"));
        let worked =
            files.iter().any(|(name, text)| of_command(name) && text.starts_with("exit 0\n--- stdout\n"));
        assert!(worked, "no golden file of a {command} that worked");
    }
}

#[test]
fn a_key_is_made_once_and_shown_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("owner.key");
    let here = [(text(dir.path()), "DIR")];
    let first = run(&["keygen", "--identity", text(&file)]);
    golden("keygen-new", &first, &here, false);
    let again = run(&["keygen", "--identity", text(&file)]);
    golden("keygen-again", &again, &here, false);
    assert_eq!(stdout(&first).lines().next(), stdout(&again).lines().next(), "the same peer");
    golden("keygen-json", &run(&["keygen", "--json", "--identity", text(&file)]), &here, false);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    golden("keygen-readable", &run(&["keygen", "--identity", text(&file)]), &here, false);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&file, "something else").unwrap();
    golden("keygen-malformed", &run(&["keygen", "--identity", text(&file)]), &here, false);
    let within = file.join("owner.key");
    golden("keygen-unwritable", &run(&["keygen", "--identity", text(&within)]), &here, false);
}

#[test]
fn an_invite_is_signed_by_its_owner_for_its_run() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("owner.key");
    let token = token(&["/ip4/127.0.0.1/tcp/4001"]);
    let here = [(text(dir.path()), "DIR")];
    let missing = run(&["invite", &token, "--identity", text(&file)]);
    golden("invite-without-identity", &missing, &here, false);
    assert!(run(&["keygen", "--identity", text(&file)]).status.success());
    golden("invite", &run(&["invite", &token, "--identity", text(&file)]), &here, false);
    let json = run(&["invite", &token, "--identity", text(&file), "--json"]);
    golden("invite-json", &json, &here, false);
    let json = stdout(&json);
    let issued: serde_json::Value = serde_json::from_str(&json).unwrap();
    let invited: Token = issued["token"].as_str().unwrap().parse().unwrap();
    let owner: PeerId = issued["owner"].as_str().unwrap().parse().unwrap();
    let invite = String::from_utf8(invited.invite.unwrap()).unwrap();
    assert_eq!(Invite::admit(Some(owner), "demo", Some(&invite)), Ok(()));
    assert!(Invite::admit(Some(owner), "another", Some(&invite)).is_err());
}

#[test]
fn a_bad_command_line_is_refused_with_2_and_a_hint() {
    golden("no-command", &run(&[]), &[], false);
    golden("token-malformed", &run(&["monitor", "hello"]), &[], false);
    golden("status-no-local", &run(&["status"]), &[], false);
    golden("status-unknown-run", &run(&["status", "hello"]), &[], false);
    let whole = token(&["/ip4/127.0.0.1/tcp/4001"]);
    golden("token-cut-off", &run(&["status", &whole[..whole.len() - 3]]), &[], false);
    golden("bad-number", &run(&["keeper", &whole, "--dir", "x", "--every", "0"]), &[], false);
}

#[test]
fn a_dead_run_is_told_from_a_bad_token() {
    let dead = token(&[&dead_address()]);
    golden("status-no-answer", &run(&["status", &dead]), &[], false);
    golden("status-no-address", &run(&["status", &token(&[])]), &[], false);
    golden("monitor-no-answer", &run(&["monitor", &dead, "--dashboard", "127.0.0.1:0"]), &[], false);
    let doctor = run(&["doctor", &dead, "--listen", "/ip4/127.0.0.1/tcp/0"]);
    assert_eq!(doctor.status.code(), Some(2), "{}", stderr(&doctor));
    let said = stdout(&doctor);
    for part in
        ["processors", "failed at connect", "This machine cannot join: no address of the token answers."]
    {
        assert!(said.contains(part), "{part:?} is missing in\n{said}");
    }
}

#[test]
fn a_busy_port_and_a_bad_address_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = format!("/ip4/127.0.0.1/tcp/{}", listener.local_addr().unwrap().port());
    let node =
        |address: &str| run(&["node", "--identity", text(&file), "--no-port-mapping", "--listen", address]);
    golden("node-busy-port", &node(&busy), &[], false);
    golden("node-bad-address", &node("somewhere"), &[], false);
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let here = [(text(dir.path()), "DIR")];
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let token = token(&[&dead_address()]);
    golden("keeper-unwritable", &run(&["keeper", &token, "--dir", text(&file.join("kept"))]), &here, false);
    let empty = dir.path().join("empty");
    golden("keeper-nothing-to-keep", &run(&["keeper", "--dir", text(&empty)]), &here, false);
    golden("export-nothing", &run(&["export", text(&empty), "--output", "weights.pt"]), &here, false);
    let broken = empty.join("epoch-000000000007");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("checkpoint.json"), "{").unwrap();
    golden("keeper-damaged", &run(&["keeper", &token, "--dir", text(&empty)]), &here, false);
}

#[test]
fn a_log_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let here = [(text(dir.path()), "DIR")];
    let log = dir.path().join("events.jsonl");
    let replay = || run(&["monitor", "--dashboard", "127.0.0.1:0", "--replay", text(&log)]);
    golden("replay-missing", &replay(), &here, false);
    std::fs::write(&log, "").unwrap();
    golden("replay-empty", &replay(), &here, false);
    std::fs::write(&log, "hello\n").unwrap();
    golden("replay-no-log", &replay(), &here, false);
}

#[test]
fn the_doctor_without_a_token_looks_at_the_machine() {
    let said = stdout(&run(&["doctor"]));
    let names: Vec<&str> =
        said.lines().map_while(|line| line.split(' ').next().filter(|name| !name.is_empty())).collect();
    assert_eq!(names, ["processors", "memory", "disk", "gpus", "clock"], "{said}");
    assert!(said.contains("Give the token of a run to see what this machine will be in it."), "{said}");
    let output = without_machine(potluck(&["doctor"]).output().unwrap());
    golden("doctor-machine", &output, &[], false);
    let output = potluck(&["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert!(report["machine"]["processors"].as_u64().unwrap() > 0);
    assert!(report["machine"]["memory_bytes"].as_u64().unwrap() > 0);
    assert_eq!(report["exit_code"].as_i64(), output.status.code().map(i64::from));
}

#[test]
fn potluck_log_chooses_what_is_logged_to_stderr() {
    let dead = token(&[&dead_address()]);
    let with =
        |level: &str| potluck(&["status", &dead]).env("POTLUCK_LOG", level).output().expect("it starts");
    golden("log-no-level", &with("loud"), &[], false);
    let usual = stderr(&with(""));
    assert!(!usual.contains("potluck::net"), "{usual}");
    let chosen = with("off,potluck::net=debug");
    let said = stderr(&chosen);
    let line = said.lines().find(|line| line.contains("DEBUG potluck::net: "));
    assert!(line.is_some_and(|line| !line.contains('\u{1b}')), "plain where no terminal is: {said}");
    assert!(said.lines().all(|line| !line.contains("DEBUG libp2p")), "{said}");
    assert_eq!(stdout(&chosen), "", "nothing of it goes to stdout");
}
