"""Does lossy compression reach the loss of none? Two peers train the demonstration's model on the same batches.

``python python/tests/compression_loss.py`` does it for as long as the demonstration; a test does it for fewer epochs.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from conftest import together

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


def trained(scale: Scale, options: dict[str, Any]) -> tuple[float, float]:
    """Loss on text that was never trained on, and how many times fewer bytes were sent."""
    train, held_out = _corpus.load(scale.context)
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(len(train), (scale.epochs, scale.target_batch_size), generator=generator)
    dhts: list[DHT] = []
    peers: list[tuple[NextByte, potluck.Optimizer]] = []
    for _ in range(2):
        known = [str(address) for dht in dhts[:1] for address in dht.get_visible_maddrs()]
        dhts.append(DHT(known, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False))
        torch.manual_seed(1)
        model = NextByte(scale)
        made = model.configure_optimizers()
        optimizer = potluck.Optimizer(
            dht=dhts[-1],
            run_id="loss",
            target_batch_size=scale.target_batch_size,
            batch_size_per_step=scale.target_batch_size // 2,
            optimizer=made["optimizer"],
            scheduler=made["lr_scheduler"]["scheduler"],
            delay_state_averaging=False,
            average_state_every=10,
            **options,
        )
        peers.append((model, optimizer))

    def run(index: int) -> None:
        model, optimizer = peers[index]
        half = scale.target_batch_size // 2
        for epoch in range(scale.epochs):
            crops = [train[int(start)] for start in starts[epoch][index * half :][:half]]
            model.loss(*map(torch.stack, zip(*crops, strict=True))).backward()
            optimizer.step()
            optimizer.zero_grad()
            while optimizer.local_epoch <= epoch:
                optimizer._session.changed(0.05)
                optimizer._follow(0)

    try:
        together(lambda: run(0), lambda: run(1), timeout=1200)
        with torch.no_grad():
            loss = float(peers[0][0].loss(*held_out.spread(256)))
        return loss, float(peers[0][1].status()["compression_ratio"])
    finally:
        for _, optimizer in peers:
            optimizer.shutdown()
        for dht in dhts:
            dht.shutdown()


def compare(scale: Scale) -> dict[str, tuple[float, float]]:
    """Loss and saving of every way."""
    return {name: trained(scale, options) for name, options in ways(scale).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = compare(QUICK if "--quick" in sys.argv else FULL)
    plain = results["uncompressed"][0]
    for name, (loss, ratio) in results.items():
        print(f"{name:14} loss {loss:.4f} ({100 * (loss / plain - 1):+.2f} %)  {ratio:.2f} times fewer bytes")
    sys.exit(any(loss > 1.01 * plain for loss, _ in results.values()))
