"""Records that only their owner can write."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from typing import Any

from potluck.dht.validation import DHTRecord, RecordValidatorBase
from potluck.utils.crypto import RSAPrivateKey, RSAPublicKey
from potluck.utils.serializer import MSGPackSerializer

_OWNER = re.compile(rb"\[owner:(.+?)\]")
_SIGNATURE = re.compile(rb"\[signature:(.+?)\]")


class RSASignatureValidator(RecordValidatorBase):
    """Signs records whose key or subkey holds ``local_public_key``, and refuses forgeries of others'.

    Byte for byte hivemind's signatures. Needs the package ``cryptography``. potluck's own records need none of this:
    the Rust side signs them with the peer's Ed25519 key.
    """

    def __init__(self, private_key: RSAPrivateKey | None = None):
        self._private_key = private_key or RSAPrivateKey.process_wide()
        public = self._private_key.get_public_key().to_bytes()
        self._local_public_key = b"[owner:" + public + b"]"

    @property
    def local_public_key(self) -> bytes:
        """Put this into a subkey to protect it."""
        return self._local_public_key

    def validate(self, record: DHTRecord) -> bool:
        owners = {*_OWNER.findall(record.key), *_OWNER.findall(record.subkey)}
        if not owners:
            return True
        signatures = _SIGNATURE.findall(record.value)
        if len(owners) > 1 or len(signatures) != 1:
            return False
        key = _public_key(owners.pop())
        if key is None:
            return False
        plain = dataclasses.replace(record, value=self.strip_value(record))
        return key.verify(self._message(plain), signatures[0])

    def sign_value(self, record: DHTRecord) -> bytes:
        if self._local_public_key not in record.key and self._local_public_key not in record.subkey:
            return record.value
        return record.value + b"[signature:" + self._private_key.sign(self._message(record)) + b"]"

    def strip_value(self, record: DHTRecord) -> bytes:
        return _SIGNATURE.sub(b"", record.value)

    @staticmethod
    def _message(record: DHTRecord) -> bytes:
        # The expiration is no part of it: potluck sends durations, and a copy that is handed on has less time left.
        return MSGPackSerializer.dumps((record.key, record.subkey, record.value))

    @property
    def priority(self) -> int:
        return 10

    def merge_with(self, other: Any) -> bool:
        # Signing twice with one key would make the record invalid.
        return bool(
            isinstance(other, RSASignatureValidator) and other.local_public_key == self.local_public_key
        )


@lru_cache(maxsize=1000)
def _public_key(line: bytes) -> RSAPublicKey | None:
    try:
        return RSAPublicKey.from_bytes(line)
    except Exception:
        # Whatever a stranger puts in there, it is no key.
        return None
