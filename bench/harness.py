"""Starts the peers of one measurement, gives the word for each round and collects their reports."""

import json
import os
import queue
import signal
import statistics
import subprocess
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON = {
    "potluck": ROOT / ".venv/bin/python",
    "gloo": ROOT / ".venv/bin/python",
    "hivemind": ROOT / ".venv-hivemind/bin/python",
}
SCRIPT = {
    "potluck": HERE / "workers/potluck_peer.py",
    "gloo": HERE / "workers/gloo_peer.py",
    "hivemind": HERE / "workers/hivemind_peer.py",
}


class PeerDied(Exception):
    """A worker ended or fell silent; its last words are in the message."""


class Worker:
    """One peer: a process in a session of its own, so that everything it starts can be ended with it."""

    def __init__(self, system: str, arguments: list[str], namespace: str | None = None):
        self.log = (
            Path(os.environ.get("BENCH_LOG_DIR", "/tmp"))
            / f"potluck-bench-{system}-{os.getpid()}-{id(self)}.log"
        )
        # "codec-<system>" is the codec worker in that system's environment.
        if codec := system.removeprefix("codec-") if system.startswith("codec-") else None:
            command = [
                str(PYTHON[codec]),
                str(HERE / "workers/codec.py"),
                f"--system={codec}",
                *arguments,
            ]
        else:
            command = [str(PYTHON[system]), str(SCRIPT[system]), *arguments]
        if namespace:
            command = ["ip", "netns", "exec", namespace, *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HIVEMIND_LOGLEVEL": "ERROR"},
        )
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def tell(self, word: str):
        """Send one word."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def report(self, key: str, timeout: float) -> dict:
        """The next report that has `key`."""
        while True:
            try:
                line = self.lines.get(timeout=timeout)
            except queue.Empty:
                line = None
            if line is None:
                raise PeerDied(f"{self.process.args[-8:]}: {self.log.read_text()[-2000:]}")
            if key in line:
                return line

    def end(self):
        """Kill the worker and everything that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.log.unlink(missing_ok=True)


class Swarm:
    """`peers` workers of one system that know one another."""

    def __init__(self, system: str, peers: int, namespaces: list[str] | None = None, **options):
        self.workers: list[Worker] = []
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        address = None
        try:
            for rank in range(peers):
                join = [f"--join={address}"] if address else []
                namespace = namespaces[rank] if namespaces else None
                worker = Worker(
                    system,
                    [f"--rank={rank}", f"--peers={peers}", *arguments, *join],
                    namespace,
                )
                self.workers.append(worker)
                if rank == 0:
                    first = worker.report("address", 60)
                    address = first["address"]
            self.ready = [first if "ready" in first else None] + [None] * (peers - 1)
            self.ready = [found or w.report("ready", 120) for found, w in zip(self.ready, self.workers)]
        except BaseException:
            self.end()
            raise

    def ask(self, word: str, timeout: float = 180) -> list[dict]:
        """Give all peers the same word; their reports by rank."""
        for worker in self.workers:
            worker.tell(word)
        return [worker.report("cpu" if word == "round" else "store", timeout) for worker in self.workers]

    def end(self):
        """End every peer."""
        for worker in self.workers:
            worker.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def rounds(swarm: Swarm, count: int) -> dict:
    """Medians over `count` rounds after one to warm up; a round lasts as long as its slowest peer."""
    swarm.ask("round")
    reports = [swarm.ask("round") for _ in range(count)]
    good = [peers for peers in reports if all(peer["ok"] for peer in peers)]
    if not good:
        raise PeerDied("no round succeeded")
    return {
        "rounds": len(good),
        "failed": len(reports) - len(good),
        "seconds": statistics.median(max(p["seconds"] for p in peers) for peers in good),
        "transfer": statistics.median(max(p["transfer"] for p in peers) for peers in good),
        "cpu": statistics.median(sum(p["cpu"] for p in peers) for peers in good),
        "memory": max(p["memory"] for peers in good for p in peers),
        "wire": statistics.median(max(p.get("wire", 0) for p in peers) for peers in good) or None,
    }
