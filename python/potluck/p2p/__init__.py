"""Names of peers and addresses. potluck has no side daemon: what hivemind's ``P2P`` did is inside :class:`potluck.DHT`."""

from potluck.p2p.multiaddr import Multiaddr
from potluck.p2p.peer_id import PeerID, PeerInfo

__all__ = ["Multiaddr", "PeerID", "PeerInfo"]
