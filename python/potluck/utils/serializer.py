"""Values of DHT records as msgpack, byte for byte as hivemind writes them. Nothing is ever unpickled."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import msgpack

C = TypeVar("C", bound=type)


class SerializerBase(ABC):
    """Something that turns values into bytes and back."""

    @staticmethod
    @abstractmethod
    def dumps(obj: object) -> bytes:
        """Value to bytes."""

    @staticmethod
    @abstractmethod
    def loads(buf: bytes) -> Any:
        """Bytes to value."""


class MSGPackSerializer(SerializerBase):
    """msgpack with tuples (extension 0x40) and classes that register an extension of their own."""

    _TUPLE = 0x40
    _packers: dict[type, int] = {}  # noqa: RUF012
    _unpackers: dict[int, type] = {}  # noqa: RUF012
    # Each level of extensions within extensions costs the reader much stack, and msgpack itself has no limit for them.
    # The Rust side reads as many.
    _DEPTH_MAX = 32
    _nested = threading.local()

    @classmethod
    def ext_serializable(cls, type_code: int) -> Callable[[C], C]:
        """Register a class with ``packb(self) -> bytes`` and ``unpackb(cls, bytes)`` under an extension number."""
        if not isinstance(type_code, int) or type_code == cls._TUPLE:
            raise ValueError(f"type_code={type_code!r}: expected a number other than {cls._TUPLE}")

        def register(wrapped: C) -> C:
            if not (hasattr(wrapped, "packb") and hasattr(wrapped, "unpackb")):
                raise TypeError(f"{wrapped.__name__} needs packb and unpackb")
            cls._packers[wrapped] = type_code
            cls._unpackers[type_code] = wrapped
            return wrapped

        return register

    @classmethod
    def _encode(cls, obj: Any) -> Any:
        code = cls._packers.get(type(obj))
        if code is not None:
            return msgpack.ExtType(code, obj.packb())
        if isinstance(obj, tuple):
            data = msgpack.packb(list(obj), strict_types=True, use_bin_type=True, default=cls._encode)
            return msgpack.ExtType(cls._TUPLE, data)
        raise TypeError(
            f"cannot store a {type(obj).__name__} in the DHT: use numbers, text, bytes, lists, dicts"
        )

    @classmethod
    def _decode(cls, code: int, data: bytes) -> Any:
        if code not in cls._unpackers and code != cls._TUPLE:
            return msgpack.ExtType(code, data)
        depth = getattr(cls._nested, "depth", 0)
        if depth >= cls._DEPTH_MAX:
            raise ValueError(f"nested deeper than {cls._DEPTH_MAX}")
        cls._nested.depth = depth + 1
        try:
            if code in cls._unpackers:
                return cls._unpackers[code].unpackb(data)  # type: ignore[attr-defined]
            items = msgpack.unpackb(data, ext_hook=cls._decode, raw=False, strict_map_key=False)
        except ValueError:
            raise  # of a level below; told once
        except Exception as error:  # classes of the program's own read this, too
            raise ValueError(f"extension {code}: {error!r}") from error
        finally:
            cls._nested.depth = depth
        if not isinstance(items, list):
            raise ValueError("a tuple that holds no array")
        return tuple(items)

    @staticmethod
    def dumps(obj: object) -> bytes:
        """Value to bytes."""
        return bytes(
            msgpack.packb(obj, use_bin_type=True, default=MSGPackSerializer._encode, strict_types=True)
        )

    @staticmethod
    def loads(buf: bytes) -> Any:
        """Bytes to value; a malformed buffer is a ``ValueError``."""
        try:
            return msgpack.unpackb(buf, ext_hook=MSGPackSerializer._decode, raw=False, strict_map_key=False)
        except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not a msgpack value: {error}") from error
