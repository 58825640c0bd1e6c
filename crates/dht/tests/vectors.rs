//! hivemind's golden vectors: ids, msgpack dialect, dictionary value, a record's value.

use bytes::Bytes;
use potluck_dht::DhtId;
use potluck_dht::dictionary::Dictionary;
use potluck_dht::msgpack::Value::{self, Bin, Bool, Float, Int, List, Map, Nil, Str, Tuple};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(value: &str) -> Value {
    Str(value.into())
}

fn bin(value: &'static [u8]) -> Value {
    Bin(Bytes::from_static(value))
}

#[test]
fn ids_hash_bytes_as_they_are_and_the_rest_as_msgpack() {
    let packed = [
        (text("hello"), "8ddf80d0b56beaa9e33d4880a065fc81d964e49f"),
        (text(""), "c7da1ff95a25c353f1319604703e8bfd287ee1a1"),
        (text("run_progress"), "238ce237adb7607e7230e2f38e3399674e67f1b7"),
        (text("myrun_progress"), "3d436de04ffd9bf69a78fa19a87dc7cdd1afe2b8"),
        (text("mygroup.0b"), "7b77d23c786feac4fdb5b484baa72eea42eefbd7"),
        (text("mygroup.all_averagers"), "c57f0ae30f1ba3991f99dc91d8b8617ea94dd1b0"),
        (Int(0), "5ba93c9db0cff93f52b521d7420e43f6eda2784f"),
        (Float(1.5), "266e2ea95d18d8e64dca032f9d63d162ce9ba9e4"),
        (Tuple(vec![text("a"), Int(1)]), "edd01de4b5be93353047fae489cc36b2e8f20fb1"),
        (List(vec![text("a"), Int(1)]), "ce4e6f62a6645381d466267533de7b165d8633c9"),
        (Map(vec![(text("k"), text("v"))]), "36dfb084773055922e895f72776a36d43956ee02"),
        (text(&"x".repeat(40)), "9c3efdc80039e94ca657c7947224663b7c3917fd"),
    ];
    for (source, id) in packed {
        assert_eq!(DhtId::of_key(&source.encode().unwrap()).to_string(), id, "{source:?}");
    }
    assert_eq!(DhtId::of_key(b"hello").to_string(), "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d");
}

#[test]
fn msgpack_is_byte_for_byte_what_hivemind_writes_and_reads_back() {
    let vectors = [
        (Nil, "c0".into()),
        (Bool(true), "c3".into()),
        (Bool(false), "c2".into()),
        (Int(0), "00".into()),
        (Int(127), "7f".into()),
        (Int(128), "cc80".into()),
        (Int(-1), "ff".into()),
        (Int(-33), "d0df".into()),
        (Int(255), "ccff".into()),
        (Int(256), "cd0100".into()),
        (Int(65536), "ce00010000".into()),
        (Int(1 << 32), "cf0000000100000000".into()),
        (Float(1.0), "cb3ff0000000000000".into()),
        (Float(f64::INFINITY), "cb7ff0000000000000".into()),
        (text("a"), "a161".into()),
        (text(&"x".repeat(32)), format!("d920{}", "78".repeat(32))),
        (bin(b""), "c400".into()),
        (bin(b"abc"), "c403616263".into()),
        (List(vec![Int(1), Int(2)]), "920102".into()),
        (Tuple(vec![Int(1), Int(2)]), "c70340920102".into()),
        (Tuple(vec![]), "d44090".into()),
        (List(vec![Tuple(vec![Int(1), text("a")])]), "91d6409201a161".into()),
        (Map(vec![(text("a"), Int(1))]), "81a16101".into()),
        (Tuple(vec![text("i"), text("love"), text("bees")]), "c70d4093a169a46c6f7665a462656573".into()),
    ];
    for (value, expected) in vectors {
        let bytes = value.encode().unwrap();
        assert_eq!(hex(&bytes), expected, "{value:?}");
        assert_eq!(Value::decode(&bytes), Ok(value));
    }
}

#[test]
fn a_progress_record_is_packed_as_hivemind_packs_it() {
    // The value of the signed record among the vectors; `hivemind_owners.rs` checks its signature.
    let peer =
        b"\x12 \x84\xeagu\xd5*T\x99\x11\x8b\xf3ag\xc3}\x80m\xe3\x9f\x0eq\r\x9bb\x15\x19pe\xaay\xa3\x84";
    let record = Map(vec![
        (text("peer_id"), bin(peer)),
        (text("epoch"), Int(3)),
        (text("samples_accumulated"), Int(128)),
        (text("samples_per_second"), Float(12.5)),
        (text("time"), Float(1_700_000_000.25)),
        (text("client_mode"), Bool(false)),
    ]);
    let expected = "86a7706565725f6964c422122084ea6775d52a5499118bf36167c37d806de39f0e710d9b6215197065aa79a384\
        a565706f636803b373616d706c65735f616363756d756c61746564cc80b273616d706c65735f7065725f7365636f6e64\
        cb4029000000000000a474696d65cb41d954fc40100000ab636c69656e745f6d6f6465c2";
    assert_eq!(hex(&record.encode().unwrap()), expected);
}

#[test]
fn a_dictionary_is_byte_for_byte_what_hivemind_writes_and_reads_back() {
    let dictionary = Dictionary {
        maxsize: f64::INFINITY,
        latest_expiration: 4_102_444_801.0,
        entries: vec![
            (text("sub1"), Bytes::from(Int(1).encode().unwrap()), 4_102_444_800.0),
            (bin(b"\x01\x02"), Bytes::from(text("v").encode().unwrap()), 4_102_444_801.0),
        ],
    };
    let bytes = dictionary.encode().unwrap();
    let expected = "c7385093cb7ff0000000000000cb41ee90cae02000009293a473756231c40101cb41ee90cae0000000\
        93c4020102c402a176cb41ee90cae0200000";
    assert_eq!(hex(&bytes), expected);
    assert_eq!(Dictionary::decode(&bytes), Ok(dictionary));
}
