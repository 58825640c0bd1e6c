"""Where a Lightning peer runs, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import free_port
from lightning_support import environment
from pasted import CTRL_C_SECONDS, Peer
from test_manners import members, orphans, run

# A user's training without a guard for __main__, with DataLoader workers.
PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset
from potluck.lightning import HivemindStrategy
torch.set_num_threads(1)
ADDRESS = "127.0.0.1"

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(16, 1)
    def training_step(self, batch, index):
        if self.trainer.max_epochs < 0 and self.trainer.strategy.local_epoch >= 3:
            print("going", self.trainer.strategy.num_peers, flush=True)
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

def train(workers, epochs):
    x = torch.randn(256, 16)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, num_workers=workers)
    place = {"host_maddrs": [f"/ip4/{ADDRESS}/tcp/{os.environ.get('PORT', 0)}"], "identity_path": os.environ.get("KEY")}
    strategy = HivemindStrategy(target_batch_size=32, **place)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=epochs, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Model(), loader)
    print("epochs", strategy.local_epoch)
"""


def test_a_script_without_a_guard_and_with_workers(tmp_path: Path) -> None:
    done = run(PROGRAM + "train(2, 1)", cwd=tmp_path, env=environment())
    assert (done.returncode, done.stdout) == (0, "epochs 8\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_notebook() -> None:
    """A kernel runs cells in its event loop, and has no file of the program."""
    code = f"""
import asyncio
async def kernel():
    names = {{"__name__": "__main__"}}
    for cell in ({PROGRAM!r}, "train(2, 1)", "train(0, 1)"):
        exec(compile(cell, "<cell>", "exec"), names)
        await asyncio.sleep(0)
asyncio.run(kernel())
"""
    done = run(code, env=environment())
    assert (done.returncode, done.stdout) == (0, "epochs 8\nepochs 8\n"), done.stderr


def test_a_spawned_child(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(PROGRAM)
    (tmp_path / "program.py").write_text(
        """
import multiprocessing, training
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=training.train, args=(1, 1))
    child.start()
    child.join()
    print("code", child.exitcode)
"""
    )
    command = [sys.executable, "program.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=environment()
    )
    assert done.stdout == "epochs 8\ncode 0\n", done.stderr


PLAIN = """
import torch, potluck
torch.set_num_threads(1)
dht = potluck.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
model = torch.nn.Linear(16, 1)
optimizer = potluck.Optimizer(dht=dht, run_id="r", target_batch_size=32, batch_size_per_step=16,
                              optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
while True:
    model(torch.randn(16, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if optimizer.local_epoch >= 3:
        print("going 1", flush=True)
"""


def in_a_session(program: str, folder: Path, caches: Path, **extra: str) -> subprocess.Popen[str]:
    """A program in a session of its own; its temporary files are in ``tmp`` of the folder."""
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        # torch makes itself a folder for compiled code, whoever uses it.
        env=environment(TMPDIR=str(folder / "tmp"), TORCHINDUCTOR_CACHE_DIR=str(caches), **extra),
        start_new_session=True,
    )


def until_it_trains(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "going 1\n":
            return
    raise AssertionError("".join(lines))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("program", [PLAIN, PROGRAM + "train(0, -1)"], ids=["torch", "lightning"])
def test_ctrl_c_once_ends_a_training(
    program: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It is one process, and leaves neither processes nor files."""
    process = in_a_session(program, tmp_path, tmp_path_factory.mktemp("torch"))
    try:
        until_it_trains(process)
        assert members(process.pid) == [process.pid], "one process and no children"
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=CTRL_C_SECONDS)
        assert members(process.pid) == []
    finally:
        process.kill()
        process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"] and not list((tmp_path / "tmp").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_leaves_nothing_and_the_same_command_goes_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No process, no socket, no temporary or shared-memory file: only the key that was asked for."""
    caches, shared_before = tmp_path_factory.mktemp("torch"), set(os.listdir("/dev/shm"))
    asked_for = {"PORT": free_port(), "KEY": "key", "POTLUCK_RUNTIME_DIR": str(tmp_path / "tmp" / "notices")}
    keys = []
    for _ in range(2):
        process = in_a_session(PROGRAM + "train(0, -1)", tmp_path, caches, **asked_for)
        try:
            until_it_trains(process)
            assert members(process.pid) == [process.pid], "one process and no children"
        finally:
            process.kill()
            process.communicate()
        assert members(process.pid) == []
        keys.append((tmp_path / "key").read_bytes())
    assert keys[0] == keys[1]
    assert {path.name for path in tmp_path.iterdir()} == {"key", "tmp"}
    assert not list((tmp_path / "tmp").iterdir())
    assert orphans(shared_before) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="needs network namespaces")
def test_ctrl_c_once_ends_a_training_whose_network_is_down(
    starts: Callable[..., Peer], machines: list[list[str]], tmp_path: Path
) -> None:
    """The others are still thought to be there, and do not answer."""
    if not machines[0]:
        pytest.skip("needs root")
    everywhere = PROGRAM.replace('ADDRESS = "127.0.0.1"', 'ADDRESS = "0.0.0.0"')
    (tmp_path / "program.py").write_text(everywhere + "train(0, -1)")
    peers = [starts("python program.py", machines[0])]
    line = peers[0].wait_for(r"\n\s+(POTLUCK_TOKEN=.*)\n").group(1)
    peers.append(starts(line, machines[1]))
    for peer in peers:
        peer.wait_for("going 2")
    host = machines[1][-1]
    subprocess.run(["ip", "-n", host, "link", "set", f"v{host.removeprefix('pl')}", "down"], check=True)
    for peer in peers:
        assert peer.ctrl_c() in (0, 1), "the exit code depends on the version of Lightning"


def beyond(reached: int, epoch: str) -> bool:
    return int(epoch) > reached


@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and shells")
def test_the_same_command_brings_a_killed_peer_back(starts: Callable[..., Peer], tmp_path: Path) -> None:
    """Whoever pasted a line pastes it again. The first has no line: it has a key and a fixed port, so that the line which
    it printed is good after its own crash, too.
    """
    spoken = 'print("epoch", self.trainer.strategy.local_epoch, "peers", self.trainer.strategy.num_peers, flush=True)'
    said = 'print("going", self.trainer.strategy.num_peers, flush=True)'
    assert said in PROGRAM
    (tmp_path / "program.py").write_text(PROGRAM.replace(said, spoken) + "train(0, -1)")
    commands = [f"PORT={free_port()} KEY=first.key python program.py"]
    peers = [starts(commands[0])]
    commands.append(peers[0].wait_for(r"\n\s+(POTLUCK_TOKEN=.*)\n").group(1))
    peers.append(starts(commands[1]))
    for peer in peers:
        peer.wait_for(r"peers 2\n")
    for killed, other in ((1, 0), (0, 1), (1, 0)):
        peers[killed].kill()
        peers[other].wait_for(r"peers 1\n", since=len(peers[other].said))
        reached = int(peers[other].wait_for(r"epoch (\d+) peers", since=len(peers[other].said)).group(1))
        peers[killed] = starts(commands[killed])
        # The first trains alone until the other has found it again; then it takes over the run's state.
        peers[killed].wait_for_last(r"epoch (\d+) peers 2\n", partial(beyond, reached))
