//! The status as OpenMetrics text, for Prometheus. Names carry their units; nothing is counted here.

use potluck_collab::Status;
use std::fmt::{Display, Write};

/// The status in the OpenMetrics exposition format (version 1.0.0), ending in `# EOF`.
pub fn openmetrics(status: &Status) -> String {
    let mut text = Text::default();
    let run = escape(&status.run_id);
    let labels = format!("run=\"{run}\"");
    text.gauge("potluck_epoch", "Shared optimizer steps so far", &labels, status.epoch);
    text.gauge("potluck_epoch_samples", "Samples of this epoch over all live peers", &labels, status.samples);
    let target = status.target_batch_size;
    text.gauge("potluck_target_batch_samples", "Samples that end the epoch", &labels, target);
    let speed = status.samples_per_second;
    text.gauge("potluck_samples_per_second", "Speed of all live peers together", &labels, speed);
    text.gauge("potluck_peers", "Live peers, this one included", &labels, status.peers.len());
    text.gauge("potluck_alone", "1 if nobody else is here", &labels, u8::from(status.alone));
    text.counter("potluck_rounds", "Rounds that gave an average", &labels, status.rounds);
    let failed = status.rounds_failed;
    text.counter("potluck_rounds_failed", "Rounds that gave none while others were here", &labels, failed);
    text.counter("potluck_sent_bytes", "Bytes sent since the start", &labels, status.bytes_sent);
    text.counter("potluck_received_bytes", "Bytes received since the start", &labels, status.bytes_received);
    let ratio = status.compression_ratio;
    text.gauge("potluck_compression_ratio", "Bytes as f32 per byte on the wire", &labels, ratio);
    if let Some(round) = &status.last_round {
        text.gauge("potluck_round_seconds", "The last round, call to result", &labels, round.stats.seconds);
        text.gauge("potluck_round_members", "Members of the last round", &labels, round.members.len());
    }
    if let Some(loss) = status.loss {
        text.gauge("potluck_loss", "The last loss that this peer reported", &labels, loss);
    }
    text.head("potluck_faults", "counter", "Faults of peers by kind");
    for (kind, count) in &status.faults {
        text.sample("potluck_faults_total", &format!("{labels},kind=\"{}\"", escape(kind)), count);
    }
    text.head("potluck_memory_bytes", "gauge", "Memory by purpose");
    for (purpose, bytes) in &status.memory {
        text.sample("potluck_memory_bytes", &format!("{labels},purpose=\"{}\"", escape(purpose)), bytes);
    }
    text.head(
        "potluck_peer_contributed_samples",
        "gauge",
        "Samples that a live peer put into finished rounds",
    );
    for peer in &status.peers {
        let labels = format!("{labels},peer=\"{}\"", peer.peer);
        text.sample("potluck_peer_contributed_samples", &labels, peer.contributed);
    }
    text.0.push_str("# EOF\n");
    text.0
}

/// What a name may end in.
const UNITS: [&str; 5] = ["bytes", "samples_per_second", "samples", "seconds", "ratio"];

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        writeln!(self.0, "# TYPE {name} {kind}").expect("a String takes everything");
        if let Some(unit) = UNITS.iter().find(|unit| name.ends_with(&format!("_{unit}"))) {
            writeln!(self.0, "# UNIT {name} {unit}").expect("a String takes everything");
        }
        writeln!(self.0, "# HELP {name} {help}.").expect("a String takes everything");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        writeln!(self.0, "{name}{{{labels}}} {value}").expect("a String takes everything");
    }

    fn gauge(&mut self, name: &str, help: &str, labels: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.sample(name, labels, value);
    }

    fn counter(&mut self, name: &str, help: &str, labels: &str, value: impl Display) {
        self.head(name, "counter", help);
        self.sample(&format!("{name}_total"), labels, value);
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_comment_or_a_sample_and_labels_are_escaped() {
        let mut status = Status { run_id: "a\"b\\c\nd".into(), rounds: 7, ..Status::default() };
        status.faults.insert("silent".into(), 2);
        let text = openmetrics(&status);
        assert!(text.ends_with("# EOF\n"));
        assert!(text.contains("potluck_rounds_total{run=\"a\\\"b\\\\c\\nd\"} 7\n"));
        assert!(text.contains("kind=\"silent\"} 2\n"));
        assert!(
            text.contains("# TYPE potluck_sent_bytes counter\n# UNIT potluck_sent_bytes bytes\n# HELP"),
            "{text}"
        );
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
