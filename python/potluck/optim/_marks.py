"""Whether a backward pass happened: a batch that was skipped has no samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class GradientMarks:
    """Remembers what lay in ``.grad``, where it stays there from one pass to the next."""

    def __init__(self, parameters: Sequence[torch.Tensor], stays: bool):
        self._parameters, self._stays = parameters, stays
        self._taken: list[tuple[int, int] | None] = []

    def _now(self) -> list[tuple[int, int] | None]:
        # Each pass adds to a gradient in place, which its version counts.
        return [None if p.grad is None else (id(p.grad), p.grad._version) for p in self._parameters]

    def take(self) -> None:
        """After a pass was counted."""
        if self._stays:
            self._taken = self._now()

    def nothing_new(self, no_loss: bool) -> bool:
        """Whether there are no gradients of a pass since then; without a loss, zeros are none either."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if not grads:
            return True
        if self._stays:
            return self._taken == self._now()
        return no_loss and not any(bool(grad.any()) for grad in grads)
