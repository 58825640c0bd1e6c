"""What a checkpoint of a shared optimizer holds beside torch's own: the epoch and the schedule's position."""

from __future__ import annotations

import warnings
from typing import Any

from potluck.optim._inner import PLATEAU, InnerOptimizer


def saved(inner: InnerOptimizer, epoch: int) -> dict[str, Any]:
    """torch's own state, and two entries that a plain torch optimizer does not look at."""
    state = {**inner.optimizer.state_dict(), "local_epoch": epoch}
    if inner.scheduler is not None:
        state["scheduler"] = inner.scheduler.state_dict()
    return state


def epoch_of(state_dict: dict[str, Any]) -> int | None:
    """The epoch of a checkpoint of this class or of hivemind's; None for one of plain torch."""
    epoch = state_dict.get("local_epoch", state_dict.get("state", {}).get("local_epoch"))
    return None if epoch is None else int(epoch)


def load(inner: InnerOptimizer, state_dict: dict[str, Any], epoch: int | None) -> None:
    """Take over optimizer, schedule, and the model's weights, which were loaded before."""
    state_dict = {name: value for name, value in state_dict.items() if name != "local_epoch"}
    schedule = state_dict.pop("scheduler", None)
    state = {name: value for name, value in state_dict.get("state", {}).items() if name != "local_epoch"}
    if schedule is None and epoch is not None:
        _catch_up(inner.scheduler, epoch)
    inner.optimizer.load_state_dict({**state_dict, "state": state})
    if schedule is not None and inner.scheduler is not None:
        inner.scheduler.load_state_dict(schedule)
    inner.copy_from_model()


def _catch_up(scheduler: Any, epoch: int) -> None:
    """Bring a schedule to an epoch, as a checkpoint of hivemind's needs: it does not hold the schedule."""
    if scheduler is None or isinstance(scheduler, PLATEAU):
        return
    with warnings.catch_warnings():
        # torch warns of a schedule that goes on before the optimizer has made a step.
        warnings.simplefilter("ignore", UserWarning)
        while getattr(scheduler, "last_epoch", epoch) < epoch:
            scheduler.step()
