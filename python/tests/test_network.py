"""Whole peers over loopback sockets: one process each, joined by what the first one prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

TRAIN = """
import sys
from pathlib import Path
import torch, potluck
from test_optimizer import SGD, backward, batches, make_model

peers, index, folder, initial = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
torch.set_num_threads(1)
dht = potluck.DHT(initial, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
model = make_model(index)
opt = potluck.Optimizer(
    dht=dht, run_id="net", target_batch_size=16, batch_size_per_step=16 // peers, optimizer=SGD(model.parameters()),
    scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.9), delay_state_averaging=False, average_state_every=2,
)
print(dht.token("net"), flush=True)
while opt.tracker.global_progress.num_peers < peers:
    opt._session.changed(0.1)
    opt._follow(0)
opt.load_state_from_peers()
print("together", flush=True)
EPOCHS = 8
torch.save([p.detach().clone() for p in model.parameters()], folder / f"start{index}.pt")
while opt.local_epoch < EPOCHS:
    epoch = opt.local_epoch
    x, y = batches(EPOCHS, 16)[epoch]
    half = 16 // peers
    backward(model, x[index * half:][:half], y[index * half:][:half])
    opt.step()
    opt.zero_grad()
    while opt.local_epoch == epoch:
        opt._session.changed(0.02)
        opt._follow(0)
torch.save([p.detach().clone() for p in model.parameters()], folder / f"end{index}.pt")
print("done", opt.status()["rounds_failed"], flush=True)
sys.stdin.readline()
opt.shutdown()
dht.shutdown()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", TRAIN, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_are_one_big_batch(tmp_path: Path) -> None:
    from test_optimizer import SGD, backward, batches, make_model

    one = start("2", "0", str(tmp_path))
    token = line(one)
    assert token.startswith("potluck")
    two = start("2", "1", str(tmp_path), token)
    try:
        assert line(two).startswith("potluck")
        assert line(one) == line(two) == "together"
        # A busy machine may stall one of them until the other has given a round up.
        assert {line(one), line(two)} <= {"done 0", "done 1"}
        begin = [torch.load(tmp_path / f"start{i}.pt") for i in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*begin, strict=True)), (
            "they began at the same parameters"
        )
        reference = make_model()
        with torch.no_grad():
            for parameter, value in zip(reference.parameters(), begin[0], strict=True):
                parameter.copy_(value)
        optimizer = SGD(reference.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        for x, y in batches(8, 16):
            backward(reference, x, y)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        end = [torch.load(tmp_path / f"end{i}.pt") for i in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*end, strict=True)), "they ended at the same bits"
        for mine, expected in zip(end[0], reference.parameters(), strict=True):
            assert (mine - expected).abs().max() < 1e-6
        for process in (one, two):
            process.send_signal(signal.SIGTERM) if process is one else process.communicate("\n", timeout=20)
        assert one.wait(10) == -signal.SIGTERM and two.returncode == 0
    finally:
        for process in (one, two):
            process.kill()
            process.communicate()
