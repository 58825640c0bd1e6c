//! The decoders of this crate for fuzz targets and property tests: each takes any bytes and asserts what must hold.

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
        ("collab_question", Bytes::from_static(br#"{"invite":null}"#)),
        ("collab_question", Bytes::from_static(br#"{"invite":"lock"}"#)),
    ]
}
