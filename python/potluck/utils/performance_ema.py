"""A running average of speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class PerformanceEMA:
    """Exponential moving average of the seconds that one unit of work takes."""

    def __init__(self, alpha: float = 0.1, eps: float = 1e-20, paused: bool = False):
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha!r}: expected a number in (0, 1]")
        self.alpha, self.eps, self.num_updates = alpha, eps, 0
        self.ema_seconds_per_sample, self.samples_per_second = 0.0, eps
        self.timestamp = time.perf_counter()
        self.paused = paused
        self.lock = threading.Lock()

    def update(self, task_size: float, interval: float | None = None) -> float:
        """Count ``task_size`` units done since the last call (or in ``interval`` seconds): units per second."""
        if task_size <= 0:
            raise ValueError(f"task_size={task_size!r}: expected a positive number")
        if self.paused:
            raise RuntimeError("PerformanceEMA is paused")
        now = time.perf_counter()
        seconds = (now - self.timestamp if interval is None else interval) / task_size
        self.timestamp = now
        self.ema_seconds_per_sample = self.alpha * seconds + (1 - self.alpha) * self.ema_seconds_per_sample
        self.num_updates += 1
        corrected = self.ema_seconds_per_sample / (1 - (1 - self.alpha) ** self.num_updates)
        self.samples_per_second = 1 / max(corrected, self.eps)
        return self.samples_per_second

    def reset_timer(self) -> None:
        """Do not count the time since the last update."""
        self.timestamp = time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time spent inside this context."""
        self.paused, before = True, self.paused
        try:
            yield
        finally:
            self.timestamp = time.perf_counter()
            self.paused = before

    @contextmanager
    def update_threadsafe(self, task_size: float) -> Iterator[None]:
        """Time the work inside this context; several threads may do so at once."""
        start = time.perf_counter()
        yield
        with self.lock:
            start = max(start, self.timestamp)
            self.update(task_size, interval=max(0.0, time.perf_counter() - start))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ema={self.samples_per_second:.5f}, num_updates={self.num_updates})"
