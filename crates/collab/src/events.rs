//! What happened, one line each: for logs and for whoever subscribes. Bounded: a slow reader misses the oldest.

use crate::status::RoundStatus;
use crate::{Channel, Lineage, RoundStats};
use potluck_net::{PeerFault, PeerId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Events that wait for a reader; older ones are dropped.
pub(crate) const EVENTS_MAX: usize = 256;

/// One thing that happened; as JSON, one line of a log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A round gave an average.
    Round(RoundStatus),
    /// A round gave none, although others were here; this peer went on with its own values.
    RoundFailed {
        /// Which epoch.
        epoch: u64,
        /// What was to be averaged.
        channel: Channel,
        /// Why.
        reason: String,
        /// Who failed.
        faults: Vec<PeerFault>,
    },
    /// The others finished a round without this peer and went on; it applies nothing, and gets what they have.
    RoundMissed {
        /// Which epoch.
        epoch: u64,
        /// What was averaged.
        channel: Channel,
        /// Why it was not there.
        reason: String,
        /// Who failed.
        faults: Vec<PeerFault>,
    },
    /// A peer is here.
    Joined {
        /// Who.
        peer: PeerId,
        /// Live peers now, this one included.
        peers: usize,
    },
    /// A peer is gone.
    Lost {
        /// Who.
        peer: PeerId,
        /// Live peers now, this one included.
        peers: usize,
        /// Whether it said farewell.
        left: bool,
    },
    /// Two machines are in the run under one identity: its file was copied.
    Copied {
        /// Whose identity.
        peer: PeerId,
        /// Whether it is ours.
        is_me: bool,
    },
    /// Everybody else is gone: this peer trains alone, which is rarely what its owner wants.
    Alone {
        /// The epoch at which it happened.
        epoch: u64,
        /// Whether the last ones said farewell: then nothing is wrong with anybody's network.
        left: bool,
    },
    /// Two histories met, and ours gives way: epochs that this peer went through are lost.
    LineageLost {
        /// What we had.
        ours: Lineage,
        /// What we take over.
        theirs: Lineage,
        /// From whom we know it.
        peer: PeerId,
    },
    /// The state of others was loaded.
    StateLoaded {
        /// The epoch before.
        from_epoch: u64,
        /// The epoch now.
        to_epoch: u64,
        /// What it cost.
        seconds: f64,
    },
    /// A round that this peer missed was fetched from others, and is applied.
    MadeUp {
        /// Whose round.
        epoch: u64,
        /// What was averaged.
        channel: Channel,
        /// What it cost.
        seconds: f64,
    },
    /// No state could be loaded; it is tried again.
    StateFailed {
        /// Why.
        reason: String,
    },
    /// This peer has left the run.
    Left,
}

/// One value in so many that the compression had to clamp is worth a word: heavy tails lose a few under 8 bit.
const SATURATED_WORTH_SAYING: u64 = 1000;

impl Event {
    /// Whether somebody should do something about it.
    pub fn is_warning(&self) -> bool {
        matches!(self, Self::Alone { left: false, .. } | Self::LineageLost { .. } | Self::Copied { .. })
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Round(round) if round.unchanged => write!(
                f,
                "epoch {}: {} peers have the same state, nothing to average, {}{}",
                round.epoch,
                round.members.len(),
                seconds(round.stats.seconds),
                faults(&round.faults)
            ),
            Self::Round(round) => write!(
                f,
                "epoch {}: averaged {} with {}, {}{}{}{}",
                round.epoch,
                channel(round.channel),
                peers(round.members.len()),
                match round.channel {
                    Channel::Gradients => format!("{:.0} samples, ", round.weight_total),
                    // The weight of a state is a matter of the policy, and no number of samples.
                    Channel::State => String::new(),
                },
                seconds(round.stats.seconds),
                saturated(&round.stats),
                faults(&round.faults)
            ),
            Self::RoundFailed { epoch, channel: what, reason, faults: who } => write!(
                f,
                "epoch {epoch}: no average of {}, went on alone: {reason}{}",
                channel(*what),
                faults(who)
            ),
            Self::RoundMissed { epoch, channel: what, reason, faults: who } => write!(
                f,
                "epoch {epoch}: missed the average of {}: {reason}; getting what the others have{}",
                channel(*what),
                faults(who)
            ),
            Self::Joined { peer, peers: now } => write!(f, "peer {} is here; {}", peer.short(), peers(*now)),
            Self::Lost { peer, peers: now, left } => {
                let how = if *left { "has left" } else { "is gone" };
                write!(f, "peer {} {how}; {}", peer.short(), peers(*now))
            }
            Self::Copied { peer, is_me } => write!(
                f,
                "{} {} is used by two machines at once: its identity file was copied; give one of them its own",
                if *is_me { "the identity of THIS peer," } else { "the identity of peer" },
                peer.short()
            ),
            Self::Alone { epoch, left: true } => {
                write!(
                    f,
                    "alone at epoch {epoch}: every other peer has left; going on, whoever joins is welcome"
                )
            }
            Self::Alone { epoch, left: false } => write!(
                f,
                "ALONE at epoch {epoch}: every other peer is gone; looking for them, check this machine's network"
            ),
            Self::LineageLost { ours, theirs, peer } => write!(
                f,
                "the swarm was split: our history {ours} gives way to {theirs} of peer {}; loading it",
                peer.short()
            ),
            Self::StateLoaded { from_epoch, to_epoch, seconds: took } => {
                let took = seconds(*took);
                write!(f, "loaded the state of epoch {to_epoch} (was at {from_epoch}) in {took}")
            }
            Self::MadeUp { epoch, channel: what, seconds: took } => {
                let (what, took) = (channel(*what), seconds(*took));
                write!(f, "epoch {epoch}: made up for the average of {what} that it had missed, in {took}")
            }
            Self::StateFailed { reason } => f.write_str(reason),
            Self::Left => f.write_str("left the run"),
        }
    }
}

fn peers(count: usize) -> String {
    if count == 1 { "1 peer".to_owned() } else { format!("{count} peers") }
}

/// A round in one house takes milliseconds, one across the world many seconds.
fn seconds(value: f64) -> String {
    if value < 1.0 { format!("{:.0} ms", value * 1e3) } else { format!("{value:.1} s") }
}

fn channel(channel: Channel) -> &'static str {
    match channel {
        Channel::Gradients => "gradients",
        Channel::State => "state",
    }
}

fn faults(faults: &[PeerFault]) -> String {
    if faults.is_empty() {
        return String::new();
    }
    let lines: Vec<String> = faults.iter().map(PeerFault::to_string).collect();
    format!("; lost on the way: {}", lines.join(", "))
}

fn saturated(stats: &RoundStats) -> String {
    let values = stats.bytes_plain / 4;
    match stats.saturated {
        0 => String::new(),
        few if few * SATURATED_WORTH_SAYING < values => String::new(),
        many => format!("; {many} values were beyond the range of the compression and were clamped to it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_net::FaultKind;

    #[test]
    fn an_event_is_one_line_of_json_and_of_text() {
        let peer = PeerId::from_ed25519(&[7; 32]);
        let event = Event::RoundFailed {
            epoch: 3,
            channel: Channel::Gradients,
            reason: "nobody came".into(),
            faults: vec![PeerFault::new(peer, FaultKind::Silent, "part 2")],
        };
        let json = serde_json::to_string(&event).unwrap();
        assert!(json.starts_with(r#"{"event":"round_failed","epoch":3,"#), "{json}");
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
        let text = event.to_string();
        assert!(text.contains(&peer.short()) && text.lines().count() == 1, "{text}");
    }
    #[test]
    fn a_round_says_how_much_the_compression_clamped_if_it_was_more_than_a_few() {
        let text =
            |count| saturated(&RoundStats { saturated: count, bytes_plain: 40_000, ..RoundStats::default() });
        assert_eq!(text(0), "");
        assert_eq!(text(9), "");
        assert!(text(10).contains("10 values"), "{}", text(10));
    }
}
