"""How a peer learns whom to join, and the text it prints so that others can join it."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from potluck.dht.dht import TOKEN_PREFIX, initial_addresses

TOKEN_VARIABLE = "POTLUCK_TOKEN"
PEERS_VARIABLES = ("INITIAL_PEERS", "PL_INITIAL_PEERS")
_KNOWN = (TOKEN_VARIABLE, *PEERS_VARIABLES)


def whom_to_join(initial_peers: str | Sequence[str] | None, token: str | None) -> str | list[str] | None:
    """The addresses or the token to join by, from the arguments or else the environment; None starts a new run.

    Whatever was given is used or refused; nothing is ignored.
    """
    given: dict[str, str | list[str]] = {}
    if token is not None:
        given["token="] = _token("token=", token)
    if initial_peers is not None:
        given["initial_peers="] = _peers("initial_peers=", initial_peers)
    given.update(_environment())
    if len({tuple([value] if isinstance(value, str) else value) for value in given.values()}) > 1:
        raise ValueError(f"{' and '.join(given)} name different peers; give one of them")
    return next(iter(given.values()), None)


def check_beside(dht: Any) -> None:
    """Refuse variables that name other peers than a DHT that runs already: they could have no effect."""
    joined = set(dht.initial_peers)
    for variable, value in _environment().items():
        if set(initial_addresses(value)) != joined:
            raise ValueError(
                f"{variable} cannot have an effect beside dht=, which joins "
                f"{'other peers' if joined else 'nobody'}: unset it, or give its value to potluck.DHT"
            )


def _environment() -> dict[str, str | list[str]]:
    """What the environment says, by variable."""
    _refuse_misspelled_variables()
    given: dict[str, str | list[str]] = {}
    if TOKEN_VARIABLE in os.environ:
        given[TOKEN_VARIABLE] = _token(TOKEN_VARIABLE, os.environ[TOKEN_VARIABLE])
    for variable in PEERS_VARIABLES:
        if variable in os.environ:
            given[variable] = _peers(variable, os.environ[variable])
    return given


def _peers(source: str, value: str | Sequence[str]) -> str | list[str]:
    """Addresses, or a token: ``potluck.DHT`` takes either as well."""
    items = [value] if isinstance(value, str) else list(value)
    if len(items) == 1 and str(items[0]).strip().startswith(TOKEN_PREFIX):
        return _token(source, str(items[0]))
    return _addresses(source, value)


def _token(source: str, text: str) -> str:
    text = text.strip()
    if not text or any(character.isspace() for character in text):
        raise ValueError(f"{source} must be one token as printed by a running peer, got {text!r}")
    return text


def _addresses(source: str, value: str | Sequence[str]) -> list[str]:
    items = value.split(",") if isinstance(value, str) else list(value)
    addresses = [str(item).strip() for item in items if str(item).strip()]
    if not addresses:
        raise ValueError(
            f"{source} is empty: leave it out to start a new run, or give addresses like /ip4/192.0.2.7/tcp/4001/p2p/12D3..."
        )
    for address in addresses:
        if not address.startswith("/") or "/p2p/" not in address or any(map(str.isspace, address)):
            raise ValueError(
                f"{source} holds {address!r}, which is not a peer's address; expected a comma-separated list like "
                "/ip4/192.0.2.7/tcp/4001/p2p/12D3..., or one token, copied from what a running peer printed"
            )
    return addresses


def _refuse_misspelled_variables() -> None:
    for name in os.environ:
        upper = name.upper()
        if name in _KNOWN:
            continue
        if not ("PEERS" in upper or "PEER" in upper.split("_") or upper.startswith("POTLUCK_TO")):
            continue
        close = difflib.get_close_matches(upper, _KNOWN, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"the environment variable {name} has no effect; did you mean {close[0]}?")


def joining_text(addresses: Sequence[str], token: str | None) -> str:
    """What to run elsewhere to train with this peer. Every form of it works as printed."""
    peers = ",".join(str(address) for address in addresses)
    variable, value = (TOKEN_VARIABLE, token) if token else (PEERS_VARIABLES[0], peers)
    argument = f"token={token!r}" if token else f"initial_peers={peers!r}"
    lines = ["To train together with this peer, run the same program on another machine like this:"]
    command = _this_command()
    if command is not None:
        lines.append(f"  {variable}={shlex.quote(value)} {command}")
        lines.append(f"or write it into the program: HivemindStrategy(..., {argument})")
    else:
        lines[0] = "To train together with this peer, use this on another machine:"
        lines.append(f"  HivemindStrategy(..., {argument})")
    return "\n".join(lines)


def _this_command() -> str | None:
    """The command line of this program, if it has one (a notebook has none)."""
    arguments = list(getattr(sys, "orig_argv", []))[1:]
    if not arguments or "ipykernel_launcher" in " ".join(arguments) or "-c" in arguments[:2]:
        return None
    return shlex.join([_interpreter(), *arguments])


def _interpreter() -> str:
    # The other machine has its own virtual environment somewhere else, so only the name is portable.
    return (
        "python"
        if os.path.basename(sys.executable).startswith("python")
        else os.path.basename(sys.executable)
    )
