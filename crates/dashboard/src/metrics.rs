//! The status as OpenMetrics text, for Prometheus. Names carry their units; nothing is counted here.

use potluck_collab::{PeerStatus, Status};
use potluck_net::Path;
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
    if let Some(eta) = status.eta_seconds {
        text.gauge("potluck_epoch_left_seconds", "Until the epoch is full, at this speed", &labels, eta);
    }
    if let Some(lineage) = status.lineage {
        let help = "Samples in the history of the parameters";
        text.gauge("potluck_history_samples", help, &labels, lineage.samples);
        let help = "Averages of the state in the history of the parameters";
        text.gauge("potluck_history_state_averages", help, &labels, lineage.state_averages);
    }
    text.gauge("potluck_peers", "Live peers, this one included", &labels, status.peers.len());
    text.gauge("potluck_alone", "1 if nobody else is here", &labels, u8::from(status.alone));
    text.counter("potluck_rounds", "Rounds that gave an average", &labels, status.rounds);
    let unchanged = "Of these, rounds in which all had the same state already";
    text.counter("potluck_rounds_unchanged", unchanged, &labels, status.rounds_unchanged);
    let failed = status.rounds_failed;
    text.counter("potluck_rounds_failed", "Rounds that gave none while others were here", &labels, failed);
    text.counter("potluck_sent_bytes", "Bytes sent since the start", &labels, status.bytes_sent);
    text.counter("potluck_received_bytes", "Bytes received since the start", &labels, status.bytes_received);
    let ratio = status.compression_ratio;
    text.gauge("potluck_compression_ratio", "Bytes as f32 per byte on the wire", &labels, ratio);
    of_the_last_round(&mut text, &labels, status);
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
    of_each_peer(&mut text, &labels, status);
    text.0.push_str("# EOF\n");
    text.0
}

fn of_the_last_round(text: &mut Text, labels: &str, status: &Status) {
    let Some(round) = &status.last_round else { return };
    let stats = &round.stats;
    text.gauge("potluck_round_seconds", "The last round, call to result", labels, stats.seconds);
    let gather = stats.gather_seconds;
    text.gauge("potluck_round_gather_seconds", "Of these, until its group was complete", labels, gather);
    text.gauge("potluck_round_epoch", "The epoch that the last round ended", labels, round.epoch);
    text.gauge("potluck_round_members", "Members of the last round", labels, round.members.len());
    text.gauge("potluck_round_weight", "Weight of all its members together", labels, round.weight_total);
    text.gauge("potluck_round_faults", "Peers at fault in it", labels, round.faults.len());
    let same = "1 if all its members had the same state already";
    text.gauge("potluck_round_unchanged", same, labels, u8::from(round.unchanged));
    text.gauge("potluck_round_attempts", "How many times it was tried", labels, stats.attempts);
    let clamped = "Values that its compression could not express and this peer clamped";
    text.gauge("potluck_round_saturated_values", clamped, labels, stats.saturated);
    let (sent, received) = (stats.bytes_sent, stats.bytes_received);
    text.gauge("potluck_round_sent_bytes", "Sent by this peer in it", labels, sent);
    text.gauge("potluck_round_received_bytes", "Received by this peer in it", labels, received);
}

/// One family a figure, one sample a peer.
fn of_each_peer(text: &mut Text, labels: &str, status: &Status) {
    type Figure = fn(&PeerStatus) -> Option<f64>;
    let name = "potluck_peer_contributed_samples";
    text.head(name, "gauge", "Samples that a peer put into finished rounds, also of those who have left");
    let here = status.peers.iter().map(|peer| (peer.peer, peer.contributed));
    for (peer, samples) in here.chain(status.left.iter().map(|peer| (peer.peer, peer.contributed))) {
        text.sample(name, &format!("{labels},peer=\"{peer}\""), samples);
    }
    let name = "potluck_left_peer_epoch";
    text.head(name, "gauge", "The epoch that a peer worked on when it was seen last");
    for peer in &status.left {
        text.sample(name, &format!("{labels},peer=\"{}\"", peer.peer), peer.epoch);
    }
    let figures: [(&str, &str, Figure); 7] = [
        ("epoch", "The epoch that a live peer works on", |peer| Some(peer.epoch as f64)),
        ("epoch_samples", "Its samples of that epoch", |peer| Some(peer.samples as f64)),
        ("share_ratio", "Its part of this epoch's samples", |peer| Some(f64::from(peer.share))),
        ("samples_per_second", "Its measured speed", |peer| Some(f64::from(peer.samples_per_second))),
        ("up_bytes_per_second", "What its uplink carries, as it measured in rounds", |peer| {
            peer.rates.up_bytes_per_second.map(f64::from)
        }),
        ("down_bytes_per_second", "The most that it has received in rounds", |peer| {
            peer.rates.down_bytes_per_second.map(f64::from)
        }),
        ("loss", "The last loss that it reported", |peer| peer.loss.map(f64::from)),
    ];
    for (name, help, figure) in figures {
        let name = format!("potluck_peer_{name}");
        text.head(&name, "gauge", help);
        for (peer, value) in status.peers.iter().filter_map(|peer| Some((peer, figure(peer)?))) {
            text.sample(&name, &format!("{labels},peer=\"{}\"", peer.peer), value);
        }
    }
    text.head("potluck_peer_connected", "gauge", "1 for how this peer is connected to a live peer");
    for (peer, path) in status.peers.iter().filter_map(|peer| Some((peer, peer.path?))) {
        let path = match path {
            Path::Direct => "direct",
            Path::HolePunched => "hole_punched",
            _ => "relayed",
        };
        text.sample("potluck_peer_connected", &format!("{labels},peer=\"{}\",path=\"{path}\"", peer.peer), 1);
    }
}

/// What a name may end in.
const UNITS: [&str; 7] =
    ["bytes", "values", "bytes_per_second", "samples_per_second", "samples", "seconds", "ratio"];

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

    /// The numbers of a JSON value, with their names.
    fn numbers(name: &str, value: &serde_json::Value, found: &mut Vec<(String, f64)>) {
        match value {
            serde_json::Value::Number(number) => found.push((name.to_owned(), number.as_f64().unwrap())),
            serde_json::Value::Object(fields) => {
                fields.iter().for_each(|(field, value)| numbers(&format!("{name}.{field}"), value, found));
            }
            serde_json::Value::Array(items) => items.iter().for_each(|item| numbers(name, item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_number_of_a_status_is_among_the_metrics() {
        let json: serde_json::Value = serde_json::from_str(include_str!("../tests/status.json")).unwrap();
        let status: Status = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(&status).unwrap(), json, "the sample has every field and no other");
        let text = openmetrics(&status);
        let shown: Vec<f64> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
            .collect();
        let mut told = Vec::new();
        numbers("", &json, &mut told);
        // The ratio stands for the first two; the third is a name in numbers; the epoch of a history is the status's.
        let other =
            [".last_round.bytes_plain", ".last_round.bytes_encoded", ".lineage.hash", ".lineage.epoch"];
        told.retain(|(name, _)| !other.contains(&name.as_str()));
        assert!(told.len() > 35, "{told:?}");
        for (name, value) in told {
            let near = |shown: &&f64| (**shown - value).abs() <= 1e-6 * value.abs();
            assert!(shown.iter().any(|shown| near(&shown)), "{name} = {value} is not in\n{text}");
        }
        for set in ["path=\"hole_punched\"} 1\n", "potluck_round_unchanged{run=\"whole\"} 1\n"] {
            assert!(text.contains(set), "{text}");
        }
    }

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
