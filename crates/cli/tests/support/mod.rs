//! Runs the built command, compares its whole output with a golden file, and trains a small real run for it to look at.
//! `UPDATE_GOLDEN=1 cargo nextest run -p potluck-cli` writes the golden files anew; read the difference before keeping it.
#![expect(dead_code, reason = "each test binary uses its own part")]

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use potluck_collab::{Directory, Invite, Loaded, Session, SessionConfig, Snapshot, Step, TensorInfo};
use potluck_dht::{Dht, DhtConfig, rendezvous};
use potluck_net::{Env, Identity, PeerId, Tasks, Token, Transport};
use potluck_net_libp2p::{Config, Libp2pTransport};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::watch;

/// Samples of one epoch in the small run.
pub(crate) const TARGET: u64 = 24;
/// Values of its only parameter.
pub(crate) const VALUES: usize = 300;

/// The command, with nothing of this machine's settings.
pub(crate) fn potluck(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_potluck"));
    command
        .args(arguments)
        .env_remove("POTLUCK_IDENTITY")
        .env_remove("POTLUCK_LOG")
        .env("POTLUCK_RUNTIME_DIR", runtime_dir())
        .env("COLUMNS", "100")
        .stdin(Stdio::null());
    command
}

/// Where the peers of this test leave their notices: nobody else's are found there.
pub(crate) fn runtime_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("notices-{}", std::process::id()))
}

/// Run it to its end.
pub(crate) fn run(arguments: &[&str]) -> Output {
    potluck(arguments).output().expect("the command starts")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

/// Compare exit code, stdout and stderr with `golden/<name>.txt`, after the redactions.
pub(crate) fn golden(name: &str, output: &Output, redact: &[(&str, &str)], numbers: bool) {
    let code = output.status.code().map_or("signal".to_owned(), |code| code.to_string());
    let mut text = format!("--- stdout\n{}--- stderr\n{}", stdout(output), stderr(output));
    for (from, to) in redact {
        text = text.replace(from, to);
    }
    text = text.lines().map(|line| format!("{}\n", redact_line(line, numbers))).collect();
    // The epoch may be full at the moment of the look.
    text = text.replace(", full in N UNIT", ", full");
    // Which of the peers gave more, and which one answered, is chance.
    if numbers {
        text = text.replace("% N N direct ", "% N N PATH ").replace("% N N - ", "% N N PATH ");
        // So is whether another round runs already, which holds buffers of its own,
        text = text.replace(", rounds N UNIT", "");
        // and whether a round was long enough to measure a link by.
        for rates in ["-/-", "-/N", "N/-", "N/N"] {
            text = text.replace(&format!("PATH {rates} "), "PATH RATES ");
        }
        for rate in ["up", "down"] {
            let rate = format!("\"{rate}_bytes_per_second\": ");
            text = text.replace(&format!("{rate}null"), &format!("{rate}N"));
        }
    }
    text.insert_str(0, &format!("exit {code}\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).expect("the golden file can be written");
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "the output differs from {}", path.display());
}

/// Peer ids, tokens and ports differ from run to run; with `numbers`, so does every figure.
fn redact_line(line: &str, numbers: bool) -> String {
    let mut out = String::new();
    let mut rest = line.trim_end();
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphanumeric()) {
        let (before, from) = rest.split_at(start);
        let end = from.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(from.len());
        let (word, after) = from.split_at(end);
        out.push_str(before);
        let port = ["/tcp/", "/udp/", "127.0.0.1:"].iter().any(|start| out.ends_with(start));
        out.push_str(match word {
            word if word.starts_with("12D3KooW") => "PEER",
            word if word.starts_with("potluck1") && word.len() > 30 => "TOKEN",
            word if port
                && word.parse::<u16>().is_ok_and(|port| port > 1023 && port != 4001 && port != 8080) =>
            {
                "PORT"
            }
            word if numbers && word.chars().all(|c| c.is_ascii_digit()) => "N",
            "ms" | "s" | "min" | "h" | "B" | "kB" | "MB" if numbers => "UNIT",
            word => word,
        });
        rest = after;
    }
    out.push_str(rest);
    // Columns are as wide as their figures.
    if numbers { out.split_whitespace().collect::<Vec<_>>().join(" ").replace("N.N", "N") } else { out }
}

/// Without the lines that say what this machine is like.
pub(crate) fn without_machine(mut output: Output) -> Output {
    let said = stdout(&output);
    let of_machine = ["processors", "memory", "disk", "gpus", "clock", "advice       less than"];
    let kept = said.lines().filter(|line| !of_machine.iter().any(|start| line.starts_with(start)));
    output.stdout = kept.map(|line| format!("{line}\n")).collect::<String>().into_bytes();
    output
}

/// Lines that differ in figures only, one after the other, are one: how many there are is up to the run.
pub(crate) fn without_repeats(mut output: Output) -> Output {
    let shape = |line: &str| line.chars().filter(|c| !c.is_ascii_digit() && *c != '.').collect::<String>();
    let mut last = String::new();
    let said = stdout(&output);
    let kept = said.lines().filter(|line| std::mem::replace(&mut last, shape(line)) != last);
    output.stdout = kept.map(|line| format!("{line}\n")).collect::<String>().into_bytes();
    output
}

/// A process that ends with the test.
pub(crate) struct Running {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().expect("the command starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = std::sync::mpsc::sync_channel(1000);
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// The rest of the first line that begins so; everything before it is skipped.
    pub(crate) fn line(&self, start: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(90));
            let line = line.unwrap_or_else(|error| panic!("no line starts with {start:?}: {error}"));
            if let Some(rest) = line.strip_prefix(start) {
                return rest.trim().to_owned();
            }
        }
    }

    /// SIGTERM, and whether it ended with 0.
    pub(crate) fn stop(self) -> bool {
        self.end("-TERM")
    }

    /// Send it a signal.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status().expect("kill runs");
        assert!(sent.success(), "kill {signal} {pid}");
    }

    /// The same with another signal.
    pub(crate) fn end(mut self, signal: &str) -> bool {
        self.signal(signal);
        self.child.wait().expect("it ends").success()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}

pub(crate) const LOOPBACK: &str = "/ip4/127.0.0.1/tcp/0";

/// Run the command for some seconds, then stop it politely.
pub(crate) fn stopped(seconds: u32, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--preserve-status", "-s", "TERM", &seconds.to_string(), env!("CARGO_BIN_EXE_potluck")]);
    command.args(arguments).env("POTLUCK_RUNTIME_DIR", runtime_dir());
    command.env_remove("POTLUCK_IDENTITY").env_remove("POTLUCK_LOG").stdin(Stdio::null());
    command.output().expect("timeout is part of the system")
}

/// Run the command until it has printed a line that begins so, to stdout or stderr, then stop it politely.
pub(crate) fn until(start: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--preserve-status", "-s", "TERM", "90", env!("CARGO_BIN_EXE_potluck")]);
    command.args(arguments).env("POTLUCK_RUNTIME_DIR", runtime_dir());
    command.env_remove("POTLUCK_IDENTITY").env_remove("POTLUCK_LOG").stdin(Stdio::null());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("timeout is part of the system");
    let (sender, lines) = mpsc::channel();
    forward(child.stdout.take().expect("piped"), false, sender.clone());
    forward(child.stderr.take().expect("piped"), true, sender);
    let (mut said, mut stopped) = ([Vec::new(), Vec::new()], false);
    for (stderr, line) in lines {
        said[usize::from(stderr)].extend(format!("{line}\n").bytes());
        if line.starts_with(start) && !std::mem::replace(&mut stopped, true) {
            let sent = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
            assert!(sent.expect("kill runs").success());
        }
    }
    let status = child.wait().expect("it ends");
    let [stdout, stderr] = said;
    Output { status, stdout, stderr }
}

/// Each line of a pipe, with its mark, until the pipe ends.
fn forward(pipe: impl Read + Send + 'static, mark: bool, to: mpsc::Sender<(bool, String)>) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            // Nobody hears it if the test has failed meanwhile.
            let _gone = to.send((mark, line));
        }
    });
}

/// A bootstrap node on loopback, and its token.
pub(crate) fn node(dir: &Path, run: &str) -> (Running, Token) {
    let identity = dir.join(format!("{run}.key"));
    let mut command = potluck(&["node", "--run", run, "--no-port-mapping", "--listen", LOOPBACK]);
    command.arg("--identity").arg(identity);
    let node = Running::start(command);
    let token = node.line("token").parse().expect("a token");
    (node, token)
}

const JOIN_LIMIT: Duration = Duration::from_secs(4);

struct Dhts(Dht);

impl Directory for Dhts {
    fn announce<'a>(&'a self, run: &'a str, _ttl: Duration) -> BoxFuture<'a, ()> {
        async move {
            let _stored = rendezvous::announce(&self.0, run.as_bytes(), b"").await;
        }
        .boxed()
    }

    fn lookup<'a>(&'a self, run: &'a str) -> BoxFuture<'a, Vec<(PeerId, Vec<String>)>> {
        async move {
            self.0.wait_joined(JOIN_LIMIT).await;
            let found = rendezvous::lookup(&self.0, run.as_bytes()).await.value;
            found.into_iter().map(|peer| (peer.peer, peer.addresses)).collect()
        }
        .boxed()
    }
}

/// One peer that trains: its parameter moves towards 1, and the loss is the distance.
pub(crate) struct Trainer {
    pub(crate) session: Session,
    /// `(epoch, loss)`, newest last.
    pub(crate) losses: watch::Receiver<Vec<(u64, f32)>>,
    transport: Arc<Libp2pTransport>,
    tasks: Tasks,
}

impl Trainer {
    pub(crate) async fn join(token: &Token) -> Self {
        Self::join_closed(token, None).await
    }

    /// Join a run that only the invited may join, if it has an owner.
    pub(crate) async fn join_closed(token: &Token, owner: Option<&Identity>) -> Self {
        let env = Env::real();
        let mut config = Config::loopback(Identity::from_seed(&env.random_bytes()));
        config.bootstrap.clone_from(&token.bootstrap);
        let transport = Libp2pTransport::start(config, env.clone()).await.expect("the transport starts");
        let patience = tokio::time::Instant::now() + Duration::from_secs(30);
        transport.wait_bootstrapped(patience).await.expect("the node answers");
        let config = DhtConfig { initial_peers: transport.bootstrap_peers(), ..DhtConfig::default() };
        let dht = Dht::start(transport.clone(), env.clone(), config).await.expect("the DHT starts");
        let tensor = TensorInfo::vector("w", VALUES, Default::default());
        let mut config = SessionConfig::new(token.run_id.clone(), TARGET, vec![tensor]);
        config.bootstrap = transport.bootstrap_peers();
        config.directory = Some(Arc::new(Dhts(dht)));
        config.owner = owner.map(Identity::peer_id);
        config.invite = owner.map(|owner| Invite::issue(owner, &token.run_id).to_text());
        let session = Session::join(transport.clone(), env, config).await.expect("the run is joined");
        let (losses, seen) = watch::channel(Vec::new());
        let tasks = Tasks::new();
        tasks.spawn(train(session.clone(), losses));
        Self { session, losses: seen, transport, tasks }
    }

    /// Wait until the run has come so far.
    pub(crate) async fn reach(&mut self, epoch: u64) {
        let far = |losses: &Vec<(u64, f32)>| losses.last().is_some_and(|(now, _)| *now >= epoch);
        let reached = tokio::time::timeout(Duration::from_secs(120), self.losses.wait_for(far)).await;
        reached.expect("the epoch is reached").expect("the trainer lives");
    }

    pub(crate) async fn leave(self) {
        self.tasks.shutdown().await;
        self.session.leave().await;
        self.transport.close().await;
    }
}

async fn train(session: Session, losses: watch::Sender<Vec<(u64, f32)>>) {
    let mut weights = vec![0.0_f32; VALUES];
    session.publish(snapshot(&weights));
    let mut samples = 0;
    loop {
        match session.step(std::mem::take(&mut samples)) {
            Step::Accumulate => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                samples = 4;
            }
            Step::Average => {
                let gradient = weights.iter().map(|weight| weight - 1.0).collect();
                let averaged = session.average_gradients(gradient, 4.0).await.value;
                if averaged.missed {
                    continue;
                }
                apply(&mut weights, averaged.vector);
                let loss = weights.iter().map(|weight| (1.0 - weight).abs()).sum::<f32>() / VALUES as f32;
                session.report_loss(loss);
                session.epoch_done(Some(snapshot(&weights)));
                losses.send_modify(|losses| losses.push((session.epoch(), loss)));
            }
            Step::LoadState => match session.load_state().await.value {
                Loaded::State(state) => {
                    let blob = state.blobs.get("param.000000").expect("the state has the parameter");
                    let (words, _) = blob.as_chunks::<4>();
                    weights = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
                }
                Loaded::Gradients(average) => {
                    apply(&mut weights, average);
                    session.epoch_done(None);
                }
                Loaded::Parameters(average) => weights = average,
                Loaded::Nothing => {}
            },
            Step::AverageState | Step::Apply => unreachable!("the policy has no such step"),
        }
    }
}

fn apply(weights: &mut [f32], average: Vec<f32>) {
    weights.iter_mut().zip(average).for_each(|(weight, gradient)| *weight -= 0.05 * gradient);
}

fn snapshot(weights: &[f32]) -> Snapshot {
    let blob: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    let shape = format!(r#"{{"param.000000": {{"dtype": "float32", "shape": [{VALUES}]}}}}"#);
    Snapshot {
        meta: BTreeMap::from([("tensors".to_owned(), shape), ("optimizer".to_owned(), "{}".to_owned())]),
        blobs: BTreeMap::from([("param.000000".to_owned(), Bytes::from(blob))]),
        ..Snapshot::default()
    }
}

/// A path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path of letters")
}

/// The checkpoints in a keeper's folder, oldest first.
pub(crate) fn checkpoints(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("the folder is there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.join("checkpoint.json").exists())
        .collect();
    found.sort();
    found
}
