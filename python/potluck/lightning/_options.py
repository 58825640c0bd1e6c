"""The strategy's arguments for ``potluck.Optimizer``: refused where they are given, not hours later in ``fit``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from potluck import _settings
from potluck.optim.optimizer import Optimizer

# What the strategy, or the program's LightningModule, gives to the optimizer.
_ELSEWHERE = {
    "batch_size_per_step": "use batch_size=, or leave it out: it is read off every batch",
    "optimizer": "configure_optimizers() of the LightningModule makes it",
    "params": "configure_optimizers() of the LightningModule names them",
    "scheduler": "use scheduler_fn=, or configure_optimizers() of the LightningModule",
}


def check(dht: Any, moved: bool, further: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """``further`` is what the strategy knows only from the optimizer, ``given`` all of it; ``moved``: onto copies."""
    known = inspect.signature(Optimizer).parameters
    for name in further:
        if name in _ELSEWHERE:
            raise TypeError(f"{name}= is no argument of HivemindStrategy: {_ELSEWHERE[name]}")
        if name not in known:
            raise TypeError(f"HivemindStrategy and potluck.Optimizer have no argument {name!r}")
    if further.get("auxiliary"):
        raise ValueError(
            "auxiliary=True cannot have an effect: a Trainer computes gradients, and an auxiliary peer has none. Use "
            "potluck.Optimizer(auxiliary=True), or the command `potluck keeper`"
        )
    values = {name: parameter.default for name, parameter in known.items()}
    values.update(dht=dht, optimizer=None, params=() if moved else None, **given)
    if values["delay_optimizer_step"] is None:
        values["delay_optimizer_step"] = values["delay_grad_averaging"]
    if values["offload_optimizer"] is None:
        values["offload_optimizer"] = moved and not values["use_local_updates"]
    _settings.check_arguments(**values)
