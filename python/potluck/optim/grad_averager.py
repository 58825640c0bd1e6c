"""Gradients: gathered over several backward passes, averaged over peers, handed to an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from potluck import _core
from potluck._tensors import FlatTensors
from potluck.averaging.averager import DecentralizedAverager
from potluck.averaging.control import StepControl
from potluck.utils.logging import get_logger
from potluck.utils.timed_storage import DHTExpiration

logger = get_logger(__name__)


class GradientAverager(DecentralizedAverager):
    """Averages the gradients of ``parameters``, each peer weighted by its samples.

    ``accumulate_grads_(batch_size)`` after each backward pass, then ``step()`` once enough samples are in, then the
    optimizer inside ``use_averaged_gradients()``. Frozen parameters take no part and cost nothing.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        dht: Any,
        prefix: str,
        reuse_grad_buffers: bool = False,
        accumulate_grads_on: torch.device | str | None = None,
        client_mode: bool | None = None,
        warn: bool = True,
        averaged_grads: Sequence[torch.Tensor] = (),
        **kwargs: Any,
    ):
        if reuse_grad_buffers and accumulate_grads_on is not None:
            raise ValueError(
                "accumulate_grads_on has no effect with reuse_grad_buffers=True: gradients gather in .grad"
            )
        self.parameters = tuple(p for p in parameters if p.requires_grad)
        if not self.parameters:
            raise ValueError("parameters: expected at least one that requires gradients")
        if averaged_grads and len(averaged_grads) != len(self.parameters):
            raise ValueError(
                f"averaged_grads: expected {len(self.parameters)} tensors, got {len(averaged_grads)}"
            )
        for index, (grad, parameter) in enumerate(zip(averaged_grads, self.parameters, strict=False)):
            if grad.shape != parameter.shape:
                raise ValueError(
                    f"averaged_grads[{index}]: expected the shape {tuple(parameter.shape)} of its parameter, got "
                    f"{tuple(grad.shape)}"
                )
        self.reuse_grad_buffers = reuse_grad_buffers
        self.warn = warn
        self.local_samples_accumulated = 0
        self.local_times_accumulated = 0
        self._first_batch: float | None = None
        self._new_averaged_grads = False
        self._alone = True
        shapes = [p.shape for p in self.parameters]
        # The optimizer appends numbers of its own that are averaged along.
        extra = [torch.Size([kwargs.pop("extra_values", 0)])]
        self._flat = FlatTensors([*shapes, *(shape for shape in extra if shape.numel())])
        self._touched = [False] * len(self.parameters)
        self._accumulators = [] if reuse_grad_buffers else self._make_accumulators(accumulate_grads_on)
        self._averaged_grads = list(averaged_grads) or self._flat.views[: len(shapes)]
        super().__init__(
            self._averaged_grads, dht, prefix=prefix, client_mode=client_mode, flat=self._flat, **kwargs
        )

    @property
    def flat_buffer(self) -> _core.FlatBuffer:
        """The vector that is averaged."""
        return self._flat.buffer

    @property
    def extra_view(self) -> torch.Tensor:
        """The numbers behind the gradients."""
        return self._flat.views[-1]

    def not_as_usual(self) -> set[str]:
        """Which arguments for buffers and state it was given that an optimizer around it has no use for."""
        own_grads = any(
            grad is not view for grad, view in zip(self._averaged_grads, self._flat.views, strict=False)
        )
        unshared = self._allow_state_sharing != (not self.client_mode and not self.auxiliary)
        found = {"averaged_grads": own_grads, "tensor_infos": self._infos is not None}
        found["allow_state_sharing"] = unshared
        return {name for name, given in found.items() if given}

    def _show_memory(self, session: _core.Session) -> None:
        session.hold("gradients", self._flat.buffer)
        self._held = [session.hold_bytes("gathering", sum(t.nbytes for t in self._accumulators))]

    def _release(self) -> None:
        """Let go of all memory. Nothing can be gathered any more."""
        self._flat.release()
        self._accumulators, self._averaged_grads, self._tensors = [], [], []
        self._held.clear()

    def _make_accumulators(self, device: torch.device | str | None) -> list[torch.Tensor]:
        devices = [torch.device(device) if device is not None else p.device for p in self.parameters]
        # Values of 64 bits keep their precision while they gather; only the exchange is in 32.
        types = [torch.promote_types(p.dtype, torch.float32) for p in self.parameters]
        return [
            torch.zeros(p.shape, dtype=dtype, device=where)
            for p, dtype, where in zip(self.parameters, types, devices, strict=True)
        ]

    @torch.no_grad()
    def accumulate_grads_(self, batch_size: int) -> None:
        """Add the gradients in ``.grad``, the mean over ``batch_size`` samples, to what was gathered."""
        if batch_size <= 0:
            raise ValueError(f"batch_size={batch_size!r}: expected at least 1 sample")
        if self._new_averaged_grads and self.warn:
            logger.warning(
                "New gradients are gathered but the averaged ones were never used. Use use_averaged_gradients() "
                "before accumulate_grads_(), or call notify_used_averaged_gradients()."
            )
            self._new_averaged_grads = False
        first = self._first_batch is None
        if first:
            self._first_batch = float(batch_size)
        factor = batch_size / (self._first_batch or 1.0)
        if self.reuse_grad_buffers and factor != 1.0:
            raise ValueError(
                f"batch of {batch_size} samples after one of {self._first_batch:.0f}: with reuse_grad_buffers=True "
                "torch adds the gradients up by itself, so that all batches of an epoch must have one size"
            )
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            if not self.reuse_grad_buffers:
                into = self._accumulators[index]
                if self._touched[index]:
                    into.add_(grad.to(into.device, into.dtype), alpha=factor)
                else:
                    into.copy_(grad)
                    if factor != 1.0:
                        into.mul_(factor)
            self._touched[index] = True
        self.local_samples_accumulated += batch_size
        self.local_times_accumulated += 1

    def mean_grad(self, index: int) -> torch.Tensor | None:
        """The gathered mean gradient of one parameter, or None if it got none."""
        if not self._touched[index]:
            return None
        gathered = self.parameters[index].grad if self.reuse_grad_buffers else self._accumulators[index]
        divisor = self.local_samples_accumulated / (self._first_batch or 1.0)
        if gathered is None or divisor in (0.0, 1.0):
            return gathered
        return gathered / divisor

    @torch.no_grad()
    def load_accumulators_into_averager_(self) -> None:
        """Write the gathered mean into the tensors that are averaged."""
        for index, view in enumerate(self._flat.views[: len(self.parameters)]):
            mean = self.mean_grad(index)
            if mean is None:
                view.zero_()
            else:
                view.copy_(mean)
        for view, grad in zip(self._flat.views, self._averaged_grads, strict=False):
            if grad is not view:
                grad.copy_(view)

    @torch.no_grad()
    def reset_accumulated_grads_(self) -> None:
        """Forget what was gathered."""
        self.local_samples_accumulated = self.local_times_accumulated = 0
        self._first_batch = None
        self._touched = [False] * len(self.parameters)
        if self.reuse_grad_buffers:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()

    def schedule_step(self, scheduled_time: DHTExpiration | None = None, **kwargs: Any) -> StepControl:
        """Ask for a round that begins once it is triggered by ``step(control=...)``."""
        if kwargs.get("weight") is not None:
            raise ValueError("weight is set by step(control=...), from the samples gathered by then")
        return super().step(scheduled_time=scheduled_time, wait=False, require_trigger=True, **kwargs)

    def step(  # type: ignore[override]
        self,
        weight: float | None = None,
        reset_accumulators: bool = True,
        control: StepControl | None = None,
        timeout: float | None = None,
        wait: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Average the gathered gradients over peers. ``weight`` is the number of samples unless given.

        None without a group within ``timeout``: what use_averaged_gradients() gives is this peer's own mean then.
        """
        if control is not None:
            if kwargs:
                raise ValueError(f"{', '.join(kwargs)}: given to schedule_step already")
            if control.triggered:
                raise RuntimeError("this round was triggered before")
            if control.done():
                raise RuntimeError("this round has ended before it was triggered: ask for a new one")
            if timeout is not None:
                control.end_within(timeout)
        self.load_accumulators_into_averager_()
        weight = float(self.local_samples_accumulated) if weight is None else weight
        if control is None:
            # Nothing is left to do here that the timeout could run out on.
            control = super().step(weight=weight, timeout=timeout, wait=False, **kwargs)
        else:
            control.weight = weight
            control.allow_allreduce()
        if reset_accumulators:
            self.reset_accumulated_grads_()
        if not wait:
            control.add_done_callback(self._finished)
            return control
        try:
            return control.result()
        finally:
            # Not by a callback: it may come after whoever waits for the result has gone on.
            self._finished(control)

    def _finished(self, control: StepControl) -> None:
        self._new_averaged_grads = not control.cancelled() and control.exception() is None

    @contextmanager
    def use_averaged_gradients(self, replace_model_gradients: bool = True) -> Iterator[list[torch.Tensor]]:
        """Inside this context ``.grad`` holds the averaged gradients (of the types of the parameters)."""
        with self.get_tensors() as averaged:
            self._new_averaged_grads = False
            grads = [
                average.to(parameter.device, parameter.dtype)
                for average, parameter in zip(averaged, self.parameters, strict=False)
            ]
            before = [p.grad for p in self.parameters]
            try:
                if replace_model_gradients:
                    for parameter, grad in zip(self.parameters, grads, strict=True):
                        parameter.grad = grad
                yield grads
            finally:
                if replace_model_gradients:
                    for parameter, grad in zip(self.parameters, before, strict=True):
                        parameter.grad = grad

    def notify_used_averaged_gradients(self) -> None:
        """Tell the averager that its result was used elsewhere."""
        self._new_averaged_grads = False

    def powersgd(self) -> dict[str, Any] | None:
        """Settings of the low-rank compression; the plain averager has none."""
        return None


class GradientAveragerFactory:
    """The signature that ``grad_averager_factory`` of the optimizer has."""

    def __call__(self, parameters: Iterable[torch.nn.Parameter], **kwargs: Any) -> GradientAverager:
        raise NotImplementedError
