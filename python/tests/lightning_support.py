"""What the Lightning tests share: a small model, a quiet Trainer, and both Lightning packages."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

# Advice of Lightning about this test's size or machine, not about what is tested.
QUIET = (
    "ignore:.*does not have many workers.*",
    "ignore:.*fewer logging steps.*",
    "ignore:.*The number of training batches.*",
    "ignore:.*GPU available but not used.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*have no `val_dataloader`.*",
    "ignore:Checkpoint directory.*exists and is not empty",
)


def package(name: str) -> ModuleType:
    """One of the two Lightning packages."""
    return importlib.import_module(name)


def regression(samples: int = 64) -> TensorDataset:
    """A linear relation, the same every time."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(
        x, x @ torch.arange(6.0)[:, None] + 0.1 * torch.randn(samples, 1, generator=generator)
    )


def loader(batch_size: int = 8, **kwargs: Any) -> DataLoader:
    """Batches of ``regression``."""
    return DataLoader(regression(), batch_size=batch_size, **kwargs)


def model_class(pl: ModuleType) -> type:
    """A small module of package ``pl`` that records the learning rate of every batch."""

    class Model(pl.LightningModule):
        def __init__(self, make_scheduler: Any = None, monitor: str | None = None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
            self.make_scheduler, self.monitor = make_scheduler, monitor
            self.rates: list[float] = []

        def error(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            loss = self.error(batch)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.error(batch))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            if self.make_scheduler is None:
                return optimizer
            # For plain Lightning: a step of the optimizer is what a shared epoch is with potluck.
            config = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
            if self.monitor:
                config.update(interval="epoch", monitor=self.monitor)
            return {"optimizer": optimizer, "lr_scheduler": config}

    return Model


def trainer(pl: ModuleType, strategy: Any, **kwargs: Any) -> Any:
    """A Trainer that writes nothing unless asked to."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(strategy=strategy, **{**settings, **kwargs})


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Equal to the bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def environment(**extra: str) -> dict[str, str]:
    """This environment without anything that would make a peer join somebody.

    Several peers share this machine's cores here: each computes with one thread, or they spend their time waiting for
    one another's threads.
    """
    kept = {
        k: v for k, v in os.environ.items() if k not in ("POTLUCK_TOKEN", "INITIAL_PEERS", "PL_INITIAL_PEERS")
    }
    if "PYTHONPATH" in extra and "PYTHONPATH" in kept:
        extra["PYTHONPATH"] += os.pathsep + kept["PYTHONPATH"]
    return {**kept, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **extra}


def start(script: Path, *arguments: str, **extra: str) -> subprocess.Popen:
    """The first peer: a program, run as a user would run it."""
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**extra),
        cwd=script.parent,
    )


def read_joining_line(process: subprocess.Popen) -> str:
    """What the first peer printed for others to paste, taken from its output as it is."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.match(r"\s+(POTLUCK_TOKEN|INITIAL_PEERS)=", line):
            return line.strip()
    raise AssertionError("no line to paste in:\n" + "".join(seen))


def paste(line: str, cwd: Path, **extra: str) -> subprocess.Popen:
    """Run a printed line in a shell."""
    return on_machine([], line, cwd, **extra)


def on_machine(machine: list[str], line: str, cwd: Path, **extra: str) -> subprocess.Popen:
    """Run a line in a shell of a machine (see the fixture ``machines``). ``python`` is this test's interpreter."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    return subprocess.Popen(
        [*machine, "sh", "-c", "exec env " + line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(PATH=path, **extra),
        cwd=cwd,
    )


def variables_of(line: str) -> dict[str, str]:
    """The environment variables that a printed line sets."""
    pairs = [word.partition("=") for word in shlex.split(line) if re.match(r"[A-Z_]+=", word)]
    return {name: value for name, _, value in pairs}
