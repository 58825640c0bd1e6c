"""Addresses as text: ``/ip4/1.2.3.4/tcp/31337/p2p/12D3Koo…``."""

from __future__ import annotations


class Multiaddr:
    """A multiaddress. Compares and hashes by its text; ``str()`` gives it back."""

    __slots__ = ("_text",)

    def __init__(self, address: str | Multiaddr):
        text = str(address).strip().rstrip("/")
        if not text.startswith("/") or len(text.split("/")) < 3:
            raise ValueError(
                f"{text!r} is not a multiaddress: expected something like /ip4/1.2.3.4/tcp/31337"
            )
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"<Multiaddr {self._text}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Multiaddr, str)) and str(other) == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __contains__(self, protocol: str) -> bool:
        return protocol in self.protocols()

    def protocols(self) -> list[str]:
        """The protocol names in order."""
        return [name for name, _ in self._pairs()]

    def value_for_protocol(self, protocol: str) -> str | None:
        """The value behind the first ``protocol``, or None."""
        return next((value for name, value in self._pairs() if name == protocol), None)

    def __getitem__(self, protocol: str) -> str:
        value = self.value_for_protocol(protocol)
        if value is None:
            raise KeyError(f"{protocol} is not part of {self._text}")
        return value

    @property
    def peer_id(self) -> str | None:
        """The peer that the whole address leads to: the last ``/p2p/``."""
        return next((value for name, value in reversed(self._pairs()) if name == "p2p"), None)

    def encapsulate(self, other: str | Multiaddr) -> Multiaddr:
        """This address with another one behind it."""
        return Multiaddr(f"{self._text}{Multiaddr(other)}")

    def decapsulate(self, other: str | Multiaddr) -> Multiaddr:
        """This address up to the last occurrence of another."""
        at = self._text.rfind(str(other))
        return Multiaddr(self._text[:at]) if at > 0 else self

    def _pairs(self) -> list[tuple[str, str]]:
        words = self._text.split("/")[1:]
        pairs: list[tuple[str, str]] = []
        at = 0
        while at < len(words):
            name = words[at]
            if name in _NO_VALUE or at + 1 == len(words):
                pairs.append((name, ""))
                at += 1
            else:
                pairs.append((name, words[at + 1]))
                at += 2
        return pairs


_NO_VALUE = frozenset({"quic", "quic-v1", "ws", "wss", "tls", "noise", "p2p-circuit", "webtransport"})
