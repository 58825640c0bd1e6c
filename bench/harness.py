"""Starts the peers of one measurement, gives the word for each round and collects their reports."""

import json
import os
import queue
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON = {
    "potluck": ROOT / ".venv/bin/python",
    "gloo": ROOT / ".venv/bin/python",
    "hivemind": ROOT / ".venv-hivemind/bin/python",
}
# With `--alone` hivemind is left out: its column and its ratios stay empty.
alone = False


def systems(*names: str) -> list[str]:
    """Those of the named systems that take part in this run, in this order."""
    return [name for name in names if not (alone and name == "hivemind")]


class PeerDied(Exception):
    """A worker ended or fell silent; its last words are in the message."""


class Worker:
    """One peer: a process in a session of its own, so that everything it starts can be ended with it."""

    def __init__(self, role: str, system: str, arguments: list[str], host=None):
        # Lives as long as the worker: `end` closes it.
        self.stderr = tempfile.NamedTemporaryFile("w+", prefix=f"bench-{system}-")  # noqa: SIM115
        command = [str(PYTHON[system]), str(HERE / f"workers/{role}.py"), f"--system={system}", *arguments]
        if host is not None:
            command = host.command(*command)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HIVEMIND_LOGLEVEL": "ERROR",
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        self.lines: queue.Queue = queue.Queue()
        self.is_loaded = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def loaded(self):
        """Wait until everything is imported."""
        if not self.is_loaded:
            self.report("loaded", 180)
            self.is_loaded = True

    def tell(self, word: str):
        """Send one line; a worker that has gone is found out by who waits for its report."""
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except OSError:
            pass

    def report(self, key: str, timeout: float) -> dict:
        """The next report that has `key`."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                self.stderr.seek(0)
                words = " ".join(self.stderr.read().split())[-300:]
                raise PeerDied(f"no {key!r} from {self.process.args[-1]} within {timeout:.0f} s: {words}")
            if key in line:
                return line

    def ask(self, word: str, key: str, timeout: float = 180) -> dict:
        """Send a line and wait for the report that answers it."""
        self.tell(word)
        return self.report(key, timeout)

    def take(self) -> list[dict]:
        """Every report that has come in since."""
        found = []
        while True:
            try:
                line = self.lines.get_nowait()
            except queue.Empty:
                return found
            if line is not None:
                found.append(line)

    def kill(self):
        """Kill the worker and everything that it has started, and do not wait for it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def end(self):
        """Kill the worker and everything that it has started."""
        self.kill()
        self.process.wait()
        self.reader.join(10)
        self.process.stdin.close()
        self.process.stdout.close()
        self.stderr.close()


class Swarm:
    """`peers` workers of one system that know one another; options are the worker's."""

    def __init__(self, role: str, system: str, peers: int, hosts=None, each=None, **options):
        self.role, self.system, self.each, self.options = role, system, each, options
        self.workers: list[Worker] = []
        self.ready: list[dict] = []
        self.newest = 0
        self.address = None
        try:
            self.grow(peers, hosts)
        except BaseException:
            self.end()
            raise

    def grow(self, peers: int, hosts=None):
        """Let workers join until there are so many; the first of them is `newest`."""
        self.newest, self.options["peers"] = len(self.workers), peers
        new = [self.start(rank, hosts[rank] if hosts else None) for rank in range(self.newest, peers)]
        if self.address is None:
            self.ready.append(self.open(new.pop(0)))
        for worker in new:
            worker.loaded()
            worker.tell(f"open {self.address}")
        self.ready += [worker.report("ready", 180) for worker in new]

    def start(self, rank: int, host=None) -> Worker:
        """Load one more worker; it takes part when it is opened. `each(rank)` has options of its own for it."""
        given = {"rank": rank, **self.options, **(self.each(rank) if self.each else {})}
        if host is not None:
            given["listen"] = host.address
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
        worker = Worker(self.role, self.system, words, host)
        self.workers.append(worker)
        return worker

    def open(self, worker: Worker) -> dict:
        """Let a loaded worker take part."""
        worker.loaded()
        ready = worker.ask("open" if self.address is None else f"open {self.address}", "ready")
        self.address = self.address or ready["address"]
        return ready

    def ask(self, word: str, key: str = "ok", timeout: float = 180) -> list[dict]:
        """Give all peers the same word; their reports by rank."""
        for worker in self.workers:
            worker.tell(word)
        return [worker.report(key, timeout) for worker in self.workers]

    def end(self):
        """End every peer, all at once: who sees another one go begins to look for it."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def end_all(systems: dict):
    """End what runs of each system, and forget it: what comes next begins anew."""
    for running in systems.values():
        running.end()
    systems.clear()


def merge(peers: list[dict]) -> dict:
    """One round out of its peers' reports: it lasts as long as its slowest peer."""
    return {
        "ok": all(peer["ok"] for peer in peers),
        "seconds": max(peer["seconds"] for peer in peers),
        "transfer": max(peer["transfer"] for peer in peers),
        "cpu": sum(peer["cpu"] for peer in peers),
    }


def alternate(swarms: dict[str, Swarm], turns: int, count=None) -> list[dict[str, dict]]:
    """One round of each system in turn, `turns` times; `count(system)` reads bytes sent so far."""
    found = []
    for _ in range(turns):
        turn = {}
        for system, swarm in swarms.items():
            before = count(system) if count else 0
            turn[system] = merge(swarm.ask("round"))
            turn[system]["wire"] = count(system) - before if count else None
        found.append(turn)
    return found


def median(turns: list[dict], system: str, key: str):
    """The median of a figure over the rounds that succeeded; None without one."""
    values = [
        turn[system][key]
        for turn in turns
        if turn.get(system, {}).get("ok") and turn[system][key] is not None
    ]
    return statistics.median(values) if values else None


def pairwise(turns: list[dict], peer: str, key: str, peer_key: str | None = None):
    """The median of peer's figure by ours, each turn by itself; None if no turn has both."""
    ratios = [
        turn[peer][peer_key or key] / turn["potluck"][key]
        for turn in turns
        if turn.get(peer, {}).get("ok") and turn["potluck"]["ok"] and turn["potluck"][key]
    ]
    return statistics.median(ratios) if ratios else None
