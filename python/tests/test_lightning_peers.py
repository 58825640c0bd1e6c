"""Several Lightning peers in processes of their own, joined by pasting what the first one printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning_support import environment, paste, read_joining_line, start, variables_of

from potluck import _core

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
parser.add_argument("--peers", type=int, default=2)
parser.add_argument("--until-writer", action="store_true")
arguments = parser.parse_args()
pl = support.package(arguments.package)

class UntilDone(pl.Callback):
    """Begins when all are there, and ends all of them at the same shared epoch."""
    most = 1
    def on_train_start(self, trainer, module):
        while trainer.strategy.num_peers < arguments.peers:
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
        while any(peer["epoch"] < arguments.epochs for peer in trainer.strategy.status["peers"]):
            time.sleep(0.02)

torch.manual_seed(3)
strategy = HivemindStrategy(target_batch_size=128, **json.loads(arguments.settings))
callback = UntilDone()
checkpoint = pl.callbacks.ModelCheckpoint(dirpath=f"checkpoints-{arguments.name}", every_n_train_steps=20)
logger = pl.loggers.CSVLogger(".", name=f"logs-{arguments.name}")
trainer = support.trainer(pl, strategy, max_epochs=-1, callbacks=[callback, checkpoint], logger=logger,
                          log_every_n_steps=1, enable_checkpointing=True, precision=arguments.precision)
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


def test_every_way_to_join(program: Path, started: list) -> None:
    """The pasted line, both variables and both arguments; the other Lightning package; another precision."""
    started.append(start(program, "--peers", "5"))
    line = read_joining_line(started[0])
    ((name, token),) = variables_of(line).items()
    assert name == "POTLUCK_TOKEN"
    addresses = _core.Node.read_token(token)[1]
    started.append(
        paste(f"{line} --name pasted --package pytorch_lightning --precision bf16-mixed", program.parent)
    )
    for name, settings, extra in [
        ("variable", {}, {"PL_INITIAL_PEERS": ",".join(addresses)}),
        ("text", {"initial_peers": ",".join(addresses)}, {}),
        ("list", {"initial_peers": addresses}, {}),
    ]:
        options = ["--peers", "5", "--name", name, "--settings", json.dumps(settings)]
        started.append(start(program, *options, **extra))
    ends = [until(process, "end") for process in started]
    assert [end["peers"] for end in ends] == [5] * 5
    assert {end["epoch"] for end in ends} == {30}
    assert len({end["weights"] for end in ends}) == 1
    assert [end["writer"] for end in ends] == [True, False, False, False, False], "the first peer writes"
    for process in started:
        until(process, "left")
        assert process.wait(_PATIENCE_SECONDS) == 0
    assert list(program.parent.glob("checkpoints-first/*.ckpt"))
    assert "loss" in (program.parent / "logs-first" / "version_0" / "metrics.csv").read_text()
    for artefact in ("checkpoints", "logs"):
        assert len(list(program.parent.glob(f"{artefact}-*"))) == 1, artefact


def test_writer_can_be_set(program: Path, started: list) -> None:
    started.append(start(program, "--settings", '{"writer": false}'))
    line = read_joining_line(started[0])
    command, _, _ = line.partition(" --settings")
    started.append(paste(f"{command} --name second", program.parent))
    ends = [until(process, "end") for process in started]
    assert [end["writer"] for end in ends] == [False, True]


def test_a_survivor_goes_on_and_writes(program: Path, started: list) -> None:
    started.append(start(program, "--epochs", "100000"))
    line = read_joining_line(started[0])
    command, _, _ = line.partition(" --epochs")
    started.append(paste(f"{command} --name second --epochs 40 --until-writer", program.parent))
    for process in started:
        until(process, "met")
    started[0].kill()
    end = until(started[1], "end")
    assert end["epoch"] >= 40 and end["writer"]
    until(started[1], "left")
    assert started[1].wait(_PATIENCE_SECONDS) == 0


def test_a_wrong_address_is_said_and_ends_it(program: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(program), "--settings", '{"bootstrap_timeout": 2}'],
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
