"""How far a run is, as plain numbers."""

from __future__ import annotations

import dataclasses
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from potluck import _core, _settings
from potluck.utils.logging import get_logger
from potluck.utils.performance_ema import PerformanceEMA
from potluck.utils.timed_storage import DHTExpiration, get_dht_time

logger = get_logger("potluck")


@dataclasses.dataclass(frozen=True)
class GlobalTrainingProgress:
    """All live peers together."""

    epoch: int
    samples_accumulated: int
    target_batch_size: int
    num_peers: int
    num_clients: int
    eta_next_epoch: DHTExpiration
    next_fetch_time: DHTExpiration


@dataclasses.dataclass(frozen=True)
class LocalTrainingProgress:
    """This peer."""

    peer_id: str
    epoch: int
    samples_accumulated: int
    samples_per_second: float
    time: DHTExpiration
    client_mode: bool


class SessionTracker:
    """The progress that a session of the optimizer knows: live peers report to one another every second."""

    def __init__(
        self,
        status: Callable[[], dict[str, Any]],
        *,
        target_batch_size: int,
        client_mode: bool,
        epoch_of: Callable[[int], int],
    ):
        self._status, self.target_batch_size, self.client_mode = status, target_batch_size, client_mode
        self._epoch_of = epoch_of

    @property
    def performance_ema(self) -> PerformanceEMA:
        """This peer's speed as its session measures it, in hivemind's form: of now, and not to be updated."""
        measured, speed = PerformanceEMA(), self.local_progress.samples_per_second
        if speed > 0:
            measured.update(speed, interval=1.0)
        return measured

    @property
    def global_progress(self) -> GlobalTrainingProgress:
        """All live peers together."""
        status = self._status()
        now = get_dht_time()
        eta = status["eta_seconds"]
        trainers = [peer for peer in status["peers"] if not peer["auxiliary"]]
        return GlobalTrainingProgress(
            epoch=self._epoch_of(max([status["epoch"], *(peer["epoch"] for peer in trainers)])),
            samples_accumulated=status["samples"],
            target_batch_size=self.target_batch_size,
            num_peers=len(trainers),
            num_clients=sum(peer["client"] for peer in trainers),
            eta_next_epoch=now + (float("inf") if eta is None else eta),
            next_fetch_time=now,
        )

    @property
    def local_progress(self) -> LocalTrainingProgress:
        """This peer."""
        status = self._status()
        mine = next((peer for peer in status["peers"] if peer["is_me"]), None)
        return LocalTrainingProgress(
            peer_id=status["peer"],
            epoch=self._epoch_of(status["epoch"]),
            samples_accumulated=0 if mine is None else mine["samples"],
            samples_per_second=0.0 if mine is None else mine["samples_per_second"],
            time=get_dht_time(),
            client_mode=self.client_mode,
        )

    @property
    def global_epoch(self) -> int:
        """The newest epoch that a live peer works on."""
        return self.global_progress.epoch

    @property
    def fetched_global_progress_this_epoch(self) -> bool:
        """Always: live peers report by themselves."""
        return True

    @property
    def ready_to_update_epoch(self) -> bool:
        """Whether the samples of this epoch are in, or others have moved on."""
        progress = self.global_progress
        return (
            progress.samples_accumulated >= self.target_batch_size
            or progress.epoch > self.local_progress.epoch
        )

    @property
    def estimated_next_update_time(self) -> DHTExpiration:
        """When the samples of this epoch will be in, by the speed of all peers."""
        return get_dht_time() if self.ready_to_update_epoch else self.global_progress.eta_next_epoch

    @contextmanager
    def pause_updates(self) -> Iterator[None]:
        """Kept for hivemind's scripts: the session measures the speed from step to step, with whatever lies between."""
        yield


class ProgressTracker(SessionTracker):
    """The progress of a run for programs that step by themselves: report samples, and ask when the epoch is full."""

    def __init__(
        self,
        dht: Any,
        prefix: str,
        target_batch_size: int,
        *,
        client_mode: bool | None = None,
        min_refresh_period: float = 0.5,
        max_refresh_period: float = 10,
        default_refresh_period: float = 3,
        expected_drift_peers: float = 3,
        expected_drift_rate: float = 0.2,
        performance_ema_alpha: float = 0.1,
        metadata_expiration: float = 60.0,
        status_loglevel: int = logging.DEBUG,
        private_key: None = None,
        daemon: bool = True,
        start: bool,
    ):
        if private_key is not None:
            raise ValueError("private_key cannot have an effect: reports are signed with the peer's own key")
        if not daemon:
            raise ValueError(
                "daemon=False cannot have an effect: potluck runs in threads of this process, which end with it"
            )
        client = bool(getattr(dht, "client_mode", False) if client_mode is None else client_mode)
        self.dht, self.prefix, self.status_loglevel = dht, prefix, status_loglevel
        self._ema = PerformanceEMA(alpha=performance_ema_alpha)
        self._session: _core.Session | None = None
        self._reported = 0
        super().__init__(
            self._session_status,
            target_batch_size=_settings.positive("target_batch_size", target_batch_size),
            client_mode=client,
            epoch_of=lambda epoch: epoch,
        )
        if start:
            self.start()

    def start(self) -> None:
        """Join."""
        options = _settings.session_options(
            run_id=f"{self.prefix}_progress",
            target_batch_size=self.target_batch_size,
            tensors=[{"key": "progress", "shape": [1], "role": "Unspecified"}],
            client_mode=self.client_mode,
        )
        self._session = _core.Session.join(self.dht.node, options)
        self._session.publish({}, {})
        self.dht.own(weakref.WeakMethod(self.shutdown))

    @property
    def _running(self) -> _core.Session:
        if self._session is None:
            raise RuntimeError("this tracker does not run: call start(), or create it with start=True")
        return self._session

    def _session_status(self) -> dict[str, Any]:
        # A step without samples looks at the other peers' news.
        self._running.step(0)
        return json.loads(self._running.status())  # type: ignore[no-any-return]

    @property
    def performance_ema(self) -> PerformanceEMA:
        """This peer's speed by what was reported here."""
        return self._ema

    @contextmanager
    def pause_updates(self) -> Iterator[None]:
        """Do not count the time spent inside as training."""
        with self._ema.pause():
            yield

    def report_local_progress(
        self, local_epoch: int, samples_accumulated: int, update_global: bool = True
    ) -> None:
        """This peer has so many samples of its epoch."""
        self._go_to(local_epoch)
        new = samples_accumulated - self._reported
        if new < 0:
            raise ValueError(
                f"samples_accumulated={samples_accumulated}: was {self._reported} in this epoch already"
            )
        if new:
            self._ema.update(new)
        self._reported = samples_accumulated
        self._running.step(new)
        if logger.isEnabledFor(self.status_loglevel):
            run = self.global_progress
            line = f"{run.samples_accumulated} of {self.target_batch_size} samples of epoch {run.epoch}"
            logger.log(self.status_loglevel, "%s: %s, from %d peers", self.prefix, line, run.num_peers)

    def update_epoch(self, new_epoch: int | None = None) -> int:
        """This peer works on a new epoch."""
        epoch = self._running.epoch + 1 if new_epoch is None else new_epoch
        self._go_to(epoch)
        return epoch

    def _go_to(self, epoch: int) -> None:
        if epoch < self._running.epoch:
            raise ValueError(f"epoch {epoch}: an epoch never falls, this peer is at {self._running.epoch}")
        while self._running.epoch < epoch:
            self._running.epoch_done(None)
            self._reported = 0

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._session is not None

    def shutdown(self, timeout: float | None = None) -> None:
        """Leave. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            session.leave(5.0 if timeout is None else timeout)
