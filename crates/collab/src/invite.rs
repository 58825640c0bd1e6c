//! Closed runs: a permission to join, signed by the run's owner. Pure: checking needs only the owner's peer id.
//!
//! An invite is bound to one run and either to one peer or to whoever holds it. It never expires by a clock, because
//! no wall clock decides anything; an owner who wants to revoke starts a run under a new id.

use potluck_net::{Identity, PeerId};

/// The text form starts with this, so that it is recognised when it is pasted into the wrong place.
const PREFIX: &str = "potluck-invite-";
/// Longest text that is looked at: a prefix, two ids and a signature in base58 fit well inside.
const TEXT_BYTES_MAX: usize = 400;
/// A peer id in a fixed field: 1 byte of length and up to 42 bytes.
const DOMAIN: &[u8] = b"potluck invite v1";

/// A signed permission to join one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invite {
    /// The only peer that may use it; `None` for whoever holds it.
    pub peer: Option<PeerId>,
    signature: [u8; 64],
}

/// Why an invite does not open a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InviteError {
    /// The run is closed and nothing was shown.
    #[error("the run is closed; ask its owner for an invite")]
    Missing,
    /// The text is no invite.
    #[error("this is no invite: it should start with {PREFIX:?} and hold a peer id and a signature")]
    Malformed,
    /// It was issued to somebody else.
    #[error("the invite was issued to another peer")]
    OtherPeer,
    /// The signature is not the owner's, or the invite is for another run.
    #[error("the invite was not signed by this run's owner for this run")]
    NotSigned,
}

impl Invite {
    /// Let `peer` (or, with `None`, any holder) join the run `run_id` that `owner` owns.
    pub fn issue(owner: &Identity, run_id: &str, peer: Option<PeerId>) -> Self {
        Self { peer, signature: owner.sign(&message(run_id, peer)) }
    }

    /// Whether `peer` may join the run `run_id` of `owner` with this.
    ///
    /// # Errors
    /// [`InviteError::OtherPeer`] or [`InviteError::NotSigned`].
    pub fn verify(&self, owner: PeerId, run_id: &str, peer: PeerId) -> Result<(), InviteError> {
        if self.peer.is_some_and(|invited| invited != peer) {
            return Err(InviteError::OtherPeer);
        }
        if owner.verify(&message(run_id, self.peer), &self.signature) {
            Ok(())
        } else {
            Err(InviteError::NotSigned)
        }
    }

    /// The text that goes into a token.
    pub fn to_text(&self) -> String {
        let mut bytes = self.signature.to_vec();
        if let Some(peer) = self.peer {
            bytes.extend_from_slice(peer.as_bytes());
        }
        format!("{PREFIX}{}", bs58::encode(bytes).into_string())
    }

    /// Read the text form.
    ///
    /// # Errors
    /// [`InviteError::Malformed`].
    pub fn from_text(text: &str) -> Result<Self, InviteError> {
        let text = text.trim();
        let body = text
            .strip_prefix(PREFIX)
            .filter(|_| text.len() <= TEXT_BYTES_MAX)
            .ok_or(InviteError::Malformed)?;
        let bytes = bs58::decode(body).into_vec().map_err(|_| InviteError::Malformed)?;
        let (signature, peer) = bytes.split_first_chunk::<64>().ok_or(InviteError::Malformed)?;
        let peer = match peer {
            [] => None,
            id => Some(PeerId::from_bytes(id).map_err(|_| InviteError::Malformed)?),
        };
        Ok(Self { peer, signature: *signature })
    }

    /// Check the invite (as text, if any was shown) of `peer`; an open run (`owner` is `None`) admits everybody.
    ///
    /// # Errors
    /// Why the peer may not join.
    pub fn admit(
        owner: Option<PeerId>,
        run_id: &str,
        peer: PeerId,
        invite: Option<&str>,
    ) -> Result<(), InviteError> {
        let Some(owner) = owner else { return Ok(()) };
        if peer == owner {
            return Ok(());
        }
        Self::from_text(invite.ok_or(InviteError::Missing)?)?.verify(owner, run_id, peer)
    }
}

fn message(run_id: &str, peer: Option<PeerId>) -> Vec<u8> {
    let mut message = DOMAIN.to_vec();
    message.extend_from_slice(&(run_id.len() as u64).to_le_bytes());
    message.extend_from_slice(run_id.as_bytes());
    if let Some(peer) = peer {
        message.extend_from_slice(peer.as_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invite_opens_one_run_for_one_peer() {
        let (owner, other) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
        let (guest, stranger) =
            (Identity::from_seed(&[3; 32]).peer_id(), Identity::from_seed(&[4; 32]).peer_id());
        let text = Invite::issue(&owner, "run", Some(guest)).to_text();
        let admit =
            |owner: &Identity, run: &str, peer| Invite::admit(Some(owner.peer_id()), run, peer, Some(&text));
        assert_eq!(admit(&owner, "run", guest), Ok(()));
        assert_eq!(admit(&owner, "run", stranger), Err(InviteError::OtherPeer));
        assert_eq!(admit(&owner, "other", guest), Err(InviteError::NotSigned));
        assert_eq!(admit(&other, "run", guest), Err(InviteError::NotSigned));
        assert_eq!(Invite::admit(Some(owner.peer_id()), "run", guest, None), Err(InviteError::Missing));
        assert_eq!(Invite::admit(None, "run", stranger, None), Ok(()));
        assert_eq!(Invite::admit(Some(owner.peer_id()), "run", owner.peer_id(), None), Ok(()));
    }

    #[test]
    fn a_bearer_invite_cannot_be_turned_into_a_bound_one() {
        let owner = Identity::from_seed(&[1; 32]);
        let guest = Identity::from_seed(&[3; 32]).peer_id();
        let bearer = Invite::issue(&owner, "run", None);
        assert_eq!(bearer.verify(owner.peer_id(), "run", guest), Ok(()));
        let forged = Invite { peer: Some(guest), ..bearer.clone() };
        assert_eq!(forged.verify(owner.peer_id(), "run", guest), Err(InviteError::NotSigned));
        assert_eq!(Invite::from_text(&bearer.to_text()), Ok(bearer));
    }

    #[test]
    fn garbage_is_malformed() {
        for text in ["", PREFIX, "potluck-invite-0OIl", "hello", &format!("{PREFIX}{}", "1".repeat(500))] {
            assert_eq!(Invite::from_text(text), Err(InviteError::Malformed), "{text:?}");
        }
    }
}
