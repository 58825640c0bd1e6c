//! The decoders of this crate for fuzz targets and property tests: each takes any bytes and asserts what must hold.

use crate::core::Core;
use crate::core::snapshots::{
    AGREED_BLOB, PAST_META, Q_BLOB, SAMPLES_META, STATE_AVERAGES_META, VELOCITY_BLOB,
};
use crate::factors::Factors;
use crate::native::sequels;
use crate::past::Past;
use crate::sight::Sight;
use crate::sketch::{SKETCH_LEN, Sketch};
use crate::wire::Note;
use crate::{
    Channel, Invite, Lineage, PolicyKind, PowerSgd, SessionConfig, Snapshot, Status, TensorInfo, TensorRole,
};
use bytes::Bytes;
use potluck_net::{Identity, PeerId};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::LazyLock;
use tokio::time::Instant;

/// Who owns the closed run `run`, and the invite that opens it.
static OWNER: LazyLock<(PeerId, String)> = LazyLock::new(|| {
    let owner = Identity::from_seed(&[1; 32]);
    (owner.peer_id(), Invite::issue(&owner, "run").to_text())
});

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

/// A watcher's question: only a well-formed one is answered, and with nothing unless it shows the invite of a closed run.
pub fn question(input: &[u8]) {
    let (owner, key) = &*OWNER;
    let sight = || Sight { status: Status::default(), manifest: BTreeMap::new() };
    let admitted = Cell::new(None);
    let admits = |invite: Option<&str>| {
        let is_one = Invite::admit(Some(*owner), "run", invite).is_ok();
        assert_eq!(is_one, invite.map(str::trim) == Some(key));
        admitted.set(Some(is_one));
        is_one
    };
    let answer = crate::sight::answer(input, admits, sight);
    assert_eq!(answer.map(|answer| !answer.is_empty()), admitted.get());
}

/// An invite as text; what reads writes the same text, and only the owner's opens the run.
pub fn invite(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let (owner, key) = &*OWNER;
    if let Ok(invite) = Invite::from_text(text) {
        assert_eq!(invite.to_text(), text.trim());
    }
    assert_eq!(Invite::admit(Some(*owner), "run", Some(text)).is_ok(), text.trim() == key);
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

/// Values of the state in [`state`], and of PowerSGD's Q.
const STATE_VALUES: usize = 3;
const Q_VALUES: usize = 8;

/// A peer at epoch 3 that keeps all that a session may.
fn peer() -> Core {
    let matrix = TensorInfo { key: "w".into(), shape: vec![8, Q_VALUES], role: TensorRole::Gradient };
    let mut config = SessionConfig::new("run", 64, vec![matrix]);
    config.state_tensors = vec![TensorInfo::vector("s", STATE_VALUES, TensorRole::Parameter)];
    config.policy = PolicyKind::DiLoCo { inner_steps: 4, outer_lr: 0.7, outer_momentum: 0.9 };
    config.powersgd = Some(PowerSgd { rank: 1, min_compression_ratio: 0.5 });
    let factors = Factors::new(&config).expect("the rank fits the matrix");
    assert!(factors.is_some(), "the matrix shrinks");
    let start = (0..3).fold(Lineage::genesis("run", &[0; 32]), |at, _| at.next_epoch(&[1; 32], 64));
    let mut core = Core::new(PeerId::from_ed25519(&[1; 32]), config, start, 7);
    core.factors = factors;
    core
}

/// The state that a donor gives: taken over whole, or refused without a trace. The first byte says which of its parts are
/// there, eight more are its epoch; a line each is samples, state averages and the past; behind them are the agreed
/// parameters, the outer optimizer's velocity and Q.
pub fn state(input: &[u8]) {
    let Some(([parts, epoch @ ..], rest)) = input.split_first_chunk::<9>() else { return };
    let has = |part: usize| parts >> part & 1 == 1;
    let mut snapshot =
        Snapshot { epoch: u64::from_le_bytes(*epoch), lineage: [7; 32], ..Snapshot::default() };
    let mut lines = rest.splitn(4, |byte| *byte == b'\n');
    for (part, name) in [SAMPLES_META, STATE_AVERAGES_META, PAST_META].into_iter().enumerate() {
        let fact = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
        if has(part) {
            snapshot.meta.insert(name.to_owned(), fact);
        }
    }
    let mut bytes = lines.next().unwrap_or_default();
    let lens = [4 * STATE_VALUES, 4 * STATE_VALUES, usize::MAX];
    for (part, (name, len)) in (3..).zip([AGREED_BLOB, VELOCITY_BLOB, Q_BLOB].into_iter().zip(lens)) {
        if has(part) {
            let (blob, behind) = bytes.split_at(len.min(bytes.len()));
            snapshot.blobs.insert(name.to_owned(), Bytes::copy_from_slice(blob));
            bytes = behind;
        }
    }
    let (given, mut core) = (snapshot.clone(), peer());
    let before = core.seal(Snapshot::default());
    let adopted = core.adopt(&mut snapshot, PeerId::from_ed25519(&[2; 32]), Instant::now());
    let after = core.seal(Snapshot::default());
    if adopted.is_err() {
        assert_eq!(after, before);
        return;
    }
    assert!(snapshot.meta.is_empty() && snapshot.blobs.is_empty(), "the program gets what is not its own");
    let lineage = Lineage::of(&given).expect("without one it is refused");
    assert!(core.lineage == lineage && lineage.beats(&Lineage::of(&before).expect("a session sealed it")));
    assert!(lineage.next_epoch(&[0; 32], 1).beats(&lineage), "an epoch never falls");
    assert_eq!(after.blobs, given.blobs);
    let past = given.meta.get(PAST_META).and_then(|text| Past::from_text(text)).unwrap_or_default();
    assert_eq!(after.meta[PAST_META], past.to_text());
    let mut next = peer();
    assert!(
        next.adopt(&mut after.clone(), core.me, Instant::now()).is_ok(),
        "what was taken over can be handed on"
    );
    assert_eq!(next.seal(Snapshot::default()), after);
}

/// A state of epoch 4 with the parts of which `parts` has the bit.
fn a_state(parts: u8) -> Bytes {
    let values =
        |count: usize| (0..count).flat_map(|at| (at as f32 / 8.0).to_le_bytes()).collect::<Vec<u8>>();
    let mut out = vec![parts];
    out.extend(4_u64.to_le_bytes());
    out.extend(b"1024\n2\n3:0707070707070707 64:0000000000000000\n");
    out.extend(
        [STATE_VALUES, STATE_VALUES, Q_VALUES]
            .into_iter()
            .zip(3..)
            .flat_map(|(count, part)| values(if parts >> part & 1 == 1 { count } else { 0 })),
    );
    out.into()
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
    let key = &OWNER.1;
    vec![
        ("collab_note", full.encode()),
        ("collab_note", bare.encode()),
        ("collab_sight", serde_json::to_vec(&sight).expect("plain data always encodes").into()),
        ("collab_past", Bytes::from_static(b"3:0707070707070707 64:0000000000000000")),
        ("collab_question", Bytes::from_static(br#"{"invite":null}"#)),
        ("collab_question", Bytes::from_static(br#"{"invite":"lock"}"#)),
        ("collab_question", format!(r#"{{"invite":"{key}"}}"#).into()),
        ("collab_invite", key.clone().into()),
        (
            "collab_invite",
            format!(" {}\n", Invite::issue(&Identity::from_seed(&[2; 32]), "run").to_text()).into(),
        ),
        ("collab_state", a_state(0b11_1111)),
        ("collab_state", a_state(0b10_0011)),
        ("collab_state", a_state(0b10_1111)),
        ("collab_sequel", format!("gradients\n{}\n1024\n65536 3,0,1\nvalues", "07".repeat(32)).into()),
        ("collab_sequel", format!("state\n{}\n0\n65536 1\n", "f0".repeat(32)).into()),
        ("collab_speed", Bytes::from_static(b"d")),
        ("collab_speed", Bytes::from_static(b"u and as much as shall be moved")),
    ]
}
