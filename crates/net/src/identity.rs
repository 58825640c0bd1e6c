//! A peer's key pair. Where it is kept on disk is the concern of the programs, not of this crate.

use crate::PeerId;
use ed25519_dalek::{Signer, SigningKey};

/// An Ed25519 key pair: it names a peer and signs what that peer says.
#[derive(Clone)]
pub struct Identity {
    key: SigningKey,
}

impl Identity {
    /// The identity made from 32 secret bytes (RFC 8032 seed).
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self { key: SigningKey::from_bytes(seed) }
    }

    /// The secret seed, for the file that keeps it.
    pub fn seed(&self) -> [u8; 32] {
        self.key.to_bytes()
    }

    /// The public name that belongs to this key.
    pub fn peer_id(&self) -> PeerId {
        PeerId::from_ed25519(self.key.verifying_key().as_bytes())
    }

    /// Sign a message; [`PeerId::verify`] checks it.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({:?}, secret not shown)", self.peer_id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_binds_message_and_peer() {
        let (alice, bob) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
        let signature = alice.sign(b"hello");
        assert!(alice.peer_id().verify(b"hello", &signature));
        assert!(!alice.peer_id().verify(b"hellO", &signature));
        assert!(!bob.peer_id().verify(b"hello", &signature));
    }
}
