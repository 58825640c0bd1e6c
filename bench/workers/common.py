"""What the workers of every system share: the same tensors, the same clock, the same report.

A worker is one peer in one process, as users run it. It prints JSON lines on stdout and reads commands (a line each)
on stdin; the controller (bench/harness.py) starts all workers of a measurement, hands the first one's address to the
others, and gives the word for each round, so that no system waits for a slow start of another.
"""

import json
import os
import sys
import threading
import time

import psutil
import torch


def say(**fields):
    """Print one JSON line for the controller."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def hear() -> str:
    """Wait for the controller's next line; its end of file means that it has gone."""
    line = sys.stdin.readline()
    if not line:
        os._exit(3)
    return line.strip()


def opened() -> str | None:
    """Say that everything is imported, wait for the word to take part; the address of a peer that already does."""
    say(loaded=True)
    word, _, address = hear().partition(" ")
    if word != "open":
        raise SystemExit(f"expected to be opened, not {word!r}")
    return address or None


def options(parser):
    """The arguments that every worker takes; those of other roles are ignored."""
    parser.add_argument("--system", required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--listen", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--announce", default=None, help="the address to give to others instead of the own one"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    return given


def join(system, given, address: str | None):
    """The system's DHT, as its users start it."""
    return system.DHT(
        initial_peers=[address] if address else [],
        host_maddrs=[f"/ip4/{given.listen}/tcp/{given.port}"],
        announce_maddrs=[given.announce] if given.announce else None,
        start=True,
    )


def tensors(numel: int, rank: int, count: int = 8) -> list[torch.Tensor]:
    """`count` matrices of about `numel` values together, the same shapes for everybody, values by rank."""
    generator = torch.Generator().manual_seed(1000 + rank)
    rows = max(1, int((numel / count) ** 0.5))
    columns = numel // count // rows
    return [torch.randn(rows, columns, generator=generator) for _ in range(count)]


def processes() -> list[psutil.Process]:
    """This process and everything that it has started."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    """CPU time of this peer, all of its processes together."""
    total = 0.0
    for process in processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def memory_bytes() -> int:
    """Proportional resident memory of this peer, all of its processes together (shared pages are divided)."""
    total = 0
    for process in processes():
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class Meter:
    """Seconds and CPU seconds of one round."""

    def __enter__(self):
        self.cpu = cpu_seconds()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.cpu = cpu_seconds() - self.cpu


class Peak:
    """The most memory that this peer holds in a round. It costs CPU time, so that no round is timed meanwhile."""

    def __enter__(self):
        self.bytes, self.done = memory_bytes(), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self):
        while not self.done.wait(0.02):
            self.bytes = max(self.bytes, memory_bytes())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def finish(code: int = 0):
    """Leave at once: what a system does at exit is not part of the measurement (the controller reaps children)."""
    sys.stdout.flush()
    os._exit(code)
