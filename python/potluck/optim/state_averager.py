"""Parameters, optimizer statistics and further tensors, kept equal at all peers; the optimizer and its schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from potluck import _core, _settings
from potluck._state import StateCodec
from potluck.averaging.averager import DecentralizedAverager
from potluck.averaging.control import StepControl
from potluck.compression import CompressionInfo, NoCompression, TensorRole
from potluck.optim._inner import InnerOptimizer
from potluck.utils.logging import get_logger
from potluck.utils.nested import nested_flatten, nested_pack
from potluck.utils.tensor_descr import TensorDescriptor

logger = get_logger("potluck")


class TrainingStateAverager(DecentralizedAverager):
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
        self._inner = InnerOptimizer(optimizer, params, offload_optimizer, scheduler)
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
                if statistic not in self._inner.optimizer.state.get(parameter, {}):
                    raise ValueError(f"average_opt_statistics: the optimizer keeps no {statistic!r}")
                tensors.append(self._inner.optimizer.state[parameter][statistic])
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
        self._before: list[torch.Tensor] = []
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
        """Any of: step the optimizer, count the epoch, average the state (now or beside the next samples)."""
        if delay_optimizer_step:
            raise ValueError(
                "delay_optimizer_step cannot have an effect here: use potluck.Optimizer(delay_optimizer_step=True)"
            )
        if averaging_control is not None and averaging_opts:
            raise ValueError("averaging_opts cannot have an effect on a round that was asked for before")
        delay = bool(delay_averaging)
        ready = self._delayed is not None and (wait_for_delayed_updates or self._delayed.done() or not delay)
        if ready and apply_delayed_updates:
            self._finish_delayed()
        if wait_for_trigger is not None:
            wait_for_trigger()
        if optimizer_step:
            self._apply(grad_scaler)
        if increment_epoch:
            self.local_epoch += 1
            self._inner.step_scheduler(None)
        if zero_grad:
            self._inner.optimizer.zero_grad(set_to_none=set_to_none)
        if not averaging_round:
            return None
        return self._average(averaging_control, delay, averaging_opts or {})

    def _apply(self, grad_scaler: Any) -> None:
        with torch.no_grad():
            if self.custom_gradients:
                grads = [p.grad for p in self._inner.main]
            else:
                grads = [p.grad for p in self._inner.model]
        if grad_scaler is None:
            self._inner.step(grads)
        else:
            grad_scaler.step(self._inner.optimizer)
        self._inner.copy_to_model()

    def _average(self, control: StepControl | None, delay: bool, opts: dict[str, Any]) -> Any:
        with torch.no_grad():
            self._before = [t.detach().clone() for t in self._tensors] if self.delta_rule_averaging else []
        if control is None:
            control = super().step(wait=False, require_trigger=True, **opts)
        control.allow_allreduce()
        if delay:
            self._delayed = control
            return control
        outcome = control.result(control.get_timeout())
        self._inner.copy_to_model()
        return outcome

    def _finish_delayed(self) -> None:
        control, self._delayed = self._delayed, None
        if control is None:
            return
        try:
            control.result()
        except (TimeoutError, RuntimeError) as error:
            logger.warning("%s: the delayed average did not come: %s", self.prefix, error)
        self._inner.copy_to_model()

    @torch.no_grad()
    def _use(self, vector: Any) -> None:
        if not self._before:
            super()._use(vector)
            return
        from potluck._tensors import views_of

        with self.lock_averaged_tensors:
            means = views_of(vector, self._flat.shapes)
            for tensor, mean, before in zip(self._tensors, means, self._before, strict=True):
                # What the optimizer did meanwhile stays: only what averaging changed is added.
                tensor.add_((mean - before).to(tensor.dtype))
            self._before = []

    def schedule_step(self, scheduled_time: float | None = None, **kwargs: Any) -> StepControl:
        """Ask for a round that ``step(averaging_control=...)`` begins."""
        return super().step(scheduled_time=scheduled_time, wait=False, require_trigger=True, **kwargs)  # type: ignore[no-any-return]

    def get_current_state(self) -> tuple[Any, Sequence[torch.Tensor], Sequence[CompressionInfo]]:
        with self.get_tensors():
            meta, blobs = self._codec.capture()
        copies = [t.clone() for t in blobs.values()]
        infos = [CompressionInfo.from_tensor(t, key=name) for name, t in zip(blobs, copies, strict=True)]
        return {**meta, "epoch": self.local_epoch, "names": list(blobs)}, copies, infos

    def _share(self, session: Any, average: Any = None) -> None:
        if session.epoch == 0 or not self._allow_state_sharing:
            return
        facts, tensors, _ = self.get_current_state()
        names = facts.pop("names")
        meta = {name: str(value) for name, value in facts.items()}
        session.publish(meta, dict(zip(names, (t.contiguous() for t in tensors), strict=True)))

    def load_state_from_peers(self, wait: bool = True, timeout: float | None = None) -> Any:
        """Replace parameters, optimizer state, schedule and epoch by the newest that others offer; None if none."""
        if not wait:
            return super().load_state_from_peers(wait=False, timeout=timeout)
        if self.session.step(0) != "load_state":
            return None
        loaded = self.session.load_state()
        if loaded is None or "epoch" not in loaded[1]:
            return None
        _, meta, blobs = loaded
        with self.get_tensors():
            self._codec.restore(meta, blobs)
        self._inner.copy_to_model()
        self.local_epoch = max(self.local_epoch, int(meta["epoch"]))
        return meta, self._tensors


def initialize_optimizer_state_(opt: torch.optim.Optimizer) -> None:
    """Make the optimizer's statistics exist, as zeros; parameters stay as they are and no step is counted."""
    parameters = [p for group in opt.param_groups for p in group["params"]]
    if any(opt.state.get(p) for p in parameters):
        return
    kept = [(p.detach().clone(), p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        opt.step()
    finally:
        with torch.no_grad():
            for parameter, (value, grad) in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = grad
            for entries in opt.state.values():
                for name, value in entries.items():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
                    elif isinstance(value, int) and name == "step":
                        entries[name] = 0


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
