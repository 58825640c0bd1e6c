//! `cli_checkpoint` of `potluck_tests::decoders`: what must hold for any bytes stands there.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| potluck_tests::decoders::decoder("cli_checkpoint")(input));
