//! The decoders of this crate for fuzz targets and property tests: each takes any bytes and asserts what must hold.

use crate::native::sequels;
use crate::past::Past;
use crate::sight::Sight;
use crate::sketch::{SKETCH_LEN, Sketch};
use crate::wire::Note;
use crate::{Channel, Lineage, Status};
use bytes::Bytes;
use std::collections::BTreeMap;

/// What a session adds to its peer's heartbeats; what decodes encodes to the same bytes.
pub fn note(input: &[u8]) {
    if let Some(note) = Note::decode(input) {
        assert_eq!(note.encode(), input);
    }
}

/// The answer to a watcher; what decodes survives another round trip.
pub fn sight(input: &[u8]) {
    if let Ok(sight) = serde_json::from_slice::<Sight>(input) {
        let bytes = serde_json::to_vec(&sight).expect("what was read can be written");
        let again: Sight = serde_json::from_slice(&bytes).expect("what was written can be read");
        assert_eq!(serde_json::to_vec(&again).expect("as before"), bytes);
    }
}

/// A watcher's question: only a well-formed one is answered, and a stranger's with nothing.
pub fn question(input: &[u8]) {
    let sight = || Sight { status: Status::default(), manifest: BTreeMap::new() };
    let answer = crate::sight::answer(input, |invite| invite == Some("key"), sight);
    assert!(answer.is_none_or(|answer| answer.is_empty() || input.windows(3).any(|three| three == b"key")));
}

/// Which epochs a peer's parameters went through; what decodes survives another round trip.
pub fn past(input: &[u8]) {
    if let Some(past) = str::from_utf8(input).ok().and_then(Past::from_text) {
        assert_eq!(Past::from_text(&past.to_text()), Some(past));
    }
}

/// A missed round's facts, a line each: channel, plan, samples, cut; what is behind them is its values.
pub fn sequel(input: &[u8]) {
    let mut parts = input.splitn(5, |byte| *byte == b'\n').map(String::from_utf8_lossy);
    let mut meta = BTreeMap::new();
    for name in [sequels::CHANNEL, sequels::PLAN, sequels::SAMPLES, sequels::CUT] {
        meta.extend(parts.next().map(|fact| (name.to_owned(), fact.into_owned())));
    }
    let told = meta.clone();
    let values = parts.next().map(|values| Bytes::copy_from_slice(values.as_bytes())).unwrap_or_default();
    let blobs = [(sequels::PHASES[0].to_owned(), values)].into();
    let snapshot = potluck_transfer::Snapshot { epoch: 3, lineage: [7; 32], meta, blobs };
    if let Some(read) = sequels::Read::new(snapshot) {
        assert_eq!(told[sequels::CHANNEL], sequels::name(read.channel));
        assert!(told.len() == 4);
    }
}

/// A question of somebody who measures the way to us: what it costs is what moves, and bounded.
pub fn speed(input: &[u8]) {
    if let Some((answer, cost)) = crate::speed::answer(input) {
        assert!(cost <= crate::speed::PIECE_BYTES && cost == answer.len().max(input.len() - 1));
    }
}

/// Inputs that decode, for a corpus: a decoder's name and the bytes.
pub fn seeds() -> Vec<(&'static str, Bytes)> {
    let lineage = Lineage { epoch: 3, samples: 1024, state_averages: 2, hash: [7; 32] };
    let sketch = Some(Sketch { epoch: 3, values: [0.5; SKETCH_LEN] });
    let full = Note {
        lineage,
        contributed: 9,
        loss: Some(1.5),
        state_due: Some(4),
        sketch,
        waiting: Some(Channel::State),
    };
    let bare = Note { loss: None, state_due: None, sketch: None, waiting: None, ..full.clone() };
    let status = Status { run_id: "run".into(), epoch: 3, ..Status::default() };
    let sight = Sight { status, manifest: [("policy".into(), "Synchronous".into())].into() };
    vec![
        ("collab_note", full.encode()),
        ("collab_note", bare.encode()),
        ("collab_sight", serde_json::to_vec(&sight).expect("plain data always encodes").into()),
        ("collab_past", Bytes::from_static(b"3:0707070707070707 64:0000000000000000")),
        ("collab_question", Bytes::from_static(br#"{"invite":null}"#)),
        ("collab_question", Bytes::from_static(br#"{"invite":"lock"}"#)),
        ("collab_sequel", format!("gradients\n{}\n1024\n65536 3,0,1\nvalues", "07".repeat(32)).into()),
        ("collab_sequel", format!("state\n{}\n0\n65536 1\n", "f0".repeat(32)).into()),
        ("collab_speed", Bytes::from_static(b"d")),
        ("collab_speed", Bytes::from_static(b"u and as much as shall be moved")),
    ]
}
