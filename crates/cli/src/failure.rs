//! What to do about an error: the `hint:` line under it.

use potluck_collab::JoinError;
use potluck_dashboard::{ReplayError, ServeError};
use potluck_net::TokenError;
use potluck_net_libp2p::StartError;
use potluck_net_libp2p::identity_file::IdentityFileError;
use std::io::ErrorKind;

/// Where tokens come from.
pub(crate) const TOKEN_HINT: &str =
    "a token is one line that starts with potluck1; `potluck node` and the training program print it";

/// For errors about which no more is known.
pub(crate) const LAST_HINT: &str =
    "docs/errors.md explains each message; POTLUCK_LOG=info shows what happened before";

/// An error that knows what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    message: String,
    hint: &'static str,
}

impl Failure {
    /// `message` says what is wrong, `hint` what to do.
    pub(crate) fn new(message: impl Into<String>, hint: &'static str) -> Self {
        Self { message: message.into(), hint }
    }
}

/// The error with its causes in one line, each said once.
pub(crate) fn text(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| {
        if said.contains(&cause) {
            said
        } else {
            format!("{said}{}{cause}", if said.is_empty() { "" } else { ": " })
        }
    })
}

/// What to do about this error, if that is known.
pub(crate) fn hint(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return Some(failure.hint);
        }
        if cause.is::<TokenError>() {
            return Some(TOKEN_HINT);
        }
        if let Some(error) = cause.downcast_ref::<ServeError>() {
            return Some(match error {
                ServeError::Bind { source, .. } => about_socket(source),
                _ => "choose another --dashboard address",
            });
        }
        if let Some(error) = cause.downcast_ref::<ReplayError>() {
            return Some(match error {
                ReplayError::Read { source, .. } => about_file(source).unwrap_or("name another file"),
                _ => "name a file that `potluck monitor TOKEN --log FILE` has written",
            });
        }
        if let Some(error) = cause.downcast_ref::<StartError>() {
            return Some(match error {
                StartError::Listen { detail, .. } if detail.contains("in use") => {
                    "another program listens there; choose another port with --listen, or 0 for any free one"
                }
                StartError::Listen { .. } => "choose an address of this machine and a port above 1023",
                StartError::Address { .. } => {
                    "addresses look like /ip4/203.0.113.5/tcp/4001 or /ip4/0.0.0.0/udp/4001/quic-v1"
                }
                _ => "see `ulimit -n` and the system's log",
            });
        }
        if let Some(error) = cause.downcast_ref::<IdentityFileError>() {
            return Some(about_identity(error));
        }
        if let Some(error) = cause.downcast_ref::<JoinError>() {
            return Some(match error {
                JoinError::Invite(_) => "ask the run's owner for a token made by `potluck invite`",
                JoinError::Mismatch { .. } => {
                    "this checkpoint or program belongs to another version of the run"
                }
                _ => "run `potluck doctor TOKEN` to see how far each address gets",
            });
        }
        cause.downcast_ref::<std::io::Error>().and_then(about_file)
    })
}

fn about_socket(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::AddrInUse => "another program listens there; choose another port, or 0 for any free one",
        ErrorKind::PermissionDenied => "ports below 1024 are for root; choose a higher one",
        _ => "choose an address of this machine, such as 127.0.0.1:8080",
    }
}

fn about_identity(error: &IdentityFileError) -> &'static str {
    match error {
        IdentityFileError::InUse { .. } => {
            "one identity is one peer: give each process its own file with --identity"
        }
        IdentityFileError::Readable { .. } => "an identity is a secret key; nobody else may read it",
        IdentityFileError::Malformed { .. } => "name another file with --identity, or move this one away",
        _ => "name a file in a folder of yours with --identity, or set POTLUCK_IDENTITY",
    }
}

fn about_file(error: &std::io::Error) -> Option<&'static str> {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Some("free some space, or name a folder on another disk")
        }
        ErrorKind::PermissionDenied => Some("name a folder that you may write to"),
        ErrorKind::ReadOnlyFilesystem => Some("this disk is read-only; name a folder on another one"),
        ErrorKind::NotADirectory => Some("a part of the path is a file; name a folder"),
        ErrorKind::FileTooLarge => Some("free some space, or raise the limit on file sizes (`ulimit -f`)"),
        ErrorKind::NotFound => Some("check the path"),
        _ => None,
    }
}
