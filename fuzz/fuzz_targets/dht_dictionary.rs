//! hivemind's DictionaryDHTValue; what decodes must encode.
#![no_main]

use potluck_dht::dictionary::Dictionary;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Ok(dictionary) = Dictionary::decode(input) {
        let bytes = dictionary.encode().expect("what was read can be written");
        assert!(Dictionary::decode(&bytes).is_ok());
    }
});
