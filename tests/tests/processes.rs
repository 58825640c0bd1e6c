//! The session code of the simulated runs over libp2p on loopback, in real processes, of which one is killed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;
use tokio::time::Instant;

/// Processes at the start; one is killed, one comes later.
const PEERS: u8 = 8;
const VICTIM: u8 = 3;
const NEWCOMER: u8 = PEERS;
/// Epochs that all must reach, and the first in whose round the victim may be killed.
const EPOCHS: u64 = 10;
const FATAL_MIN: u64 = 3;
/// A run that is not done by then hangs: it takes a tenth of this.
const LIMIT: Duration = Duration::from_secs(120);

/// What a process said, in words; `tests/src/bin/peer.rs` describes the lines.
struct Line {
    at: Duration,
    by: u8,
    words: Vec<String>,
}

impl Line {
    fn word(&self, at: usize) -> &str {
        self.words.get(at).map_or("", String::as_str)
    }

    fn number(&self, at: usize) -> u64 {
        self.word(at).parse().unwrap_or_else(|_| panic!("no number: {:?}", self.words))
    }
}

struct Swarm {
    children: BTreeMap<u8, Child>,
    lines: (SyncSender<Line>, Receiver<Line>),
    heard: Vec<Line>,
    began: Instant,
}

impl Drop for Swarm {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            // It may have ended by itself.
            let _ended = child.kill();
            let _status = child.wait();
        }
    }
}

impl Swarm {
    fn new() -> Self {
        let (children, heard) = (BTreeMap::new(), Vec::new());
        Self { children, lines: sync_channel(1000), heard, began: Instant::now() }
    }

    fn start(&mut self, seed: u8, through: &[String]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peer"));
        command.args([seed.to_string(), EPOCHS.to_string()]).args(through);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("the peer starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (lines, began) = (self.lines.0.clone(), self.began);
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let words = line.split_whitespace().map(str::to_owned).collect();
                if lines.send(Line { at: began.elapsed(), by: seed, words }).is_err() {
                    return;
                }
            }
        });
        self.children.insert(seed, child);
    }

    /// Let them train.
    fn go(&mut self, seeds: std::ops::RangeInclusive<u8>) {
        for (_, child) in self.children.range_mut(seeds) {
            let input = child.stdin.as_mut().expect("piped");
            input.write_all(b"go\n").expect("it listens");
        }
    }

    /// Listen until a line is enough; that line.
    fn until(&mut self, what: &str, mut enough: impl FnMut(&Line) -> bool) -> &Line {
        loop {
            let left = LIMIT.saturating_sub(self.began.elapsed());
            match self.lines.1.recv_timeout(left) {
                Ok(line) => self.heard.push(line),
                Err(_) => panic!("no {what} after {LIMIT:?}:\n{}", self.story()),
            }
            if self.heard.last().is_some_and(&mut enough) {
                return self.heard.last().expect("it was just pushed");
            }
        }
    }

    fn story(&self) -> String {
        let text = |line: &Line| format!("{:?} {}: {}", line.at, line.by, line.words.join(" "));
        let lines = self.heard.iter().map(text);
        lines.collect::<Vec<_>>().join("\n")
    }

    /// All lines of one kind by one process.
    fn said<'a>(&'a self, by: u8, kind: &'a str) -> impl Iterator<Item = &'a Line> {
        self.heard.iter().filter(move |line| line.by == by && line.word(0) == kind)
    }
}

#[test]
fn real_processes_go_on_when_one_is_killed_in_mid_round_and_one_joins() {
    let mut swarm = Swarm::new();
    let mut addresses: Vec<String> = Vec::new();
    for seed in 0..PEERS {
        swarm.start(seed, &addresses);
        let line = swarm.until("address", |line| line.by == seed && line.word(0) == "address");
        addresses.push(line.word(1).to_owned());
    }
    // Whoever comes while the first round is under way goes on alone, and makes up for it.
    let (mut met, all) = (0, usize::from(PEERS) * usize::from(PEERS - 1));
    swarm.until("peer that has met the last one", |line| {
        met += usize::from(line.word(0) == "joined");
        met == all
    });
    swarm.go(0..=PEERS - 1);
    let victim = addresses[usize::from(VICTIM)].rsplit('/').next().expect("it ends in the id").to_owned();

    let fatal = |line: &Line| line.by == VICTIM && line.word(0) == "midway" && line.number(1) >= FATAL_MIN;
    let fatal = swarm.until("round in which to kill", fatal).number(1);
    let mut killed = swarm.children.remove(&VICTIM).expect("it was started");
    killed.kill().expect("it runs: SIGKILL");
    killed.wait().expect("it has ended");
    addresses.remove(usize::from(VICTIM));
    swarm.start(NEWCOMER, &addresses);
    swarm.go(NEWCOMER..=NEWCOMER);

    let living: BTreeSet<u8> = (0..=NEWCOMER).filter(|seed| *seed != VICTIM).collect();
    let mut there = BTreeSet::new();
    let last = |line: &Line| line.word(0) == "epoch" && line.number(1) == EPOCHS;
    swarm.until("last epoch of all", |line| {
        if last(line) {
            there.insert(line.by);
        }
        there.is_superset(&living)
    });

    // The same history and the same bits, at everybody.
    let ends: BTreeSet<(&str, &str)> = swarm
        .heard
        .iter()
        .filter(|line| last(line) && living.contains(&line.by))
        .map(|line| (line.word(2), line.word(3)))
        .collect();
    assert_eq!(ends.len(), 1, "{}", swarm.story());

    for by in living.iter().copied().filter(|by| *by != NEWCOMER) {
        // It was a member of the round in which it died, is named for it once, and nobody else ever is.
        let blamed: Vec<(u64, &str, &str)> =
            swarm.said(by, "round").map(|line| (line.number(1), line.word(2), line.word(3))).collect();
        let named: Vec<_> = blamed.iter().filter(|(_, _, blamed)| !blamed.is_empty()).collect();
        assert_eq!(named, [&(fatal, "8", victim.as_str())], "{}", swarm.story());
        assert_eq!(swarm.said(by, "alone").count(), 0, "every round gave an average\n{}", swarm.story());
        let lost: Vec<&str> = swarm.said(by, "lost").map(|line| line.word(1)).collect();
        assert_eq!(lost, [victim.as_str()], "{}", swarm.story());
        let rounds: Vec<u64> = blamed.iter().map(|(epoch, ..)| *epoch).collect();
        assert_eq!(rounds, (0..EPOCHS).collect::<Vec<_>>(), "one round an epoch\n{}", swarm.story());
    }
    let with_newcomer = |line: &&Line| line.number(2) == u64::from(PEERS) && line.number(1) > fatal;
    let loaded = swarm.said(NEWCOMER, "loaded").count();
    assert!(loaded >= 1, "it catches up\n{}", swarm.story());
    let contributes = swarm.said(NEWCOMER, "round").any(|line| with_newcomer(&line));
    assert!(contributes, "and contributes\n{}", swarm.story());
}
