//! The commands that look at a run, against a real one: peers in this process, sockets on loopback, the built command.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a helper of a test may fail the test, or say why it does nothing"
)]

mod support;

use potluck_net::Token;
use std::io::{Read, Write};
use std::time::Duration;
use support::{Running, TARGET, Trainer, VALUES, checkpoints, golden, node, potluck, stderr, stdout, text};

/// The command runs while the peers of the test go on training.
async fn run(arguments: Vec<String>) -> std::process::Output {
    let arguments: Vec<String> = arguments;
    let command = move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        potluck(&arguments).output().expect("the command starts")
    };
    tokio::task::spawn_blocking(command).await.expect("it ends")
}

fn arguments(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("it ends")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_and_doctor_see_a_run_and_do_not_disturb_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_node, token) = node(dir.path(), "seen");
    let code = token.to_string();
    let nobody = run(arguments(&["status", &code, "--limit", "1"])).await;
    golden("status-nobody", &nobody, &[], false);

    let mut first = Trainer::join(&token).await;
    let second = Trainer::join(&token).await;
    first.reach(3).await;
    let output = run(arguments(&["status", &code])).await;
    let ids = [first.session.local_peer().short(), second.session.local_peer().short()];
    let short = [(ids[0].as_str(), "PEER"), (ids[1].as_str(), "PEER"), ("PEER*", "PEER")];
    golden("status", &output, &short, true);
    let json = run(arguments(&["status", &code, "--json"])).await;
    let status: serde_json::Value = serde_json::from_str(&stdout(&json)).unwrap();
    assert_eq!(status["run_id"], "seen");
    assert_eq!(status["target_batch_size"], TARGET);
    assert!(status["epoch"].as_u64().unwrap() >= 3);
    let mut peers: Vec<&str> =
        status["peers"].as_array().unwrap().iter().map(|peer| peer["peer"].as_str().unwrap()).collect();
    peers.sort_unstable();
    let mut expected = [first.session.local_peer().to_string(), second.session.local_peer().to_string()];
    expected.sort_unstable();
    assert_eq!(peers, expected, "whoever looks is not among them");

    let named = run(arguments(&["status", "seen"])).await;
    golden("status", &named, &short, true);

    let watch = ["status", code.as_str(), "--watch", "--json", "--every", "0.3", "--count", "3"];
    let lines = stdout(&run(arguments(&watch)).await);
    assert_eq!(lines.lines().count(), 3, "{lines}");

    in_a_terminal(&code).await;

    let doctor = run(arguments(&["doctor", &code, "--listen", "/ip4/127.0.0.1/tcp/0", "--json"])).await;
    let report: serde_json::Value = serde_json::from_str(&stdout(&doctor)).unwrap();
    let network = &report["network"];
    assert_eq!(network["bootstrap"][0]["stage"], "connected", "{report}");
    assert!(network["speed"]["up_mbit_per_second"].as_f64().unwrap() > 0.0, "{report}");
    assert!(network["speed"]["down_mbit_per_second"].as_f64().unwrap() > 0.0, "{report}");
    assert_ne!(doctor.status.code(), Some(2), "{report}");

    assert_eq!(first.session.status().borrow().rounds_failed, 0);
    first.leave().await;
    second.leave().await;
}

/// The view of a terminal, which `script` pretends to be; a signal gives the terminal back as it was.
async fn in_a_terminal(code: &str) {
    let watch = format!(
        "stty rows 24 columns 100; timeout --foreground -s TERM 4 {} status {code} --watch --every 0.3",
        env!("CARGO_BIN_EXE_potluck")
    );
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &watch, "/dev/null"]).env("TERM", "xterm").env_remove("POTLUCK_LOG");
    command.stdin(std::process::Stdio::null());
    let screen = stdout(&blocking(move || command.output().expect("script is part of the system")).await);
    let (opened, closed) = (screen.find("\u{1b}[?1049h"), screen.rfind("\u{1b}[?1049l"));
    assert!(opened.is_some() && opened < closed, "the terminal is given back: {screen:?}");
    // Blanks are not printed but jumped over.
    for text in ["potluck", "ends)", "seen:", "samples/s,", "contributed", "direct"] {
        assert!(screen.contains(text), "{text:?} is not on {screen:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn monitor_serves_the_dashboard_of_a_run_it_is_not_in() {
    let dir = tempfile::tempdir().unwrap();
    let (_node, token) = node(dir.path(), "shown");
    let mut first = Trainer::join(&token).await;
    first.reach(1).await;
    let log = dir.path().join("events.jsonl");
    let code = token.to_string();
    let mut command = potluck(&["monitor", &code, "--dashboard", "127.0.0.1:0"]);
    command.arg("--log").arg(&log);
    let (monitor, url) = blocking(move || {
        let monitor = Running::start(command);
        let url = monitor.line("dashboard");
        (monitor, url)
    })
    .await;
    let address = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let second = Trainer::join(&token).await;
    let joined = format!("\"peer\":\"{}\"", second.session.local_peer());
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    while !std::fs::read_to_string(&log).unwrap_or_default().contains(&joined) {
        assert!(tokio::time::Instant::now() < patience, "the newcomer is not in the log");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let metrics = get(&address, "/metrics").await;
    assert!(metrics.contains("potluck_peers{run=\"shown\"} 2"), "{metrics}");
    assert!(get(&address, "/").await.contains("<html"));
    let local: serde_json::Value =
        serde_json::from_str(&stdout(&run(arguments(&["status", "shown", "--json"])).await)).unwrap();
    assert_eq!(local["peers"].as_array().unwrap().len(), 2, "from the page of the monitor: {local}");
    let busy = run(arguments(&["monitor", &code, "--dashboard", &address])).await;
    golden("monitor-busy-port", &busy, &[], false);
    assert!(blocking(move || monitor.stop()).await, "SIGTERM ends it with 0");
    let left: Vec<_> = std::fs::read_dir(support::runtime_dir()).unwrap().collect();
    assert_eq!(left.len(), 1, "the notice of the node only: {left:?}");
    replayed(&log).await;
    first.leave().await;
    second.leave().await;
}

/// The log alone is enough for the page of a run.
async fn replayed(log: &std::path::Path) {
    let mut command = potluck(&["monitor", "--dashboard", "127.0.0.1:0", "--replay"]);
    command.arg(log);
    let address = blocking(move || {
        let monitor = Running::start(command);
        assert!(monitor.line("replaying").ends_with("of the run \"shown\""));
        let url = monitor.line("dashboard");
        (monitor, url.trim_start_matches("http://").trim_end_matches('/').to_owned())
    });
    let (_monitor, address) = address.await;
    let history: serde_json::Value = serde_json::from_str(&get(&address, "/api/history").await).unwrap();
    assert_eq!(history["replayed"], true);
    let kinds: Vec<&str> = history["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["what"]["event"].as_str().unwrap())
        .collect();
    assert!(kinds.contains(&"joined"), "{kinds:?}");
    assert_eq!(history["points"].as_array().unwrap().last().unwrap()["peers"], 2, "{history}");
    let status: serde_json::Value = serde_json::from_str(&get(&address, "/api/status").await).unwrap();
    assert_eq!((&status["run_id"], status["peers"].as_array().unwrap().len()), (&"shown".into(), 2));
}

/// The body of a page.
async fn get(address: &str, path: &str) -> String {
    let (address, path) = (address.to_owned(), path.to_owned());
    blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_comes_back_from_its_keeper_when_everybody_has_left() {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    let (_node, token) = node(dir.path(), "kept");
    let mut first = Trainer::join(&token).await;
    let mut second = Trainer::join(&token).await;
    let mut keeper = start_keeper(&token, &kept, &[]).await;
    first.reach(6).await;
    second.reach(6).await;
    assert_eq!(first.session.status().borrow().rounds_failed, 0, "nobody waits for a keeper");
    let (_, loss_before) = *first.losses.borrow().last().unwrap();
    first.leave().await;
    second.leave().await;
    keeper = blocking(move || {
        keeper.line("everybody has left");
        keeper
    })
    .await;
    // The keeper's machine restarts as well.
    assert!(blocking(move || keeper.stop()).await, "SIGTERM ends it with 0");
    assert!(!checkpoints(&kept).is_empty());
    let keeper = start_keeper(&token, &kept, &[]).await;

    let mut third = Trainer::join(&token).await;
    let fourth = Trainer::join(&token).await;
    third.reach(9).await;
    let losses = third.losses.borrow().clone();
    let (epoch, loss) = losses[0];
    assert!(epoch >= 5, "it begins where the checkpoint was, not at 0: {losses:?}");
    assert!(loss < loss_before * 1.2, "the curve goes on: {loss_before} then {losses:?}");
    third.leave().await;
    fourth.leave().await;
    assert!(blocking(move || keeper.stop()).await);

    let newest = checkpoints(&kept).pop().unwrap();
    let weights = dir.path().join("weights.safetensors");
    let export = run(arguments(&["export", text(&newest), "--output", text(&weights)])).await;
    golden("export", &export, &[(text(dir.path()), "DIR")], true);
    let bytes = std::fs::read(&weights).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let param = tensors.tensor("param.000000").unwrap();
    assert_eq!(param.shape(), [VALUES]);

    let (weights, names) = (dir.path().join("weights.pt"), dir.path().join("names.txt"));
    std::fs::write(&names, "layer.weight\n").unwrap();
    let export = ["export", text(&kept), "--names", text(&names), "--output", text(&weights)];
    assert!(run(arguments(&export)).await.status.success());
    if let Some(loaded) = blocking(move || as_torch_loads_it(&weights)).await {
        let (words, _) = param.data().as_chunks::<4>();
        let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        assert_eq!(loaded, serde_json::json!({ "layer.weight": values }));
    }
}

/// What `torch.load` makes of a state dict, with nothing of potluck imported. `None` before `make setup`.
fn as_torch_loads_it(weights: &std::path::Path) -> Option<serde_json::Value> {
    let python = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    if !python.exists() {
        eprintln!("skipped: no .venv with torch");
        return None;
    }
    let script = "import json, sys, torch\n\
        state = torch.load(sys.argv[1], weights_only=True)\n\
        print(json.dumps({name: tensor.tolist() for name, tensor in state.items()}))";
    let output = std::process::Command::new(python).args(["-c", script, text(weights)]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    Some(serde_json::from_str(&stdout(&output)).unwrap())
}

async fn start_keeper(token: &Token, kept: &std::path::Path, more: &[&str]) -> Running {
    let code = token.to_string();
    let mut command = potluck(&["keeper", &code, "--no-port-mapping", "--every", "1"]);
    command.arg("--dir").arg(kept).args(["--listen", "/ip4/127.0.0.1/tcp/0"]).args(more);
    blocking(move || {
        let keeper = Running::start(command);
        keeper.line("keeping");
        keeper
    })
    .await
}

/// A disk of its own in memory, of so many kB; `None` where this user may not mount one.
struct Disk(std::path::PathBuf);

impl Disk {
    fn mount(at: &std::path::Path, kilobytes: u32) -> Option<Self> {
        std::fs::create_dir(at).unwrap();
        let size = format!("size={kilobytes}k");
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs", text(at)]);
        mount.output().is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever is still in it keeps it; that is no reason to fail.
        let _unmounted = std::process::Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_in_the_middle_of_a_checkpoint_keeps_the_older_ones() {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    // Six pages: the identity, two checkpoints of two files, and the first file of the third.
    let Some(_disk) = Disk::mount(&kept, 24) else {
        eprintln!("skipped: needs root to mount a small disk");
        return;
    };
    let (_node, token) = node(dir.path(), "tiny");
    let mut trainer = Trainer::join(&token).await;
    let limited = ["--keep", "3", "--every", "1", "--no-port-mapping", "--listen", "/ip4/127.0.0.1/tcp/0"];
    let code = token.to_string();
    let mut command = std::process::Command::new("timeout");
    command.args(["-s", "TERM", "--preserve-status", "8", env!("CARGO_BIN_EXE_potluck"), "keeper", &code]);
    command.arg("--dir").arg(&kept).args(limited).env("POTLUCK_RUNTIME_DIR", support::runtime_dir());
    let output = blocking(move || command.output().unwrap()).await;
    trainer.reach(3).await;
    let said = stderr(&output);
    assert!(output.status.success(), "the keeper goes on and ends when told to: {said}");
    assert!(
        said.contains("cannot save the checkpoint") && said.contains("No space left on device"),
        "{said}"
    );
    assert!(said.contains("older checkpoints are untouched"), "{said}");
    assert!(said.contains("hint: free some space"), "{said}");
    // It is said again for each epoch that cannot be saved.
    let once: String = said.lines().take(2).map(|line| format!("{line}\n")).collect();
    let first = std::process::Output { stdout: Vec::new(), stderr: once.into_bytes(), ..output.clone() };
    golden("keeper-full-disk", &first, &[(text(dir.path()), "DIR")], true);
    let whole = checkpoints(&kept);
    assert_eq!(whole.len(), 2, "{whole:?} after\n{}", stdout(&output));
    let weights = dir.path().join("weights.safetensors");
    for checkpoint in &whole {
        let export = run(arguments(&["export", text(checkpoint), "--output", text(&weights)])).await;
        assert!(export.status.success(), "{}", stderr(&export));
    }
    trainer.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_leaves_the_old_checkpoint_and_the_keeper_alive() {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    let (_node, token) = node(dir.path(), "full");
    let mut trainer = Trainer::join(&token).await;
    let keeper = start_keeper(&token, &kept, &[]).await;
    trainer.reach(3).await;
    let keeper = blocking(move || {
        keeper.line("saved");
        keeper
    })
    .await;
    assert!(blocking(move || keeper.stop()).await);
    let before = checkpoints(&kept);
    // No file may grow beyond 1 kB: what a full disk says, without filling one.
    let limited = format!(
        "trap '' XFSZ; ulimit -f 1; exec timeout -s TERM 6 {} keeper {token} --dir {} --every 1 --no-port-mapping \
         --listen /ip4/127.0.0.1/tcp/0",
        env!("CARGO_BIN_EXE_potluck"),
        text(&kept)
    );
    let output =
        blocking(move || std::process::Command::new("bash").args(["-c", &limited]).output().unwrap()).await;
    assert!(stderr(&output).contains("cannot save the checkpoint"), "{}", stderr(&output));
    assert!(stderr(&output).contains("older checkpoints are untouched"), "{}", stderr(&output));
    assert_eq!(checkpoints(&kept), before, "nothing was lost, nothing half-written stays");
    trainer.leave().await;
}
