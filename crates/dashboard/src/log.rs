//! The JSON-lines log: one event a line, which the dashboard and any script can replay.

use potluck_collab::Event;
use std::path::{Path, PathBuf};
use tokio::fs::OpenOptions;
use tokio::io::AsyncWriteExt;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

/// Why the log ended early. Training goes on without it.
#[derive(Debug, thiserror::Error)]
#[error("event log {}: {source}; events are no longer written, training goes on", path.display())]
pub struct LogError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: std::io::Error,
}

/// Append every event to `path`, one JSON object a line with the seconds since the start, until the session ends.
/// A reader that fell behind is told how many lines are missing.
///
/// # Errors
/// [`LogError`] if the file cannot be opened or written, for example because the disk is full.
pub async fn write_log(path: &Path, mut events: broadcast::Receiver<Event>) -> Result<(), LogError> {
    let fail = |source| LogError { path: path.to_owned(), source };
    let mut file = OpenOptions::new().create(true).append(true).open(path).await.map_err(fail)?;
    let start = tokio::time::Instant::now();
    loop {
        let seconds = |start: tokio::time::Instant| (start.elapsed().as_secs_f64() * 1e3).round() / 1e3;
        let line = match events.recv().await {
            Ok(event) => serde_json::json!({"seconds": seconds(start), "what": event}),
            Err(RecvError::Lagged(count)) => serde_json::json!({"seconds": seconds(start), "missed": count}),
            Err(RecvError::Closed) => return file.flush().await.map_err(fail),
        };
        file.write_all(format!("{line}\n").as_bytes()).await.map_err(fail)?;
        file.flush().await.map_err(fail)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_event_is_a_line_of_json() {
        let path = std::env::temp_dir().join(format!("potluck-log-{}.jsonl", std::process::id()));
        let (sender, receiver) = broadcast::channel(8);
        sender.send(Event::Alone { epoch: 3 }).unwrap();
        sender.send(Event::Left).unwrap();
        drop(sender);
        write_log(&path, receiver).await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["what"]["event"], "alone");
        assert_eq!(lines[0]["what"]["epoch"], 3);
    }

    #[tokio::test]
    async fn an_unwritable_path_is_named() {
        let (_sender, receiver) = broadcast::channel(1);
        let error = write_log(Path::new("/nonexistent/x.jsonl"), receiver).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.jsonl"));
    }
}
