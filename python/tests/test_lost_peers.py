"""A peer that is killed: the others go on with a mean of those who are there, and the same command brings it back."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import together
from test_optimizer import SGD, backward, batches, distance, equal, make_model

import potluck
from potluck.dht import DHT

# Gives its part of every epoch; of the last one only its samples, and then waits for its end.
THIRD = """
import sys, time
from test_optimizer import SGD, backward, batches, make_model
import potluck
dht = potluck.DHT([sys.argv[1]], start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
model = make_model()
opt = potluck.Optimizer(dht=dht, run_id="r", target_batch_size=24, batch_size_per_step=8,
                        optimizer=SGD(model.parameters()), delay_state_averaging=False)
opt.load_state_from_peers()
print("joined", flush=True)
class Late:
    def __getattr__(self, name):
        return getattr(session, name)
    def average_gradients(self, vector, weight):
        print("averaging", flush=True)
        time.sleep(600)
session = opt._session
for epoch, (x, y) in enumerate(batches(3, 24)):
    if epoch == 2:
        opt._session = Late()
    backward(model, x[16:], y[16:])
    opt.step()
    opt.zero_grad()
    while opt.local_epoch <= epoch:
        session.changed(0.05)
        opt._follow(0)
"""


def test_a_peer_killed_in_a_round_is_left_out_of_it(loopback_dht: Callable[..., DHT]) -> None:
    data, reference = [*batches(3, 24), *batches(2, 24, seed=9)], make_model()
    optimizer = SGD(reference.parameters())
    for epoch, (x, y) in enumerate(data):
        # The third one's samples of the epoch in which it was killed are missing.
        kept = 16 if epoch == 2 else 24
        backward(reference, x[:kept], y[:kept])
        optimizer.step()
        optimizer.zero_grad()
    models = [make_model(), make_model()]
    opts = [
        potluck.Optimizer(
            dht=loopback_dht(),
            run_id="r",
            target_batch_size=24,
            optimizer=SGD(model.parameters()),
            delay_state_averaging=False,
        )
        for model in models
    ]
    (address, *_) = map(str, opts[0].dht.get_visible_maddrs())
    third = subprocess.Popen(
        [sys.executable, "-c", THIRD, address],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    averaging = [threading.Event(), threading.Event()]

    def peer(index: int) -> None:
        opt, model = opts[index], models[index]
        while sum(1 for _ in opt.status()["peers"]) < 3:
            opt._session.changed(0.05)
            opt._follow(0)
        for epoch, (x, y) in enumerate(data):
            size = 8 if epoch < 3 else 12
            if epoch == 2:
                opt._session = Watched(opt._session, averaging[index])
            mine = slice(index * size, index * size + size)
            backward(model, x[mine], y[mine])
            opt.step(batch_size=size)
            opt.zero_grad()
            while opt.local_epoch <= epoch:
                opt._session.changed(0.05)
                opt._follow(0)

    def kill() -> None:
        assert third.stdout
        assert [third.stdout.readline() for _ in range(2)] == ["joined\n", "averaging\n"]
        assert all(event.wait(60) for event in averaging)
        third.send_signal(signal.SIGKILL)

    try:
        together(kill, lambda: peer(0), lambda: peer(1))
    finally:
        third.kill()
        third.communicate()
    assert distance(reference, models[0]) < 1e-6 and equal(*models)
    for opt in opts:
        opt.shutdown()


class Watched:
    """A session that says when it averages."""

    def __init__(self, session: Any, event: threading.Event):
        self._inner, self._event = session, event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def average_gradients(self, vector: Any, weight: float) -> Any:
        self._event.set()
        return self._inner.average_gradients(vector, weight)


# Says after each epoch what its weights are.
ENDLESS = """
import hashlib, sys, time
from test_optimizer import SGD, backward, batches, make_model
import potluck
dht = potluck.DHT(sys.argv[2:], start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False,
                  identity_path=sys.argv[1])
model = make_model()
opt = potluck.Optimizer(dht=dht, run_id="r", target_batch_size=16, batch_size_per_step=4,
                        optimizer=SGD(model.parameters()), delay_state_averaging=False)
opt.load_state_from_peers()
print(*map(str, dht.get_visible_maddrs()), flush=True)
for x, y in batches(100000, 4, seed=len(sys.argv)):
    backward(model, x, y)
    before = opt.local_epoch
    opt.step()
    opt.zero_grad()
    if opt.local_epoch > before:
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        print(opt.local_epoch, hashlib.sha256(weights).hexdigest(), flush=True)
    time.sleep(0.02)
"""


def test_a_killed_peer_catches_up_by_the_same_command(tmp_path: Path) -> None:
    def start(name: str, *peers: str) -> tuple[subprocess.Popen[str], list[str]]:
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(tmp_path / name), *peers],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        started.append(process)
        assert process.stdout
        return process, process.stdout.readline().split()

    def told(process: subprocess.Popen[str]) -> tuple[int, str]:
        assert process.stdout
        epoch, weights = process.stdout.readline().split()
        return int(epoch), weights

    seen: dict[int, str] = {}

    def agree(first: subprocess.Popen[str], other: subprocess.Popen[str]) -> tuple[int, int]:
        """Until they have had equal weights at four epochs one after another; the other's first and last epoch.

        While one comes, the first may end an epoch without it, and it loads that one's state.
        """
        began, row = None, 0
        for _ in range(12):
            epoch, weights = told(other)
            began = epoch if began is None else began
            while max(seen, default=0) < epoch:
                seen.update([told(first)])
            row = row + 1 if seen.get(epoch) == weights else 0
            if row == 4:
                return began, epoch
        raise AssertionError(f"not equal since epoch {began}: {weights} beside {seen}")

    started: list[subprocess.Popen[str]] = []
    try:
        first, addresses = start("first")
        second, _ = start("second", addresses[0])
        _, last = agree(first, second)
        second.kill()
        second.wait()
        again, _ = start("second", addresses[0])
        began, _ = agree(first, again)
        assert began > last, "it went on where the run is"
    finally:
        for process in started:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
