//! hivemind's owner signatures (its RSASignatureValidator) as a validator: the rules about records carry a second dialect.
//! The record was signed by hivemind 1.1.12 itself.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use num_bigint::BigUint;
use potluck_dht::msgpack::Value::{Bin, Float, Str, Tuple};
use potluck_dht::{DhtId, Expiration, Record, RecordValidator, Validators};
use sha2::{Digest, Sha256};
use std::sync::Arc;

const OWNER: &str = "[owner:ssh-rsa \
    AAAAB3NzaC1yc2EAAAADAQABAAABAQDLreOk5/6XDWIwNSEpx+KQQ1+O99yXw2y71kUpgcosEcNGZqDJ+jpCEXwMRhYXyDZ7zwql24ol\
    N7Z119PI8zd+3r1KyPsVqOk8YxH255C9y2pzJRrEwDk+xB48g8VdoF0UKFHHQHPGyvVApkAaQOMoxh4eWrs/gB65ONOB9Exc6EeO2Mxf\
    2bFfCc9nQzCovkg9e4L5P9j6sEliiH9uhir3Y+Eiylxj/CgUJTulQFSBZE3NyoGSTMDMd97KpoSh2XN4czzRt/wmH0Tq7SFYfI1XPcr1\
    pNqn+ACOquDJu0HIUhuvFC46hJ+nF6fpX1kBMlTlI1B6pxzv3dHtITxStwIP]";
const VALUE: &str = "\
    86a7706565725f6964c422122084ea6775d52a5499118bf36167c37d806de39f0e710d9b6215197065aa79a384a565706f636803\
    b373616d706c65735f616363756d756c61746564cc80b273616d706c65735f7065725f7365636f6e64cb4029000000000000a474\
    696d65cb41d954fc40100000ab636c69656e745f6d6f6465c2";
const SIGNATURE: &str = "[signature:\
    UCp8Kt1SDxE9m8ErHKpJhW/o5bR/RPvdNOcdhxiSAuXeUFijmiLDwF4C6RK5nGy8m5Tt+u1/gTEvQdzPUNvbTuP+oNx1AgqtvKeq9jS6\
    rI1lMiUL0s97v1GC9vXvsLfloKFKtakrVpwWgUrxMlrHBozCrqbyiVSYwQP5HkVHOdd18/SySfXxZodvZYiflbKgKzO17GlyR5le7Ues\
    1B+XSXi9YNLUACfEf4iKQkc2DyA9TMVR1vd0z1lecQlc7qyXbERkOl2QGY5G4yHVigyM1LD8uLGgtiUXesu/9RyuwTd7FhDFgTZLHz8N\
    J8eebAE2jYwyAx6i9TwZS5Wfbqy+Mg==]";
const EXPIRATION: f64 = 1_700_000_060.5;
/// SHA-256 of what was signed, to tell a wrong layout from a wrong signature.
const SIGNED_SHA256: &str = "fad23ce6fb389718a1532e4ae6c525181a9df37f0d0852f0c2aa7464f01083f2";

/// RSA-PSS with SHA-256 and the longest salt, RFC 8017 section 9.1.2. `key` is in OpenSSH's form.
fn pss_holds(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    fn field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let (field, behind) = behind.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        *rest = behind;
        Some(field)
    }
    let mut rest = key;
    let fields = [field(&mut rest), field(&mut rest), field(&mut rest)];
    let [Some(b"ssh-rsa"), Some(exponent), Some(modulus)] = fields else { return false };
    let modulus = BigUint::from_bytes_be(modulus);
    let encoded = BigUint::from_bytes_be(signature).modpow(&BigUint::from_bytes_be(exponent), &modulus);
    let mut padded = encoded.to_bytes_be();
    let length = usize::try_from((modulus.bits() - 1).div_ceil(8)).unwrap();
    padded.splice(..0, vec![0; length.saturating_sub(padded.len())]);
    let Some((&0xbc, padded)) = padded.split_last() else { return false };
    let Some((masked, hash)) = padded.split_last_chunk::<32>() else { return false };
    let mask = (0_u32..).flat_map(|count| Sha256::digest([&hash[..], &count.to_be_bytes()].concat()));
    let mut block: Vec<u8> = masked.iter().zip(mask).map(|(byte, mask)| byte ^ mask).collect();
    block[0] &= 0xff >> (8 * length as u64 - (modulus.bits() - 1));
    let Some((1, salt)) = block.split_first() else { return false };
    Sha256::digest([&[0; 8], &Sha256::digest(message)[..], salt].concat())[..] == hash[..]
}

/// What is between the first `open` and the next `]`, and all of it.
fn tagged<'a>(bytes: &'a [u8], open: &str) -> Option<(&'a [u8], std::ops::Range<usize>)> {
    let start = bytes.windows(open.len()).position(|window| window == open.as_bytes())?;
    let inner = &bytes[start + open.len()..];
    let length = inner.iter().position(|byte| *byte == b']')?;
    Some((&inner[..length], start..start + open.len() + length + 1))
}

/// Only checks: a signature of our own is no vector.
struct RsaOwners;

impl RecordValidator for RsaOwners {
    fn validate(&self, record: &Record) -> bool {
        let subkey = record.subkey.clone().unwrap_or_default();
        let Some((owner, _)) = tagged(&record.key, "[owner:").or_else(|| tagged(&subkey, "[owner:")) else {
            return true;
        };
        let Some((signature, place)) = tagged(&record.value, "[signature:") else { return false };
        if tagged(&record.value[place.end..], "[signature:").is_some() {
            return false;
        }
        let key = owner.strip_prefix(b"ssh-rsa ").and_then(|key| BASE64_STANDARD.decode(key).ok());
        let (Some(key), Ok(signature)) = (key, BASE64_STANDARD.decode(signature)) else { return false };
        signed(record, &self.strip(record)).is_some_and(|message| pss_holds(&key, &message, &signature))
    }

    fn strip(&self, record: &Record) -> Bytes {
        let mut value = record.value.to_vec();
        while let Some((_, place)) = tagged(&value, "[signature:") {
            value.drain(place);
        }
        value.into()
    }

    fn priority(&self) -> i32 {
        10
    }
}

/// The tuple of key, subkey, value and expiration, which hivemind signs.
fn signed(record: &Record, value: &Bytes) -> Option<Vec<u8>> {
    let Expiration::At(time) = record.expiration else { return None };
    let subkey = record.subkey.clone()?;
    Tuple(vec![Bin(record.key.clone()), Bin(subkey), Bin(value.clone()), Float(time)]).encode().ok()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn record() -> Record {
    let key = DhtId::of_key(&Str("myrun_progress".into()).encode().unwrap());
    Record {
        key: Bytes::copy_from_slice(key.as_bytes()),
        subkey: Some(Bin(Bytes::from_static(OWNER.as_bytes())).encode().unwrap().into()),
        value: [&bytes(VALUE), SIGNATURE.as_bytes()].concat().into(),
        expiration: Expiration::At(EXPIRATION),
    }
}

fn rules() -> Validators {
    let mut rules = Validators::default();
    rules.add(Arc::new(RsaOwners));
    rules
}

#[test]
fn a_record_that_hivemind_signed_is_believed_and_comes_out_without_its_signature() {
    let (record, value) = (record(), Bytes::from(bytes(VALUE)));
    let message = signed(&record, &value).unwrap();
    assert_eq!(Sha256::digest(&message)[..], bytes(SIGNED_SHA256)[..], "the tuple is packed otherwise");
    assert!(rules().validate(&record));
    assert_eq!(rules().strip(&record), value);
}

#[test]
fn a_record_of_an_owner_that_was_changed_is_not_believed() {
    let (good, rules) = (record(), rules());
    let value = bytes(VALUE);
    let unsigned = Record { value: value.clone().into(), ..good.clone() };
    assert!(!rules.validate(&unsigned));
    let mut other = good.value.to_vec();
    other[40] ^= 1;
    assert!(!rules.validate(&Record { value: other.into(), ..good.clone() }));
    let twice = [&good.value[..], SIGNATURE.as_bytes()].concat();
    assert!(!rules.validate(&Record { value: twice.into(), ..good.clone() }));
    let later = Expiration::At(EXPIRATION + 1.0);
    assert!(!rules.validate(&Record { expiration: later, ..good.clone() }));
    let nobodys =
        Record { subkey: Some(Bin(Bytes::from_static(b"sub")).encode().unwrap().into()), ..unsigned };
    assert!(rules.validate(&nobodys));
}
