"""A program that runs as a user would run it: its output is read all the time, and Ctrl-C is pressed once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable

# What is promised is 5 s; the rest is room for a machine that runs other tests as well.
CTRL_C_SECONDS = 20


class Peer:
    """A running program, and everything that it has printed.

    It is waited for ``patience`` seconds, so that what it said is told before the limit of a test ends the test.
    """

    def __init__(self, process: subprocess.Popen, patience: float = 240) -> None:
        self.process, self._patience = process, patience
        self._output: list[bytes] = []
        # Read all the time: a peer whose progress bar fills an unread pipe stops training.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
            self._output.append(chunk)

    @property
    def said(self) -> str:
        return b"".join(self._output).decode(errors="replace")

    def wait_for(self, pattern: str, since: int = 0) -> re.Match:
        """Until it prints the pattern."""
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            ended = not self._reader.is_alive()
            if found := re.search(pattern, self.said[since:]):
                return found
            assert not ended, self.said
            self.process.poll()
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} was not printed in:\n{self.said[-3000:]}")

    def wait_for_last(self, pattern: str, true_of: Callable[[str], bool]) -> None:
        """Until what the pattern finds last is as wanted."""
        deadline = time.monotonic() + self._patience
        while not ((found := re.findall(pattern, self.said[-5000:])) and true_of(found[-1])):
            assert time.monotonic() < deadline and self._reader.is_alive(), self.said[-3000:]
            time.sleep(0.05)

    def ctrl_c(self) -> int:
        """Once; it must be gone within moments, without a traceback. The exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(CTRL_C_SECONDS)
        self._reader.join(5)
        assert "Traceback" not in self.said, self.said
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        self.process.stdout.close()
