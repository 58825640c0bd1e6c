"""What a shared optimizer is made of: the memory that it exchanges, its gradient averager, its hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from potluck import _settings
from potluck._state import StateCodec
from potluck._tensors import FlatTensors
from potluck.compression import CompressionBase
from potluck.optim._facts import OptimizerFacts
from potluck.optim._inner import PLATEAU
from potluck.optim.grad_averager import GradientAverager

_HOOKS = (
    "step_pre",
    "step_post",
    "state_dict_pre",
    "state_dict_post",
    "load_state_dict_pre",
    "load_state_dict_post",
)


class OptimizerParts(OptimizerFacts):
    """Makes the parts of :class:`potluck.Optimizer`."""

    dht: Any
    client_mode: bool
    reuse_grad_buffers: bool
    use_local_updates: bool

    def _hold_state(
        self, statistics: Sequence[str], extra_tensors: Sequence[torch.Tensor], compression: CompressionBase
    ) -> None:
        """Memory for what state averaging exchanges, and the codec of what newcomers load."""
        for name in statistics:
            if not isinstance(name, str):
                raise TypeError(f"average_opt_statistics: expected names such as 'exp_avg', got {name!r}")
        known = self._inner.statistics() if statistics else None
        for name in statistics:
            if known is not None and name not in known:
                raise ValueError(
                    f"average_opt_statistics: this optimizer keeps no {name!r} in the shape of the parameters; it keeps "
                    f"{', '.join(sorted(known)) or 'nothing'}"
                )
        self._statistics, self._extra_tensors = tuple(statistics), list(extra_tensors)
        # Local updates average nothing but the state, so the loss for a plateau travels with it.
        self._loss_cells = [torch.zeros(2)] if self.use_local_updates and self._averages_loss else []
        self._state = FlatTensors(
            [p.shape for p in self._inner.main] * (1 + len(self._statistics))
            + [t.shape for t in [*self._extra_tensors, *self._loss_cells]]
        )
        self._codec = StateCodec(
            self._inner.optimizer, self._inner.main, self._extra_tensors, self._inner.scheduler, compression
        )

    def _tensor_infos(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What gradient rounds and state rounds carry, in order."""
        shapes = [p.shape for p in self._inner.main]
        names = [f"{i:06}" for i in range(len(shapes))]
        state = _settings.tensor_infos([f"param.{n}" for n in names], shapes, "Parameter")
        for statistic in self._statistics:
            state += _settings.tensor_infos([f"{statistic}.{n}" for n in names], shapes, "Optimizer")
        extra = [f"extra.{i:06}" for i in range(len(self._extra_tensors))]
        state += _settings.tensor_infos(extra, [t.shape for t in self._extra_tensors], "Unspecified")
        loss = _settings.tensor_infos(["loss"], [(2,)], "Exact") if self._averages_loss else []
        if self.use_local_updates:
            return [], state + loss
        # Keys by position, as in hivemind: PerTensorCompression names them so.
        gradients = _settings.tensor_infos([str(i) for i in range(len(shapes))], shapes, "Gradient")
        # Compressed, a trace of somebody's touch could vanish, or one appear.
        touched = _settings.tensor_infos(["touched"], [(len(shapes),)], "Exact")
        return gradients + touched + loss, state

    def _adopt_hooks(self) -> None:
        # torch's own constructor would add parameter groups; hooks, groups and state are those of the inner optimizer.
        for kind in _HOOKS:
            name = f"_optimizer_{kind}_hooks"
            setattr(self, name, getattr(self._inner.optimizer, name, OrderedDict()))
        self.defaults = self._inner.optimizer.defaults

    def _make_grad_averager(self, factory: Callable[..., GradientAverager] | None) -> GradientAverager | None:
        if self.use_local_updates:
            return None
        given = {
            "dht": self.dht,
            "prefix": f"{self.run_id}_grad_averager",
            "reuse_grad_buffers": self.reuse_grad_buffers,
            "client_mode": self.client_mode,
            "warn": False,
            "start": False,
            "extra_values": len(self._inner.model) + 2 * int(self._averages_loss),
        }
        averager = (factory or GradientAverager)(self._inner.model, **given)
        if not isinstance(averager, GradientAverager):
            raise TypeError(
                f"grad_averager_factory returned a {type(averager).__name__}, not a potluck GradientAverager"
            )
        _settings.check_factory(averager, given)
        return averager

    @property
    def _averages_loss(self) -> bool:
        return isinstance(self._inner.scheduler, PLATEAU)
