"""The torch optimizer inside: built or taken over, on the model's parameters or on copies in host memory."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


class InnerOptimizer:
    """Applies gradients. ``main`` are the parameters that the optimizer changes, ``model`` those of the model."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Callable[..., Any],
        params: Any,
        offload: bool,
        scheduler: Any,
    ):
        if isinstance(optimizer, torch.optim.Optimizer):
            if params is not None:
                raise ValueError("params has no effect on an optimizer that is built already: leave it out")
            if offload:
                raise ValueError(
                    "offload_optimizer needs to build the optimizer on copies in host memory: give params= and "
                    "optimizer=lambda params: torch.optim.…(params)"
                )
            self.optimizer = optimizer
            self.model_all = [p for group in optimizer.param_groups for p in group["params"]]
            self.main_all = self.model_all
        elif callable(optimizer):
            if params is None:
                raise ValueError("optimizer is a function: it needs params=model.parameters()")
            groups = _as_groups(params)
            self.model_all = [p for group in groups for p in group["params"]]
            self.main_all = [_copy_to_host(p) for p in self.model_all] if offload else self.model_all
            main = iter(self.main_all)
            groups = [{**group, "params": [next(main) for _ in group["params"]]} for group in groups]
            self.optimizer = optimizer(
                groups if len(groups) > 1 or len(groups[0]) > 1 else groups[0]["params"]
            )
            if not isinstance(self.optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"optimizer= returned a {type(self.optimizer).__name__}, not a torch optimizer"
                )
        else:
            raise TypeError(
                f"optimizer={optimizer!r}: expected a torch optimizer or a function of the parameters"
            )
        _check_kind(self.optimizer)
        self.offload = offload
        pairs = [(m, c) for m, c in zip(self.model_all, self.main_all, strict=True) if m.requires_grad]
        self.model = [m for m, _ in pairs]
        self.main = [c for _, c in pairs]
        frozen = [(m, c) for m, c in zip(self.model_all, self.main_all, strict=True) if not m.requires_grad]
        self._frozen, self._frozen_main = [m for m, _ in frozen], [c for _, c in frozen]
        if not self.model:
            raise ValueError("no parameter requires gradients: there is nothing to train")
        if any(p.is_complex() for p in self.model):
            raise ValueError(
                "complex parameters cannot be averaged: give torch.view_as_real(parameter), and compute with "
                "torch.view_as_complex of it"
            )
        self.scheduler = self._make_scheduler(scheduler)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the copies of parameters in host memory."""
        return sum(p.nbytes for p in self.main_all) if self.offload else 0

    def groups_text(self) -> str:
        """Which parameters are in which group, in one short line that is equal at peers where this is."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        facts = [[(list(p.shape), p.requires_grad) for p in group] for group in groups]
        counts = ", ".join(str(len(group)) for group in groups[:8]) + (", …" if len(groups) > 8 else "")
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return f"{len(groups)} of {counts} parameters, {digest[:16]}"

    def _make_scheduler(self, scheduler: Any) -> Any:
        if isinstance(scheduler, type) or (callable(scheduler) and not hasattr(scheduler, "step")):
            scheduler = scheduler(self.optimizer)
        if scheduler is not None and not hasattr(scheduler, "step"):
            raise TypeError(
                f"scheduler={scheduler!r}: expected a scheduler, or a function that makes one of the optimizer"
            )
        if scheduler is not None:
            owner = getattr(scheduler, "optimizer", self.optimizer)
            if owner is not self.optimizer:
                raise ValueError(
                    "scheduler was made for another optimizer: give a function, scheduler=lambda opt: …(opt)"
                )
        return scheduler

    def statistics(self) -> set[str] | None:
        """The names of what the optimizer keeps in the shape of each parameter; None if that cannot be told."""
        several = [p for p in self.main if p.numel() > 1]
        if not several:
            return None
        # With as many dimensions as there are: some optimizers keep other things of vectors.
        like = min(several, key=lambda p: (-p.dim(), p.numel()))
        stand_in = torch.nn.Parameter(torch.zeros_like(like))
        stand_in.grad = torch.zeros_like(like)
        try:
            probe = copy.copy(self.optimizer)
            probe.state = defaultdict(dict)
            probe.param_groups = [{**self.optimizer.param_groups[0], "params": [stand_in]}]
            probe.step()
        except Exception:
            # An optimizer of somebody's own need not be one that can be copied.
            return None
        kept = probe.state[stand_in].items()
        return {name for name, value in kept if getattr(value, "shape", None) == like.shape}

    @property
    def param_groups(self) -> list[Any]:
        """The optimizer's groups, with the parameters of the model: those are what gets gradients."""
        groups: list[Any] = self.optimizer.param_groups
        if not self.offload:
            return groups
        model = iter(self.model_all)
        return [ModelGroup(group, [next(model) for _ in group["params"]]) for group in groups]

    @property
    def state(self) -> Any:
        """The optimizer's state by the model's parameters."""
        return ModelState(self) if self.offload else self.optimizer.state

    def check_frozen(self) -> None:
        """Refuse to train a parameter that takes no part in the average."""
        for parameter in self._frozen:
            if parameter.requires_grad:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} requires gradients now and was frozen when the "
                    "optimizer was made: all peers agreed on what is averaged then. Make the optimizer before "
                    "anything is frozen"
                )

    def step(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Apply gradients of the trainable parameters, in order; what the model holds in ``.grad`` stays."""
        self.apply(self.hooked(grads) if self.offload else grads)

    @torch.no_grad()
    def hooked(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What the step hooks make of gradients for :meth:`apply` on copies.

        They find them in ``.grad`` of the model's parameters as well, and may change them there.
        """
        if not self._hooks:
            return list(grads)
        with _kept([*self.main, *self.model]):
            self._place(grads)
            self._run_hooks(self._hooks)
            return [p.grad for p in self.main]

    def _run_hooks(self, hooks: OrderedDict[int, Any]) -> None:
        """On what lies in ``.grad`` of the copies."""
        shown = []
        for model, main in zip(self.model, self.main, strict=True):
            # Of one type and place they are one tensor.
            model.grad = None if main.grad is None else main.grad.to(model.device, model.dtype)
            if model.grad is not None:
                shown.append((model, main, model.grad, model.grad._version))
        with torch.enable_grad():
            for hook in list(hooks.values()):
                hook(self.optimizer, (), {})
        for model, main, grad, version in shown:
            if model.grad is not grad or grad._version != version:
                main.grad = None if model.grad is None else model.grad.to(main.device, main.dtype)

    @contextmanager
    def hooks_at_the_model(self) -> Iterator[None]:
        """Inside, whoever else calls the optimizer's step (a gradient scaler does) has its hooks work as in :meth:`step`."""
        hooks = self._hooks
        if not self.offload or not hooks:
            yield
            return
        at_model = {0: lambda *_: self._run_hooks(hooks)}
        self.optimizer._optimizer_step_pre_hooks = OrderedDict(at_model)
        try:
            with _kept(self.model):
                yield
        finally:
            self.optimizer._optimizer_step_pre_hooks = hooks

    @torch.no_grad()
    def apply(self, grads: Sequence[torch.Tensor | None]) -> None:
        """The optimizer's step; on copies without the hooks, which are through then."""
        with _kept([*self.main, *self._frozen_main]):
            self._place(grads)
            for parameter in self._frozen_main:
                parameter.grad = None
            hooks = self._hooks
            if self.offload and hooks:
                self.optimizer._optimizer_step_pre_hooks = OrderedDict()
            try:
                with torch.enable_grad():
                    self.optimizer.step()
            finally:
                if self.offload and hooks:
                    self.optimizer._optimizer_step_pre_hooks = hooks

    @property
    def _hooks(self) -> OrderedDict[int, Any]:
        hooks: OrderedDict[int, Any] = getattr(self.optimizer, "_optimizer_step_pre_hooks", OrderedDict())
        return hooks

    def _place(self, grads: Sequence[torch.Tensor | None]) -> None:
        for parameter, grad in zip(self.main, grads, strict=True):
            parameter.grad = None if grad is None else grad.to(parameter.device, parameter.dtype)

    def step_scheduler(self, loss: float | None) -> None:
        """One epoch of the schedule. A plateau scheduler looks at the loss averaged over peers."""
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, PLATEAU):
            if loss is not None:
                self.scheduler.step(loss)
        else:
            self.scheduler.step()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """After the offloaded parameters changed."""
        if self.offload:
            for model, main in zip(self.model, self.main, strict=True):
                model.copy_(main)

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """After the model's parameters were replaced from outside, as by a checkpoint."""
        if self.offload:
            for model, main in zip(self.model, self.main, strict=True):
                main.copy_(model)


@contextmanager
def _kept(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, ``.grad`` may be anything; after it, what it was."""
    before = [p.grad for p in parameters]
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


class ModelGroup(MutableMapping[str, Any]):
    """A parameter group of an optimizer on copies, as one of the model's parameters; other changes go to the group."""

    def __init__(self, group: dict[str, Any], params: list[torch.Tensor]):
        self._group, self._params = group, params

    def __getitem__(self, name: str) -> Any:
        return self._params if name == "params" else self._group[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "params":
            raise ValueError("the parameters of a group cannot change: all peers agreed on them")
        self._group[name] = value

    def __delitem__(self, name: str) -> None:
        del self._group[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


class ModelState(MutableMapping[Any, Any]):
    """The state of an optimizer on copies, under the model's parameters or under the copies."""

    def __init__(self, inner: InnerOptimizer):
        self._state = inner.optimizer.state
        self._main = dict(zip(inner.model_all, inner.main_all, strict=True))
        self._model = dict(zip(inner.main_all, inner.model_all, strict=True))

    def __getitem__(self, key: Any) -> Any:
        return self._state[self._main.get(key, key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._state[self._main.get(key, key)] = value

    def __delitem__(self, key: Any) -> None:
        del self._state[self._main.get(key, key)]

    def __contains__(self, key: Any) -> bool:
        return self._main.get(key, key) in self._state

    def __iter__(self) -> Iterator[Any]:
        return (self._model.get(key, key) for key in self._state)

    def __len__(self) -> int:
        return len(self._state)


def _check_kind(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers that cannot step with one averaged gradient."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times per step; peers average one gradient per step"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError("SparseAdam takes sparse gradients only; averaged ones are dense: take Adam")


def _as_groups(params: Any) -> list[dict[str, Any]]:
    if isinstance(params, torch.Tensor):
        raise TypeError("params: expected parameters or parameter groups, got one tensor")
    items = list(params)
    if not items:
        raise ValueError("params is empty")
    if not isinstance(items[0], dict):
        # Named parameters, as from model.named_parameters(), lose their names.
        items = [{"params": [item[1] if isinstance(item, tuple) else item for item in items]}]
    return [{**group, "params": _listed(group["params"])} for group in items]


def _listed(params: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _copy_to_host(parameter: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    copied = parameter.detach().to("cpu", dtype, copy=True)
    return torch.nn.Parameter(copied, requires_grad=parameter.requires_grad)
