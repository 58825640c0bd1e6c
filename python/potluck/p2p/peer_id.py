"""Who a peer is: the multihash of its public key."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from potluck.p2p.multiaddr import Multiaddr

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class PeerID:
    """A peer's public name. Compares, sorts and hashes by its bytes."""

    __slots__ = ("_bytes",)

    def __init__(self, peer_id_bytes: bytes):
        self._bytes = bytes(peer_id_bytes)

    def to_bytes(self) -> bytes:
        """The multihash."""
        return self._bytes

    def to_base58(self) -> str:
        """The text form."""
        number, text = int.from_bytes(self._bytes, "big"), ""
        while number:
            number, digit = divmod(number, 58)
            text = _ALPHABET[digit] + text
        zeros = len(self._bytes) - len(self._bytes.lstrip(b"\0"))
        return "1" * zeros + text

    to_string = to_base58

    @classmethod
    def from_base58(cls, text: str) -> PeerID:
        """Read the text form."""
        number = 0
        for letter in text:
            digit = _ALPHABET.find(letter)
            if digit < 0:
                raise ValueError(f"{text!r} is no peer id: {letter!r} does not occur in one")
            number = number * 58 + digit
        zeros = len(text) - len(text.lstrip("1"))
        return cls(b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big"))

    def __str__(self) -> str:
        return self.to_base58()

    def __repr__(self) -> str:
        return f"<potluck.p2p.PeerID ({self.to_base58()})>"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return self.to_base58() == other
        if isinstance(other, bytes):
            return self._bytes == other
        return isinstance(other, PeerID) and self._bytes == other._bytes

    def __lt__(self, other: PeerID) -> bool:
        return self._bytes < other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)


@dataclasses.dataclass(frozen=True)
class PeerInfo:
    """A peer and its addresses."""

    peer_id: PeerID
    addrs: Sequence[Multiaddr]
