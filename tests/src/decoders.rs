//! Every decoder that reads strangers' bytes, as a function that takes any bytes and asserts what must hold: the fuzz
//! targets (`fuzz/`) and the property tests (`tests/tests/decoders.rs`) call the same ones. What libp2p and the router's
//! UPnP decode themselves is their authors' to test.

use bytes::Bytes;
use potluck_compression::low_rank::LowRank;
use potluck_compression::{
    DType, Limits, Scheme, Scratch, SerializedTensor, deserialize, first_non_finite, serialize,
};
use potluck_dht::dictionary::Dictionary;
use potluck_dht::msgpack::Value;
use potluck_dht::wire::{Answer, Ask, Refusal, Reply, Request, WireEntry, WireRecord};
use potluck_dht::{DhtId, Ed25519Validator, Expiration, Record, RecordValidator, Verdict};
use potluck_net::Identity;
use std::collections::BTreeMap;
use std::time::Duration;

/// Taken by path, so that neither the tests nor the targets build all that the command is made of.
#[path = "../../crates/cli/src/tensors.rs"]
mod tensors;

/// A decoder's name and what must hold for any bytes given to it.
pub type Decoder = (&'static str, fn(&[u8]));

/// All of them by name. Each has a fuzz target of the same name.
pub const DECODERS: &[Decoder] = &[
    ("averaging_control", potluck_averaging::fuzz::control),
    ("averaging_invite", potluck_averaging::fuzz::invite),
    ("averaging_pair", potluck_averaging::fuzz::pair),
    ("averaging_record", potluck_averaging::fuzz::record),
    ("cli_checkpoint", cli_checkpoint),
    ("collab_invite", potluck_collab::fuzz::invite),
    ("collab_note", potluck_collab::fuzz::note),
    ("collab_past", potluck_collab::fuzz::past),
    ("collab_question", potluck_collab::fuzz::question),
    ("collab_sequel", potluck_collab::fuzz::sequel),
    ("collab_sight", potluck_collab::fuzz::sight),
    ("collab_speed", potluck_collab::fuzz::speed),
    ("collab_state", potluck_collab::fuzz::state),
    ("compression_bfloat16", |input| compression_decode(Scheme::BFloat16, input)),
    ("compression_blockwise4", |input| compression_decode(Scheme::Blockwise4Bit, input)),
    ("compression_blockwise8", |input| compression_decode(Scheme::Blockwise8Bit, input)),
    ("compression_float16", |input| compression_decode(Scheme::Float16, input)),
    ("compression_low_rank", compression_low_rank),
    ("compression_none", |input| compression_decode(Scheme::None, input)),
    ("compression_quantile8", |input| compression_decode(Scheme::Quantile8Bit, input)),
    ("compression_scaled_float16", |input| compression_decode(Scheme::ScaledFloat16, input)),
    ("compression_tensor", compression_tensor),
    ("compression_uniform8", |input| compression_decode(Scheme::Uniform8Bit, input)),
    ("dht_announcement", dht_announcement),
    ("dht_answer", dht_answer),
    ("dht_dictionary", dht_dictionary),
    ("dht_msgpack", dht_msgpack),
    ("dht_request", dht_request),
    ("dht_signed_record", dht_signed_record),
    ("net_kept", potluck_net_libp2p::fuzz::kept),
    ("net_libp2p_frames", potluck_net_libp2p::fuzz::frames),
    ("net_peer_id", potluck_net::fuzz::peer_id),
    ("net_token", potluck_net::fuzz::token),
    ("transfer_bits", potluck_transfer::fuzz::bits),
    ("transfer_index", potluck_transfer::fuzz::index),
    ("transfer_request", potluck_transfer::fuzz::request),
];

/// The decoder of this name.
///
/// # Panics
/// If there is none.
pub fn decoder(name: &str) -> fn(&[u8]) {
    let found = DECODERS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("no decoder is called {name}")).1
}

/// Inputs that decode: where random bytes start to be changed from.
pub fn seeds() -> Vec<(&'static str, Bytes)> {
    let mut seeds = potluck_averaging::fuzz::seeds();
    seeds.extend(potluck_collab::fuzz::seeds());
    seeds.extend(potluck_net::fuzz::seeds());
    seeds.extend(potluck_net_libp2p::fuzz::seeds());
    seeds.extend(potluck_transfer::fuzz::seeds());
    seeds.extend(checkpoint_seeds());
    seeds.extend(compression_seeds());
    seeds.extend(dht_seeds());
    seeds
}

/// A state as a keeper saves it: what it writes it can read. A line each is the facts about tensors, about the optimizer's,
/// which of them travel compressed, and the name of one beside the first parameter; the rest is both ones' bytes.
fn cli_checkpoint(input: &[u8]) {
    let mut parts = input.splitn(5, |byte| *byte == b'\n');
    let mut text = || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let mut meta = BTreeMap::new();
    for name in ["tensors", "optimizer", tensors::ENCODED] {
        meta.insert(name.to_owned(), text());
    }
    let name = text();
    let bytes = Bytes::copy_from_slice(parts.next().unwrap_or_default());
    let mut blobs =
        BTreeMap::from([(name.clone(), bytes.clone()), ("param.000000".to_owned(), bytes.clone())]);
    let file = tensors::write(&meta, &blobs);
    assert_eq!(file.is_err(), name == tensors::RESERVED);
    if let Ok(file) = file {
        assert_eq!(tensors::read(&file.into()).expect("what was written can be read"), blobs);
    }
    for shape in tensors::shapes(&meta).values() {
        if let Some(len) = shape.bytes() {
            let strides = shape.strides();
            let last =
                shape.shape.iter().zip(&strides).map(|(count, stride)| count.saturating_sub(1) * stride);
            assert!(len == 0 || last.sum::<usize>() < len);
        }
    }
    if tensors::decode(&mut meta, &mut blobs).is_ok() {
        assert!(!meta.contains_key(tensors::ENCODED));
    }
}

fn checkpoint_seeds() -> Vec<(&'static str, Bytes)> {
    let raw: Vec<u8> = (0..6u8).flat_map(|value| f32::from(value).to_le_bytes()).collect();
    let (message, _) =
        serialize(DType::Float32, &[2, 3], &raw, Scheme::Float16).expect("plain values encode");
    let tensor = r#"{"param.000000":{"dtype":"float32","shape":[2,3]}}"#;
    let empty = r#"{"param.000000":{"dtype":"bool","shape":[0,4294967296,4294967296]}}"#;
    let optimizer = r#"{"0":{"step":{"value":3},"m":{"dtype":"float32","shape":[6]}}}"#;
    let seed = |lines: [&str; 4], bytes: &[u8]| {
        let bytes = [lines.join("\n").as_bytes(), b"\n", bytes].concat();
        ("cli_checkpoint", Bytes::from(bytes))
    };
    vec![
        seed([tensor, optimizer, "[]", "opt.0.m"], &raw),
        seed([tensor, "{}", r#"["param.000000","extra"]"#, "extra"], &message.to_protobuf()),
        seed(["{}", optimizer, "", tensors::RESERVED], &raw),
        seed([empty, "{}", "", "opt.0.m"], &[]),
    ]
}

/// A scheme's decoder: any bytes for any count either decode or are refused, without touching the output. The first two
/// bytes are the count.
fn compression_decode(scheme: Scheme, input: &[u8]) {
    let Some(([low, high], bytes)) = input.split_first_chunk() else { return };
    let count = usize::from(u16::from_le_bytes([*low, *high]) % 8192);
    // Mostly the length that fits, so that the checks behind the first are reached.
    let mut fitted = bytes.to_vec();
    if bytes.len() % 4 != 0 {
        fitted.resize(scheme.encoded_len(count), 0);
    }
    let mut values = vec![1.5_f32; count];
    if scheme.decode(&fitted, &mut values).is_err() {
        assert!(values.iter().all(|value| *value == 1.5));
        assert!(scheme.decode_add(&fitted, 2.0, &mut values).is_err());
        assert!(scheme.decode_sum(&fitted, 2.0, &vec![0.0; count], &mut values).is_err());
        assert!(values.iter().all(|value| *value == 1.5));
    } else {
        let mut sum = vec![1.0_f32; count];
        scheme.decode_add(&fitted, 2.0, &mut sum).expect("what decodes can be added");
        for (sum, value) in sum.iter().zip(&values) {
            let expected = 1.0 + 2.0 * value;
            assert!(sum.to_bits() == expected.to_bits() || sum.is_nan() && expected.is_nan());
        }
        let mut out = vec![0.0_f32; count];
        let found = scheme.decode_sum(&fitted, 2.0, &vec![1.0; count], &mut out);
        let found = found.expect("what decodes can be added");
        assert_eq!(found.first_non_finite, first_non_finite(&values));
        assert!(out.iter().zip(&sum).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()));
    }
}

/// PowerSGD's factors as strangers may average them: any values either make a finite Q, or are refused and leave no
/// trace. The first three bytes are rows, columns and rank; P's bytes follow, then Q's, with ones behind their end.
fn compression_low_rank(input: &[u8]) {
    let Some(([rows, columns, rank], bytes)) = input.split_first_chunk() else { return };
    let (rows, columns, rank) = (usize::from(*rows), usize::from(*columns), usize::from(rank % 9));
    let Ok(mut state) = LowRank::new(rows, columns, rank, 1, 0) else { return };
    let words = bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word));
    let mut floats = words.chain(std::iter::repeat(1.0));
    let mut take = |count: usize| -> Vec<f32> { floats.by_ref().take(count).collect() };
    let (p, q) = (take(rows * rank), take(columns * rank));
    let memory = state.export_memory();
    let grad: Vec<f32> = (0..rows * columns).map(|number| (number as f32 * 0.37).sin()).collect();
    state.begin(&grad).expect("a finite gradient is taken");
    let mut out = vec![0.0; grad.len()];
    let done = state
        .phase_p_done(&p)
        .map(|own| assert_eq!(first_non_finite(own), None))
        .and_then(|()| state.finish(&q, &mut out));
    if done.is_err() {
        state.abort();
        assert_eq!(state.export_memory(), memory);
        assert_eq!(out, vec![0.0; grad.len()]);
    }
    assert_eq!(first_non_finite(&state.export_q()), None);
}

/// The `Tensor` message and what it declares: never more memory than the limits allow, and a read message reads back.
fn compression_tensor(input: &[u8]) {
    let limits = Limits { buffer_bytes_max: 1 << 16, elements_max: 1 << 16, dimensions_max: 8 };
    let Ok(tensor) = SerializedTensor::from_protobuf(input, &limits) else { return };
    assert!(tensor.buffer.len() <= limits.buffer_bytes_max && tensor.size.len() <= limits.dimensions_max);
    assert_eq!(SerializedTensor::from_protobuf(&tensor.to_protobuf(), &limits).as_ref(), Ok(&tensor));
    if let Ok(raw) = deserialize(&tensor, &limits) {
        assert_eq!(raw.bytes.len(), raw.shape.iter().product::<usize>() * raw.dtype.size());
    }
}

/// A peer's announcement under a run's key.
fn dht_announcement(input: &[u8]) {
    let _any_refusal_is_fine = potluck_dht::rendezvous::decode(Bytes::copy_from_slice(input));
}

/// A DHT answer from a stranger; what decodes survives another round trip.
fn dht_answer(input: &[u8]) {
    if let Ok(answer) = Answer::decode(Bytes::copy_from_slice(input)) {
        assert_eq!(Answer::decode(answer.encode()), Ok(answer));
    }
}

/// hivemind's DictionaryDHTValue; what decodes must encode.
fn dht_dictionary(input: &[u8]) {
    if let Ok(dictionary) = Dictionary::decode(input) {
        let bytes = dictionary.encode().expect("what was read can be written");
        assert!(Dictionary::decode(&bytes).is_ok());
    }
}

/// hivemind's msgpack dialect; what decodes must encode.
fn dht_msgpack(input: &[u8]) {
    if let Ok(value) = Value::decode(input) {
        let bytes = value.encode().expect("what was read can be written");
        assert!(Value::decode(&bytes).is_ok());
    }
}

/// A DHT request from a stranger; what decodes encodes to the same bytes.
fn dht_request(input: &[u8]) {
    let input = Bytes::copy_from_slice(input);
    if let Ok(request) = Request::decode(input.clone()) {
        assert_eq!(request.encode(), input);
    }
}

/// Owner tags and signatures: the first byte says how much of the input is the subkey, the rest is the value.
fn dht_signed_record(input: &[u8]) {
    let Some((at, rest)) = input.split_first() else { return };
    let (subkey, value) = rest.split_at(usize::from(*at).min(rest.len()));
    let record = Record {
        key: Bytes::from_static(b"key"),
        subkey: Some(Bytes::copy_from_slice(subkey)),
        value: Bytes::copy_from_slice(value),
        expiration: Expiration::In(Duration::from_secs(1)),
    };
    let validator = Ed25519Validator::new(Identity::from_seed(&[1; 32]), 1);
    let _any_verdict_is_fine =
        (validator.validate(&record), validator.strip(&record), validator.version(&record));
}

/// The decoder of a scheme's buffers.
fn decoder_of(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Blockwise4Bit => "compression_blockwise4",
        Scheme::Blockwise8Bit => "compression_blockwise8",
        Scheme::BFloat16 => "compression_bfloat16",
        Scheme::Float16 => "compression_float16",
        Scheme::None => "compression_none",
        Scheme::Quantile8Bit => "compression_quantile8",
        Scheme::ScaledFloat16 => "compression_scaled_float16",
        Scheme::Uniform8Bit => "compression_uniform8",
        other => panic!("{other:?} has no decoder here: add it, and its fuzz target"),
    }
}

fn compression_seeds() -> Vec<(&'static str, Bytes)> {
    let values: Vec<f32> = (0..40u8).map(|i| f32::from(i) / 8.0 - 2.0).collect();
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut seeds = Vec::new();
    for scheme in Scheme::ALL {
        let mut buffer = vec![40, 0];
        if scheme.encode(&values, &mut buffer, &mut Scratch::default()).is_ok() {
            seeds.push((decoder_of(*scheme), buffer.into()));
        }
        if let Ok((tensor, _)) = serialize(DType::Float32, &[5, 8], &raw, *scheme) {
            seeds.push(("compression_tensor", tensor.to_protobuf().into()));
        }
    }
    for (rows, columns, rank) in [(7, 5, 2), (1, 1, 1), (16, 12, 8)] {
        let mut factors = vec![rows, columns, rank];
        let count = usize::from(rank) * (usize::from(rows) + usize::from(columns));
        factors.extend(values.iter().cycle().take(count).flat_map(|value| value.to_le_bytes()));
        seeds.push(("compression_low_rank", factors.into()));
    }
    seeds
}

fn dht_seeds() -> Vec<(&'static str, Bytes)> {
    let (left, value) = (Duration::from_secs(30), Bytes::from_static(b"value"));
    let record = WireRecord {
        key: Bytes::from_static(b"key"),
        subkey: Some(value.clone()),
        value: value.clone(),
        left,
    };
    let peer = Identity::from_seed(&[2; 32]).peer_id();
    let contacts = vec![(peer, vec!["/ip4/1.2.3.4/tcp/1".into()].into())];
    let asks = [
        Ask::Ping,
        Ask::Find { id: DhtId::from_bytes([1; 20]), want_value: true },
        Ask::Store { handed_on: false, records: vec![record] },
    ];
    let entry = Some(WireEntry::Dictionary(vec![(value.clone(), (value.clone(), left))]));
    let replies = [
        Reply::Pong,
        Reply::Refused(Refusal::Malformed),
        Reply::Refused(Refusal::Rate),
        Reply::Found { entry: Some(WireEntry::Regular((value.clone(), left))), contacts: Vec::new() },
        Reply::Found { entry, contacts },
        Reply::Stored(vec![Verdict::Accepted, Verdict::Full, Verdict::Older { version: 3 }]),
    ];
    let values = Value::Map(vec![
        (Value::Str("list".into()), Value::List(vec![Value::Int(-3), Value::Nil, Value::Bool(true)])),
        (Value::Bin(value.clone()), Value::Tuple(vec![Value::Float(1.5), Value::Ext(9, value.clone())])),
    ]);
    let entries = vec![(Value::Str("subkey".into()), value, 1e9)];
    let dictionary = Dictionary { maxsize: 10.0, latest_expiration: 1e9, entries };
    let mut seeds = vec![
        ("dht_msgpack", Bytes::from(values.encode().expect("small"))),
        ("dht_dictionary", dictionary.encode().expect("small").into()),
        ("dht_announcement", Bytes::from_static(b"\x01\x12/ip4/1.2.3.4/tcp/1payload")),
        ("dht_signed_record", signed_record()),
    ];
    seeds.extend(asks.map(|ask| ("dht_request", Request { sender: None, ask }.encode())));
    let addresses: std::sync::Arc<[String]> = vec!["/ip4/1.2.3.4/tcp/1".into()].into();
    seeds
        .extend(replies.map(|reply| ("dht_answer", Answer { addresses: addresses.clone(), reply }.encode())));
    seeds
}

fn signed_record() -> Bytes {
    let identity = Identity::from_seed(&[1; 32]);
    let subkey = Bytes::from(potluck_dht::owner_tag(identity.peer_id()));
    let mut record = Record {
        key: Bytes::from_static(b"key"),
        subkey: Some(subkey.clone()),
        value: Bytes::from_static(b"value"),
        expiration: Expiration::In(Duration::from_secs(1)),
    };
    record.value = Ed25519Validator::new(identity, 1).sign(&record);
    let at = u8::try_from(subkey.len()).expect("a tag is short");
    [&[at], subkey.as_ref(), record.value.as_ref()].concat().into()
}
