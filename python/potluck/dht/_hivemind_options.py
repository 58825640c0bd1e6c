"""hivemind's options of its side daemon and its DHT node: which values potluck can follow, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Clocks of things that potluck times by what it measures. Every value is accepted.
_TIMING = frozenset(
    {
        "backoff_rate",
        "blacklist_time",
        "cache_refresh_before_expiry",
        "idle_timeout",
        "refresh_timeout",
        "startup_timeout",
    }
)
_SIZES = "potluck sizes its routing table, its caches and its requests by itself"
_CACHE = "potluck keeps no copies of what it has found: get() asks where a record is kept"
_FINDS_OUT = "potluck finds out by itself who can be dialled"
_OLD = "hivemind ignores it too; give addresses in host_maddrs, such as /ip4/0.0.0.0/udp/0/quic-v1"
# Option -> the values that change nothing (hivemind's default, and what potluck does), and why no other can have an effect.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_nat": ((True,), _FINDS_OUT),
    "bucket_size": ((20,), _SIZES),
    "cache_locally": ((True, False), ""),
    "cache_nearest": ((1, 0), _CACHE),
    "cache_on_store": ((True, False), ""),
    "cache_size": ((None, 0), _CACHE),
    "check_if_identity_free": ((True,), "two peers of one identity would be one peer to all others"),
    "chunk_size": ((16,), _SIZES),
    "conn_manager": ((True,), "potluck always bounds its connections"),
    "daemon": ((True,), "potluck runs in threads of this process, which end with it"),
    "depth_modulo": ((5,), _SIZES),
    "dht_mode": (("server", "auto"), "a peer that nobody can dial is one with client_mode=True"),
    "parallel_rpc": ((None,), _SIZES),
    "persistent_conn_max_msg_size": ((4 * 1024 * 1024,), "potluck sends what is large in pieces"),
    "quic": ((None, False), _OLD),
    "relay_hop_limit": ((0,), "a relay carries one hop; relay_server=True makes this peer one"),
    "reuse_get_requests": ((True,), _SIZES),
    "strict": ((True,), "potluck proves the identity of every peer it talks to"),
    "tls": ((True,), "every connection is encrypted; either side may choose Noise or TLS"),
    "use_auto_relay": ((True, False), ""),
    "use_ipfs": (
        (False, None),
        "potluck peers find each other through the run's own peers, not through IPFS: give initial_peers",
    ),
    "use_relay": (
        (True,),
        "a relay is used only where no direct way leads to a peer; announce_maddrs=[...] tells others a direct one",
    ),
    "use_relay_discovery": ((None, False), _OLD),
    "use_relay_hop": ((None, False), _OLD),
    # Of no use at any value but the absent one.
    "authorizer": ((None,), "closed runs use invites in the token"),
    "force_reachability": ((None,), _FINDS_OUT),
    "identity": ((None,), "use identity_path"),
    "no_listen": ((False,), "use client_mode=True"),
    "node_id": ((None,), "the node id follows from the peer's key"),
    "p2p": ((None,), "potluck has no side daemon to share"),
    "record_validator": ((None,), "use record_validators=[...]"),
    "trusted_relays": ((None,), "relays are found among the run's peers"),
}


def check(given: Mapping[str, Any]) -> None:
    """Refuse what could have no effect, with the reason."""
    for name, value in given.items():
        if name in _TIMING:
            continue
        if name not in _FIXED:
            raise TypeError(f"DHT() got an unexpected keyword argument {name!r}")
        values, reason = _FIXED[name]
        if not any(type(value) is type(same) and value == same for same in values):
            raise ValueError(f"{name}={value!r} cannot have an effect: {reason}")
