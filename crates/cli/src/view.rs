//! A status as text: the same lines for a pipe, a file and the terminal view.

use potluck_collab::{LeftPeer, PeerStatus, Status};
use potluck_net::Path;
use std::fmt::Write;

/// Everything, as plain lines.
pub(crate) fn text(status: &Status) -> String {
    let mut lines = headline(status);
    lines.push_str(&table(status));
    lines
}

/// What there is to say about the run as a whole.
pub(crate) fn headline(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    let peers = status.peers.iter().filter(|peer| !peer.auxiliary).count();
    let train = if peers == 1 { "peer trains" } else { "peers train" };
    line(format!("run      {}: {peers} {train}, epoch {}", status.run_id, status.epoch));
    let eta = match status.eta_seconds {
        Some(eta) if eta > 0.0 => format!(", full in {}", seconds(f64::from(eta))),
        Some(_) => ", full".to_owned(),
        None => ", nobody computes".to_owned(),
    };
    line(format!(
        "progress {} of {} samples ({:.0} %), {:.1} samples/s{eta}",
        status.samples,
        status.target_batch_size,
        fraction(status) * 100.0,
        status.samples_per_second
    ));
    line(match &status.last_round {
        None => "round    none yet".to_owned(),
        Some(round) => format!(
            "round    of epoch {}: {} members in {}, {} sent, {} received{}{}",
            round.epoch,
            round.members.len(),
            seconds(round.stats.seconds),
            bytes(round.stats.bytes_sent),
            bytes(round.stats.bytes_received),
            if round.unchanged {
                "\n         nothing to average: all had the same state already"
            } else {
                ""
            },
            round.faults.iter().map(|fault| format!("\n         {fault}")).collect::<String>()
        ),
    });
    let faults: Vec<String> = status.faults.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let faults = if faults.is_empty() { "none".to_owned() } else { faults.join(", ") };
    let unchanged = match status.rounds_unchanged {
        0 => String::new(),
        count => format!(" ({count} had nothing to average)"),
    };
    line(format!(
        "rounds   {} done{unchanged}, {} failed; faults: {faults}",
        status.rounds, status.rounds_failed
    ));
    line(format!(
        "traffic  {} sent, {} received, compressed {:.1} times",
        bytes(status.bytes_sent),
        bytes(status.bytes_received),
        status.compression_ratio
    ));
    let memory: Vec<String> =
        status.memory.iter().map(|(purpose, held)| format!("{purpose} {}", bytes(*held))).collect();
    if !memory.is_empty() {
        line(format!("memory   {}", memory.join(", ")));
    }
    if status.alone {
        line("ALERT    this peer trains alone: no other peer is here".to_owned());
    }
    out
}

/// The head of the table of peers.
pub(crate) const COLUMNS: [&str; 10] =
    ["rank", "peer", "epoch", "samples", "share", "samples/s", "contributed", "path", "MB/s up/down", "loss"];

/// Those who have left, in a table for people.
const LEFT_MAX: usize = 10;

/// One line for each peer, whoever gave most first; then for those who have left.
pub(crate) fn rows(status: &Status) -> Vec<[String; COLUMNS.len()]> {
    let mut peers: Vec<&PeerStatus> = status.peers.iter().collect();
    peers.sort_by_key(|peer| (peer.auxiliary, std::cmp::Reverse(peer.contributed), peer.peer));
    let row = |(rank, peer): (usize, &PeerStatus)| {
        [
            if peer.auxiliary { "-".to_owned() } else { (rank + 1).to_string() },
            format!("{}{}", peer.peer.short(), if peer.is_me { "*" } else { "" }),
            peer.epoch.to_string(),
            peer.samples.to_string(),
            format!("{:.0} %", peer.share * 100.0),
            format!("{:.1}", peer.samples_per_second),
            peer.contributed.to_string(),
            match (peer.is_me, peer.path) {
                (true, _) => "-",
                (false, Some(Path::Direct)) => "direct",
                (false, Some(Path::HolePunched)) => "hole-punched",
                (false, Some(Path::Relayed)) => "relayed",
                (false, _) => "none",
            }
            .to_owned(),
            format!(
                "{}/{}",
                megabytes(peer.rates.up_bytes_per_second),
                megabytes(peer.rates.down_bytes_per_second)
            ),
            peer.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}")),
        ]
    };
    let here = peers.into_iter().enumerate().map(row);
    here.chain(status.left.iter().take(LEFT_MAX).map(left)).collect()
}

/// Whoever is here no more has given what it gave all the same.
fn left(peer: &LeftPeer) -> [String; COLUMNS.len()] {
    let (name, epoch, contributed) =
        (peer.peer.short(), peer.epoch.to_string(), peer.contributed.to_string());
    ["-", &name, &epoch, "-", "-", "-", &contributed, "left", "-", "-"].map(str::to_owned)
}

fn table(status: &Status) -> String {
    let mut rows = rows(status);
    rows.insert(0, COLUMNS.map(str::to_owned));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
    let mut out = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        // Writing to a string cannot fail.
        let _written = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    out.push_str("* answered; paths are as it sees them\n");
    if let Some(more) = status.left.len().checked_sub(LEFT_MAX).filter(|more| *more > 0) {
        let _written = writeln!(out, "and {more} more who have left; --json lists them");
    }
    out
}

/// How much of the epoch is in, 0 to 1.
pub(crate) fn fraction(status: &Status) -> f64 {
    (status.samples as f64 / status.target_batch_size.max(1) as f64).min(1.0)
}

/// A measured rate in MB/s, for people.
fn megabytes(bytes_per_second: Option<f32>) -> String {
    match bytes_per_second.map(|rate| rate / 1e6) {
        None => "-".to_owned(),
        Some(rate) if rate < 0.995 => format!("{rate:.2}"),
        Some(rate) if rate < 99.95 => format!("{rate:.1}"),
        Some(rate) => format!("{rate:.0}"),
    }
}

/// A duration for people.
pub(crate) fn seconds(value: f64) -> String {
    match value {
        value if value < 1.0 => format!("{:.0} ms", value * 1e3),
        value if value < 120.0 => format!("{value:.1} s"),
        value if value < 7200.0 => format!("{:.0} min", value / 60.0),
        value => format!("{:.1} h", value / 3600.0),
    }
}

/// A size for people, in powers of ten.
pub(crate) fn bytes(value: u64) -> String {
    let mut size = value as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if size < 999.5 {
            let digits = usize::from(size < 99.95 && unit != "B");
            return format!("{size:.digits$} {unit}");
        }
        size /= 1000.0;
    }
    format!("{size:.1} TB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_collab::Rates;

    #[test]
    fn figures_have_a_unit_and_few_digits() {
        assert_eq!(
            [0, 999, 1000, 123_456, 5_000_000_000_000].map(bytes),
            ["0 B", "999 B", "1.0 kB", "123 kB", "5.0 TB"]
        );
        assert_eq!([0.0123, 3.21, 600.0, 9000.0].map(seconds), ["12 ms", "3.2 s", "10 min", "2.5 h"]);
    }

    #[test]
    fn whoever_gave_most_is_first_and_helpers_have_no_rank() {
        let peer = |seed: u8, contributed, auxiliary| PeerStatus {
            peer: potluck_net::PeerId::from_ed25519(&[seed; 32]),
            is_me: seed == 1,
            epoch: 2,
            samples: 3,
            samples_per_second: 1.0,
            path: Some(Path::Relayed),
            rates: Rates::measured(if seed == 1 { 12.34e6 } else { 0.0 }, 40_000.0 * f64::from(seed)),
            share: 0.5,
            contributed,
            auxiliary,
            client: false,
            loss: None,
        };
        let peers = vec![peer(1, 5, false), peer(2, 90, true), peer(3, 7, false)];
        let left = |seed: u8| LeftPeer {
            peer: potluck_net::PeerId::from_ed25519(&[seed; 32]),
            epoch: 1,
            contributed: 100 - u64::from(seed),
        };
        let left: Vec<LeftPeer> = (10..22).map(left).collect();
        let status = Status { peers, left, ..Status::default() };
        let rows = rows(&status);
        let ranks: Vec<(&str, &str)> = rows.iter().map(|row| (row[0].as_str(), row[6].as_str())).collect();
        assert_eq!(ranks[..4], [("1", "7"), ("2", "5"), ("-", "90"), ("-", "90")]);
        assert_eq!((rows.len(), rows[3][7].as_str(), rows[12][6].as_str()), (13, "left", "81"));
        assert!(text(&status).ends_with("and 2 more who have left; --json lists them\n"));
        assert_eq!((rows[0][7].as_str(), rows[1][7].as_str()), ("relayed", "-"));
        assert_eq!((rows[0][8].as_str(), rows[1][8].as_str()), ("-/0.12", "12.3/0.04"));
        assert_eq!([0.994e6, 0.996e6, 123.4e6].map(|rate| megabytes(Some(rate))), ["0.99", "1.0", "123"]);
    }
}
