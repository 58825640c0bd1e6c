//! The decoders of this crate for fuzz targets and property tests: each takes any bytes and asserts what must hold.

use crate::wire::{PairFrame, decode_control, encode_control};
use crate::{AveragerConfig, Invite};
use bytes::Bytes;
use potluck_compression::{Policy, Scheme, TensorInfo, TensorRole};
use potluck_net::Identity;

/// A message of a control stream; what decodes survives another round trip.
pub fn control(input: &[u8]) {
    if let Ok(message) = decode_control(input) {
        let bytes = encode_control(&message);
        let again = decode_control(&bytes).expect("what was read can be written");
        // As bytes, because NaN differs from itself.
        assert_eq!(encode_control(&again), bytes);
    }
}

/// A frame between two members of a round; what decodes survives another round trip.
pub fn pair(input: &[u8]) {
    if let Ok(frame) = PairFrame::decode(Bytes::copy_from_slice(input)) {
        assert_eq!(PairFrame::decode(frame.encode()), Ok(frame));
    }
}

/// An invite from a stranger is never one of an owner's.
pub fn invite(input: &[u8]) {
    if let Some(invite) = Invite::from_bytes(input) {
        assert_eq!(invite.to_bytes(), *input);
        let owner = Identity::from_seed(&[1; 32]);
        assert_eq!(invite.is_valid(&owner.peer_id(), "run"), invite == Invite::new(&owner, "run"));
    }
}

/// The averages of a missed round: the first byte is the length of the text that says how they were cut. What decodes is
/// finite.
pub fn record(input: &[u8]) {
    let Some((len, rest)) = input.split_first() else { return };
    let (cut, bytes) = rest.split_at(usize::from(*len % 64).min(rest.len()));
    let phases = [Bytes::copy_from_slice(bytes)];
    if let Ok((vector, second)) = of_record().decode(&String::from_utf8_lossy(cut), &phases) {
        assert!(vector.len() == RECORD_VALUES && second.is_empty());
        assert!(vector.iter().all(|value| value.is_finite()));
    }
}

const RECORD_VALUES: usize = 40;

fn of_record() -> AveragerConfig {
    let tensors = vec![TensorInfo::vector("w", RECORD_VALUES, TensorRole::Gradient)];
    AveragerConfig::new(tensors, Policy::Fixed(Scheme::Float16))
}

fn a_record() -> Bytes {
    [&[9][..], b"65536 1,2", &[0x3c; 2 * RECORD_VALUES]].concat().into()
}

/// Inputs that decode, for a corpus: a decoder's name and the bytes.
pub fn seeds() -> Vec<(&'static str, Bytes)> {
    use crate::wire::{Control, Hello, News, Plan, PlanMember, Pulse, Ready, RoundMessage, Standing};
    let peer = Identity::from_seed(&[2; 32]).peer_id();
    let pulse = Pulse { process: 7, sequence: 9, up: 1e6, down: 2e6, ..Pulse::default() };
    let hello = Hello {
        version: 1,
        run: "run".into(),
        manifest: [("target".into(), "256".into())].into(),
        invite: Some(vec![1; 64]),
        incarnation: 1,
        addresses: vec!["/ip4/1.2.3.4/tcp/1".into()],
        peers: 3,
        pulse: pulse.clone(),
    };
    let (standing, beat) = (Standing::Alive, Some(pulse.clone()));
    let news = vec![News { peer, incarnation: 3, standing, addresses: Vec::new(), beat }];
    let ready = Ready {
        epoch: Some(3),
        nonce: 5,
        attempt: 0,
        weight: 32.0,
        norm: 1.5,
        gathered: Bytes::from_static(b"state"),
        rate: 1e6,
        private: false,
        auxiliary: false,
        layout: [4; 32],
    };
    let member = PlanMember {
        peer,
        nonce: 5,
        weight: 32.0,
        norm: 1.5,
        gathered: Bytes::new(),
        share: 100,
        private: false,
        auxiliary: false,
    };
    let plan = Plan {
        run: "run".into(),
        channel: "gradients".into(),
        epoch: Some(3),
        attempt: 1,
        coordinator: peer,
        members: vec![member],
        chunk_bytes: 64 << 10,
        implausible: vec![peer],
    };
    let digests = vec![[1; 32], [2; 32]];
    let rounds = [
        RoundMessage::Ready(ready),
        RoundMessage::Begin(Box::new(plan)),
        RoundMessage::LeftOut { nonce: 1, epoch: None, attempt: 2 },
        RoundMessage::Done { plan: [3; 32], digests: digests.clone() },
        RoundMessage::Verdict { plan: [3; 32], digests, holders: vec![peer, peer] },
        RoundMessage::Query { plan: [3; 32] },
    ];
    let controls = [
        Control::Hello(Box::new(hello)),
        Control::Refuse("no".into()),
        Control::Beat { incarnation: 1, pulse, news },
        Control::Ask(peer),
        Control::Vouch { peer, incarnation: 1, heard_ms: 20 },
        Control::Leave,
    ]
    .into_iter()
    .chain(rounds.map(|message| Control::Round { channel: "gradients".into(), message }));
    let pairs = [
        PairFrame::Hello { plan: [1; 32], phase: 0, contributions: vec![(0, 1)], averages: vec![(1, 2)] },
        PairFrame::Contribution { part: 1, chunk: 2, bytes: Bytes::from_static(b"values") },
        PairFrame::Average { part: 1, generation: 1, chunk: 2, mask: 5, bytes: Bytes::from_static(b"mean") },
        PairFrame::Prefix { part: 1, generation: 2, chunks: 3 },
        PairFrame::Complain { part: 1, generation: 2 },
    ];
    let mut seeds: Vec<_> = controls.map(|message| ("averaging_control", encode_control(&message))).collect();
    seeds.extend(pairs.iter().map(|frame| ("averaging_pair", frame.encode())));
    let invite = Invite::new(&Identity::from_seed(&[1; 32]), "run").to_bytes();
    seeds.extend([("averaging_invite", invite.to_vec().into()), ("averaging_record", a_record())]);
    seeds
}
