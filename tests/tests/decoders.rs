//! Random and damaged bytes into every decoder, deterministically: refused with a name, never a panic. `make fuzz` looks
//! for the same with the help of coverage; its seed corpus is checked here.
//!
//! `FUZZ_SECONDS=30 cargo test --release -p potluck-tests --test decoders` goes on for 30 s with each decoder.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a test says what it tried, and what broke")]

use bytes::Bytes;
use potluck_tests::decoders::{DECODERS, Decoder, seeds};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Inputs for each decoder unless `FUZZ_SECONDS` says how long; fewer without optimisation. Together about 20 s of processor time.
const INPUTS: usize = if cfg!(debug_assertions) { 50_000 } else { 1_000_000 };
/// Twenty times fewer for these, which check a signature, read base 58, factor a matrix, or make a session or a file.
const SLOW: &[&str] = &[
    "averaging_invite",
    "cli_checkpoint",
    "collab_invite",
    "collab_question",
    "collab_state",
    "compression_low_rank",
    "dht_signed_record",
    "net_token",
];

/// Decoders that are tried at the same time.
const THREADS: usize = 2;

/// The next input: bytes out of the air, or a good one that was damaged in up to four places, cut or extended.
fn input(noise: &mut StdRng, good: &[&Bytes]) -> Vec<u8> {
    let random = |noise: &mut StdRng, max: usize| -> Vec<u8> {
        (0..noise.random_range(0..max)).map(|_| noise.random()).collect()
    };
    if noise.random_ratio(1, 8) {
        return random(noise, 300);
    }
    let mut bytes = good[noise.random_range(0..good.len())].to_vec();
    for _ in 0..noise.random_range(1..5) {
        let at = noise.random_range(0..bytes.len().max(1));
        match noise.random_range(0..5) {
            0 => bytes.truncate(at),
            1 => bytes.extend(random(noise, 20)),
            2 => drop(bytes.splice(at.min(bytes.len())..at.min(bytes.len()), random(noise, 5))),
            // Lengths and counts are where a decoder goes wrong.
            3 => bytes.iter_mut().skip(at).take(noise.random_range(1..9)).for_each(|byte| *byte = 0xff),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = noise.random()),
        }
    }
    bytes
}

/// Says which input broke which decoder, should it panic.
struct Witness<'a>(&'a str, &'a [u8]);

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} broke on {:02x?}", self.0, self.1);
        }
    }
}

fn torture((name, decode): Decoder, number: usize, good: &[&Bytes], time: Option<Duration>) {
    let (begin, mut noise) = (Instant::now(), StdRng::seed_from_u64(number as u64));
    let inputs = match name {
        name if SLOW.contains(&name) => INPUTS / 20,
        "compression_tensor" => INPUTS,
        // The eight schemes share what one decoder gets.
        name if name.starts_with("compression_") => INPUTS / 8,
        _ => INPUTS,
    };
    for given in 0.. {
        if time.map_or(given >= inputs, |time| begin.elapsed() >= time) {
            println!("{name}: {given} inputs in {:.2?}", begin.elapsed());
            return;
        }
        let bytes = input(&mut noise, good);
        let _witness = Witness(name, &bytes);
        decode(&bytes);
    }
}

#[test]
fn no_bytes_break_a_decoder() {
    let seconds = std::env::var("FUZZ_SECONDS").ok();
    let time =
        seconds.map(|seconds| Duration::from_secs(seconds.parse().expect("FUZZ_SECONDS is whole seconds")));
    let (seeds, next) = (seeds(), AtomicUsize::new(0));
    let try_them = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some((name, decode)) = DECODERS.get(number).copied() else { return };
            let good: Vec<&Bytes> =
                seeds.iter().filter(|(of, _)| *of == name).map(|(_, seed)| seed).collect();
            assert!(!good.is_empty(), "{name} has no seed");
            good.iter().for_each(|seed| decode(seed));
            torture((name, decode), number, &good, time);
        }
    };
    // The scope ends with a panic if one of them did.
    std::thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(try_them))));
}

#[test]
fn every_decoder_has_a_fuzz_target_and_a_seed_corpus() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz");
    let names: BTreeSet<String> = DECODERS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let found = |folder: &Path, cut: &str| -> BTreeSet<String> {
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name());
        files.map(|name| name.to_str().unwrap().trim_end_matches(cut).to_owned()).collect()
    };
    assert_eq!(found(&fuzz.join("fuzz_targets"), ".rs"), names);
    let corpus = fuzz.join("corpus");
    for (name, seed) in seeds() {
        let file = corpus.join(name).join(&blake3::hash(&seed).to_hex()[..16]);
        if std::env::var_os("WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, &seed).unwrap();
        }
        let kept = std::fs::read(&file).unwrap_or_default();
        assert!(
            kept == seed,
            "{} is not what is written today: WRITE_CORPUS=1 cargo test -p potluck-tests --test decoders",
            file.display()
        );
    }
    assert_eq!(found(&corpus, ""), names);
}
