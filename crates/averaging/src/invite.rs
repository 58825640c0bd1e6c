//! Closed runs: a signed permission to join, carried in the run's token and shown in the first message of every link.

use potluck_net::{Identity, PeerId};

/// Permission to join a run, signed by the run's owner. Whoever holds it may join, like a key to a house.
#[derive(Clone, PartialEq, Eq)]
pub struct Invite {
    signature: [u8; 64],
}

impl Invite {
    /// An invite to `run`; `owner` must be the run's owner for others to accept it.
    pub fn new(owner: &Identity, run: &str) -> Self {
        Self { signature: owner.sign(&message(run)) }
    }

    /// From its bytes, or `None` if there are not 64 of them.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self { signature: bytes.try_into().ok()? })
    }

    /// Its bytes, for a token.
    pub fn to_bytes(&self) -> [u8; 64] {
        self.signature
    }

    /// Whether `owner` has signed it for `run`.
    pub fn is_valid(&self, owner: &PeerId, run: &str) -> bool {
        owner.verify(&message(run), &self.signature)
    }
}

impl std::fmt::Debug for Invite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Invite(signature not shown)")
    }
}

fn message(run: &str) -> Vec<u8> {
    [b"potluck invite 1\0", run.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invite_is_for_one_run_of_one_owner() {
        let (owner, other) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
        let invite = Invite::new(&owner, "run");
        assert!(invite.is_valid(&owner.peer_id(), "run"));
        assert!(!invite.is_valid(&owner.peer_id(), "another"));
        assert!(!invite.is_valid(&other.peer_id(), "run"));
    }
}
