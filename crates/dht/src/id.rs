//! Sans-I/O. Where keys and peers lie in the DHT: 160-bit ids with the XOR metric, hashed as hivemind hashes them.

use potluck_net::PeerId;
use sha1::{Digest, Sha1};
use std::fmt;

/// Length of an id in bytes.
pub const ID_BYTES: usize = 20;

/// A 160-bit point of the key space, big-endian; the order is numeric.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DhtId([u8; ID_BYTES]);

impl DhtId {
    /// The smallest id.
    pub const ZERO: Self = Self([0; ID_BYTES]);

    /// The id of a key: SHA-1 of its bytes.
    ///
    /// hivemind hashes the msgpack form of everything that is not `bytes`; see [`crate::msgpack`].
    pub fn of_key(key: &[u8]) -> Self {
        Self(Sha1::digest(key).into())
    }

    /// The id of a peer in the native dialect: SHA-1 of its peer id. Nobody has to claim it, so nobody can lie about it.
    pub fn of_peer(peer: PeerId) -> Self {
        Self::of_key(peer.as_bytes())
    }

    /// The id with these bytes.
    pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes, most significant first.
    pub const fn as_bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }

    /// XOR distance to another id; compare distances, nothing else.
    #[must_use]
    pub fn distance(&self, other: &Self) -> Self {
        let mut out = self.0;
        for (byte, other) in out.iter_mut().zip(other.0) {
            *byte ^= other;
        }
        Self(out)
    }

    /// Bit `index`, 0 being the most significant; false beyond the last one.
    pub fn bit(&self, index: usize) -> bool {
        self.0.get(index / 8).is_some_and(|byte| byte & (0x80 >> (index % 8)) != 0)
    }

    /// This id with bit `index` set to `value`.
    #[must_use]
    pub fn with_bit(mut self, index: usize, value: bool) -> Self {
        if let Some(byte) = self.0.get_mut(index / 8) {
            let mask = 0x80 >> (index % 8);
            if value {
                *byte |= mask;
            } else {
                *byte &= !mask;
            }
        }
        self
    }

    /// Number of leading bits that two ids share (0 to 160).
    pub fn common_prefix(&self, other: &Self) -> usize {
        let distance = self.distance(other);
        match distance.0.iter().position(|byte| *byte != 0) {
            Some(at) => at * 8 + distance.0[at].leading_zeros() as usize,
            None => ID_BYTES * 8,
        }
    }
}

impl fmt::Display for DhtId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for DhtId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DhtId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_bytes_are_plain_sha1_as_in_hivemind() {
        assert_eq!(DhtId::of_key(b"hello").to_string(), "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d");
    }

    #[test]
    fn prefixes_and_bits_count_from_the_top() {
        let id = DhtId::ZERO.with_bit(9, true);
        assert_eq!(id.common_prefix(&DhtId::ZERO), 9);
        assert_eq!(id.common_prefix(&id), 160);
        assert!(id.bit(9) && !id.bit(8) && !id.bit(4000));
    }
}
