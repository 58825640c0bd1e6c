//! Every command of docs/operating.md and of the README: what somebody copies from there works. The systemd unit and the
//! container file are started as they are written, but on loopback.

mod support;

use potluck_net::{PeerId, Token};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use support::{LOOPBACK, Running, potluck, run, stderr, text};

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The fenced blocks of one language, with lines that end in `\` joined to the next.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let fenced = document.split("```").skip(1).step_by(2);
    let named = fenced.filter_map(|block| block.strip_prefix(language).filter(|rest| rest.starts_with('\n')));
    named.map(|block| block.replace("\\\n", " ")).collect()
}

/// What stands between backticks in running text.
fn inline(document: &str) -> Vec<String> {
    let text: String = document.split("```").step_by(2).collect();
    let lines = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    lines.map(str::to_owned).collect()
}

/// The arguments of a command line of `potluck`, without a comment or what it is piped into.
fn arguments(line: &str) -> Option<Vec<String>> {
    let line = line.strip_prefix("$ ").unwrap_or(line).strip_prefix("potluck ")?;
    let line = line.split(" #").next().and_then(|line| line.split(" | ").next()).unwrap_or_default();
    Some(line.split_whitespace().map(str::to_owned).collect())
}

/// Stands for `TOKEN` and `potluck1...`.
fn token() -> String {
    let address = format!("/ip4/127.0.0.1/tcp/4001/p2p/{}", PeerId::from_ed25519(&[7; 32]));
    Token { run_id: "demo".into(), bootstrap: vec![address], invite: None }.to_string()
}

/// The command knows these arguments, and takes their values.
fn parses(arguments: &[String]) {
    let token = token();
    let mut given: Vec<&str> = arguments
        .iter()
        .map(|argument| if ["TOKEN", "potluck1..."].contains(&argument.as_str()) { &token } else { argument })
        .map(|argument| argument.trim_matches(['\'', '"']))
        .collect();
    // Options and their values are read first, and nothing is done.
    given.push("--help");
    let output = run(&given);
    assert!(output.status.success(), "potluck {}: {}", arguments.join(" "), stderr(&output));
}

/// Keys and values of a unit, by section.
fn unit(text: &str) -> BTreeMap<String, Vec<(String, String)>> {
    let (mut sections, mut section) = (BTreeMap::<_, Vec<_>>::new(), String::new());
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(name) => section = name.to_owned(),
            None => {
                let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("no key: {line}"));
                sections.entry(section.clone()).or_default().push((key.to_owned(), value.to_owned()));
            }
        }
    }
    sections
}

/// Start it with these arguments, but on loopback; it must print a token and end politely.
fn serves(mut command: Command, arguments: &[String]) {
    let mut given = Vec::new();
    for argument in arguments {
        let any = argument.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/").replace("/4001", "/0");
        assert_eq!(any != *argument, argument.starts_with("/ip4/"), "not an address that is listened to");
        given.push(any);
    }
    assert!(given.contains(&LOOPBACK.to_owned()), "{given:?}");
    // No router is asked for a port.
    command.args(&given).arg("--no-port-mapping");
    let started = Running::start(command);
    let token: Token = started.line("token").parse().expect("a token");
    assert!(token.bootstrap.iter().any(|address| address.contains("/quic-v1/")), "{token:?}");
    assert!(started.stop());
}

#[test]
fn every_command_line_of_the_documents_is_understood() {
    let mut commands = BTreeSet::new();
    for name in ["docs/operating.md", "README.md"] {
        let document = document(name);
        let shown = blocks(&document, "console");
        let lines = shown.iter().flat_map(|block| block.lines()).map(str::to_owned);
        for arguments in lines.chain(inline(&document)).filter_map(|line| arguments(&line)) {
            parses(&arguments);
            commands.insert(arguments[0].clone());
        }
    }
    for command in ["doctor", "status", "monitor", "keeper", "export", "relay", "sim", "keygen", "invite"] {
        assert!(commands.contains(command), "{command} is in no document: {commands:?}");
    }
}

#[test]
fn the_systemd_unit_is_valid_and_its_command_serves() {
    let units = blocks(&document("docs/operating.md"), "ini");
    assert_eq!(units.len(), 1);
    let sections = unit(&units[0]);
    assert!(sections.keys().eq(["Install", "Service", "Unit"]), "{sections:?}");
    let known = [
        "After",
        "Description",
        "DynamicUser",
        "ExecStart",
        "LimitNOFILE",
        "NoNewPrivileges",
        "ProtectHome",
        "ProtectSystem",
        "Restart",
        "StateDirectory",
        "WantedBy",
        "Wants",
    ];
    for (key, _) in sections.values().flatten() {
        assert!(known.contains(&key.as_str()), "{key}: look it up in systemd.directives, then add it here");
    }
    let service: BTreeMap<_, _> = sections["Service"].iter().cloned().collect();
    let state = format!("%S/{}", service["StateDirectory"]);
    assert!(service["ExecStart"].contains(&state), "the only place that a dynamic user may write to");
    let command = service["ExecStart"].strip_prefix("/usr/local/bin/").expect("where it was installed");
    let dir = tempfile::tempdir().expect("a directory");
    let given = arguments(&command.replace(&state, text(dir.path()))).expect("it starts potluck");
    parses(&given);
    serves(potluck(&[]), &given);
    assert!(dir.path().join("identity").exists(), "it keeps its name");

    let file = dir.path().join("potluck-relay.service");
    let here = units[0].replace("/usr/local/bin/potluck", env!("CARGO_BIN_EXE_potluck"));
    std::fs::write(&file, here).expect("it can be written");
    let verify = Command::new("systemd-analyze").arg("verify").arg(&file).stdin(Stdio::null()).output();
    // Where systemd is not installed the list of keys above has to do.
    if let Ok(output) = verify {
        let about = stderr(&output);
        let about: Vec<&str> = about.lines().filter(|line| line.contains("potluck-relay.service")).collect();
        assert!(output.status.success() && about.is_empty(), "{about:?}");
    }
}

#[test]
fn the_container_file_builds_this_command_and_its_default_serves() {
    let document = document("docs/operating.md");
    let files = blocks(&document, "dockerfile");
    assert_eq!(files.len(), 1);
    let of = |instruction: &str| -> Vec<&str> {
        let start = format!("{instruction} ");
        files[0].lines().filter_map(|line| line.strip_prefix(start.as_str())).collect()
    };
    let image = of("FROM")[0];
    let version = env!("CARGO_PKG_RUST_VERSION");
    assert!(image.contains(&format!("rust:{version}-")), "{image} has another Rust than {version}");
    let package = format!("cargo build --release --locked -p {}", env!("CARGO_PKG_NAME"));
    assert!(of("RUN")[0].ends_with(&package), "{:?}", of("RUN"));
    assert_eq!(of("COPY")[1], "--from=build /src/target/release/potluck /usr/local/bin/potluck");
    assert_eq!(of("ENTRYPOINT"), ["[\"potluck\"]"]);
    assert_eq!(of("EXPOSE"), ["4001/tcp 4001/udp"]);

    let dir = tempfile::tempdir().expect("a directory");
    let (name, value) = of("ENV")[0].split_once('=').expect("a name and a value");
    let (volume, file) = (of("VOLUME")[0], value.rsplit('/').next().expect("a name"));
    assert_eq!(value, format!("{volume}/{file}"), "what must outlive a container is on the volume");
    let identity = dir.path().join(file);
    let default: Vec<String> = serde_json::from_str(of("CMD")[0]).expect("a list of words");
    let consoles = blocks(&document, "console");
    let podman = consoles.iter().find_map(|block| block.strip_prefix("\n$ podman run ")).expect("how to run");
    let (options, given) = podman.split_once(" potluck ").expect("the image");
    assert!(options.ends_with(&format!("potluck:{volume}")), "the volume is kept: {options}");
    let given: Vec<String> = given.split_whitespace().map(str::to_owned).collect();
    for arguments in [default, given] {
        parses(&arguments);
        let mut command = potluck(&[]);
        command.env(name, &identity);
        serves(command, &arguments);
    }
    assert!(identity.exists(), "{name} says where the identity is");
}
