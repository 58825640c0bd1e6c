"""What the workers of every system share: the same tensors, the same clock, the same report.

A worker is one peer in one process, as users run it. It prints JSON lines on stdout and reads commands (one word a line)
on stdin; the controller (bench/harness.py) starts all workers of a measurement, hands the first one's address to the
others, and gives the word for each round, so that no system waits for a slow start of another.
"""

import json
import os
import sys
import time

import psutil
import torch


def say(**fields):
    """Print one JSON line for the controller."""
    print(json.dumps(fields), flush=True)


def hear() -> str:
    """Wait for the controller's next word; its end of file means that it has gone."""
    line = sys.stdin.readline()
    if not line:
        sys.exit(3)
    return line.strip()


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


def finish(code: int = 0):
    """Leave at once: what a system does at exit is not part of the measurement (the controller reaps children)."""
    sys.stdout.flush()
    os._exit(code)
