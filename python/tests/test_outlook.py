"""What is said about the target batch before it disappoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from test_optimizer import SGD, backward, batches, make_model

import potluck
from potluck.dht import DHT
from potluck.optim._outlook import Outlook


def status(rate: float, rounds: int = 0, seconds: float | None = None, peers: int = 2) -> dict[str, Any]:
    last = None if seconds is None else {"seconds": seconds}
    return {"samples_per_second": rate, "peers": [{}] * peers, "rounds": rounds, "last_round": last}


def test_the_length_of_an_epoch_is_said_once_before_the_first() -> None:
    outlook = Outlook(8192)
    assert outlook.look(status(0.0)) is None, "nothing is known yet"
    assert (
        outlook.look(status(64.0))
        == "2 peers together 64 samples/s: an epoch of target_batch_size=8192 takes about 128 s"
    )
    assert outlook.look(status(64.0)) is None
    assert outlook.look(status(64.0, 1, 3.0)) is None, "three seconds in two minutes are fine"
    assert outlook.done


@pytest.mark.parametrize(
    ("rate", "seconds", "advice"), [(640.0, 2.0, 16384), (64.0, 0.3, None), (6400.0, 0.1, None)]
)
def test_a_target_that_makes_peers_mostly_talk_gets_a_suggestion(
    rate: float, seconds: float, advice: int | None
) -> None:
    line = Outlook(256).look(status(rate, 1, seconds))
    assert (line is None) == (advice is None)
    if line is not None:
        assert f"target_batch_size={advice}" in line
        # It keeps its promise: at that target a round is at most a tenth of the time.
        assert seconds <= 0.1 * (seconds + advice / rate) * 1.001


def test_the_optimizer_says_it(local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="potluck")
    model = make_model()
    with potluck.Optimizer(
        dht=local_dht(),
        run_id="r",
        target_batch_size=10**6,
        batch_size_per_step=8,
        optimizer=SGD(model.parameters()),
    ) as opt:
        for x, y in batches(200, 8):
            backward(model, x, y)
            opt.step()
            opt._session.changed(0.01)
            if opt._outlook._foretold:
                break
    assert caplog.text.count("an epoch of target_batch_size=1000000 takes about") == 1
