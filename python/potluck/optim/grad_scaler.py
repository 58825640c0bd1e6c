"""A gradient scaler that also takes float16 parameters. The stock ``torch.amp.GradScaler`` works as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for a :class:`potluck.Optimizer` whose parameters may be float16 themselves.

    It unscales each backward pass before the optimizer gathers it, so that peers with different scales average
    gradients of one scale; a pass that overflowed is left out, and the scale of this peer falls.
    """

    def __init__(self, device: str = "cuda", **kwargs: Any):
        super().__init__(device, **kwargs)
        self._clean_steps = 0
        self._half: dict[int, bool] = {}

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale."""
        _ask(optimizer)
        if not self.is_enabled() or not _has_half(optimizer):
            super().unscale_(optimizer)
            return
        if id(optimizer) in self._half:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        inverse, finite = 1.0 / self.get_scale(), True
        for grad in _grads(optimizer):
            # In float32: the reciprocal of a large scale is zero in float16.
            plain = grad.float().mul_(inverse)
            grad.copy_(plain)
            finite = finite and bool(torch.isfinite(plain).all())
        self._half[id(optimizer)] = finite

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Unscale unless that was done, and step unless a gradient overflowed."""
        _ask(optimizer)
        if not self.is_enabled() or not _has_half(optimizer):
            return super().step(optimizer, *args, **kwargs)
        if id(optimizer) not in self._half:
            self.unscale_(optimizer)
        return optimizer.step(*args, **kwargs) if self._half[id(optimizer)] else None

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Let the scale grow, or fall after an overflow."""
        if not self._half or new_scale is not None:
            self._half.clear()
            super().update(new_scale)
            return
        scale, finite = self.get_scale(), all(self._half.values())
        self._half.clear()
        self._clean_steps = self._clean_steps + 1 if finite else 0
        if not finite:
            scale *= self.get_backoff_factor()
        elif self._clean_steps >= self.get_growth_interval():
            scale, self._clean_steps = scale * self.get_growth_factor(), 0
        super().update(scale)

    @contextmanager
    def running_global_step(self) -> Iterator[None]:
        """Kept for hivemind's scripts: gradients are unscaled before they are gathered, so nothing differs inside."""
        yield

    def are_grads_finite(self, optimizer: torch.optim.Optimizer, use_cached: bool = False) -> bool:
        """Whether every gradient is finite."""
        if use_cached and id(optimizer) in self._half:
            return self._half[id(optimizer)]
        return all(bool(torch.isfinite(grad).all()) for grad in _grads(optimizer))


def _grads(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter.grad


def _ask(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer refuse to be scaled, as the stock scaler does in the end."""
    getattr(optimizer, "_step_supports_amp_scaling", None)


def _has_half(optimizer: torch.optim.Optimizer) -> bool:
    return any(grad.dtype == torch.float16 for grad in _grads(optimizer))
