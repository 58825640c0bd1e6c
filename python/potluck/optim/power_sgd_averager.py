"""PowerSGD: matrices of gradients travel as two thin factors, and what that loses is added next time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from potluck.optim.grad_averager import GradientAverager


class PowerSGDGradientAverager(GradientAverager):
    """A :class:`GradientAverager` with low-rank compression (arXiv:1905.13727).

    ``averager_rank`` columns per factor; only tensors that shrink by at least ``min_compression_ratio`` are factored.
    Factors and error memory live in the Rust core: they change only when a round succeeds, start from the run's name,
    and are part of the state that newcomers load.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        averager_rank: int,
        *,
        dht: Any,
        prefix: str,
        reuse_grad_buffers: bool = False,
        accumulate_grads_on: torch.device | str | None = None,
        client_mode: bool | None = None,
        warn: bool = True,
        min_compression_ratio: float = 0.5,
        averaged_grads: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ):
        if isinstance(averager_rank, bool) or not isinstance(averager_rank, int) or averager_rank < 1:
            raise ValueError(f"averager_rank={averager_rank!r}: expected an integer of at least 1")
        if not 0 <= min_compression_ratio < 1:
            raise ValueError(f"min_compression_ratio={min_compression_ratio!r}: expected 0 <= ratio < 1")
        self.rank = averager_rank
        self.min_compression_ratio = min_compression_ratio
        super().__init__(
            parameters,
            dht=dht,
            prefix=prefix,
            reuse_grad_buffers=reuse_grad_buffers,
            accumulate_grads_on=accumulate_grads_on,
            client_mode=client_mode,
            warn=warn,
            averaged_grads=averaged_grads or (),
            **kwargs,
        )

    def powersgd(self) -> dict[str, Any] | None:
        return {"rank": self.rank, "min_compression_ratio": self.min_compression_ratio}
