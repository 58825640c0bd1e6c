"""Parameters, optimizer statistics and further tensors, kept equal at all peers; the optimizer and its schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from potluck import _core, _settings
from potluck._state import StateCodec
from potluck._tensors import views_of
from potluck.averaging.control import StepControl
from potluck.compression import CompressionInfo, NoCompression, TensorRole
from potluck.optim._codec_averager import CodecAverager
from potluck.optim._inner import PLATEAU, InnerOptimizer
from potluck.utils.logging import get_logger
from potluck.utils.nested import nested_flatten, nested_pack
from potluck.utils.serializer import MSGPackSerializer
from potluck.utils.tensor_descr import TensorDescriptor

logger = get_logger("potluck")


class TrainingStateAverager(CodecAverager):
    """Steps an optimizer, and averages parameters and statistics with peers, for training loops of one's own.

    :class:`potluck.Optimizer` does all of this by itself; use this class to decide when.
    """

    def __init__(
        self,
        *,
        dht: Any,
        optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
        params: Iterable[Any] | None = None,
        scheduler: Any = None,
        initialize_optimizer: bool | None = None,
        offload_optimizer: bool = False,
        custom_gradients: bool = False,
        reuse_tensors: bool | None = None,
        delta_rule_averaging: bool = False,
        performance_ema_alpha: float = 0.1,
        sync_epoch_when_averaging: bool = False,
        parameter_names: Sequence[str] | None = None,
        average_opt_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
        status_loglevel: int = logging.DEBUG,
        **kwargs: Any,
    ):
        if initialize_optimizer is False and average_opt_statistics:
            raise ValueError("average_opt_statistics needs initialize_optimizer: the statistics must exist")
        if custom_gradients and not offload_optimizer:
            raise ValueError(
                "custom_gradients=True cannot have an effect without offload_optimizer=True: the optimizer inside has the "
                "model's own parameters, and takes their gradients"
            )
        if reuse_tensors is False:
            raise ValueError(
                "reuse_tensors=False cannot have an effect: an average is kept apart from the tensors until it is applied"
            )
        self._inner = InnerOptimizer(optimizer, params, offload_optimizer, scheduler)
        if isinstance(self._inner.scheduler, PLATEAU):
            raise ValueError(
                "scheduler: ReduceLROnPlateau needs a loss and would never step here. Step it by yourself, or use "
                "potluck.Optimizer and its report_loss()"
            )
        self.offload_optimizer, self.custom_gradients = offload_optimizer, custom_gradients
        self.delta_rule_averaging = delta_rule_averaging
        self.sync_epoch_when_averaging, self.status_loglevel = sync_epoch_when_averaging, status_loglevel
        if average_opt_statistics or initialize_optimizer:
            initialize_optimizer_state_(self._inner.optimizer)
        names = list(parameter_names) if parameter_names else [str(i) for i in range(len(self._inner.main))]
        if len(names) != len(self._inner.main):
            raise ValueError(f"parameter_names: expected {len(self._inner.main)} names, got {len(names)}")
        tensors = list(self._inner.main)
        roles = [(name, TensorRole.PARAMETER) for name in names]
        for statistic in average_opt_statistics:
            for name, parameter in zip(names, self._inner.main, strict=True):
                value = self._inner.optimizer.state.get(parameter, {}).get(statistic)
                if not isinstance(value, torch.Tensor):
                    raise ValueError(f"average_opt_statistics: the optimizer keeps no tensor {statistic!r}")
                tensors.append(value)
                roles.append((f"{statistic}.{name}", TensorRole.OPTIMIZER))
        self.extra_tensors = tuple(extra_tensors)
        tensors += self.extra_tensors
        roles += [(f"extra.{i}", TensorRole.UNSPECIFIED) for i in range(len(self.extra_tensors))]
        infos = [
            CompressionInfo(name, TensorDescriptor.from_tensor(t), role)
            for t, (name, role) in zip(tensors, roles, strict=True)
        ]
        self._codec = StateCodec(
            self._inner.optimizer,
            self._inner.main,
            self.extra_tensors,
            self._inner.scheduler,
            _settings.check_compression(
                "state_compression", kwargs.get("state_compression", NoCompression())
            ),
        )
        self.local_epoch = 0
        self._delayed: StepControl | None = None
        # Values as they were when a round was asked for, and its average, until it is applied.
        self._before: list[torch.Tensor] = []
        self._averaged: _core.FlatBuffer | None = None
        self._delaying = False
        super().__init__(tensors, dht, tensor_infos=infos, **kwargs)

    def _show_memory(self, session: _core.Session) -> None:
        super()._show_memory(session)
        self._held = [session.hold_bytes("offloaded", self._inner.offloaded_bytes)]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside."""
        return self._inner.optimizer

    @property
    def scheduler(self) -> Any:
        """The schedule, stepped once per epoch."""
        return self._inner.scheduler

    @property
    def averaging_in_progress(self) -> bool:
        """Whether a delayed round runs."""
        return self._delayed is not None and not self._delayed.done()

    def step(  # type: ignore[override]
        self,
        wait_for_delayed_updates: bool | None = None,
        apply_delayed_updates: bool = True,
        increment_epoch: bool = False,
        optimizer_step: bool = False,
        zero_grad: bool = False,
        delay_optimizer_step: bool = False,
        averaging_round: bool = False,
        delay_averaging: bool | None = None,
        averaging_control: StepControl | None = None,
        wait_for_trigger: Callable[[], Any] | None = None,
        grad_scaler: Any = None,
        set_to_none: bool = True,
        averaging_opts: dict[str, Any] | None = None,
    ) -> Any:
        """Any of: step the optimizer, count the epoch, average the state (now or beside the next samples).

        With ``delay_averaging=True`` the average is of the values of this call. It changes nothing until a later call
        applies it: the first one after it is there, or the next one with ``averaging_round`` or
        ``wait_for_delayed_updates``, which wait for it. It then replaces the values, and what the optimizer did
        meanwhile; with ``delta_rule_averaging=True`` only what averaging changed is added.
        """
        self._check_step(
            delay_optimizer_step, averaging_round, delay_averaging, averaging_control, averaging_opts
        )
        if grad_scaler is not None and not optimizer_step:
            raise ValueError("grad_scaler cannot have an effect without optimizer_step=True")
        self._settle(averaging_round or bool(wait_for_delayed_updates), apply_delayed_updates)
        if wait_for_trigger is not None:
            wait_for_trigger()
        # The state may be handed to a newcomer meanwhile, by the thread of a round.
        with self.get_tensors():
            if optimizer_step:
                self._apply(grad_scaler)
            if increment_epoch:
                self.local_epoch += 1
                self._inner.step_scheduler(None)
            if zero_grad:
                self._zero_grad(set_to_none)
        if not averaging_round:
            return None
        return self._average(averaging_control, bool(delay_averaging), averaging_opts or {})

    def _check_step(
        self,
        delay_optimizer_step: bool,
        averaging_round: bool,
        delay_averaging: bool | None,
        control: StepControl | None,
        opts: dict[str, Any] | None,
    ) -> None:
        if delay_optimizer_step:
            raise ValueError(
                "delay_optimizer_step cannot have an effect here: use potluck.Optimizer(delay_optimizer_step=True)"
            )
        if control is not None and opts:
            raise ValueError("averaging_opts cannot have an effect on a round that was asked for before")
        if not averaging_round and (delay_averaging or control is not None or opts):
            raise ValueError(
                "delay_averaging, averaging_control and averaging_opts cannot have an effect without averaging_round=True"
            )
        if self.sync_epoch_when_averaging and "gather" in (opts or {}):
            raise ValueError("gather cannot be given: with sync_epoch_when_averaging=True it holds the epoch")

    def _apply(self, grad_scaler: Any) -> None:
        if grad_scaler is None:
            grads = [p.grad for p in (self._inner.main if self.custom_gradients else self._inner.model)]
            self._inner.step(grads)
        else:
            self._apply_scaled(grad_scaler)
        self._inner.copy_to_model()

    def _apply_scaled(self, grad_scaler: Any) -> None:
        """Let the scaler unscale what the optimizer inside is given, and decide whether it steps."""
        if self.custom_gradients or not self.offload_optimizer:
            with self._inner.hooks_at_the_model():
                grad_scaler.step(self._inner.optimizer)
            return
        for main, model in zip(self._inner.main, self._inner.model, strict=True):
            # Unscaling a copy leaves the model's own as they are, whoever looks at them next.
            main.grad = (
                None if model.grad is None else model.grad.detach().to(main.device, main.dtype, copy=True)
            )
        try:
            with self._inner.hooks_at_the_model():
                grad_scaler.step(self._inner.optimizer)
        finally:
            for main in self._inner.main:
                main.grad = None

    def _zero_grad(self, set_to_none: bool) -> None:
        self._inner.optimizer.zero_grad(set_to_none=set_to_none)
        if not self.offload_optimizer:
            return
        for parameter in self._inner.model:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()

    def _average(self, control: StepControl | None, delay: bool, opts: dict[str, Any]) -> Any:
        with torch.no_grad(), self.get_tensors():
            self._before = (
                [t.detach().clone() for t in self._tensors] if delay or self.delta_rule_averaging else []
            )
        self._averaged, self._delaying = None, delay
        try:
            if control is None:
                if self.sync_epoch_when_averaging:
                    opts = {**opts, "gather": self.local_epoch}
                control = super().step(wait=False, **opts)
            else:
                if self.sync_epoch_when_averaging:
                    control.data_for_gather = MSGPackSerializer.dumps(self.local_epoch)
                control.allow_allreduce()
            if delay:
                self._delayed = control
                return control
            outcome = control.result()
        finally:
            if self._delayed is None:
                self._before = []
        self._inner.copy_to_model()
        self._sync_epoch(outcome)
        return outcome

    def _settle(self, wait: bool, apply: bool) -> None:
        """Apply the average that was asked for with ``delay_averaging``, if it is there or waited for."""
        control = self._delayed
        if control is None or not (wait or control.done()):
            return
        try:
            outcome = control.result()
        except Exception as error:  # whatever it is, later steps must not meet it again
            reason = str(error) or type(error).__name__
            logger.warning("%s: the delayed average did not come: %s", self.prefix, reason)
            outcome = None
        if not apply:
            return
        self._delayed = None
        vector, self._averaged = self._averaged, None
        if vector is not None:
            with self.get_tensors():
                self._replace(vector)
                self._inner.copy_to_model()
            if self._session is not None:
                self._share(self._session)
        self._before = []
        self._sync_epoch(outcome)

    def _sync_epoch(self, outcome: Any) -> None:
        if self.sync_epoch_when_averaging and outcome is not None:
            epochs = [epoch for epoch in outcome.values() if isinstance(epoch, int)]
            self.local_epoch = max([self.local_epoch, *epochs])

    @torch.no_grad()
    def _fill(self) -> None:
        if not self._before:
            super()._fill()
            return
        # The optimizer may have stepped meanwhile: what is averaged is what it was asked for.
        for view, value in zip(self._flat.views, self._before, strict=False):
            view.copy_(value)

    def _use(self, vector: Any) -> None:
        if self._delaying:
            self._averaged = vector
        else:
            self._replace(vector)

    @torch.no_grad()
    def _replace(self, vector: Any) -> None:
        if not self.delta_rule_averaging:
            super()._use(vector)
            return
        with self.lock_averaged_tensors:
            means = views_of(vector, self._flat.shapes)
            for tensor, mean, before in zip(self._tensors, means, self._before, strict=True):
                # What the optimizer did meanwhile stays: only what averaging changed is added.
                change = (mean.to(before.device) - before) * self.averaging_alpha
                tensor.add_(change.to(tensor.dtype))

    def _log(self, session: Any) -> None:
        for loud, line, _ in session.take_events():
            logger.log(logging.WARNING if loud else self.status_loglevel, "%s: %s", self.prefix, line)

    def schedule_step(self, scheduled_time: float | None = None, **kwargs: Any) -> StepControl:
        """Ask for a round that ``step(averaging_control=...)`` begins."""
        return super().step(scheduled_time=scheduled_time, wait=False, require_trigger=True, **kwargs)  # type: ignore[no-any-return]

    def _facts(self) -> dict[str, Any]:
        return {"epoch": self.local_epoch}

    def _share(self, session: Any, average: Any = None) -> None:
        # A delayed average is offered once it is applied.
        if average is None or not self._delaying:
            super()._share(session)

    _count_name = "epoch"

    def _loaded(self, count: int) -> None:
        self._inner.copy_to_model()
        self.local_epoch = max(self.local_epoch, count)


class _Beginning(dict[str, Any]):
    """The statistics of one parameter, and the values that they began with."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.first:
            self.first[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        super().__setitem__(name, value)


def initialize_optimizer_state_(opt: torch.optim.Optimizer) -> None:
    """Make the optimizer's statistics exist, with the values of before the first step.

    Parameters stay as they are and no step is counted. Statistics that begin as a copy of the first gradient, such as
    a momentum buffer, are zeros.
    """
    parameters = [p for group in opt.param_groups for p in group["params"]]
    if any(opt.state.get(p) for p in parameters):
        return
    parameters = [p for p in parameters if p.requires_grad]
    kept = [(p.detach().clone(), p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        opt.state[parameter] = _Beginning()
    # Decay is part of the gradient, and would go into what begins as a copy of it.
    decay = [group.get("weight_decay") for group in opt.param_groups]
    for group in opt.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    try:
        opt.step()
    finally:
        for group, value in zip(opt.param_groups, decay, strict=True):
            if "weight_decay" in group:
                group["weight_decay"] = value
        with torch.no_grad():
            for parameter, (value, grad) in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = grad
                entries = opt.state.pop(parameter)
                begun = {**entries, **entries.first} if isinstance(entries, _Beginning) else entries
                if begun:
                    opt.state[parameter] = begun


def dump_optimizer_state(opt: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """The optimizer's state as facts and tensors, in an order that all peers agree on."""
    facts: list[dict[str, Any]] = []
    tensors: list[torch.Tensor] = []
    for value in nested_flatten(opt.state_dict()):
        if isinstance(value, torch.Tensor):
            facts.append({"type": "tensor", "index": len(tensors)})
            tensors.append(value.cpu())
        else:
            facts.append({"type": "value", "value": value})
    return facts, tensors


def load_optimizer_state(
    opt: torch.optim.Optimizer, flat_metadata: Sequence[dict[str, Any]], flat_tensors: Sequence[torch.Tensor]
) -> None:
    """The inverse of :func:`dump_optimizer_state` for an optimizer of the same shape."""
    flat = []
    for fact in flat_metadata:
        if fact.get("type") == "tensor" and isinstance(fact.get("index"), int):
            flat.append(flat_tensors[fact["index"]])
        elif fact.get("type") == "value":
            flat.append(fact["value"])
        else:
            raise ValueError(f"not a fact of an optimizer state: {fact!r}")
    opt.load_state_dict(nested_pack(flat, opt.state_dict()))
