"""The mean loss of an epoch's batches, kept where the losses are."""

from __future__ import annotations

import math

import torch


class LossTally:
    """Sums on the device of the losses. To read a number there waits for all that was computed before."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._mean: float | None = None
        self._ended = False

    def add(self, loss: float | torch.Tensor) -> bool:
        """Take up the loss of one batch; one that is not finite does not count. Whether the mean is known without waiting."""
        if not isinstance(loss, torch.Tensor):
            loss = torch.tensor(float(loss), dtype=torch.float64)
        loss = loss.detach().reshape(())
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        finite = torch.isfinite(loss)
        sums = torch.stack([torch.where(finite, loss, torch.zeros_like(loss)), finite.to(loss.dtype)])
        if self._sums is None or self._ended:
            self._sums, self._ended = sums, False
        else:
            self._sums = self._sums.to(sums.device, sums.dtype) + sums
        self._mean = None
        return loss.device.type == "cpu"

    def mean(self) -> float | None:
        """Of this epoch, or of the last one until there is a loss again; None if there is none that is finite."""
        if self._mean is None and self._sums is not None:
            total, count = self._sums.tolist()
            self._mean = total / count if count else math.nan
        return None if self._mean is None or math.isnan(self._mean) else self._mean

    def end_epoch(self) -> None:
        """The next loss is the first of another epoch."""
        self._ended = True
