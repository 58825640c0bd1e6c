//! What peers say on control streams and on the streams of a round, as bytes. Limits are checked before anything is
//! allocated or believed. `docs/protocol.md` describes every field.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::{BufMut, Bytes, BytesMut};
use potluck_net::{PeerId, Reachability};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of everything in this file; a different one is refused at the first message.
pub const PROTOCOL_VERSION: u32 = 5;
/// Largest control message that is decoded, in bytes.
const CONTROL_BYTES_MAX: usize = 2 << 20;
/// Room for a control message as it is encoded; larger ones grow.
const ENCODED_BYTES: usize = 512;
/// Longest list in any control message: members, news, parts.
const LIST_MAX: usize = 1024;
/// Longest application payload in a heartbeat, in bytes.
pub const APP_BYTES_MAX: usize = 256;
/// Longest user payload that a member of a round may hand to the others, in bytes.
pub const GATHER_BYTES_MAX: usize = 16 << 10;

/// Bytes of a peer that are not what the protocol allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {0}")]
pub(crate) struct WireError(pub(crate) String);

/// What a peer reports of its training, in every heartbeat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The epoch that it is working on.
    pub epoch: u64,
    /// Samples that it has accumulated in this epoch.
    pub samples: u64,
    /// Its speed.
    pub samples_per_second: f64,
    /// Whether it could take part in a round now (it is caught up).
    pub ready: bool,
    /// Anything small that the layer above wants everybody to know, at most [`APP_BYTES_MAX`] bytes.
    pub app: Bytes,
}

impl Default for Progress {
    fn default() -> Self {
        Self { epoch: 0, samples: 0, samples_per_second: 0.0, ready: true, app: Bytes::new() }
    }
}

/// One peer as another one knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct News {
    pub(crate) peer: PeerId,
    pub(crate) incarnation: u64,
    pub(crate) standing: Standing,
    pub(crate) addresses: Vec<String>,
    /// The newest heartbeat known of it, without its news; lets peers without a link to it see its progress.
    pub(crate) beat: Option<Pulse>,
}

/// Whether a peer is part of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Standing {
    Alive,
    Dead,
    Left,
}

/// One heartbeat's content.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Pulse {
    /// Random at the start of the program: a restart shows even when nobody had time to miss its predecessor.
    pub(crate) process: u32,
    pub(crate) sequence: u64,
    pub(crate) progress: Progress,
    pub(crate) up: f64,
    pub(crate) down: f64,
    pub(crate) reachability: Reachability,
    pub(crate) client: bool,
    pub(crate) auxiliary: bool,
}

/// First message in both directions of a control stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    pub(crate) run: String,
    pub(crate) manifest: BTreeMap<String, String>,
    pub(crate) invite: Option<Vec<u8>>,
    pub(crate) incarnation: u64,
    pub(crate) addresses: Vec<String>,
    pub(crate) pulse: Pulse,
    /// How many others it knows to be alive.
    pub(crate) peers: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Control {
    Hello(Box<Hello>),
    /// The other side may not join; for people.
    Refuse(String),
    Beat {
        incarnation: u64,
        pulse: Pulse,
        news: Vec<News>,
    },
    /// Everybody whom the sender knows, for a newcomer; nothing that must be told on.
    Introduce(Vec<News>),
    /// "Have you heard of this peer lately?"
    Ask(PeerId),
    /// "I heard it this many milliseconds ago."
    Vouch {
        peer: PeerId,
        incarnation: u64,
        heard_ms: u32,
    },
    Leave,
    Round {
        channel: String,
        message: RoundMessage,
    },
}

/// A member's wish to average.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ready {
    /// Epoch of the round; `None` mixes with every other `None`.
    pub(crate) epoch: Option<u64>,
    /// Distinguishes this peer's steps.
    pub(crate) nonce: u64,
    /// Lowest attempt that it accepts.
    pub(crate) attempt: u32,
    pub(crate) weight: f64,
    /// Euclidean norm of its vector.
    pub(crate) norm: f64,
    pub(crate) gathered: Bytes,
    /// The slower of its measured directions.
    pub(crate) rate: f64,
    pub(crate) private: bool,
    /// Reduces only, has no vector.
    pub(crate) auxiliary: bool,
    /// What must be equal: tensors and compression.
    #[serde(with = "hash")]
    pub(crate) layout: [u8; 32],
}

/// One member in a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct PlanMember {
    pub(crate) peer: PeerId,
    pub(crate) nonce: u64,
    pub(crate) weight: f64,
    pub(crate) norm: f64,
    pub(crate) gathered: Bytes,
    pub(crate) share: u32,
    pub(crate) private: bool,
    pub(crate) auxiliary: bool,
}

/// What a round does, decided by its coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) run: String,
    pub(crate) channel: String,
    pub(crate) epoch: Option<u64>,
    pub(crate) attempt: u32,
    pub(crate) coordinator: PeerId,
    pub(crate) members: Vec<PlanMember>,
    /// Encoded bytes of a chunk, about.
    pub(crate) chunk_bytes: u32,
    /// Members whose norm was implausible; their weight is 0.
    pub(crate) implausible: Vec<PeerId>,
}

/// Messages of one channel's rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum RoundMessage {
    Ready(Ready),
    Begin(Box<Plan>),
    /// This round goes on without you.
    LeftOut {
        nonce: u64,
        epoch: Option<u64>,
        attempt: u32,
    },
    /// I gave this round up.
    Withdraw {
        #[serde(with = "hash")]
        plan: [u8; 32],
    },
    /// I hold every part; these are their digests.
    Done {
        #[serde(with = "hash")]
        plan: [u8; 32],
        #[serde(with = "hashes")]
        digests: Vec<[u8; 32]>,
    },
    /// What was agreed: digests, and who holds the bytes of each part.
    Verdict {
        #[serde(with = "hash")]
        plan: [u8; 32],
        #[serde(with = "hashes")]
        digests: Vec<[u8; 32]>,
        holders: Vec<PeerId>,
    },
    /// The coordinator is gone: how far are you?
    Query {
        #[serde(with = "hash")]
        plan: [u8; 32],
    },
}

/// A [`Control::Round`] whose parts are somebody else's.
#[derive(Serialize)]
#[serde(rename = "Control")]
enum Borrowed<'a> {
    Round { channel: &'a str, message: &'a RoundMessage },
}

/// Hashes as bytes: as lists of numbers they are half as long again, and a verdict has one for each part.
mod hash {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(hash)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let bytes = <&[u8]>::deserialize(deserializer)?;
        <[u8; 32]>::try_from(bytes).map_err(|_| serde::de::Error::invalid_length(bytes.len(), &"32 bytes"))
    }
}

/// One after the other.
mod hashes {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(hashes: &[[u8; 32]], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(hashes.as_flattened())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<[u8; 32]>, D::Error> {
        let bytes = <&[u8]>::deserialize(deserializer)?;
        match bytes.as_chunks::<32>() {
            (hashes, []) => Ok(hashes.to_vec()),
            _ => Err(serde::de::Error::invalid_length(bytes.len(), &"a multiple of 32 bytes")),
        }
    }
}

pub(crate) fn encode_control(message: &Control) -> Bytes {
    encode(message)
}

/// A [`Control::Round`].
pub(crate) fn encode_round(channel: &str, message: &RoundMessage) -> Bytes {
    encode(&Borrowed::Round { channel, message })
}

fn encode(message: &impl Serialize) -> Bytes {
    // A heartbeat's size, so that it is not copied while it grows.
    let mut bytes = Vec::with_capacity(ENCODED_BYTES);
    rmp_serde::encode::write(&mut bytes, message).expect("plain data always encodes");
    bytes.into()
}

pub(crate) fn decode_control(frame: &[u8]) -> Result<Control, WireError> {
    if frame.len() > CONTROL_BYTES_MAX {
        return Err(WireError(format!("{} bytes, at most {CONTROL_BYTES_MAX} expected", frame.len())));
    }
    let message: Control = rmp_serde::from_slice(frame).map_err(|error| WireError(error.to_string()))?;
    check(&message)?;
    Ok(message)
}

fn check(message: &Control) -> Result<(), WireError> {
    let sound = match message {
        Control::Hello(hello) => {
            hello.manifest.len() <= LIST_MAX && hello.addresses.len() <= 32 && pulse_is_sound(&hello.pulse)
        }
        Control::Beat { pulse, news, .. } => pulse_is_sound(pulse) && news_are_sound(news),
        Control::Introduce(news) => news_are_sound(news),
        Control::Round { message, .. } => round_is_sound(message),
        _ => true,
    };
    if sound { Ok(()) } else { Err(WireError("a field is out of its limits".into())) }
}

fn news_are_sound(news: &[News]) -> bool {
    let sound = |news: &News| news.addresses.len() <= 32 && news.beat.as_ref().is_none_or(pulse_is_sound);
    news.len() <= LIST_MAX && news.iter().all(sound)
}

fn pulse_is_sound(pulse: &Pulse) -> bool {
    let positive = |x: f64| x.is_finite() && x >= 0.0;
    pulse.progress.app.len() <= APP_BYTES_MAX
        && positive(pulse.progress.samples_per_second)
        && positive(pulse.up)
        && positive(pulse.down)
}

fn round_is_sound(message: &RoundMessage) -> bool {
    let weight = |w: f64| w.is_finite() && w >= 0.0;
    match message {
        RoundMessage::Ready(ready) => {
            weight(ready.weight) && ready.rate.is_finite() && ready.gathered.len() <= GATHER_BYTES_MAX
        }
        RoundMessage::Begin(plan) => {
            plan.members.len() <= crate::plan::GROUP_MAX
                && crate::spans::CHUNK_BYTES.contains(&plan.chunk_bytes)
                && plan.members.iter().all(|m| weight(m.weight) && m.gathered.len() <= GATHER_BYTES_MAX)
        }
        RoundMessage::Done { digests, .. } => digests.len() <= LIST_MAX,
        RoundMessage::Verdict { digests, holders, .. } => {
            digests.len() <= LIST_MAX && holders.len() == digests.len()
        }
        _ => true,
    }
}

/// A frame on the stream of a pair of members in a round: one byte of kind, then fixed little-endian fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PairFrame {
    /// First frame, both directions: the plan, and where each of the other's parts shall start: `contributions` that
    /// I need as reducer, `averages` that I need as receiver, as `(part, first chunk)`.
    Hello { plan: [u8; 32], phase: u8, contributions: Vec<(u16, u32)>, averages: Vec<(u16, u32)> },
    /// My encoded values of a chunk that you reduce.
    Contribution { part: u16, chunk: u32, bytes: Bytes },
    /// The average of a chunk; bit i of `mask` says that member i is in it.
    Average { part: u16, generation: u16, chunk: u32, mask: u64, bytes: Bytes },
    /// I reduce this part from now on; how many of its averages do you hold?
    Adopt { part: u16, generation: u16 },
    /// So many, from its beginning.
    Prefix { part: u16, generation: u16, chunks: u32 },
    /// Send me your contributions to this part, from this chunk.
    Pull { part: u16, generation: u16, chunk: u32 },
    /// Send me the averages of this part that you hold, from this chunk.
    Copy { part: u16, generation: u16, chunk: u32 },
    /// This part's reducer is lost to me; you are next.
    Complain { part: u16, generation: u16 },
}

/// Bytes in front of the encoded values of an average.
pub(crate) const AVERAGE_HEAD_BYTES: usize = 17;
/// Bytes in front of the encoded values of a contribution.
pub(crate) const CONTRIBUTION_HEAD_BYTES: usize = 7;

/// The start of an average's frame. What is large is encoded right behind its head, so that nobody copies it.
pub(crate) fn average_head(part: u16, generation: u16, chunk: u32, mask: u64) -> [u8; AVERAGE_HEAD_BYTES] {
    let mut head = [0; AVERAGE_HEAD_BYTES];
    let mut out = head.as_mut_slice();
    out.put_u8(2);
    out.put_u16_le(part);
    out.put_u16_le(generation);
    out.put_u32_le(chunk);
    out.put_u64_le(mask);
    head
}

/// The start of a contribution's frame.
pub(crate) fn contribution_head(part: u16, chunk: u32) -> [u8; CONTRIBUTION_HEAD_BYTES] {
    let mut head = [0; CONTRIBUTION_HEAD_BYTES];
    let mut out = head.as_mut_slice();
    out.put_u8(1);
    out.put_u16_le(part);
    out.put_u32_le(chunk);
    head
}

impl PairFrame {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        match self {
            Self::Hello { plan, phase, contributions, averages } => {
                out.put_u8(0);
                out.put_slice(plan);
                out.put_u8(*phase);
                for list in [contributions, averages] {
                    out.put_u16_le(u16::try_from(list.len()).unwrap_or(u16::MAX));
                    for (part, chunk) in list.iter().take(usize::from(u16::MAX)) {
                        out.put_u16_le(*part);
                        out.put_u32_le(*chunk);
                    }
                }
            }
            Self::Contribution { part, chunk, bytes } => {
                out.put_slice(&contribution_head(*part, *chunk));
                out.put_slice(bytes);
            }
            Self::Average { part, generation, chunk, mask, bytes } => {
                out.put_slice(&average_head(*part, *generation, *chunk, *mask));
                out.put_slice(bytes);
            }
            Self::Adopt { part, generation } => short(&mut out, 3, *part, *generation, 0),
            Self::Prefix { part, generation, chunks } => short(&mut out, 4, *part, *generation, *chunks),
            Self::Pull { part, generation, chunk } => short(&mut out, 5, *part, *generation, *chunk),
            Self::Copy { part, generation, chunk } => short(&mut out, 6, *part, *generation, *chunk),
            Self::Complain { part, generation } => short(&mut out, 7, *part, *generation, 0),
        }
        out.freeze()
    }

    pub(crate) fn decode(mut frame: Bytes) -> Result<Self, WireError> {
        let at = &mut frame;
        Ok(match u8_of(at)? {
            0 => Self::Hello {
                plan: hash_of(at)?,
                phase: u8_of(at)?,
                contributions: list(at)?,
                averages: list(at)?,
            },
            1 => Self::Contribution { part: u16_of(at)?, chunk: u32_of(at)?, bytes: frame },
            2 => Self::Average {
                part: u16_of(at)?,
                generation: u16_of(at)?,
                chunk: u32_of(at)?,
                mask: u64::from_le_bytes(take(at)?),
                bytes: frame,
            },
            kind @ 3..=7 => {
                let (part, generation, chunk) = (u16_of(at)?, u16_of(at)?, u32_of(at)?);
                match kind {
                    3 => Self::Adopt { part, generation },
                    4 => Self::Prefix { part, generation, chunks: chunk },
                    5 => Self::Pull { part, generation, chunk },
                    6 => Self::Copy { part, generation, chunk },
                    _ => Self::Complain { part, generation },
                }
            }
            kind => return Err(WireError(format!("frame kind {kind}"))),
        })
    }
}

fn short(out: &mut BytesMut, kind: u8, part: u16, generation: u16, chunk: u32) {
    out.put_u8(kind);
    out.put_u16_le(part);
    out.put_u16_le(generation);
    out.put_u32_le(chunk);
}

fn take<const N: usize>(frame: &mut Bytes) -> Result<[u8; N], WireError> {
    let head = frame.split_to_checked(N).ok_or_else(|| WireError("frame is cut short".into()))?;
    <[u8; N]>::try_from(head.as_ref()).map_err(|_| WireError("frame is cut short".into()))
}

trait SplitChecked {
    fn split_to_checked(&mut self, len: usize) -> Option<Bytes>;
}

impl SplitChecked for Bytes {
    fn split_to_checked(&mut self, len: usize) -> Option<Bytes> {
        (len <= self.len()).then(|| self.split_to(len))
    }
}

fn u8_of(frame: &mut Bytes) -> Result<u8, WireError> {
    take::<1>(frame).map(u8::from_le_bytes)
}

fn u16_of(frame: &mut Bytes) -> Result<u16, WireError> {
    take(frame).map(u16::from_le_bytes)
}

fn u32_of(frame: &mut Bytes) -> Result<u32, WireError> {
    take(frame).map(u32::from_le_bytes)
}

fn hash_of(frame: &mut Bytes) -> Result<[u8; 32], WireError> {
    take(frame)
}

fn list(frame: &mut Bytes) -> Result<Vec<(u16, u32)>, WireError> {
    let len = u16_of(frame)?;
    if usize::from(len) > LIST_MAX {
        return Err(WireError(format!("list of {len}")));
    }
    (0..len).map(|_| Ok((u16_of(frame)?, u32_of(frame)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pair_frames_survive_the_wire() {
        let frames = [
            PairFrame::Hello {
                plan: [7; 32],
                phase: 1,
                contributions: vec![(1, 2)],
                averages: vec![(3, 4), (5, 6)],
            },
            PairFrame::Contribution { part: 3, chunk: 9, bytes: Bytes::from_static(b"abc") },
            PairFrame::Average {
                part: 1,
                generation: 2,
                chunk: 3,
                mask: 1 << 63,
                bytes: Bytes::from_static(b"x"),
            },
            PairFrame::Copy { part: 1, generation: 2, chunk: 77 },
        ];
        for frame in frames {
            assert_eq!(PairFrame::decode(frame.encode()), Ok(frame));
        }
    }

    proptest! {
        #[test]
        fn a_strangers_bytes_never_panic(bytes: Vec<u8>) {
            let _refused_or_not = decode_control(&bytes);
            let _refused_or_not = PairFrame::decode(bytes.into());
        }
    }
}
