"""hivemind's older interface: average parameters, gradients or statistics after a step of one's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from potluck import _core, _settings
from potluck._state import StateCodec
from potluck.compression import CompressionInfo, NoCompression, TensorRole
from potluck.optim._codec_averager import CodecAverager
from potluck.optim.state_averager import initialize_optimizer_state_
from potluck.utils.tensor_descr import TensorDescriptor


class TrainingAverager(CodecAverager):
    """Averages what ``opt`` holds: its parameters, their gradients, its statistics, further tensors.

    Newcomers load all parameters and the whole state of the optimizer, whatever of it is averaged.
    """

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
        count = len(self._parameters)
        names = [str(i) for i in range(count)] if parameter_names is None else list(parameter_names)
        if len(names) != count:
            raise ValueError(f"parameter_names: expected {count} names, got {len(names)}")
        self.parameter_names = tuple(names)
        if self.opt_statistics and not initialize_optimizer:
            raise ValueError(
                "average_opt_statistics needs initialize_optimizer=True: the statistics must exist"
            )
        if initialize_optimizer:
            initialize_optimizer_state_(opt)
        for name in self.opt_statistics:
            if not all(isinstance(opt.state.get(p, {}).get(name), torch.Tensor) for p in self._parameters):
                raise ValueError(f"average_opt_statistics: the optimizer keeps no tensor {name!r}")
        self.local_step = 0
        self.lock_averager_step = threading.Lock()
        compression = _settings.check_compression(
            "state_compression", kwargs.get("state_compression", NoCompression())
        )
        self._codec = StateCodec(opt, self._parameters, self.extra_tensors, None, compression)
        with torch.no_grad():
            copies = [t.detach().cpu().float().clone() for t in self.local_tensors()]
        if not copies:
            raise ValueError("nothing to average: set average_parameters, average_gradients or extra_tensors")
        super().__init__(copies, kwargs.pop("dht"), tensor_infos=self.tensor_infos(), **kwargs)

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"] if p.requires_grad]

    def _show_memory(self, session: _core.Session) -> None:
        super()._show_memory(session)
        self._held = [session.hold_bytes("tensors", sum(t.nbytes for t in self._tensors))]

    def local_tensors(self, replace_none: bool = True) -> Iterator[torch.Tensor]:
        """The tensors of the model and optimizer, in the order in which they are averaged."""
        parameters = self._parameters
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

    def tensor_infos(self) -> list[CompressionInfo]:  # type: ignore[override]
        """What a compression may look at, in the order of :meth:`local_tensors`."""
        described: list[tuple[str, TensorRole]] = []
        if self.average_parameters:
            described += [(name, TensorRole.PARAMETER) for name in self.parameter_names]
        if self.average_gradients:
            described += [(f"grad.{name}", TensorRole.GRADIENT) for name in self.parameter_names]
        for statistic in self.opt_statistics:
            described += [(f"{statistic}.{name}", TensorRole.OPTIMIZER) for name in self.parameter_names]
        described += [(f"extra.{i}", TensorRole.UNSPECIFIED) for i in range(len(self.extra_tensors))]
        return [
            CompressionInfo(key, TensorDescriptor.from_tensor(tensor), role)
            for tensor, (key, role) in zip(self.local_tensors(), described, strict=True)
        ]

    def step(self, data_lock: Any = None, wait: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Average once and add what averaging changed to the local tensors. ``data_lock`` guards them meanwhile.

        With ``wait=False`` a thread does it, and the answer is a future.
        """
        if not wait:
            return self._beside(lambda: self.step(data_lock, **kwargs))
        guard = nullcontext() if data_lock is None else data_lock
        with self.lock_averager_step:
            with guard, torch.no_grad(), self.get_tensors() as averaged:
                for parameter in self._parameters:
                    if self.average_gradients and parameter.grad is None:
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
                super()._share(self.session)
            return gathered

    def _share(self, session: Any, average: Any = None) -> None:
        """Not at the end of the round: the state is offered when the average is in it."""

    def _refuse(self, reason: ValueError) -> None:
        super()._refuse(reason)
        super()._share(self.session)

    def _facts(self) -> dict[str, Any]:
        return {"step": self.local_step}

    _count_name = "step"

    def _loaded(self, count: int) -> None:
        self.local_step = max(self.local_step, count)
