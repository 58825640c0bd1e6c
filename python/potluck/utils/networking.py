"""Choosing and showing addresses."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from potluck.p2p.multiaddr import Multiaddr
from potluck.utils.logging import get_logger

logger = get_logger(__name__)


def choose_ip_address(
    maddrs: Sequence[Multiaddr], prefer_global: bool = True, protocol_priority: Sequence[str] = ("ip4", "ip6")
) -> str:
    """The address that a stranger is most likely to reach."""
    for wanted in (prefer_global, not prefer_global):
        for protocol in protocol_priority:
            for maddr in maddrs:
                address = maddr.value_for_protocol(protocol)
                if address is not None and ipaddress.ip_address(address).is_global == wanted:
                    return address
    raise ValueError(f"no address of {', '.join(protocol_priority)} among {[str(m) for m in maddrs]}")


def log_visible_maddrs(visible_maddrs: Sequence[Multiaddr], only_p2p: bool = False) -> None:
    """Log how other machines join."""
    if only_p2p:
        shown = sorted({f"/p2p/{maddr.peer_id}" for maddr in visible_maddrs if maddr.peer_id})
    else:
        shown = [str(maddr) for maddr in visible_maddrs]
    logger.info("To connect other peers to this one, use --initial_peers %s", " ".join(shown))
