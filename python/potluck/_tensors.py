"""Flat vectors and the tensors that are views of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from potluck import _core


class FlatTensors:
    """One f32 vector owned by Rust, and a torch view of it per tensor. What torch writes, Rust averages."""

    def __init__(self, shapes: Iterable[Sequence[int]]):
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.buffer = _core.FlatBuffer(sum(math.prod(shape) for shape in self.shapes))
        self.views = views_of(self.buffer, self.shapes)

    def release(self) -> None:
        """Let go of the memory."""
        self.shapes, self.views, self.buffer = [], [], _core.FlatBuffer(0)

    def load(self, buffer: _core.FlatBuffer) -> None:
        """Copy another buffer of the same layout."""
        flat(self.buffer).copy_(flat(buffer))


def flat(buffer: _core.FlatBuffer) -> torch.Tensor:
    """The whole buffer as a tensor, without copying."""
    return torch.from_dlpack(buffer)


def views_of(buffer: _core.FlatBuffer, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """One view per shape, in order."""
    whole, views, start = flat(buffer), [], 0
    for shape in shapes:
        count = math.prod(shape)
        views.append(whole[start : start + count].view(shape))
        start += count
    return views
