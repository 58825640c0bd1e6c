//! Closed runs: the text form of a permission to join, signed by the run's owner, and its check before anything is
//! dialled. Pure: checking needs only the owner's peer id.
//!
//! An invite is bound to one run and is good for whoever holds it, like a key to a house. It never expires by a clock,
//! because no wall clock decides anything; an owner who wants to revoke starts a run under a new id.

use potluck_net::{Identity, PeerId};

/// The text form starts with this, so that it is recognised when it is pasted into the wrong place.
const PREFIX: &str = "potluck-invite-";
/// Longest text that is looked at: a prefix and a signature in base58 fit well inside.
const TEXT_BYTES_MAX: usize = 200;

/// A signed permission to join one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invite {
    pub(crate) inner: potluck_averaging::Invite,
}

/// Why an invite does not open a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InviteError {
    /// The run is closed and nothing was shown.
    #[error("the run is closed; ask its owner for an invite")]
    Missing,
    /// The text is no invite.
    #[error("this is no invite: it should start with {PREFIX:?} and hold a signature")]
    Malformed,
    /// The signature is not the owner's, or the invite is for another run.
    #[error("the invite was not signed by this run's owner for this run")]
    NotSigned,
}

impl Invite {
    /// Let any holder join the run `run_id` that `owner` owns.
    pub fn issue(owner: &Identity, run_id: &str) -> Self {
        Self { inner: potluck_averaging::Invite::new(owner, run_id) }
    }

    /// Whether this opens the run `run_id` of `owner`.
    ///
    /// # Errors
    /// [`InviteError::NotSigned`].
    pub fn verify(&self, owner: PeerId, run_id: &str) -> Result<(), InviteError> {
        if self.inner.is_valid(&owner, run_id) { Ok(()) } else { Err(InviteError::NotSigned) }
    }

    /// The text that goes into a token.
    pub fn to_text(&self) -> String {
        format!("{PREFIX}{}", bs58::encode(self.inner.to_bytes()).into_string())
    }

    /// Read the text form.
    ///
    /// # Errors
    /// [`InviteError::Malformed`].
    pub fn from_text(text: &str) -> Result<Self, InviteError> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).filter(|_| text.len() <= TEXT_BYTES_MAX);
        let bytes = body.and_then(|body| bs58::decode(body).into_vec().ok()).ok_or(InviteError::Malformed)?;
        let inner = potluck_averaging::Invite::from_bytes(&bytes).ok_or(InviteError::Malformed)?;
        Ok(Self { inner })
    }

    /// Check the invite (as text, if any was shown); an open run (`owner` is `None`) admits everybody.
    ///
    /// # Errors
    /// Why the run stays closed.
    pub fn admit(owner: Option<PeerId>, run_id: &str, invite: Option<&str>) -> Result<(), InviteError> {
        let Some(owner) = owner else { return Ok(()) };
        Self::from_text(invite.ok_or(InviteError::Missing)?)?.verify(owner, run_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invite_opens_one_run_of_one_owner() {
        let (owner, other) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
        let text = Invite::issue(&owner, "run").to_text();
        let admit = |owner: &Identity, run: &str, text| Invite::admit(Some(owner.peer_id()), run, text);
        assert_eq!(admit(&owner, "run", Some(&text)), Ok(()));
        assert_eq!(admit(&owner, "other", Some(&text)), Err(InviteError::NotSigned));
        assert_eq!(admit(&other, "run", Some(&text)), Err(InviteError::NotSigned));
        assert_eq!(admit(&owner, "run", None), Err(InviteError::Missing));
        assert_eq!(Invite::admit(None, "run", None), Ok(()));
        assert_eq!(Invite::from_text(&text), Ok(Invite::issue(&owner, "run")));
    }

    #[test]
    fn garbage_is_malformed() {
        for text in ["", PREFIX, "potluck-invite-0OIl", "hello", &format!("{PREFIX}{}", "1".repeat(500))] {
            assert_eq!(Invite::from_text(text), Err(InviteError::Malformed), "{text:?}");
        }
    }
}
