//! hivemind's msgpack dialect; what decodes must encode.
#![no_main]

use potluck_dht::msgpack::Value;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Ok(value) = Value::decode(input) {
        let bytes = value.encode().expect("what was read can be written");
        assert!(Value::decode(&bytes).is_ok());
    }
});
