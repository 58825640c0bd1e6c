"""Several Lightning peers in processes of their own, joined by pasting what the first one printed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning_support import environment, paste, read_joining_line, start, variables_of

pytestmark = pytest.mark.timeout(240)
_PATIENCE_SECONDS = 150

# What a user would write: trains until the run has had EPOCHS steps, and says what it saw.
PROGRAM = '''
import argparse, hashlib, json, time, warnings
warnings.simplefilter("ignore")
import torch
import lightning_support as support
from potluck.lightning import HivemindStrategy

parser = argparse.ArgumentParser()
parser.add_argument("--package", default="lightning.pytorch")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--precision", default="32-true")
parser.add_argument("--settings", default="{}")
parser.add_argument("--name", default="first")
parser.add_argument("--until-writer", action="store_true")
arguments = parser.parse_args()
pl = support.package(arguments.package)

class UntilDone(pl.Callback):
    """Begins with two peers, and ends all of them at the same shared epoch."""
    most = 1
    def on_train_start(self, trainer, module):
        deadline = time.monotonic() + 60
        while trainer.strategy.num_peers < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        print(json.dumps({"at": "met"}), flush=True)
    def on_train_batch_end(self, trainer, module, *_):
        self.most = max(self.most, trainer.strategy.num_peers)
        writes = trainer.is_global_zero or not arguments.until_writer
        trainer.should_stop = writes and trainer.strategy.local_epoch >= arguments.epochs
    def on_train_end(self, trainer, module):
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
        print(json.dumps({"at": "end", "epoch": trainer.strategy.local_epoch, "peers": self.most,
                          "writer": trainer.is_global_zero, "weights": weights,
                          "loss": float(trainer.callback_metrics["loss"])}), flush=True)
        # Who leaves first hands the writing over; these tests look at who writes while all are there.
        deadline = time.monotonic() + 60
        while any(peer["epoch"] < arguments.epochs for peer in trainer.strategy.status["peers"]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)

pl.seed_everything(3, verbose=False)
strategy = HivemindStrategy(target_batch_size=128, **json.loads(arguments.settings))
callback = UntilDone()
checkpoint = pl.callbacks.ModelCheckpoint(dirpath=f"checkpoints-{arguments.name}", every_n_train_steps=20)
trainer = support.trainer(pl, strategy, max_epochs=-1, callbacks=[callback, checkpoint],
                          enable_checkpointing=True, precision=arguments.precision)
model = support.model_class(pl)()
if arguments.name != "first":
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # whoever joins takes over the weights of the run
trainer.fit(model, support.loader(16, shuffle=True))
print(json.dumps({"at": "left"}), flush=True)
'''


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    support = Path(__file__).with_name("lightning_support.py")
    (tmp_path / support.name).write_text(support.read_text())
    return path


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(process: subprocess.Popen, at: str) -> dict[str, Any]:
    """Read on to the event ``at``."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("{"):
            event = json.loads(line)
            if event["at"] == at:
                return event
    raise AssertionError(f"ended without {at!r}:\n" + "".join(seen[-40:]))


@pytest.mark.parametrize("second_package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_pasted_line_joins(program: Path, started: list, second_package: str) -> None:
    started.append(start(program))
    line = read_joining_line(started[0])
    started.append(paste(f"{line} --name second --package {second_package}", program.parent))
    ends = [until(process, "end") for process in started]
    assert [end["peers"] for end in ends] == [2, 2]
    assert [end["epoch"] for end in ends] == [30, 30]
    assert ends[0]["weights"] == ends[1]["weights"]
    assert sum(end["writer"] for end in ends) == 1
    assert ends[0]["writer"], "the first peer writes"
    for process in started:
        until(process, "left")
        assert process.wait(_PATIENCE_SECONDS) == 0
    assert list(program.parent.glob("checkpoints-first/*.ckpt"))
    assert not list(program.parent.glob("checkpoints-second/*.ckpt"))


@pytest.mark.parametrize("form", ["PL_INITIAL_PEERS", "argument string", "argument list"])
def test_the_other_forms_join(program: Path, started: list, form: str) -> None:
    started.append(start(program))
    ((_, value),) = variables_of(read_joining_line(started[0])).items()
    key = "initial_peers" if value.startswith("/") else "token"
    extra: dict[str, str] = {}
    settings: dict[str, Any] = {}
    if form == "PL_INITIAL_PEERS":
        if key == "token":
            pytest.skip("the program prints a token, which has its own variable")
        extra = {form: value}
    else:
        settings = {key: value.split(",") if form == "argument list" and key == "initial_peers" else value}
    started.append(start(program, "--name", "second", "--settings", json.dumps(settings), **extra))
    assert [until(process, "end")["peers"] for process in started] == [2, 2]


def test_writer_can_be_set(program: Path, started: list) -> None:
    started.append(start(program, "--settings", '{"writer": false}'))
    line = read_joining_line(started[0])
    command, _, _ = line.partition(" --settings")
    started.append(paste(f"{command} --name second", program.parent))
    ends = [until(process, "end") for process in started]
    assert [end["writer"] for end in ends] == [False, True]


def test_mixed_precision_beside_full(program: Path, started: list) -> None:
    started.append(start(program))
    line = read_joining_line(started[0])
    started.append(paste(f"{line} --name second --precision bf16-mixed", program.parent))
    ends = [until(process, "end") for process in started]
    assert [end["peers"] for end in ends] == [2, 2]


def test_a_survivor_goes_on_and_writes(program: Path, started: list) -> None:
    started.append(start(program, "--epochs", "100000"))
    line = read_joining_line(started[0])
    command, _, _ = line.partition(" --epochs")
    started.append(paste(f"{command} --name second --epochs 300 --until-writer", program.parent))
    for process in started:
        until(process, "met")
    started[0].kill()
    end = until(started[1], "end")
    assert end["epoch"] >= 300 and end["writer"]
    until(started[1], "left")
    assert started[1].wait(_PATIENCE_SECONDS) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_once_ends_it(program: Path, started: list) -> None:
    started.append(start(program))
    line = read_joining_line(started[0])
    started.append(paste(f"{line} --name second --epochs 100000", program.parent))
    for process in started:
        until(process, "met")
    started[1].send_signal(signal.SIGINT)
    said, _ = started[1].communicate(timeout=_PATIENCE_SECONDS)
    # Lightning's own answer to Ctrl-C is to tear down and exit with 1.
    assert started[1].returncode == 1 and "Traceback" not in said, said
    assert until(started[0], "end")["peers"] == 2


def test_a_wrong_address_is_said_and_ends_it(program: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(program), "--settings", '{"bootstrap_timeout": 5}'],
        env=environment(
            INITIAL_PEERS="/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
        ),
        capture_output=True,
        text=True,
        cwd=program.parent,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode != 0
    assert "/ip4/127.0.0.1/tcp/9" in done.stderr, done.stderr


def _namespaces_work() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"pl{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with one cable between them."""
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
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False)


@pytest.mark.skipif(not _namespaces_work(), reason="network namespaces need root and iproute2")
def test_two_hosts_join_by_pasting(program: Path, started: list, two_hosts: tuple[str, str]) -> None:
    def on(host: str, command: str) -> subprocess.Popen:
        path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
        return subprocess.Popen(
            ["ip", "netns", "exec", host, "sh", "-c", "exec env " + command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(PATH=path),
            cwd=program.parent,
        )

    started.append(on(two_hosts[0], f"{sys.executable} {program}"))
    line = read_joining_line(started[0])
    assert "192.0.2.1" in line or "POTLUCK_TOKEN" in line
    started.append(on(two_hosts[1], f"{line} --name second"))
    ends = [until(process, "end") for process in started]
    assert [end["peers"] for end in ends] == [2, 2]
