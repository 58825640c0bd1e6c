"""One training peer of potluck or of hivemind 1.1.12: the same loop around the same torch code, only the import differs.

It reports every step (when it was called and when it returned, the epoch, the samples, the loss). Words: `train`,
`pause`, `load` (download the state), `memory`.
"""

import argparse
import copy
import importlib
import queue
import sys
import threading
import time
import types
from pathlib import Path

import torch

import common

DEMO = Path(__file__).resolve().parents[2] / "python/potluck/demo"
# What hivemind's quickstart tells its users to give; its defaults (15 s and 60 s) wait longer. potluck needs neither.
HIVEMIND_TIMES = {"matchmaking_time": 3.0, "averaging_timeout": 10.0}


def demo_modules(system: str):
    """The demonstration's own model and text. The model is a torch module here: Lightning is no part of what is measured."""
    hidden = ["potluck.lightning", "potluck.lightning._packages"]
    if system != "potluck":
        hidden += ["potluck", "potluck.demo"]
    for name in hidden:
        sys.modules[name] = types.ModuleType(name)
    if system != "potluck":
        sys.modules["potluck.demo"].__path__ = [str(DEMO)]
    plain = types.SimpleNamespace(LightningModule=torch.nn.Module)
    sys.modules["potluck.lightning._packages"].packages_in_use = lambda: (plain,)
    return [importlib.import_module(f"potluck.demo.{name}") for name in ("_model", "_corpus", "_scale")]


class Demo:
    """The demonstration's transformer at its full scale."""

    def __init__(self, given):
        model, corpus, scale = demo_modules(given.system)
        self.scale = scale.FULL
        torch.manual_seed(1)
        self.model = model.NextByte(self.scale)
        self.text = corpus.load(self.scale.context)[0]
        self.order = torch.Generator().manual_seed(100 + given.rank)

    def loss(self, size: int) -> torch.Tensor:
        """The loss of one batch that this peer chooses at random."""
        starts = torch.randint(0, len(self.text), (size,), generator=self.order).tolist()
        pairs = [self.text[start] for start in starts]
        return self.model.loss(torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs]))


class Small:
    """68k parameters on made-up data: nothing that takes time but the system under test."""

    def __init__(self, given):
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(128, 256), torch.nn.Tanh(), torch.nn.Linear(256, 136)
        )
        self.order = torch.Generator().manual_seed(100 + given.rank)

    def loss(self, size: int) -> torch.Tensor:
        """Something with a gradient."""
        points = torch.randn(size, 128, generator=self.order)
        return torch.nn.functional.mse_loss(self.model(points), points.repeat(1, 2)[:, :136].sin())


class Peer:
    """A model, an optimizer that is shared, and a loop."""

    def __init__(self, given):
        self.given = given
        self.work = (Demo if given.model == "demo" else Small)(given)
        self._train_alone()
        torch_only = common.memory_bytes()
        self.system = importlib.import_module(given.system)
        self.codecs = importlib.import_module(f"{given.system}.compression")
        self.dht = common.join(self.system, given, common.opened())
        self.optimizer = self._optimizer()
        self.words: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        common.say(ready=True, address=str(self.dht.get_visible_maddrs()[0]), torch=torch_only)

    def _train_alone(self):
        """A step of a copy, with nothing but torch: what its optimizers and autograd load is torch's own."""
        model = copy.deepcopy(self.work.model)
        optimizer = torch.optim.AdamW(model.parameters())
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()

    def _optimizer(self):
        given = self.given
        more = dict(HIVEMIND_TIMES) if given.system == "hivemind" else {}
        if given.lossy:
            # As in the demonstration: large tensors in 8 bits, small ones in 16.
            lossy = self.codecs.SizeAdaptiveCompression(
                threshold=2**16 + 1,
                less=self.codecs.Float16Compression(),
                greater_equal=self.codecs.Uniform8BitQuantization(),
            )
            more |= {"grad_compression": lossy, "state_averaging_compression": lossy}
        if given.ballast:
            # Never averaged, always part of what a newcomer loads. Sums of whole numbers are exact, so that they show
            # whether the donors' state has arrived.
            numbers = torch.arange(given.ballast * 250_000) % 1000
            self.ballast = numbers.float().add_(given.seed)
            more |= {"extra_tensors": [self.ballast], "average_state_every": 1 << 30}
        return self.system.Optimizer(
            dht=self.dht,
            run_id="bench",
            target_batch_size=given.target,
            batch_size_per_step=given.batch,
            optimizer=torch.optim.AdamW(self.work.model.parameters(), lr=given.learning_rate),
            **more,
        )

    def _listen(self):
        while True:
            self.words.put(common.hear())

    def step(self):
        """One batch, as in any training loop."""
        began = time.monotonic()
        self.optimizer.zero_grad()
        loss = self.work.loss(self.given.batch)
        loss.backward()
        time.sleep(max(0.0, began + self.given.pace - time.monotonic()))
        before, called = self.optimizer.local_epoch, time.monotonic()
        self.optimizer.step()
        common.say(
            step=before,
            epoch=self.optimizer.local_epoch,
            called=called,
            done=time.monotonic(),
            samples=self.given.batch,
            loss=float(loss.detach()),
        )

    def load(self):
        """Download the run's state: the donors are an epoch ahead, and have other extra tensors than this peer."""
        with common.Meter() as meter:
            self.optimizer.load_state_from_peers()
        common.say(
            ok=self.optimizer.local_epoch > 0, seconds=meter.seconds, sum=float(self.ballast.double().sum())
        )

    def run(self):
        """Obey until told to stop."""
        training = False
        while True:
            try:
                word = self.words.get(block=not training)
            except queue.Empty:
                self.step()
                continue
            if word == "train":
                training = True
            elif word == "pause":
                training = False
                common.say(paused=True)
            elif word == "load":
                self.load()
            elif word == "memory":
                common.say(memory=common.memory_bytes(), processes=len(common.processes()))
            elif word == "stop":
                return
            else:
                raise SystemExit(f"unknown word {word!r}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("demo", "small"), default="small")
    parser.add_argument("--target", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds that a batch takes at least")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lossy", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="what is in the extra state")
    parser.add_argument("--ballast", type=int, default=0, help="MB of extra state")
    Peer(common.options(parser)).run()
    common.finish()


if __name__ == "__main__":
    main()
