//! Random and damaged bytes into every decoder: refused with a name, never a panic, never memory on a stranger's word.

use bytes::Bytes;
use potluck_dht::dictionary::Dictionary;
use potluck_dht::msgpack::Value;
use potluck_dht::wire::{Answer, Ask, Refusal, Reply, Request, WireEntry, WireError, WireRecord};
use potluck_dht::{DhtId, Ed25519Validator, Expiration, Record, RecordValidator, Verdict, rendezvous};
use potluck_net::{Identity, PeerId};
use proptest::prelude::*;
use std::time::Duration;

fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

fn record() -> impl Strategy<Value = WireRecord> {
    (bytes(40), proptest::option::of(bytes(40)), bytes(200), any::<u64>()).prop_map(
        |(key, subkey, value, left)| WireRecord { key, subkey, value, left: Duration::from_millis(left) },
    )
}

fn request() -> impl Strategy<Value = Request> {
    let find = (any::<[u8; 20]>(), any::<bool>())
        .prop_map(|(id, want_value)| Ask::Find { id: DhtId::from_bytes(id), want_value });
    let store = (any::<bool>(), proptest::collection::vec(record(), 0..5))
        .prop_map(|(handed_on, records)| Ask::Store { handed_on, records });
    let ask = prop_oneof![Just(Ask::Ping), find, store];
    let sender = proptest::option::of(proptest::collection::vec("[a-z0-9/]{0,20}", 0..8));
    (sender, ask).prop_map(|(sender, ask)| Request { sender: sender.map(Into::into), ask })
}

fn answer() -> impl Strategy<Value = Answer> {
    let item = || (bytes(100), any::<u64>()).prop_map(|(value, left)| (value, Duration::from_millis(left)));
    let entry = prop_oneof![
        item().prop_map(WireEntry::Regular),
        proptest::collection::vec((bytes(40), item()), 0..5).prop_map(WireEntry::Dictionary),
    ];
    let contact = any::<[u8; 32]>().prop_map(|key| (PeerId::from_ed25519(&key), vec!["/ip4".into()].into()));
    let found = (proptest::option::of(entry), proptest::collection::vec(contact, 0..20))
        .prop_map(|(entry, contacts)| Reply::Found { entry, contacts });
    let verdict = prop_oneof![
        Just(Verdict::Accepted),
        Just(Verdict::Full),
        any::<u64>().prop_map(|version| Verdict::Older { version }),
    ];
    let stored = proptest::collection::vec(verdict, 0..9).prop_map(Reply::Stored);
    let refused = prop_oneof![Just(Refusal::Malformed), Just(Refusal::Rate)].prop_map(Reply::Refused);
    let reply = prop_oneof![Just(Reply::Pong), refused, found, stored];
    reply.prop_map(|reply| Answer { addresses: vec!["/ip4/1.2.3.4".into()].into(), reply })
}

/// Change one byte, or cut the end off.
fn damage(bytes: &Bytes, at: usize, value: u8, cut: bool) -> Bytes {
    let at = at % bytes.len().max(1);
    let mut damaged = bytes.to_vec();
    if cut {
        damaged.truncate(at);
    } else if let Some(byte) = damaged.get_mut(at) {
        *byte = value;
    }
    damaged.into()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn noise_is_survived_by_every_decoder(noise in bytes(400)) {
        let _ = Request::decode(noise.clone());
        let _ = Answer::decode(noise.clone());
        let _ = rendezvous::decode(noise.clone());
        let _ = Dictionary::decode(&noise);
        if let Ok(value) = Value::decode(&noise) {
            prop_assert!(value.encode().is_ok());
        }
    }

    #[test]
    fn requests_round_trip_and_damage_is_survived(
        request in request(), at in any::<usize>(), value in any::<u8>(), cut in any::<bool>(),
    ) {
        let bytes = request.encode();
        prop_assert_eq!(Request::decode(bytes.clone()), Ok(request));
        let damaged = damage(&bytes, at, value, cut);
        prop_assert!(!cut || Request::decode(damaged.clone()).is_err());
        if let Ok(other) = Request::decode(damaged.clone()) {
            prop_assert_eq!(other.encode(), damaged);
        }
    }

    #[test]
    fn answers_round_trip_and_damage_is_survived(
        answer in answer(), at in any::<usize>(), value in any::<u8>(), cut in any::<bool>(),
    ) {
        let bytes = answer.encode();
        prop_assert_eq!(Answer::decode(bytes.clone()), Ok(answer));
        let damaged = damage(&bytes, at, value, cut);
        prop_assert!(!cut || Answer::decode(damaged.clone()).is_err());
    }

    #[test]
    fn no_record_upsets_the_validator(
        key in bytes(60), tail in "(\\[owner:[a-zA-Z0-9]{0,60}\\]?){0,3}", value in bytes(300),
    ) {
        let validator = Ed25519Validator::new(Identity::from_seed(&[1; 32]), 1);
        let tagged = !tail.is_empty();
        let expiration = Expiration::In(Duration::from_secs(1));
        let record = Record { key, subkey: Some(tail.into()), value, expiration };
        prop_assert!(!(tagged && validator.validate(&record)), "nobody signed it");
        let _ = (validator.strip(&record), validator.version(&record));
    }
}

#[test]
fn declared_lengths_beyond_a_limit_are_named() {
    // A client's store of one record whose key claims 65,535 bytes.
    let message = Bytes::from_static(&[0, 3, 0, 0, 1, 0xff, 0xff, 1, 2, 3]);
    let expected = WireError::TooLarge { field: "key", found: 65_535, max: 512 };
    assert_eq!(Request::decode(message), Err(expected));
    let long = Bytes::from(vec![0; potluck_dht::wire::MESSAGE_BYTES_MAX + 1]);
    assert!(matches!(Answer::decode(long), Err(WireError::TooLarge { field: "message", .. })));
}

#[test]
fn deep_nesting_ends_before_the_stack_does() {
    let deep = vec![0x91; 100_000];
    assert!(Value::decode(&deep).is_err());
    // An array that claims four billion elements.
    assert!(Value::decode(&[0xdd, 0xff, 0xff, 0xff, 0xff]).is_err());
}
