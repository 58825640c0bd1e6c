//! Sans-I/O. The native record signature: a key or subkey that names its owner can be written by that owner only.
//!
//! hivemind's protection of keys is void, because it hashes them before it validates; here the key travels as it is.

use crate::record::{Expiration, Record, RecordValidator};
use bytes::{BufMut, Bytes, BytesMut};
use potluck_net::{Identity, PeerId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What every signature starts with, so that one made for a record can never pass for anything else.
const DOMAIN: &[u8] = b"potluck-dht-record-1";
const TAG_OPEN: &[u8] = b"[owner:";
/// What a name starts with in hivemind's tags. Its signatures are checked by the programs that use them, not here.
const RSA_NAME: &[u8] = b"ssh-rsa ";
/// Lifetime, version, signature.
const TRAILER_BYTES: usize = 8 + 8 + 64;
/// What a holder says of versions is not proved, and none follows the highest number. From here on only liars tell of them, and
/// whoever holds what was signed because of one: the answer is a version above here that grows with each process, too.
const BELIEVED_BELOW: u64 = 1 << 62;
/// A remaining time may exceed the signed lifetime by this much: rounding on the wire.
const LIFETIME_SLACK: Duration = Duration::from_millis(10);

/// The tag that, anywhere in a key or subkey, reserves it for `peer`.
pub fn owner_tag(peer: PeerId) -> String {
    format!("[owner:{peer}]")
}

/// Signs this peer's protected records and checks everybody's.
///
/// A record is protected when its key or subkey contains `[owner:<peer id>]`. Its value is then followed by
/// `lifetime in ms (u64) | version (u64) | Ed25519 signature`, all big-endian; the signature covers key, subkey, value,
/// lifetime and version. The lifetime bounds how long a copy may live on, the version decides which of two is newer.
#[derive(Debug, Clone)]
pub struct Ed25519Validator {
    identity: Identity,
    first_version: u64,
    next_version: Arc<AtomicU64>,
}

/// Whom a record belongs to.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Nobody,
    Peer(PeerId),
    /// Tags that name nobody or several peers.
    Invalid,
}

/// A signed value taken apart.
struct Parts<'a> {
    value: &'a [u8],
    lifetime_ms: u64,
    version: u64,
    signature: &'a [u8; 64],
}

impl Ed25519Validator {
    /// A validator that signs as `identity`. Versions count up from `first_version`: any number that tends to grow
    /// from one process of this identity to the next; a holder that has a higher one says so and it is skipped.
    pub fn new(identity: Identity, first_version: u64) -> Self {
        let first_version = first_version.clamp(1, BELIEVED_BELOW);
        Self { identity, first_version, next_version: Arc::new(AtomicU64::new(first_version)) }
    }

    fn is_ours(&self, record: &Record) -> bool {
        owner(record) == Owner::Peer(self.identity.peer_id())
    }
}

impl RecordValidator for Ed25519Validator {
    fn sign(&self, record: &Record) -> Bytes {
        let Expiration::In(lifetime) = record.expiration else { return record.value.clone() };
        if !self.is_ours(record) {
            return record.value.clone();
        }
        let lifetime_ms = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
        let version = self.next_version.fetch_add(1, Ordering::Relaxed);
        let message = message(record, &record.value, lifetime_ms, version);
        let mut signed = BytesMut::with_capacity(record.value.len() + TRAILER_BYTES);
        signed.put_slice(&record.value);
        signed.put_u64(lifetime_ms);
        signed.put_u64(version);
        signed.put_slice(&self.identity.sign(&message));
        signed.freeze()
    }

    fn validate(&self, record: &Record) -> bool {
        let peer = match owner(record) {
            Owner::Nobody => return true,
            Owner::Invalid => return false,
            Owner::Peer(peer) => peer,
        };
        let (Some(parts), Expiration::In(left)) = (split(&record.value), record.expiration) else {
            return false;
        };
        left <= Duration::from_millis(parts.lifetime_ms).saturating_add(LIFETIME_SLACK)
            && parts.version > 0
            && peer.verify(&message(record, parts.value, parts.lifetime_ms, parts.version), parts.signature)
    }

    fn strip(&self, record: &Record) -> Bytes {
        match (owner(record), split(&record.value)) {
            (Owner::Peer(_), Some(parts)) => record.value.slice(..parts.value.len()),
            _ => record.value.clone(),
        }
    }

    fn version(&self, record: &Record) -> u64 {
        match (owner(record), split(&record.value)) {
            (Owner::Peer(_), Some(parts)) => parts.version,
            _ => 0,
        }
    }

    fn observe(&self, version: u64) {
        let beyond = if version < BELIEVED_BELOW { version + 1 } else { BELIEVED_BELOW + self.first_version };
        self.next_version.fetch_max(beyond, Ordering::Relaxed);
    }

    fn priority(&self) -> i32 {
        10
    }
}

fn message(record: &Record, value: &[u8], lifetime_ms: u64, version: u64) -> Vec<u8> {
    let subkey = record.subkey.as_deref();
    let mut out = Vec::with_capacity(value.len() + record.key.len() + 128);
    out.put_slice(DOMAIN);
    out.put_u8(u8::from(subkey.is_some()));
    for part in [&record.key, subkey.unwrap_or_default(), value] {
        out.put_u64(part.len() as u64);
        out.put_slice(part);
    }
    out.put_u64(lifetime_ms);
    out.put_u64(version);
    out
}

fn split(signed: &[u8]) -> Option<Parts<'_>> {
    let (rest, signature) = signed.split_last_chunk::<64>()?;
    let (rest, version) = rest.split_last_chunk::<8>()?;
    let (value, lifetime) = rest.split_last_chunk::<8>()?;
    Some(Parts {
        value,
        lifetime_ms: u64::from_be_bytes(*lifetime),
        version: u64::from_be_bytes(*version),
        signature,
    })
}

fn owner(record: &Record) -> Owner {
    let mut found = Owner::Nobody;
    for text in [&record.key, record.subkey.as_ref().unwrap_or(&Bytes::new())] {
        let mut rest = &text[..];
        while let Some(at) = rest.windows(TAG_OPEN.len()).position(|window| window == TAG_OPEN) {
            rest = rest.get(at + TAG_OPEN.len()..).unwrap_or_default();
            let name = rest.split(|byte| *byte == b']').next().unwrap_or_default();
            let closed = name.len() < rest.len();
            if closed && name.starts_with(RSA_NAME) {
                continue;
            }
            let peer = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
            found = match (found, peer) {
                (Owner::Nobody, Some(peer)) if closed => Owner::Peer(peer),
                (Owner::Peer(before), Some(peer)) if closed && before == peer => Owner::Peer(peer),
                _ => return Owner::Invalid,
            };
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(subkey: String) -> Record {
        Record {
            key: Bytes::from_static(b"run"),
            subkey: Some(subkey.into()),
            value: Bytes::from_static(b"hello"),
            expiration: Expiration::In(Duration::from_secs(60)),
        }
    }

    #[test]
    fn only_the_owner_writes_a_tagged_subkey() {
        let (alice, bob) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
        let (by_alice, by_bob) = (Ed25519Validator::new(alice.clone(), 1), Ed25519Validator::new(bob, 1));
        let plain = record(owner_tag(alice.peer_id()));
        let signed = Record { value: by_alice.sign(&plain), ..plain.clone() };
        assert!(by_bob.validate(&signed));
        assert_eq!(by_bob.strip(&signed), plain.value);
        assert_eq!(by_bob.version(&signed), 1);
        assert!(!by_bob.validate(&plain), "unsigned");
        assert!(!by_bob.validate(&Record { value: by_bob.sign(&plain), ..plain.clone() }), "not the owner");
        for at in 0..signed.value.len() {
            let mut value = signed.value.to_vec();
            value[at] ^= 1;
            assert!(!by_bob.validate(&Record { value: value.into(), ..signed.clone() }), "byte {at} changed");
        }
        let longer = Expiration::In(Duration::from_secs(61));
        assert!(!by_bob.validate(&Record { expiration: longer, ..signed.clone() }), "prolonged");
        assert!(!by_bob.validate(&Record { key: Bytes::from_static(b"other"), ..signed }), "moved");
    }

    #[test]
    fn keys_are_protected_too_and_untagged_records_are_free() {
        let alice = Identity::from_seed(&[1; 32]);
        let validator = Ed25519Validator::new(Identity::from_seed(&[2; 32]), 1);
        let mut protected = record("plain".into());
        protected.key = owner_tag(alice.peer_id()).into();
        assert!(!validator.validate(&protected));
        assert!(validator.validate(&record("plain".into())));
    }

    #[test]
    fn a_version_that_a_liar_tells_of_leaves_room_for_the_next_and_for_the_next_process() {
        let alice = Identity::from_seed(&[1; 32]);
        let plain = record(owner_tag(alice.peer_id()));
        let mut last = 0;
        for first_version in [100, 200] {
            let validator = Ed25519Validator::new(alice.clone(), first_version);
            // Somebody holds what the process before has signed.
            validator.observe(last);
            for told in [BELIEVED_BELOW - 1, u64::MAX, u64::MAX - 1] {
                validator.observe(told);
                let signed = Record { value: validator.sign(&plain), ..plain.clone() };
                assert!(validator.validate(&signed), "{told} was told");
                assert!(validator.version(&signed) > last, "{told} was told");
                last = validator.version(&signed);
            }
            assert!(last < u64::MAX / 2);
        }
    }

    #[test]
    fn odd_tags_are_refused_not_fatal() {
        let (alice, bob) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
        let validator = Ed25519Validator::new(alice.clone(), 1);
        let rsa = record("[owner:ssh-rsa AAAAB3NzaC1yc2E]".into());
        assert!(validator.validate(&rsa), "hivemind's tag is checked elsewhere");
        let two = format!("{}{}", owner_tag(alice.peer_id()), owner_tag(bob.peer_id()));
        let mixed = format!("[owner:ssh-rsa AAAA]{}", owner_tag(bob.peer_id()));
        for subkey in [
            "[owner:]".into(),
            "[owner:zzz".into(),
            "[owner:0OIl]".into(),
            "[owner:ssh-rsa A".into(),
            two,
            mixed,
        ] {
            let record = record(subkey);
            assert!(!validator.validate(&Record { value: validator.sign(&record), ..record }));
        }
    }
}
