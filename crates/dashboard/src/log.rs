//! The JSON-lines log: one event a line, and the status now and then, which the dashboard and any script can replay.

use potluck_collab::{Event, Status};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs::{File, OpenOptions};
use tokio::io::AsyncWriteExt;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, MissedTickBehavior};

/// How often the status is written: enough for a curve, and some 40 MB a week for a small run.
const STATUS_EVERY: Duration = Duration::from_secs(30);
/// Longer lines are no log of ours: the status of some thousand peers is shorter.
const LINE_BYTES_MAX: usize = 4 << 20;

/// Why the log ended early. Training goes on without it.
#[derive(Debug, thiserror::Error)]
#[error("event log {}: {source}; events are no longer written, training goes on", path.display())]
pub struct LogError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: std::io::Error,
}

/// Why a log cannot be replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The file cannot be read.
    #[error("event log {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line says nothing that a log says.
    #[error("event log {}, line {line}: {detail}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// There is nothing to show.
    #[error("event log {} holds no status", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// One line.
#[derive(Serialize, Deserialize)]
struct Line {
    /// Since the log was begun, or begun again.
    seconds: f64,
    #[serde(flatten)]
    said: Said,
}

#[derive(Serialize, Deserialize)]
enum Said {
    /// Something happened.
    #[serde(rename = "what")]
    What(Event),
    /// How things stand.
    #[serde(rename = "status")]
    Status(Box<Status>),
    /// So many events are missing: the disk was slower than they came.
    #[serde(rename = "missed")]
    Missed(u64),
}

/// What a log tells.
#[derive(Debug, Clone, Default)]
pub struct Replay {
    pub(crate) statuses: Vec<(f64, Status)>,
    pub(crate) events: Vec<(f64, Event)>,
}

/// Append every event to `path`, one JSON object a line with the seconds since the start, until the session ends; and
/// the status at the start, every half minute and at the end. A reader that fell behind is told how many lines are
/// missing.
///
/// # Errors
/// [`LogError`] if the file cannot be opened or written, for example because the disk is full.
pub async fn write_log(
    path: &Path,
    mut status: watch::Receiver<Status>,
    mut events: broadcast::Receiver<Event>,
) -> Result<(), LogError> {
    let fail = |source| LogError { path: path.to_owned(), source };
    let mut file = OpenOptions::new().create(true).append(true).open(path).await.map_err(fail)?;
    let start = Instant::now();
    let mut tick = tokio::time::interval_at(start + STATUS_EVERY, STATUS_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let first = Said::Status(Box::new(status.borrow_and_update().clone()));
    append(&mut file, start, first).await.map_err(fail)?;
    loop {
        let now =
            |status: &mut watch::Receiver<Status>| Said::Status(Box::new(status.borrow_and_update().clone()));
        let (said, last) = tokio::select! {
            biased;
            _ = tick.tick() => (now(&mut status), false),
            event = events.recv() => match event {
                Ok(event) => (Said::What(event), false),
                Err(RecvError::Lagged(count)) => (Said::Missed(count), false),
                Err(RecvError::Closed) => (now(&mut status), true),
            },
        };
        append(&mut file, start, said).await.map_err(fail)?;
        if last {
            return Ok(());
        }
    }
}

async fn append(file: &mut File, start: Instant, said: Said) -> std::io::Result<()> {
    let seconds = (start.elapsed().as_secs_f64() * 1e3).round() / 1e3;
    let line = serde_json::to_string(&Line { seconds, said })?;
    file.write_all(format!("{line}\n").as_bytes()).await?;
    file.flush().await
}

impl Replay {
    /// Read a log. Its last line may be cut off, as by a power failure.
    ///
    /// # Errors
    /// [`ReplayError`], naming the line.
    pub fn read(path: &Path) -> Result<Self, ReplayError> {
        let fail = |source| ReplayError::Read { path: path.to_owned(), source };
        let mut reader = BufReader::new(std::fs::File::open(path).map_err(fail)?);
        let mut replay = Self::default();
        // A log that was begun again counts from 0 again.
        let (mut before, mut last) = (0.0, 0.0);
        for number in 1.. {
            let mut text = Vec::new();
            let mut limited = std::io::Read::take(&mut reader, LINE_BYTES_MAX as u64);
            if limited.read_until(b'\n', &mut text).map_err(fail)? == 0 {
                break;
            }
            let line: Line = match serde_json::from_slice(&text) {
                Ok(line) => line,
                Err(_) if !text.ends_with(b"\n") && text.len() < LINE_BYTES_MAX => break,
                Err(error) => {
                    let detail = error.to_string();
                    return Err(ReplayError::Line { path: path.to_owned(), line: number, detail });
                }
            };
            if line.seconds < last {
                before += last;
            }
            last = line.seconds;
            let seconds = before + last;
            match line.said {
                Said::What(event) => replay.events.push((seconds, event)),
                Said::Status(status) => replay.statuses.push((seconds, *status)),
                Said::Missed(_) => {}
            }
        }
        if replay.statuses.is_empty() {
            return Err(ReplayError::Empty { path: path.to_owned() });
        }
        Ok(replay)
    }

    /// The run of the newest status.
    pub fn run_id(&self) -> &str {
        self.statuses.last().map_or("", |(_, status)| &status.run_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn statuses(epoch: u64) -> watch::Sender<Status> {
        watch::Sender::new(Status { run_id: "demo".into(), epoch, ..Status::default() })
    }

    async fn session(path: &Path, epoch: u64) {
        let (sender, receiver) = broadcast::channel(8);
        sender.send(Event::Alone { epoch, left: false }).unwrap();
        sender.send(Event::Left).unwrap();
        drop(sender);
        write_log(path, statuses(epoch).subscribe(), receiver).await.unwrap();
    }

    #[tokio::test]
    async fn each_event_is_a_line_of_json_between_statuses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        session(&path, 3).await;
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert_eq!((&lines[0]["status"]["epoch"], &lines[3]["status"]["epoch"]), (&3.into(), &3.into()));
        assert_eq!((&lines[1]["what"]["event"], &lines[1]["what"]["epoch"]), (&"alone".into(), &3.into()));
        assert_eq!(lines[2]["what"]["event"], "left");
    }

    #[tokio::test]
    async fn what_was_written_in_two_sittings_is_read_as_one_story() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        session(&path, 3).await;
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"seconds\":7,\"missed\":2}\n")
            .unwrap();
        session(&path, 9).await;
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"seconds\":9,\"wh")
            .unwrap();
        let replay = Replay::read(&path).unwrap();
        assert_eq!(replay.run_id(), "demo");
        assert_eq!(replay.events.len(), 4);
        let epochs: Vec<u64> = replay.statuses.iter().map(|(_, status)| status.epoch).collect();
        assert_eq!(epochs, [3, 3, 9, 9]);
        assert!(replay.statuses[2].0 >= 7.0 && replay.statuses[1].0 < 7.0, "the second sitting comes later");
    }

    #[tokio::test]
    async fn an_unwritable_path_and_a_line_that_is_none_are_named() {
        let (_sender, receiver) = broadcast::channel(1);
        let error = write_log(Path::new("/nonexistent/x.jsonl"), statuses(0).subscribe(), receiver)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.jsonl"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        for (text, said) in [
            ("", "holds no status"),
            ("\n", "line 1: "),
            ("{\"seconds\":1,\"missed\":1}\nhello\n", "line 2: "),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Replay::read(&path).unwrap_err().to_string();
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }
}
