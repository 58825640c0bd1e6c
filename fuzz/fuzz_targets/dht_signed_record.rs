//! Owner tags and signatures: the first byte says how much of the input is the subkey, the rest is the value.
#![no_main]

use bytes::Bytes;
use potluck_dht::{Ed25519Validator, Expiration, Record, RecordValidator};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((at, rest)) = input.split_first() else { return };
    let (subkey, value) = rest.split_at(usize::from(*at).min(rest.len()));
    let record = Record {
        key: Bytes::from_static(b"key"),
        subkey: Some(Bytes::copy_from_slice(subkey)),
        value: Bytes::copy_from_slice(value),
        expiration: Expiration::In(std::time::Duration::from_secs(1)),
    };
    let validator = Ed25519Validator::new(potluck_net::Identity::from_seed(&[1; 32]), 1);
    let _ = (validator.validate(&record), validator.strip(&record), validator.version(&record));
});
