"""A peer that missed a round applies the average of it, and has the bits of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together
from test_optimizer import OPTIMIZERS, backward, batches, equal, make_model, see_each_other

import potluck
from potluck.dht import DHT
from potluck.lightning._roster import Plan
from potluck.lightning._schedulers import SharedPlateau

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


class Heard:
    """A roster in which the writer's rates are known."""

    is_writer = alone = False

    def __init__(self, plan: Plan):
        self.plan = lambda: plan


def test_a_lightning_plateaus_rates_hold_from_their_epoch_on_also_in_rounds_made_up_at_once(
    loopback_dht: Callable[..., DHT],
) -> None:
    models, peers, rates = [make_model() for _ in range(3)], [], []
    for model in models:
        inner, used = OPTIMIZERS["Adam"](model.parameters()), {}
        opt = potluck.Optimizer(
            dht=loopback_dht(),
            run_id="late",
            target_batch_size=16,
            batch_size_per_step=8,
            optimizer=inner,
            # So many rounds are kept for those who missed them as are no more than the state.
            grad_compression=potluck.Float16Compression(),
            delay_state_averaging=False,
            average_state_every=100,
        )
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(inner)
        SharedPlateau(plateau, Heard(Plan(2, (0.001,))), lambda opt=opt: opt.local_epoch)
        inner.register_step_post_hook(
            lambda inner, *_, opt=opt, used=used: used.update({opt.local_epoch: inner.param_groups[0]["lr"]})
        )
        peers.append(opt)
        rates.append(used)
    see_each_other(peers)
    late = peers[2]

    def train(index: int, epochs: range) -> None:
        for epoch, (x, y) in zip(epochs, batches(5, 16)[epochs.start :], strict=False):
            backward(models[index], x[index * 8 :][:8], y[index * 8 :][:8])
            peers[index].step()
            peers[index].zero_grad()
            while peers[index].local_epoch <= epoch:
                peers[index]._session.changed(0.05)
                peers[index]._follow(0)

    # After the first one it is no newcomer, and the others know that somebody may ask.
    for epochs in (range(1), range(1, 4)):
        together(partial(train, 0, epochs), partial(train, 1, epochs))
        while late.tracker.global_epoch < epochs.stop:
            late._session.changed(0.1)
        late.load_state_from_peers()
        assert late.local_epoch == epochs.stop
    # By epoch: a round that failed on the way had the rate of its epoch too.
    assert rates == [{0: 0.01, 1: 0.01, 2: 0.001, 3: 0.001}] * 3
    assert equal(models[0], models[2]) and equal(models[0], models[1])
    for peer in peers:
        peer.shutdown()


def test_a_plateaus_rates_hold_again_after_a_state_of_before_them_was_loaded() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(inner)
    shared = SharedPlateau(plateau, Heard(Plan(3, (0.5,))), lambda: 3)
    before = inner.state_dict()
    for _ in range(2):
        shared.follow()
        assert inner.param_groups[0]["lr"] == 0.5
        inner.param_groups[0]["lr"] = 0.25
        shared.follow()
        assert inner.param_groups[0]["lr"] == 0.25, "the program's own changes stand"
        inner.load_state_dict(before)
    shared.release()
    inner.load_state_dict(before)
    inner.param_groups[0]["params"][0].grad = torch.ones(1)
    inner.step()
    assert inner.param_groups[0]["lr"] == 1.0
