//! A DHT answer from a stranger; what decodes must survive another round trip.
#![no_main]

use potluck_dht::wire::Answer;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Ok(answer) = Answer::decode(bytes::Bytes::copy_from_slice(input)) {
        assert_eq!(Answer::decode(answer.encode()), Ok(answer));
    }
});
