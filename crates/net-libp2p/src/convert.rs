//! Between potluck's names for things and libp2p's.

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol as Part;
use potluck_net::PeerId;
use std::net::IpAddr;

/// libp2p's form of a peer id.
pub(crate) fn to_libp2p(peer: PeerId) -> libp2p::PeerId {
    libp2p::PeerId::from_bytes(peer.as_bytes())
        .expect("both kinds of peer id are multihashes that libp2p knows")
}

/// Our form of a peer id, or `None` if its key is of a kind that potluck does not admit.
pub(crate) fn from_libp2p(peer: &libp2p::PeerId) -> Option<PeerId> {
    PeerId::from_bytes(&peer.to_bytes()).ok()
}

/// Whether an address leads through a relay.
pub(crate) fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Part::P2pCircuit)
}

/// Whether an address is one of QUIC.
pub(crate) fn is_quic(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Part::QuicV1)
}

/// The last `/p2p/` of an address: whom it leads to.
pub(crate) fn target(address: &Multiaddr) -> Option<libp2p::PeerId> {
    match address.iter().last() {
        Some(Part::P2p(peer)) => Some(peer),
        _ => None,
    }
}

/// The address with `/p2p/peer` at its end, or `None` if it leads to somebody else.
pub(crate) fn with_target(address: Multiaddr, peer: libp2p::PeerId) -> Option<Multiaddr> {
    address.with_p2p(peer).ok()
}

/// The IP address at the start of an address.
pub(crate) fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next() {
        Some(Part::Ip4(ip)) => Some(ip.into()),
        Some(Part::Ip6(ip)) => Some(ip.into()),
        _ => None,
    }
}

/// Whether an address means this machine only.
pub(crate) fn is_loopback(address: &Multiaddr) -> bool {
    ip(address).is_some_and(|ip| ip.is_loopback())
}

/// Whether an address can mean anything to another machine's swarm at all.
pub(crate) fn is_usable(address: &Multiaddr) -> bool {
    match ip(address) {
        Some(IpAddr::V4(ip)) => !ip.is_unspecified() && !ip.is_link_local(),
        Some(IpAddr::V6(ip)) => !ip.is_unspecified() && !ip.is_unicast_link_local(),
        None => true,
    }
}
