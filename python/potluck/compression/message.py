"""A tensor as it travels: hivemind's protobuf ``Tensor``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from potluck import _core

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass
class SerializedTensor:
    """The fields of hivemind's ``runtime.proto`` message ``Tensor``."""

    buffer: bytes = b""
    size: list[int] = dataclasses.field(default_factory=list)
    requires_grad: bool = False
    dtype: str = ""
    compression: int = 0
    chunks: int = 0

    def SerializeToString(self) -> bytes:
        """The protobuf form."""
        return _core.encode_message(
            bytes(self.buffer),
            list(self.size),
            self.requires_grad,
            self.dtype,
            int(self.compression),
            self.chunks,
        )

    @classmethod
    def FromString(cls, data: bytes) -> SerializedTensor:
        """Read the protobuf form; a malformed one is a ``ValueError`` that names the field."""
        return cls(*_core.decode_message(data))

    def ByteSize(self) -> int:
        """Length of the protobuf form."""
        return len(self.SerializeToString())

    def tensor(self) -> torch.Tensor:
        """Decode."""
        import torch

        dtype: Any = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: unknown value {self.dtype!r}")
        raw = _core.decode(bytes(self.buffer), list(self.size), self.dtype, int(self.compression))
        if len(raw) == 0:
            tensor = torch.empty(self.size, dtype=dtype)
        else:
            tensor = torch.frombuffer(raw, dtype=dtype).reshape(self.size)
        return tensor.requires_grad_(self.requires_grad)
