"""The delayed optimizer step, in a thread of its own: torch releases the GIL inside its operations."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StepWorker:
    """One step at a time beside the training; ``ready`` is called in its thread when it has ended."""

    def __init__(self, ready: Callable[[], None]):
        self._ready = ready
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def waits(self) -> bool:
        """Whether a step is on its way or has ended and was not taken yet."""
        return self._thread is not None

    @property
    def is_here(self) -> bool:
        """Whether the caller is the step itself."""
        return self._thread is threading.current_thread()

    def start(self, work: Callable[[], None]) -> None:
        """Begin a step; the last one was taken."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
            finally:
                self._ready()

        self._thread = threading.Thread(target=run, name="potluck-optimizer", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether a step waits to be taken, and has ended by then."""
        if self._thread is None:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def take(self, timeout: float | None = None) -> bool:
        """Wait for the step; whether there was one. Its error is raised here."""
        if not self.wait(timeout):
            return False
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return True
