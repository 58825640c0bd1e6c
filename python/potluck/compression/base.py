"""What every compression class shares, and the description of a tensor that policies look at."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any

from potluck import _core
from potluck.compression.message import SerializedTensor

if TYPE_CHECKING:
    import torch

Key = Any
BITS_PER_VALUE = {wire_id: bits for _, wire_id, bits in _core.schemes()}
SCHEME_NAMES = {wire_id: name for name, wire_id, _ in _core.schemes()}


class CompressionType(IntEnum):
    """The number of a scheme on the wire: hivemind's below 64, potluck's own from 64."""

    NONE = 0
    MEANSTD_16BIT = 1
    FLOAT16 = 2
    QUANTILE_8BIT = 3
    UNIFORM_8BIT = 4
    BLOCKWISE_8BIT = 5
    BFLOAT16 = 64
    BLOCKWISE_4BIT = 65


class TensorRole(Enum):
    """What a tensor is for."""

    ACTIVATION = 0
    PARAMETER = 1
    GRADIENT = 2
    OPTIMIZER = 3
    UNSPECIFIED = 4


@dataclasses.dataclass(frozen=True)
class CompressionInfo:
    """What a policy may look at: key, shape and role of a tensor, never its values."""

    key: Key
    descriptor: Any
    role: TensorRole = TensorRole.UNSPECIFIED
    part_index: int = 0
    part_size: int | None = None

    @classmethod
    def from_tensor(
        cls, tensor: torch.Tensor, key: Key = None, descriptor: Any = None, **kwargs: Any
    ) -> CompressionInfo:
        """The description of ``tensor``."""
        from potluck.utils.tensor_descr import TensorDescriptor

        return cls(key, descriptor or TensorDescriptor.from_tensor(tensor), **kwargs)

    def get_part(self, part_index: int, part_size: int | None) -> CompressionInfo:
        """The description of one part of this tensor."""
        return dataclasses.replace(self, part_index=part_index, part_size=part_size)


def key_text(key: Hashable) -> str:
    """The form in which a key travels in a policy."""
    return "" if key is None else str(key)


class CompressionBase:
    """A rule that turns tensors into messages. Equal on all peers of a run."""

    def policy(self) -> Any:
        """The rule as plain data: what the Rust core uses, and what peers compare."""
        raise NotImplementedError

    def names(self) -> set[str]:
        """The tensors that rules of it are for, by name."""
        return set()

    @property
    def policy_json(self) -> str:
        """:meth:`policy` as text."""
        return json.dumps(self.policy(), sort_keys=True)

    def scheme_for(self, info: CompressionInfo) -> CompressionType:
        """The scheme that the rule chooses for a tensor."""
        shape = list(info.descriptor.size)
        return CompressionType(_core.scheme_for(self.policy_json, key_text(info.key), shape, info.role.name))

    def compress(
        self, tensor: torch.Tensor, info: CompressionInfo | None = None, allow_inplace: bool = False
    ) -> SerializedTensor:
        """Encode a tensor. ``allow_inplace`` is a permission; the tensor is never changed.

        Values that the scheme cannot express are refused (``ValueError`` with the index of the first), or clamped and
        counted in the message's ``saturated`` and ``nan``.
        """
        info = CompressionInfo.from_tensor(tensor) if info is None else info
        scheme = self.scheme_for(info)
        plain = tensor.detach().cpu().contiguous()
        buffer, size, dtype, saturated, nan = _core.encode(plain, int(scheme))
        return SerializedTensor(
            buffer=buffer,
            size=list(size),
            requires_grad=tensor.requires_grad,
            dtype=dtype,
            compression=scheme,
            saturated=saturated,
            nan=nan,
        )

    def extract(self, serialized_tensor: SerializedTensor) -> torch.Tensor:
        """Decode a message that this or any other class made."""
        return serialized_tensor.tensor()

    def estimate_compression_ratio(self, info: CompressionInfo) -> float:
        """Encoded bits over the bits of the original, without headers."""
        import torch

        dtype = info.descriptor.dtype
        bits = torch.finfo(dtype).bits if dtype.is_floating_point else _integer_bits(dtype)
        scheme = int(self.scheme_for(info))
        return 1.0 if scheme == 0 else BITS_PER_VALUE[scheme] / bits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompressionBase) and self.policy() == other.policy()

    def __hash__(self) -> int:
        return hash(self.policy_json)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _integer_bits(dtype: torch.dtype) -> int:
    import torch

    return 8 if dtype == torch.bool else torch.iinfo(dtype).bits


class FixedCompression(CompressionBase):
    """One scheme for every tensor."""

    compression_type: CompressionType

    def policy(self) -> Any:
        return {"Fixed": SCHEME_VARIANTS[self.compression_type]}


# How the Rust enum names its variants (serde).
SCHEME_VARIANTS = {
    CompressionType.NONE: "None",
    CompressionType.MEANSTD_16BIT: "ScaledFloat16",
    CompressionType.FLOAT16: "Float16",
    CompressionType.QUANTILE_8BIT: "Quantile8Bit",
    CompressionType.UNIFORM_8BIT: "Uniform8Bit",
    CompressionType.BLOCKWISE_8BIT: "Blockwise8Bit",
    CompressionType.BFLOAT16: "BFloat16",
    CompressionType.BLOCKWISE_4BIT: "Blockwise4Bit",
}


class NoCompression(FixedCompression):
    """The values themselves."""

    compression_type = CompressionType.NONE
