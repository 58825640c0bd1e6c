"""Learning-rate schedulers in a run: they count shared epochs, so that all peers step with the same rates.

A Lightning step or epoch is local: a fast peer has more of them. A shared epoch is one optimizer step of the whole run.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from potluck.lightning import _roster
from potluck.lightning._roster import Plan, Roster

# Lightning steps a scheduler when `index % frequency == 0`; this never holds, so only the shared epoch steps it.
_NEVER = 2**62

# A plateau's new rate holds from at least so many epochs ahead, and from so many looks of the other peers, which gives
# them time to hear of it.
_PLATEAU_LEAD_EPOCHS = 2
_PLATEAU_LEAD_LOOKS = 3
# The pace of epochs is measured over about this time.
_PACE_SECONDS = 10.0


class Pace:
    """How fast shared epochs go by, from when they were seen."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, epoch: int) -> None:
        """The epoch now being trained."""
        if self._seen and self._seen[-1][1] == epoch:
            return
        now = self._clock()
        self._seen.append((now, epoch))
        while len(self._seen) > 2 and self._seen[1][0] < now - _PACE_SECONDS:
            self._seen.popleft()

    def within(self, seconds: float) -> int:
        """How many epochs may end within this time."""
        if len(self._seen) < 2:
            return 0
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return math.ceil(seconds * (last - first) / max(ended - began, 1e-3))


class EpochSchedulers:
    """Several schedulers as one: ``step()`` is called once per shared epoch."""

    def __init__(self, schedulers: list[Any], step_one: Callable[[Any], None]) -> None:
        self._schedulers = schedulers
        self._step_one = step_one
        self.optimizer: Optimizer = schedulers[0].optimizer

    def step(self) -> None:
        """Advance every scheduler by one shared epoch."""
        for scheduler in self._schedulers:
            self._step_one(scheduler)

    def get_last_lr(self) -> list[float]:
        """The learning rates now in force."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The position of every scheduler."""
        # Flat, because what cannot travel (a function, say) is left out entry by entry.
        return {
            f"{index}.{name}": value
            for index, scheduler in enumerate(self._schedulers)
            for name, value in scheduler.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        for index, scheduler in enumerate(self._schedulers):
            mine = {f"{index}.{name}": name for name in scheduler.state_dict()}
            scheduler.load_state_dict({name: state[key] for key, name in mine.items()})


def split(configs: list[Any]) -> tuple[list[Any], list[ReduceLROnPlateau]]:
    """Lightning's scheduler configs as (schedulers that count epochs, schedulers that watch a metric)."""
    counting = [config.scheduler for config in configs if not config.reduce_on_plateau]
    watching = [config.scheduler for config in configs if config.reduce_on_plateau]
    return counting, watching


def leave_to_epochs(configs: list[Any]) -> None:
    """Keep the configs for Lightning's checkpoints and monitors, but let only shared epochs step them."""
    for config in configs:
        if not config.reduce_on_plateau:
            config.interval, config.frequency = "step", _NEVER


class SharedPlateau:
    """A ``ReduceLROnPlateau`` whose decisions hold for the whole run.

    Peers have different validation losses, so if each acted on its own their rates would part. The writer's metric
    decides; the new rates start at an agreed epoch on every peer. On the others Lightning's calls have no effect.
    """

    def __init__(self, plateau: ReduceLROnPlateau, roster: Roster, local_epoch: Callable[[], int]) -> None:
        self._plateau = plateau
        self._roster = roster
        self._local_epoch = local_epoch
        self._applied: Plan | None = None
        self._pace = Pace()
        plain = type(plateau)
        self._plain = plain

        def step(_: Any, metrics: Any, *args: Any, **kwargs: Any) -> None:
            self._on_metric(metrics, *args, **kwargs)

        # A subclass, not an attribute: the scheduler's state_dict() is its __dict__.
        plateau.__class__ = type(plain.__name__, (plain,), {"step": step, "__module__": plain.__module__})
        # Before every step and not before every batch, of which one may apply several epochs that were missed.
        self._hooks = [
            plateau.optimizer.register_step_pre_hook(lambda *_: self.follow()),
            plateau.optimizer.register_load_state_dict_post_hook(lambda _: self._forget()),
        ]

    def _on_metric(self, metrics: Any, *args: Any, **kwargs: Any) -> None:
        waiting = self._roster.plan()
        if not self._roster.is_writer or (waiting is not None and waiting.epoch > self._local_epoch()):
            # Not the one that decides, or its last decision holds from an epoch that is still to come.
            return
        groups = self._plateau.optimizer.param_groups
        before = [group["lr"] for group in groups]
        self._plain.step(self._plateau, metrics, *args, **kwargs)
        after = tuple(float(group["lr"]) for group in groups)
        if list(after) == before:
            return
        if self._roster.alone:
            self._roster.publish(Plan(self._local_epoch(), after))
            return
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
        heard = self._pace.within(_PLATEAU_LEAD_LOOKS * _roster._REFRESH_SECONDS)
        lead = max(_PLATEAU_LEAD_EPOCHS, heard)
        self._roster.publish(Plan(self._local_epoch() + lead, after))

    def _forget(self) -> None:
        """After a state was loaded: its rates may be those of before the plan."""
        self._applied = None

    def follow(self) -> None:
        """Before a step: take the rates that hold for the epoch that it ends."""
        self._pace.note(self._local_epoch())
        plan = self._roster.plan()
        groups = self._plateau.optimizer.param_groups
        if (
            plan is None
            or plan == self._applied
            or plan.epoch > self._local_epoch()
            or len(plan.rates) != len(groups)
        ):
            return
        self._applied = plan
        for group, rate in zip(groups, plan.rates, strict=True):
            group["lr"] = rate

    def release(self) -> None:
        """Give the scheduler its own class back, for after the run."""
        for hook in self._hooks:
            hook.remove()
        self._plateau.__class__ = self._plain
