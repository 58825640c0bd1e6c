"""Does lossy compression reach the loss of none? Two peers train the demonstration's model on the same batches.

``python python/tests/compression_loss.py`` does it for as long as the demonstration; a test does it for fewer epochs.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

import torch
from conftest import TooLate, together

import potluck
from potluck.demo import _corpus
from potluck.demo._model import NextByte
from potluck.demo._scale import FULL, QUICK, Scale
from potluck.dht import DHT
from potluck.optim.power_sgd_averager import PowerSGDGradientAverager

EIGHT_BIT = potluck.Uniform8BitQuantization()


def ways(scale: Scale) -> dict[str, dict[str, Any]]:
    """Arguments of the optimizer. Narrow matrices need a lower rank, or there is nothing to save."""
    rank = 32 if scale.width > 100 else 16
    factory = partial(PowerSGDGradientAverager, averager_rank=rank, min_compression_ratio=0.5)
    return {
        "uncompressed": {},
        "8 bit": {"grad_compression": EIGHT_BIT, "state_averaging_compression": EIGHT_BIT},
        "PowerSGD": {"grad_averager_factory": factory},
    }


class Story:
    """Who trains when: of three peers two stay; the third joins, and leaves; later a round fails for the second one."""

    def __init__(self, epochs: int, eventful: bool):
        self.guest = range(epochs // 4, epochs // 2) if eventful else range(0)
        self.failing = 3 * epochs // 4 if eventful else -1
        self.wanted, self.here = threading.Event(), threading.Event()

    def size(self, epoch: int, peer: int, target: int) -> int:
        """Samples of a peer in this epoch; all of them together are the target."""
        present = 3 if epoch in self.guest else 2
        return target // present + (peer < target % present) if peer < present else 0

    def begin(self, epoch: int, peer: int) -> None:
        """The two wait for the third, so that every run is the same."""
        if peer < 2 and self.guest and epoch == self.guest.start:
            self.wanted.set()
            assert self.here.wait(600)


def trained(scale: Scale, options: dict[str, Any], eventful: bool = False) -> tuple[float, float]:
    """Loss on text that was never trained on, and how many times fewer bytes were sent."""
    train, held_out = _corpus.load(scale.context)
    generator = torch.Generator().manual_seed(2)
    target, story = scale.target_batch_size, Story(scale.epochs, eventful)
    starts = torch.randint(len(train), (scale.epochs, target), generator=generator)
    dhts: list[DHT] = []
    peers: dict[int, tuple[NextByte, potluck.Optimizer]] = {}

    def join(index: int) -> tuple[NextByte, potluck.Optimizer]:
        known = [str(address) for dht in dhts[:1] for address in dht.get_visible_maddrs()]
        dhts.append(DHT(known, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False))
        torch.manual_seed(1)
        model = NextByte(scale)
        made = model.configure_optimizers()
        optimizer = potluck.Optimizer(
            dht=dhts[-1],
            run_id="loss",
            target_batch_size=target,
            optimizer=made["optimizer"],
            scheduler=made["lr_scheduler"]["scheduler"],
            delay_state_averaging=False,
            average_state_every=10,
            **options,
        )
        peers[index] = model, optimizer
        return model, optimizer

    def run(index: int) -> None:
        model, optimizer = peers[index]
        while (epoch := optimizer.local_epoch) < scale.epochs and (size := story.size(epoch, index, target)):
            story.begin(epoch, index)
            session = optimizer._session
            if index == 1 and epoch == story.failing and not isinstance(session, TooLate):
                optimizer._session = TooLate(session, peers[0][1])
            first = sum(story.size(epoch, other, target) for other in range(index))
            crops = [train[int(start)] for start in starts[epoch][first : first + size]]
            model.loss(*map(torch.stack, zip(*crops, strict=True))).backward()
            optimizer.step(batch_size=size)
            optimizer.zero_grad()
            # What was dropped with a failed round is computed again.
            while optimizer.local_epoch <= epoch and optimizer._gradients.local_samples_accumulated:
                session.changed(0.05)
                optimizer._follow(0)

    def visit() -> None:
        if story.guest:
            assert story.wanted.wait(600)
            _, optimizer = join(2)
            optimizer.load_state_from_peers()
            assert optimizer.local_epoch == story.guest.start
            story.here.set()
            run(2)
            assert optimizer.local_epoch == story.guest.stop
            optimizer.shutdown()

    try:
        for index in range(2):
            join(index)
        together(lambda: run(0), lambda: run(1), visit, timeout=1200)
        with torch.no_grad():
            loss = float(peers[0][0].loss(*held_out.spread(256)))
        status = peers[0][1].status()
        # A busy machine may fail one that was not to fail; its samples are computed again.
        assert status["rounds_failed"] > 0 or not eventful, status
        return loss, float(status["compression_ratio"])
    finally:
        for _, optimizer in peers.values():
            optimizer.shutdown()
        for dht in dhts:
            dht.shutdown()


def compare(scale: Scale) -> dict[str, tuple[float, float]]:
    """Loss and saving of every way; of the lossy ones also through a join, a leave and a failed round."""
    found = {name: trained(scale, options) for name, options in ways(scale).items()}
    for name, options in ways(scale).items():
        if options:
            found[f"{name}, eventful"] = trained(scale, options, eventful=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = compare(QUICK if "--quick" in sys.argv else FULL)
    plain = results["uncompressed"][0]
    for name, (loss, ratio) in results.items():
        print(f"{name:18} loss {loss:.4f} ({100 * (loss / plain - 1):+.2f} %)  {ratio:.2f} times fewer bytes")
    sys.exit(any(loss > 1.01 * plain for loss, _ in results.values()))
