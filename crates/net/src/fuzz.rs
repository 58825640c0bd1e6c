//! The decoders of this crate for fuzz targets and property tests: each takes any bytes and asserts what must hold.

use crate::{Identity, PeerId, Token};
use bytes::Bytes;

/// A join token, sealed with a right checksum so that what is behind it is reached; what reads writes the same text.
pub fn token(input: &[u8]) {
    let text = crate::token::sealed(input);
    if let Ok(token) = text.parse::<Token>() {
        assert_eq!(token.to_string(), text);
    }
    if let Ok(text) = std::str::from_utf8(input) {
        let _any_refusal_is_fine = text.parse::<Token>();
    }
}

/// A peer's id, as bytes and as text; what decodes survives another round trip.
pub fn peer_id(input: &[u8]) {
    if let Ok(peer) = PeerId::from_bytes(input) {
        assert_eq!(PeerId::from_bytes(peer.as_bytes()).ok(), Some(peer));
        assert_eq!(peer.to_string().parse().ok(), Some(peer));
    }
    if let Ok(text) = std::str::from_utf8(input) {
        let _any_refusal_is_fine = text.parse::<PeerId>();
    }
}

/// Inputs that decode, for a corpus: a decoder's name and the bytes.
pub fn seeds() -> Vec<(&'static str, Bytes)> {
    let peer = Identity::from_seed(&[3; 32]).peer_id();
    let token = Token {
        run_id: "run".into(),
        bootstrap: vec![format!("/ip4/1.2.3.4/tcp/1/p2p/{peer}")],
        invite: Some(vec![1; 64]),
    };
    vec![
        ("net_token", token.encode().into()),
        ("net_token", Bytes::from(token.to_string())),
        ("net_peer_id", Bytes::from(peer.as_bytes().to_vec())),
        ("net_peer_id", Bytes::from(peer.to_string())),
    ]
}
