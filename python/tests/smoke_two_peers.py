"""Two peers in two processes train one model over loopback and end with the same weights.

A program, not a test: the workflow runs it on every platform with nothing but the wheel and torch, and ``test_smoke.py``
runs it here. The first peer trains alone at first, so that the second has a state to take over.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from typing import Any

ALONE_EPOCHS, EPOCHS = 5, 25
BATCH, TARGET = 16, 64
# A batch takes this long on top, so that a slow start of either does not make the other do all of the work.
PACE_SECONDS = 0.03
LIMIT_SECONDS = 240.0


def say(kind: str, **fields: Any) -> None:
    """One line to whoever started this peer."""
    print(json.dumps({"kind": kind, **fields}), flush=True)


def peer(token: str | None) -> None:
    """Train to the last epoch, say what came out, and stay until the standard input ends."""
    import torch

    import potluck

    torch.set_num_threads(1)
    # Other first weights in each: they are equal at the end because the newcomer takes over the run's.
    torch.manual_seed(0 if token is None else 1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    with (
        potluck.DHT(token, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False) as dht,
        potluck.Optimizer(
            dht=dht,
            run_id="smoke",
            target_batch_size=TARGET,
            batch_size_per_step=BATCH,
            optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
            grad_compression=potluck.Float16Compression(),
        ) as optimizer,
    ):
        losses: list[float] = []

        def train(until: int) -> None:
            while optimizer.local_epoch < until:
                inputs = torch.randn(BATCH, 8)
                loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                time.sleep(PACE_SECONDS)

        if token is None:
            train(ALONE_EPOCHS)
            say("token", token=dht.token("smoke"))
            # Level, not only there: whoever trains on meanwhile may be at the end before the other has begun.
            while not any(
                other["epoch"] >= ALONE_EPOCHS for other in optimizer.status()["peers"] if not other["is_me"]
            ):
                time.sleep(0.05)
        else:
            optimizer.load_state_from_peers()
        began = optimizer.local_epoch
        train(EPOCHS)
        weights = hashlib.sha256()
        for parameter in model.parameters():
            weights.update(bytes(parameter.detach().flatten().view(torch.uint8).tolist()))
        sent = optimizer.status()["bytes_sent"]
        say(
            "end",
            began=began,
            epoch=optimizer.local_epoch,
            digest=weights.hexdigest(),
            sent=sent,
            losses=losses,
        )
        sys.stdin.read()


def start(*arguments: str) -> subprocess.Popen[str]:
    """One peer in a process of its own."""
    command = [sys.executable, __file__, "peer", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def hear(process: subprocess.Popen[str], kind: str) -> dict[str, Any]:
    """The next line of that kind."""
    assert process.stdout
    for line in process.stdout:
        if (told := json.loads(line))["kind"] == kind:
            return told
    raise SystemExit(f"a peer ended (exit code {process.wait()}) or took too long before it said {kind!r}")


def problems(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What is wrong with the ends of the two, in sentences."""
    found = []
    if first["digest"] != second["digest"]:
        found.append(f"the weights differ: {first['digest'][:16]} and {second['digest'][:16]}")
    if {first["epoch"], second["epoch"]} != {EPOCHS}:
        found.append(f"epochs {first['epoch']} and {second['epoch']} instead of {EPOCHS}")
    if second["began"] < ALONE_EPOCHS:
        found.append(f"the second began at epoch {second['began']}, not with the state of the first")
    for name, end in (("first", first), ("second", second)):
        if not end["sent"]:
            found.append(f"the {name} peer sent nothing")
        if not end["losses"]:
            found.append(f"the {name} peer trained nothing")
    early, late = first["losses"][:10], first["losses"][-10:]
    if not sum(late) < 0.8 * sum(early):
        found.append(f"the loss did not fall: {sum(early) / 10:.3f}, at the end {sum(late) / 10:.3f}")
    return found


def main() -> int:
    """Start both, compare their ends; the exit code."""
    started = [start()]
    watchdog = threading.Timer(LIMIT_SECONDS, lambda: [process.kill() for process in started])
    watchdog.start()
    try:
        started.append(start(hear(started[0], "token")["token"]))
        ends = [hear(process, "end") for process in started]
        # Both at once: none of them is to look for the other.
        for process in started:
            process.stdin.close()
        for process in started:
            process.wait()
        found = problems(*ends)
        found += [f"exit code {process.returncode}" for process in started if process.returncode]
    finally:
        watchdog.cancel()
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    if not found:
        print(f"two peers, {EPOCHS} epochs, equal weights: {ends[0]['digest'][:16]}")
    return 1 if found else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        peer(*(sys.argv[2:3] or [None]))
    else:
        sys.exit(main())
