"""The handle of one averaging round that was asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from enum import Enum
from typing import Any

from potluck.utils.timed_storage import DHTExpiration, get_dht_time


class AveragingStage(Enum):
    """How far a round is."""

    IDLE = 0
    LOOKING_FOR_GROUP = 1
    AWAITING_TRIGGER = 2
    RUNNING_ALLREDUCE = 3
    FINISHED = 4


class StepControl(Future):  # type: ignore[type-arg]
    """A round that runs in the background: a future, with the weight and the trigger that may still change."""

    def __init__(
        self,
        scheduled_time: DHTExpiration,
        deadline: float | None,
        allow_retries: bool,
        weight: float,
        data_for_gather: bytes,
    ):
        super().__init__()
        self._guard = threading.Lock()
        self._trigger = threading.Event()
        self._stage = AveragingStage.IDLE
        self._scheduled_time = scheduled_time
        self._weight = weight
        self.deadline = deadline
        self.allow_retries = allow_retries
        self.data_for_gather = data_for_gather
        self.thread: threading.Thread | None = None

    @property
    def stage(self) -> AveragingStage:
        """How far the round is."""
        return self._stage

    @stage.setter
    def stage(self, stage: AveragingStage) -> None:
        self._stage = stage

    @property
    def scheduled_time(self) -> DHTExpiration:
        """When the round is meant to begin; not before."""
        return self._scheduled_time

    @scheduled_time.setter
    def scheduled_time(self, scheduled_time: DHTExpiration) -> None:
        if self.began_allreduce:
            raise RuntimeError("the round has begun: its time cannot change any more")
        if self.deadline is not None and scheduled_time >= self.deadline:
            raise ValueError("scheduled_time: expected a time before the deadline")
        self._scheduled_time = scheduled_time

    @property
    def weight(self) -> float:
        """How much this peer counts; may change until the round begins."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        if not (weight >= 0 and weight != float("inf")):
            raise ValueError(f"weight={weight!r}: expected a finite number >= 0")
        with self._guard:
            if self.began_allreduce:
                how = "ended" if self.done() else "begun"
                raise RuntimeError(f"the round has {how}: the weight cannot change any more")
            self._weight = weight

    @property
    def triggered(self) -> bool:
        """Whether the round may begin."""
        return self._trigger.is_set()

    @property
    def began_allreduce(self) -> bool:
        """Whether values are being exchanged, or were."""
        return self._stage in (AveragingStage.RUNNING_ALLREDUCE, AveragingStage.FINISHED)

    def allow_allreduce(self) -> None:
        """Let a round begin that was asked for with ``require_trigger=True``."""
        self._trigger.set()

    def get_timeout(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - get_dht_time())

    def end_within(self, timeout: float) -> None:
        """Bring the deadline forward, if it is later than so many seconds from now."""
        deadline = get_dht_time() + timeout
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)

    def cancel(self) -> bool:
        """Give the round up; false if it has ended."""
        with self._guard:
            if self.done():
                return False
            # A running future cannot be cancelled by the standard class, but a round can.
            with self._condition:
                if self._state in ("CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED"):
                    return False
                self._state = "CANCELLED"
                self._condition.notify_all()
            self._invoke_callbacks()  # type: ignore[attr-defined]
            self._trigger.set()
            return True

    def result(self, timeout: float | None = None) -> Any:
        """The outcome of the round; looks for Ctrl-C while waiting."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 0.1 if deadline is None else min(0.1, deadline - time.monotonic())
            try:
                return super().result(max(0.0, left))
            except FutureTimeoutError:
                if self.done():
                    raise
                if deadline is not None and time.monotonic() >= deadline:
                    raise

    # Used by the averager only.

    def wait_for_trigger(self) -> None:
        """Until the trigger, the cancellation or the deadline."""
        if not self._trigger.wait(self.get_timeout()):
            raise TimeoutError("the round was never triggered before its deadline")
        if self.cancelled():
            raise CancelledError()

    def begin(self) -> float:
        """Freeze the weight."""
        with self._guard:
            if self.cancelled():
                raise CancelledError()
            self._stage = AveragingStage.RUNNING_ALLREDUCE
            return self._weight

    def run(self, work: Callable[[StepControl], Any]) -> None:
        """Do the round in this thread and keep its outcome."""
        try:
            value, error = work(self), None
        except BaseException as raised:
            value, error = None, raised
        self._stage = AveragingStage.FINISHED
        with self._guard:
            if self.done():
                return
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(value)
