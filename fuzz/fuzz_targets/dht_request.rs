//! A DHT request from a stranger; what decodes must encode to the same bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let input = bytes::Bytes::copy_from_slice(input);
    if let Ok(request) = potluck_dht::wire::Request::decode(input.clone()) {
        assert_eq!(request.encode(), input);
    }
});
