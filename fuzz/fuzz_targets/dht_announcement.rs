//! A peer's announcement under a run's key.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = potluck_dht::rendezvous::decode(bytes::Bytes::copy_from_slice(input));
});
