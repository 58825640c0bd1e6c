"""Splitting of messages into pieces and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potluck.compression.message import SerializedTensor

STREAMING_CHUNK_SIZE_BYTES = 2**16


def split_for_streaming(
    serialized_tensor: SerializedTensor, chunk_size_bytes: int = STREAMING_CHUNK_SIZE_BYTES
) -> Iterator[SerializedTensor]:
    """The chunks of one tensor; the first carries everything but the rest of the buffer."""
    buffer = memoryview(serialized_tensor.buffer)
    count = -(-len(buffer) // chunk_size_bytes)
    yield dataclasses.replace(serialized_tensor, buffer=bytes(buffer[:chunk_size_bytes]), chunks=count)
    empty = type(serialized_tensor)
    for start in range(chunk_size_bytes, len(buffer), chunk_size_bytes):
        yield empty(buffer=bytes(buffer[start : start + chunk_size_bytes]))


def combine_from_streaming(stream: Iterator[SerializedTensor]) -> SerializedTensor:
    """Join the chunks of one tensor."""
    from potluck.compression.serialization import combine_from_streaming as combine

    return combine(stream)
