"""Peers for tests: within this process, each in a thread of its own, or over loopback sockets."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pasted import Peer

from potluck import _core
from potluck.dht import DHT

# A shell that runs something in the background makes it ignore Ctrl-C, and whatever it starts too. What the tests start
# shall answer to Ctrl-C as at a terminal, however the tests were started.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hub() -> _core.Hub:
    """A place where peers of this process meet."""
    return _core.Hub()


@pytest.fixture
def local_dht(hub: _core.Hub) -> Iterator[Callable[[], DHT]]:
    """Makes peers of this process; they are shut down after the test."""
    made: list[DHT] = []

    def make() -> DHT:
        made.append(DHT.within_process(hub))
        return made[-1]

    yield make
    for dht in made:
        dht.shutdown()


@pytest.fixture
def loopback_dht() -> Iterator[Callable[..., DHT]]:
    """Makes peers that talk over loopback sockets, each joining the first; they are shut down after the test."""
    made: list[DHT] = []

    def make(*initial_peers: str, **kwargs: Any) -> DHT:
        known = [str(address) for dht in made[:1] for address in dht.get_visible_maddrs()]
        options = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, **kwargs}
        made.append(DHT(list(initial_peers) or known, start=True, **options))
        return made[-1]

    yield make
    for dht in made:
        dht.shutdown()


def _namespaces_work() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"pl{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """What to put before a command to run it on one of two machines.

    They are network namespaces with one cable between them; without root, both are this machine.
    """
    if not _namespaces_work():
        yield [[], []]
        return
    tag = uuid.uuid4().hex[:6]
    hosts = (f"pl{tag}a", f"pl{tag}b")
    commands = [f"ip netns add {host}" for host in hosts]
    commands.append(f"ip link add v{tag}a netns {hosts[0]} type veth peer name v{tag}b netns {hosts[1]}")
    for index, (host, cable) in enumerate(zip(hosts, (f"v{tag}a", f"v{tag}b"), strict=True)):
        commands += [
            f"ip -n {host} addr add 192.0.2.{index + 1}/24 dev {cable}",
            f"ip -n {host} link set {cable} up",
            f"ip -n {host} link set lo up",
        ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        yield [["ip", "netns", "exec", host] for host in hosts]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False)


@pytest.fixture
def starts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Peer]]:
    """Runs lines as a user would paste them, on this machine or on one of ``machines``; none outlives the test."""
    from lightning_support import on_machine

    peers: list[Peer] = []
    marked = request.node.get_closest_marker("timeout")
    limit = float(marked.args[0] if marked else request.config.getini("timeout"))

    def start(line: str, machine: list[str] | None = None) -> Peer:
        peers.append(Peer(on_machine(machine or [], line, tmp_path), 0.8 * limit))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


def free_port() -> str:
    """A port for several processes, one after the other.

    It is none of those that are given to whoever asks for any: another test would be given it between two of them.
    """
    span = Path("/proc/sys/net/ipv4/ip_local_port_range")
    given = int(span.read_text().split()[0]) if span.exists() else 49152
    first = max(1024, given - 12_000)
    while True:
        port = random.randrange(first, first + 12_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return str(port)


def together(*works: Callable[[], Any], timeout: float = 200) -> list[Any]:
    """Run each work in a thread; their results in order, or the first error."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a peer did not finish in time"
    return results


def waiting(opt: Any) -> int:
    """Samples of this peer that are in no round yet."""
    if opt.grad_averager is not None:
        return int(opt.grad_averager.local_samples_accumulated)
    return sum(peer["samples"] for peer in opt.status()["peers"] if peer["is_me"])


class TooLate:
    """A session whose peer comes to the next round that ends an epoch when the other one has given it up."""

    def __init__(self, inner: Any, other: Any):
        self._inner, self._other = inner, other
        self._failed = other.status()["rounds_failed"]
        # With local updates an epoch ends with the mean of the parameters.
        self._with_state = other.use_local_updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _wait(self) -> None:
        while self._other.status()["rounds_failed"] == self._failed:
            self._inner.changed(0.05)

    def average_gradients(self, vector: Any, weight: float) -> Any:
        self._wait()
        return self._inner.average_gradients(vector, weight)

    def average_state(self, vector: Any) -> Any:
        if self._with_state:
            self._wait()
        return self._inner.average_state(vector)

    def start_gradients(self, vector: Any, weight: float) -> None:
        self._wait()
        self._inner.start_gradients(vector, weight)
