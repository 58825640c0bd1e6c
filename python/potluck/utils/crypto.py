"""RSA keys in hivemind's forms. Needs the package ``cryptography``, which is loaded on first use."""

from __future__ import annotations

import base64
import threading
from typing import Any


def _modules() -> Any:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import padding, rsa
    except ImportError as error:
        raise ImportError("RSA signatures need the package cryptography: pip install cryptography") from error
    return exceptions, hashes, serialization, padding, rsa


def _pss() -> tuple[Any, Any]:
    _, hashes, _, padding, _ = _modules()
    return padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH), hashes.SHA256()


class RSAPublicKey:
    """Checks signatures."""

    def __init__(self, public_key: Any):
        self._key = public_key

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether the base64 ``signature`` over ``data`` is of this key."""
        exceptions = _modules()[0]
        padding, digest = _pss()
        try:
            self._key.verify(base64.b64decode(signature, validate=True), data, padding, digest)
        except (ValueError, exceptions.InvalidSignature):
            return False
        return True

    def to_bytes(self) -> bytes:
        """The OpenSSH line."""
        serialization = _modules()[2]
        return bytes(
            self._key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        )

    @classmethod
    def from_bytes(cls, key: bytes) -> RSAPublicKey:
        """Read the OpenSSH line; ``ValueError`` if it is none of an RSA key."""
        _, _, serialization, _, rsa = _modules()
        loaded = serialization.load_ssh_public_key(key)
        if not isinstance(loaded, rsa.RSAPublicKey):
            raise ValueError("expected an RSA key")
        return cls(loaded)


class RSAPrivateKey:
    """Makes signatures."""

    _process_wide: RSAPrivateKey | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._key = _modules()[4].generate_private_key(public_exponent=65537, key_size=2048)

    @classmethod
    def process_wide(cls) -> RSAPrivateKey:
        """One key for the whole process."""
        with cls._lock:
            if cls._process_wide is None:
                cls._process_wide = cls()
            return cls._process_wide

    def sign(self, data: bytes) -> bytes:
        """The signature in base64."""
        padding, digest = _pss()
        return base64.b64encode(self._key.sign(data, padding, digest))

    def to_bytes(self) -> bytes:
        """The key itself (DER, not encrypted): a secret."""
        serialization = _modules()[2]
        return bytes(
            self._key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )

    def get_public_key(self) -> RSAPublicKey:
        """The half that others get."""
        return RSAPublicKey(self._key.public_key())
