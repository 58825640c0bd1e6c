//! Who a peer is: the multihash of its public key, as libp2p defines it, without depending on libp2p.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

/// Longest peer id that is accepted, in bytes: an identity multihash of a 36-byte key (38), with room to spare.
const LEN_MAX: usize = 42;
/// Bytes before the raw key in the id of an Ed25519 peer: multihash (identity, 36 bytes) and protobuf header.
const ED25519_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// A peer's identity: a libp2p multihash of its public key (Ed25519: 38 bytes, RSA: 34 bytes).
///
/// Small and `Copy`; the order is that of the bytes and is the tie-break wherever peers must agree on an order.
#[derive(Clone, Copy, Eq)]
pub struct PeerId {
    bytes: [u8; LEN_MAX],
    len: u8,
}

/// Why bytes or text are not a peer id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerIdError {
    /// The text is not base58btc.
    #[error("peer id {text:?} is not base58")]
    NotBase58 {
        /// What was given (at most 80 characters of it).
        text: String,
    },
    /// The bytes are not a multihash that libp2p uses for keys.
    #[error(
        "{len} bytes starting {head:02x?} are no peer id: expected 0024080112 + key (Ed25519) or 1220 + hash (RSA)"
    )]
    NotMultihash {
        /// Number of bytes given.
        len: usize,
        /// The first bytes given.
        head: Vec<u8>,
    },
}

impl PeerId {
    /// The id of the peer that owns this Ed25519 public key.
    pub fn from_ed25519(public_key: &[u8; 32]) -> Self {
        let mut bytes = [0u8; LEN_MAX];
        bytes[..6].copy_from_slice(&ED25519_PREFIX);
        bytes[6..38].copy_from_slice(public_key);
        Self { bytes, len: 38 }
    }

    /// Parse the binary form.
    ///
    /// # Errors
    /// [`PeerIdError::NotMultihash`] if the bytes are neither an Ed25519 nor a SHA-256 multihash.
    pub fn from_bytes(input: &[u8]) -> Result<Self, PeerIdError> {
        let ed25519 = input.len() == 38 && input.starts_with(&ED25519_PREFIX);
        let sha256 = input.len() == 34 && input.starts_with(&[0x12, 0x20]);
        if !ed25519 && !sha256 {
            let head = input.iter().take(6).copied().collect();
            return Err(PeerIdError::NotMultihash { len: input.len(), head });
        }
        let mut bytes = [0u8; LEN_MAX];
        bytes[..input.len()].copy_from_slice(input);
        Ok(Self { bytes, len: input.len() as u8 })
    }

    /// The binary form (multihash).
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The Ed25519 public key inside the id, or `None` for a peer with an RSA key.
    pub fn ed25519_key(&self) -> Option<[u8; 32]> {
        let bytes = self.as_bytes();
        bytes.starts_with(&ED25519_PREFIX).then(|| bytes[6..].try_into().ok()).flatten()
    }

    /// Whether `signature` over `message` was made by this peer. Always false for RSA peers, which sign nothing here.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        let Some(key) = self.ed25519_key() else { return false };
        let Ok(key) = ed25519_dalek::VerifyingKey::from_bytes(&key) else { return false };
        key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(signature)).is_ok()
    }

    /// The last 6 characters of the text form: enough for a log line, never for a decision.
    pub fn short(&self) -> String {
        let text = self.to_string();
        text[text.len().saturating_sub(6)..].to_owned()
    }
}

impl PeerId {
    /// The first bytes, the first of the key among them: as good as always enough to tell two peers apart.
    fn head(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.bytes;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

// Peers are looked up all the time, and a call that compares all bytes costs more than the rest of the search.
impl Ord for PeerId {
    #[inline]
    fn cmp(&self, other: &Self) -> Ordering {
        let rest = || self.bytes[8..].cmp(&other.bytes[8..]).then(self.len.cmp(&other.len));
        self.head().cmp(&other.head()).then_with(rest)
    }
}

impl PartialOrd for PeerId {
    #[inline]
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for PeerId {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.head() == other.head() && self.len == other.len && self.bytes[8..] == other.bytes[8..]
    }
}

impl Hash for PeerId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.as_bytes()).into_string())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId(..{})", self.short())
    }
}

impl FromStr for PeerId {
    type Err = PeerIdError;

    fn from_str(text: &str) -> Result<Self, PeerIdError> {
        let bytes = bs58::decode(text)
            .into_vec()
            .map_err(|_| PeerIdError::NotBase58 { text: text.chars().take(80).collect() })?;
        Self::from_bytes(&bytes)
    }
}

impl Serialize for PeerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            serializer.serialize_bytes(self.as_bytes())
        }
    }
}

impl<'de> Deserialize<'de> for PeerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = PeerId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a peer id as base58 text or as multihash bytes")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<PeerId, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<PeerId, E> {
                PeerId::from_bytes(bytes).map_err(E::custom)
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<PeerId, A::Error> {
                let mut bytes = Vec::with_capacity(LEN_MAX);
                while let Some(byte) = seq.next_element::<u8>()? {
                    if bytes.len() == LEN_MAX {
                        return Err(serde::de::Error::invalid_length(LEN_MAX + 1, &self));
                    }
                    bytes.push(byte);
                }
                PeerId::from_bytes(&bytes).map_err(serde::de::Error::custom)
            }
        }
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(Visitor)
        } else {
            deserializer.deserialize_bytes(Visitor)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_round_trip() {
        let id = PeerId::from_ed25519(&[7; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().starts_with("12D3KooW"));
        assert_eq!(PeerId::from_bytes(id.as_bytes()), Ok(id));
        let mut rsa = vec![0x12, 0x20];
        rsa.extend([9; 32]);
        assert!(PeerId::from_bytes(&rsa).unwrap().to_string().starts_with("Qm"));
    }

    #[test]
    fn strangers_bytes_are_refused() {
        assert!(PeerId::from_bytes(&[]).is_err());
        assert!(PeerId::from_bytes(&[0; 38]).is_err());
        assert!(PeerId::from_bytes(&[0x12; 4000]).is_err());
        assert!("0OIl".parse::<PeerId>().is_err());
    }
}
