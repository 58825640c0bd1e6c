"""A peer that missed a round applies the average of it, and has the bits of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together
from test_optimizer import backward, batches, make_model

import potluck
from potluck.dht import DHT

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offloaded and delayed": {"offload_optimizer": True, "delay_optimizer_step": True},
    "delayed gradients": {"offload_optimizer": True, "delay_grad_averaging": True},
    "float16": {"grad_compression": potluck.Float16Compression()},
    "powersgd": {
        "grad_averager_factory": partial(
            potluck.PowerSGDGradientAverager, averager_rank=2, min_compression_ratio=0.1
        )
    },
    "local updates": {"use_local_updates": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_missed_round_is_applied_afterwards(
    loopback_dht: Callable[..., DHT], caplog: pytest.LogCaptureFixture, form: str
) -> None:
    caplog.set_level(logging.INFO, "potluck")
    models = [make_model(0) for _ in range(3)]
    options = dict(FORMS[form])

    def optimizer(model: torch.nn.Module) -> potluck.Optimizer:
        how: dict[str, Any] = {
            "optimizer": lambda params: torch.optim.AdamW(params, lr=0.01),
            "params": model.parameters(),
        }
        if "use_local_updates" not in options:  # torch warns of schedules before the first step
            how["scheduler"] = lambda inner: torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
        return potluck.Optimizer(
            dht=loopback_dht(), run_id="late", target_batch_size=16, batch_size_per_step=8, **how, **options
        )

    peers = [optimizer(model) for model in models]
    for peer in peers:
        while len(peer.status()["peers"]) < 3:
            peer._session.changed(0.1)
            peer._session.step(0)

    def train(index: int) -> None:
        """One batch, which is half of an epoch, and nothing more until the epoch is over."""
        x, y = batches(1, 16)[0]
        backward(models[index], x[index * 8 :][:8], y[index * 8 :][:8])
        peers[index].step()
        while peers[index].local_epoch < 1:
            peers[index]._session.changed(0.05)
            peers[index]._follow(0)

    # The third peer computes nothing while the others finish an epoch.
    together(partial(train, 0), partial(train, 1))
    late = peers[2]
    while late.local_epoch < 1:
        late._session.changed(0.1)
        late.load_state_from_peers()
    assert "made up for the average" in caplog.text and "loaded the state" not in caplog.text
    for index in (0, 1):
        assert peers[index].local_epoch == 1, "they have not gone on without it"
    for mine, theirs in zip(models[2].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert late.status()["lineage"] == peers[0].status()["lineage"]
    saved = [peer.state_dict() for peer in (late, peers[0])]
    assert saved[0]["param_groups"] == saved[1]["param_groups"], "the schedule has gone on as well"
    for index, entries in saved[0]["state"].items():
        if "use_local_updates" not in options:
            assert all(torch.equal(entries[name], saved[1]["state"][index][name]) for name in entries)
    for peer in peers:
        peer.shutdown()
