//! How far a dial got, so that "cannot connect" becomes one line per address with the stage that failed.

use libp2p::core::transport::TransportError;
use libp2p::swarm::DialError;
use libp2p::{Multiaddr, dns};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;

/// The stages of a dial, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Stage {
    /// Not tried yet, or under way.
    Dialing,
    /// The address itself cannot be used here.
    Address,
    /// Its name was not resolved.
    Dns,
    /// No connection came about: refused, unreachable, or no answer at all.
    Connect,
    /// Connected, but encryption or multiplexing was not agreed on.
    Handshake,
    /// Somebody answered, but not the peer that the address names.
    WrongIdentity,
    /// The right peer, but it does not speak this version of potluck, or not potluck at all.
    Version,
    /// One of the two sides has no room for more connections.
    Refused,
    /// Connected.
    Connected,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dialing => "dialing",
            Self::Address => "address",
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Handshake => "handshake",
            Self::WrongIdentity => "wrong identity",
            Self::Version => "version",
            Self::Refused => "refused",
            Self::Connected => "connected",
        })
    }
}

/// A transport's error with the stage at which it happened.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {detail}")]
pub(crate) struct StageError {
    pub(crate) stage: Stage,
    pub(crate) detail: String,
}

impl StageError {
    /// Wraps an error of `stage`, with all its causes in one line.
    pub(crate) fn new(stage: Stage, error: &dyn std::error::Error) -> Self {
        Self { stage, detail: causes(error) }
    }

    /// For `map_err` on a transport.
    pub(crate) fn at<E: std::error::Error>(stage: Stage) -> impl Fn(E) -> Self + Clone {
        move |error| Self::new(stage, &error)
    }

    /// What the resolver in front of the boxed transports says.
    pub(crate) fn from_dns(error: dns::Error<io::Error>) -> Self {
        match error {
            dns::Error::Transport(inner) => Self::from_boxed(&inner),
            dns::Error::MultiaddrNotSupported(address) => {
                Self { stage: Stage::Address, detail: format!("{address} is not supported here") }
            }
            dns::Error::Dial(errors) => {
                let errors: Vec<Self> = errors.into_iter().map(Self::from_dns).collect();
                let stage = errors.iter().map(|error| error.stage).max().unwrap_or(Stage::Dns);
                let details: Vec<String> = errors.into_iter().map(|error| error.detail).collect();
                Self { stage, detail: details.join(", ") }
            }
            other => Self { stage: Stage::Dns, detail: causes(&other) },
        }
    }

    /// Each transport marks its own errors; what is not marked comes from encryption and multiplexing.
    pub(crate) fn from_boxed(error: &io::Error) -> Self {
        match find_stage(error) {
            Some(inner) => Self { stage: inner.stage, detail: inner.detail.clone() },
            // Wrappers that pass their inner error's text on as their own hide its type, but not the mark in the text.
            None => {
                let text = causes(error);
                let marked = [Stage::Address, Stage::Dns, Stage::Connect]
                    .into_iter()
                    .find_map(|stage| Some((stage, text.strip_prefix(&format!("{stage}: "))?.to_owned())));
                let (stage, detail) = marked.unwrap_or((Stage::Handshake, text));
                Self { stage, detail }
            }
        }
    }
}

/// An error and its causes, each once.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text.replace('\n', " ")
}

/// What became of one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// Unknown when the failure concerns no address in particular.
    pub(crate) address: Option<Multiaddr>,
    pub(crate) stage: Stage,
    pub(crate) detail: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Some(address) => write!(f, "{address}: {}: {}", self.stage, self.detail),
            None => write!(f, "{}: {}", self.stage, self.detail),
        }
    }
}

/// One line per address of a failed dial.
pub(crate) fn attempts(error: &DialError) -> Vec<Attempt> {
    let whole = |stage, detail: String| vec![Attempt { address: None, stage, detail }];
    match error {
        DialError::Transport(errors) => {
            errors.iter().map(|(address, error)| attempt(address.clone(), error)).collect()
        }
        DialError::WrongPeerId { obtained, address } => vec![Attempt {
            address: Some(address.clone()),
            stage: Stage::WrongIdentity,
            detail: format!("the peer there is {obtained}"),
        }],
        DialError::LocalPeerId { address } => vec![Attempt {
            address: Some(address.clone()),
            stage: Stage::WrongIdentity,
            detail: "this is our own address".into(),
        }],
        DialError::NoAddresses => whole(Stage::Address, "no address is known".into()),
        DialError::Denied { cause } => whole(Stage::Refused, causes(cause)),
        other => whole(Stage::Connect, causes(other)),
    }
}

fn attempt(address: Multiaddr, error: &TransportError<io::Error>) -> Attempt {
    let (stage, detail) = match error {
        TransportError::MultiaddrNotSupported(_) => {
            (Stage::Address, "this kind of address is not supported here".to_owned())
        }
        TransportError::Other(error) => {
            let StageError { stage, detail } = StageError::from_boxed(error);
            (stage, detail)
        }
    };
    Attempt { address: Some(address), stage, detail }
}

/// The innermost [`StageError`], wherever boxing has put it.
fn find_stage(error: &io::Error) -> Option<&StageError> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|inner| inner as _);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<StageError>() {
            return Some(found);
        }
        if let Some(inner) = error.downcast_ref::<io::Error>()
            && let Some(found) = find_stage(inner)
        {
            return Some(found);
        }
        next = error.source();
    }
    None
}
