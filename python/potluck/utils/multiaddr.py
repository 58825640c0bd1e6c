"""Where hivemind has :class:`potluck.p2p.Multiaddr`."""

from potluck.p2p.multiaddr import Multiaddr

__all__ = ["Multiaddr"]
