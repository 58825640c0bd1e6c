"""Functions that encode one tensor, and decode one tensor or a stream of its chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from potluck.compression.base import (
    CompressionBase,
    CompressionInfo,
    CompressionType,
    NoCompression,
)
from potluck.compression.floating import BFloat16Compression, Float16Compression, ScaledFloat16Compression
from potluck.compression.message import SerializedTensor
from potluck.compression.quantization import (
    Blockwise4BitQuantization,
    BlockwiseQuantization,
    Quantile8BitQuantization,
    Uniform8BitQuantization,
)

if TYPE_CHECKING:
    import torch

BASE_COMPRESSION_TYPES: dict[str, CompressionBase] = {
    rule.compression_type.name: rule
    for rule in (
        NoCompression(),
        Float16Compression(),
        ScaledFloat16Compression(),
        BFloat16Compression(),
        Uniform8BitQuantization(),
        Quantile8BitQuantization(),
        BlockwiseQuantization(),
        Blockwise4BitQuantization(),
    )
}


def serialize_torch_tensor(
    tensor: torch.Tensor,
    compression_type: int = CompressionType.NONE,
    info: CompressionInfo | None = None,
    allow_inplace: bool = False,
    **kwargs: object,
) -> SerializedTensor:
    """Encode a tensor in the scheme of this number."""
    rule = BASE_COMPRESSION_TYPES[CompressionType(compression_type).name]
    info = info or CompressionInfo.from_tensor(tensor, **kwargs)
    return rule.compress(tensor, info, allow_inplace)


def deserialize_torch_tensor(serialized_tensor: SerializedTensor) -> torch.Tensor:
    """Decode a tensor."""
    return serialized_tensor.tensor()


async def deserialize_tensor_stream(stream: AsyncIterator[Iterable[SerializedTensor]]) -> list[torch.Tensor]:
    """Decode tensors that arrive in chunks; a chunk with an element type starts a new tensor."""
    tensors: list[torch.Tensor] = []
    chunks: list[SerializedTensor] = []
    async for message in stream:
        for chunk in message:
            if chunk.dtype and chunks:
                tensors.append(combine_from_streaming(chunks).tensor())
                chunks = []
            chunks.append(chunk)
    if chunks:
        tensors.append(combine_from_streaming(chunks).tensor())
    return tensors


def combine_from_streaming(chunks: Iterable[SerializedTensor]) -> SerializedTensor:
    """Join the chunks of one tensor."""
    parts = list(chunks)
    if not parts:
        raise ValueError("a tensor has at least one chunk")
    first = parts[0]
    buffer = b"".join(part.buffer for part in parts)
    return SerializedTensor(buffer, list(first.size), first.requires_grad, first.dtype, first.compression, 0)
