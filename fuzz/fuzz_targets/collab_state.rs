//! `collab_state` of `potluck_tests::decoders`: what must hold for any bytes stands there.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| potluck_tests::decoders::decoder("collab_state")(input));
