"""The training text: Python's own language reference, which every Python carries in ``pydoc_data``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = 256
_HELD_OUT = 0.05


def load(context: int) -> tuple[Crops, Crops]:
    """Crops to train on, and crops of a part of the text that is never trained on."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit(
            "the demonstration trains on the text of Python's module pydoc_data.topics, which this Python lacks: "
            f"{error} (on Debian and Ubuntu: apt install libpython3-stdlib)"
        ) from error
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    text = torch.frombuffer(bytearray(joined, "utf-8"), dtype=torch.uint8)
    cut = int(len(text) * (1 - _HELD_OUT))
    return Crops(text[:cut], context), Crops(text[cut:], context)


class Crops(Dataset):
    """Every stretch of ``context`` bytes, with the byte that follows each position as its label."""

    def __init__(self, text: Tensor, context: int) -> None:
        self._text = text
        self._context = context

    def __len__(self) -> int:
        return len(self._text) - self._context - 1

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        stretch = self._text[start : start + self._context + 1].long()
        return stretch[:-1], stretch[1:]

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` crops at even distances, the same ones every time."""
        starts = torch.linspace(0, len(self) - 1, count).long().tolist()
        pairs = [self[start] for start in starts]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
