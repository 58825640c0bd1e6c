"""The shape, type and place of a tensor, without its values."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from potluck.utils.serializer import MSGPackSerializer

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(repr=True, frozen=True)
class DescriptorBase:
    """A description of something."""


@dataclasses.dataclass(repr=True, frozen=True)
class TensorDescriptor(DescriptorBase):
    """What :func:`torch.empty` needs to make such a tensor."""

    size: tuple[int, ...]
    dtype: Any = None
    layout: Any = None
    device: Any = None
    requires_grad: bool = False
    pin_memory: bool = False
    compression: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Another name of ``size``."""
        return self.size

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> TensorDescriptor:
        """The description of ``tensor``."""
        pinned = tensor.device.type == "cpu" and tensor.is_pinned()
        return cls(
            tuple(tensor.shape), tensor.dtype, tensor.layout, tensor.device, tensor.requires_grad, pinned
        )

    def make_zeros(self, **overrides: Any) -> torch.Tensor:
        """A tensor of zeros of this description."""
        import torch

        kwargs: dict[str, Any] = {
            "dtype": self.dtype,
            "device": self.device,
            "requires_grad": self.requires_grad,
        }
        return torch.zeros(self.size, **{**kwargs, **overrides})

    make_empty = make_zeros


@MSGPackSerializer.ext_serializable(0x51)
@dataclasses.dataclass(repr=True, frozen=True)
class BatchTensorDescriptor(TensorDescriptor):
    """A tensor whose first dimension is a batch of any size."""

    def __init__(self, *instance_size: int, **kwargs: Any):
        super().__init__((0, *instance_size), **kwargs)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> BatchTensorDescriptor:
        """The description of one item of the batch ``tensor``."""
        return cls(
            *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad
        )

    def make_zeros(self, batch_size: int = 0, **overrides: Any) -> torch.Tensor:
        """A batch of zeros."""
        import torch

        kwargs: dict[str, Any] = {
            "dtype": self.dtype,
            "device": self.device,
            "requires_grad": self.requires_grad,
        }
        return torch.zeros((batch_size, *self.size[1:]), **{**kwargs, **overrides})

    make_empty = make_zeros

    def packb(self) -> bytes:
        """As a value of the DHT: the fields by name, those of torch as text."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        of_torch = {name: None if fields[name] is None else str(fields[name]) for name in _OF_TORCH}
        return MSGPackSerializer.dumps({**fields, **of_torch})

    @classmethod
    def unpackb(cls, raw: bytes) -> BatchTensorDescriptor:
        """What :meth:`packb` wrote; anything else is a ``ValueError``."""
        import torch

        fields = MSGPackSerializer.loads(raw)
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not known >= fields.keys() or "size" not in fields:
            raise ValueError("no description of a batch: expected a dictionary of its fields")
        size = fields.pop("size")
        for name in ("dtype", "layout"):
            if (text := fields.get(name)) is not None:
                # Not by getattr, for which torch imports modules of some names.
                fields[name] = vars(torch).get(str(text).removeprefix("torch."))
                if not isinstance(fields[name], getattr(torch, name)):
                    raise ValueError(f"{name}={text!r}: not known here")
        try:
            if fields.get("device") is not None:
                fields["device"] = torch.device(fields["device"])
            return cls(*(int(length) for length in size[1:]), **fields)
        except (TypeError, RuntimeError, OverflowError, LookupError) as error:
            raise ValueError(f"no description of a batch: {error}") from None


# Fields whose values are torch's.
_OF_TORCH = ("dtype", "layout", "device")
