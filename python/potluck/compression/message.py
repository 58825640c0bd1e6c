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
    #: What :meth:`CompressionBase.compress` had to change besides rounding: values that were clamped to the scheme's
    #: range, and NaN that travel as NaN. Both stay with the sender.
    saturated: int = dataclasses.field(default=0, compare=False)
    nan: int = dataclasses.field(default=0, compare=False)

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
        size = list(self.size)
        elements = _core.decode(bytes(self.buffer), size, self.dtype, int(self.compression))
        tensor = torch.empty(size, dtype=dtype) if 0 in size else torch.from_dlpack(elements)
        return tensor.requires_grad_(self.requires_grad)
