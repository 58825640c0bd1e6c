"""Learning-rate schedules of several peers: every kind, with the rate of one process at everybody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together
from test_optimizer import SCHEDULES, SGD, backward, batches, distance, equal, make_model, plain

import potluck
from potluck.dht import DHT

PLATEAU = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5)


def train(
    local_dht: Callable[[], DHT],
    epochs: int,
    losses: Callable[[int, int, float], float | None],
    peers: int = 2,
    **options: Any,
) -> tuple[list[torch.nn.Module], list[list[float]]]:
    """Models, and each peer's rates by epoch. ``losses(peer, epoch, loss)`` is what a peer reports of its batch."""
    data, models = batches(epochs, 8 * peers), [make_model() for _ in range(peers)]
    opts = [
        potluck.Optimizer(
            dht=local_dht(),
            run_id="r",
            target_batch_size=8 * peers,
            batch_size_per_step=8,
            optimizer=SGD(model.parameters()),
            **options,
        )
        for model in models
    ]

    def peer(index: int) -> Callable[[], list[float]]:
        def run() -> list[float]:
            opt, rates = opts[index], []
            for epoch, (x, y) in enumerate(data):
                mine = slice(8 * index, 8 * index + 8)
                loss = losses(index, epoch, float(backward(models[index], x[mine], y[mine])))
                if loss is not None:
                    opt.report_loss(loss)
                opt.step()
                opt.zero_grad()
                while opt.local_epoch <= epoch:
                    opt._session.changed(0.05)
                    opt._follow(0)
                rates.append(opt.param_groups[0]["lr"])
            return rates

        return run

    rates = together(*map(peer, range(peers)))
    for opt in opts:
        opt.shutdown()
    return models, rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_peers_are_one_process(local_dht: Callable[[], DHT], name: str) -> None:
    reference = make_model()
    plain(SGD, batches(8, 16), reference, SCHEDULES[name])
    models, rates = train(
        local_dht, 8, lambda _, __, loss: loss, scheduler=SCHEDULES[name], delay_state_averaging=False
    )
    assert rates[0] == rates[1]
    assert distance(reference, models[0]) < 1e-6 and equal(*models)


@pytest.mark.parametrize("local", [False, True], ids=["gradients", "local updates"])
def test_a_plateau_is_one_of_the_mean_loss(local_dht: Callable[[], DHT], local: bool) -> None:
    """The first peer's loss falls by one an epoch, the second's rises by two: their mean rises."""
    _, rates = train(
        local_dht,
        5,
        lambda peer, epoch, _: 2.0 * epoch if peer else -1.0 * epoch,
        scheduler=PLATEAU,
        use_local_updates=local,
    )
    assert rates[0] == rates[1] == [0.1 * 0.5**epoch for epoch in range(5)]


@pytest.mark.parametrize("local", [False, True], ids=["gradients", "local updates"])
def test_a_silent_peer_does_not_count_as_a_loss_of_zero(local_dht: Callable[[], DHT], local: bool) -> None:
    # Relative to a loss, so that half of it would be a plateau's best for ever.
    spoken = [8.0, 7.0, 6.0, 5.0]
    for silent in (lambda _: None, lambda _: float("nan")):
        _, rates = train(
            local_dht,
            4,
            lambda peer, epoch, _, silent=silent: silent(epoch) if peer and epoch < 2 else spoken[epoch],
            scheduler=partial(PLATEAU, threshold=0.0),
            use_local_updates=local,
        )
        assert rates == [[0.1] * 4] * 2


@pytest.mark.parametrize("peers", [1, 2])
def test_a_plateau_without_any_loss_says_so_once(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture, peers: int
) -> None:
    _, rates = train(local_dht, 4, lambda *_: None, peers=peers, scheduler=PLATEAU)
    assert rates == [[0.1] * 4] * peers
    said = [r for r in caplog.records if "has no loss to look at" in r.message]
    assert len(said) == peers and said[0].levelno == logging.WARNING
