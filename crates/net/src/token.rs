//! Join tokens: one line of text that holds all a newcomer needs to find a run.
//!
//! `potluck1` + base58(fields + first four bytes of their BLAKE3 hash): opaque on purpose, so that nobody edits one by
//! hand, and a slip of copy and paste is told apart from a dead address. A token is no secret unless it holds an invite.

use std::fmt;
use std::str::FromStr;

/// What every token of this version starts with.
const PREFIX: &str = "potluck1";
/// Longest token text that is looked at: base58 decoding costs quadratic time.
const TEXT_BYTES_MAX: usize = 8 << 10;
/// Longest run name, in bytes.
const RUN_ID_BYTES_MAX: usize = 128;
/// Most bootstrap addresses in one token.
const BOOTSTRAP_MAX: usize = 12;
/// Longest bootstrap address, in bytes.
const ADDRESS_BYTES_MAX: usize = 255;
/// Longest invite, in bytes.
const INVITE_BYTES_MAX: usize = 1024;
/// Bytes of the hash that guard against typing errors.
const CHECKSUM_BYTES: usize = 4;

/// What the token of a node that was told of no run says: such a node is there for every run.
pub const EVERY_RUN: &str = "potluck";

/// All that a newcomer needs to find a run. Its text form goes around by mail or chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The name of the run, 1 to 128 bytes.
    pub run_id: String,
    /// Multiaddrs with `/p2p/` suffix of peers to ask first, at most 12.
    pub bootstrap: Vec<String>,
    /// A signed invite, for runs that admit only the invited. At most 1024 bytes.
    pub invite: Option<Vec<u8>>,
}

/// Why text is not a token, or why a token cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It starts differently.
    #[error("this is no join token: a token starts with `{PREFIX}`, this starts with {start:?}")]
    NotAToken {
        /// The first characters given.
        start: String,
    },
    /// A character that no token has.
    #[error("this token is damaged: it holds a character that no token has; copy it again, whole")]
    NotBase58,
    /// The checksum differs.
    #[error("this token is damaged or cut off: its checksum does not match; copy it again, whole")]
    Checksum,
    /// Longer than any token.
    #[error("a token has at most {TEXT_BYTES_MAX} characters, this has {len}")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// The checksum is right, but the content is not: made by another version, or on purpose.
    #[error("this token is malformed: {what}; was it made by another version of potluck?")]
    Malformed {
        /// The first thing that is wrong.
        what: &'static str,
    },
}

impl Token {
    /// Check the limits that also hold for reading, so that every token that can be written can be read.
    ///
    /// # Errors
    /// [`TokenError::Malformed`], naming the field and its limit.
    pub fn validate(&self) -> Result<(), TokenError> {
        let wrong = |what| Err(TokenError::Malformed { what });
        if self.run_id.is_empty() || self.run_id.len() > RUN_ID_BYTES_MAX {
            return wrong("the run name must have 1 to 128 bytes");
        }
        if self.bootstrap.len() > BOOTSTRAP_MAX {
            return wrong("at most 12 bootstrap addresses fit");
        }
        if self.bootstrap.iter().any(|address| address.is_empty() || address.len() > ADDRESS_BYTES_MAX) {
            return wrong("a bootstrap address must have 1 to 255 bytes");
        }
        if self.invite.as_ref().is_some_and(|invite| invite.is_empty() || invite.len() > INVITE_BYTES_MAX) {
            return wrong("an invite must have 1 to 1024 bytes");
        }
        Ok(())
    }

    /// The fields, each behind its length. Fields over their limit are cut by [`Token::validate`], not here.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, self.run_id.as_bytes());
        put(&mut out, &[u8::try_from(self.bootstrap.len()).unwrap_or(u8::MAX)]);
        for address in &self.bootstrap {
            put(&mut out, address.as_bytes());
        }
        put(&mut out, self.invite.as_deref().unwrap_or_default());
        out
    }

    fn decode(mut bytes: &[u8]) -> Result<Self, TokenError> {
        let run_id = take_text(&mut bytes)?;
        let [count] = *take(&mut bytes)? else {
            return Err(TokenError::Malformed { what: "the number of addresses is missing" });
        };
        if usize::from(count) > BOOTSTRAP_MAX {
            return Err(TokenError::Malformed { what: "at most 12 bootstrap addresses fit" });
        }
        let bootstrap = (0..count).map(|_| take_text(&mut bytes)).collect::<Result<_, _>>()?;
        let invite = Some(take(&mut bytes)?.to_vec()).filter(|invite| !invite.is_empty());
        if !bytes.is_empty() {
            return Err(TokenError::Malformed { what: "bytes are left over" });
        }
        let token = Self { run_id, bootstrap, invite };
        token.validate()?;
        Ok(token)
    }
}

/// Append one field: 2 bytes of length (big-endian), then the field, cut to what the length can say.
fn put(out: &mut Vec<u8>, field: &[u8]) {
    let len = u16::try_from(field.len()).unwrap_or(u16::MAX);
    out.extend(len.to_be_bytes());
    out.extend(field.iter().take(usize::from(len)));
}

fn take<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], TokenError> {
    let missing = TokenError::Malformed { what: "a field is cut off" };
    let (len, rest) = bytes.split_first_chunk::<2>().ok_or(missing.clone())?;
    let (field, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*len))).ok_or(missing)?;
    *bytes = rest;
    Ok(field)
}

fn take_text(bytes: &mut &[u8]) -> Result<String, TokenError> {
    let field = take(bytes)?;
    String::from_utf8(field.to_vec()).map_err(|_| TokenError::Malformed { what: "a text is not UTF-8" })
}

fn checksum(fields: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&blake3::hash(fields).as_bytes()[..CHECKSUM_BYTES]);
    sum
}

/// The text form of fields.
pub(crate) fn sealed(fields: &[u8]) -> String {
    let bytes = [fields, &checksum(fields)].concat();
    format!("{PREFIX}{}", bs58::encode(bytes).into_string())
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&sealed(&self.encode()))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > TEXT_BYTES_MAX {
            return Err(TokenError::TooLong { len: text.len() });
        }
        let Some(body) = text.strip_prefix(PREFIX) else {
            return Err(TokenError::NotAToken { start: text.chars().take(16).collect() });
        };
        let bytes = bs58::decode(body).into_vec().map_err(|_| TokenError::NotBase58)?;
        let (fields, sum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(TokenError::Checksum)?;
        if checksum(fields) != *sum {
            return Err(TokenError::Checksum);
        }
        Self::decode(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        Token {
            run_id: "demo".into(),
            bootstrap: vec!["/ip4/10.0.0.1/tcp/4001/p2p/12D3KooW".into(), "/dns/example.org/tcp/1".into()],
            invite: Some(vec![1, 2, 3]),
        }
    }

    #[test]
    fn text_round_trips_and_ignores_space_around_it() {
        let text = token().to_string();
        assert!(text.starts_with(PREFIX));
        assert_eq!(format!(" {text}\n").parse(), Ok(token()));
        let bare = Token { run_id: "r".into(), bootstrap: vec![], invite: None };
        assert_eq!(bare.to_string().parse(), Ok(bare));
    }

    #[test]
    fn damage_is_named() {
        let text = token().to_string();
        assert_eq!(text[..text.len() - 1].parse::<Token>(), Err(TokenError::Checksum));
        assert_eq!(format!("{text}0").parse::<Token>(), Err(TokenError::NotBase58));
        assert!(matches!("/ip4/1.2.3.4".parse::<Token>(), Err(TokenError::NotAToken { .. })));
        assert!(matches!("x".repeat(9000).parse::<Token>(), Err(TokenError::TooLong { len: 9000 })));
    }

    #[test]
    fn limits_hold_for_reading_as_for_making() {
        let long = Token { run_id: "r".repeat(129), ..token() };
        assert!(long.validate().is_err());
        assert!(long.to_string().parse::<Token>().is_err());
        let many = Token { bootstrap: vec!["/ip4/1.1.1.1".into(); 13], ..token() };
        assert!(many.to_string().parse::<Token>().is_err());
    }

    #[test]
    fn the_largest_token_is_readable() {
        let largest = Token {
            run_id: "r".repeat(RUN_ID_BYTES_MAX),
            bootstrap: vec!["a".repeat(ADDRESS_BYTES_MAX); BOOTSTRAP_MAX],
            invite: Some(vec![255; INVITE_BYTES_MAX]),
        };
        assert_eq!(largest.to_string().parse(), Ok(largest));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut sealed = bytes.clone();
            sealed.extend(checksum(&bytes));
            let text = format!("{PREFIX}{}", bs58::encode(sealed).into_string());
            if let Ok(token) = text.parse::<Token>() {
                prop_assert_eq!(token.to_string(), text);
            }
        }
    }
}
