"""hivemind's older interface: average parameters, gradients or statistics after a step of one's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from potluck import _core
from potluck.averaging.averager import DecentralizedAverager
from potluck.optim.state_averager import initialize_optimizer_state_


class TrainingAverager(DecentralizedAverager):
    """Averages what ``opt`` holds: its parameters, their gradients, its statistics, further tensors."""

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        *,
        average_parameters: bool,
        average_gradients: bool,
        average_opt_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
        parameter_names: Sequence[str] | None = None,
        initialize_optimizer: bool = True,
        **kwargs: Any,
    ):
        self.opt, self.extra_tensors = opt, tuple(extra_tensors)
        self.average_parameters, self.average_gradients = average_parameters, average_gradients
        self.opt_statistics = tuple(average_opt_statistics)
        if self.opt_statistics:
            if not initialize_optimizer:
                raise ValueError(
                    "average_opt_statistics needs initialize_optimizer=True: the statistics must exist"
                )
            initialize_optimizer_state_(opt)
        self.local_step = 0
        self.lock_averager_step = threading.Lock()
        with torch.no_grad():
            copies = [t.detach().cpu().float().clone() for t in self.local_tensors()]
        if not copies:
            raise ValueError("nothing to average: set average_parameters, average_gradients or extra_tensors")
        super().__init__(copies, kwargs.pop("dht"), **kwargs)

    def _show_memory(self, session: _core.Session) -> None:
        super()._show_memory(session)
        self._held = [session.hold_bytes("tensors", sum(t.nbytes for t in self._tensors))]

    def local_tensors(self, replace_none: bool = True) -> Iterator[torch.Tensor]:
        """The tensors of the model and optimizer, in the order in which they are averaged."""
        parameters = [p for group in self.opt.param_groups for p in group["params"] if p.requires_grad]
        if self.average_parameters:
            yield from parameters
        if self.average_gradients:
            for parameter in parameters:
                if parameter.grad is not None:
                    yield parameter.grad
                elif replace_none:
                    yield torch.zeros_like(parameter)
        for name in self.opt_statistics:
            for parameter in parameters:
                yield self.opt.state[parameter][name]
        yield from self.extra_tensors

    def step(self, data_lock: Any = None, wait: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Average once and add what averaging changed to the local tensors. ``data_lock`` guards them meanwhile."""
        if not wait:
            raise ValueError("wait=False: call step() in a thread of your own, and give it a data_lock")
        guard = nullcontext() if data_lock is None else data_lock
        with self.lock_averager_step:
            with guard, torch.no_grad(), self.get_tensors() as averaged:
                for parameter in (p for group in self.opt.param_groups for p in group["params"]):
                    if self.average_gradients and parameter.requires_grad and parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                for copy, local in zip(averaged, self.local_tensors(), strict=True):
                    copy.copy_(local)
                before = [copy.clone() for copy in averaged]
            gathered = super().step(**kwargs)
            with guard, torch.no_grad(), self.get_tensors() as averaged:
                if gathered is not None:
                    for local, mean, old in zip(self.local_tensors(), averaged, before, strict=True):
                        local.add_((mean - old).to(local.device, local.dtype))
            self.local_step += 1
            return gathered
