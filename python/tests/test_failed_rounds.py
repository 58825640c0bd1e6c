"""A round that fails under every policy, against what it means in a single process."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from conftest import TooLate, together, waiting
from test_optimizer import OPTIMIZERS, backward, batches, distance, equal, make_model

import potluck
from potluck.dht import DHT

EPOCHS, FAILS, HALF = 7, 3, 8
POLICIES = [
    None,
    "delay_state_averaging",
    "delay_optimizer_step",
    "delay_grad_averaging",
    "use_local_updates",
]


def mine(batch: Any, peer: int) -> Any:
    """The half of a batch that one of the two peers computes."""
    return tuple(values[HALF * peer : HALF * peer + HALF] for values in batch)


@dataclass(frozen=True)
class Outcome:
    """What may become of a round that one peer has given up before the other one came."""

    # Whose gradients are in the average: what the first peer had sent is there, or is not.
    counted: tuple[int, ...]
    # Nobody's are, each has made a step of its own, and one of these is everybody's; then the epoch is made again.
    alone: int | None = None


OUTCOMES = [Outcome((1,)), Outcome((0, 1)), *(Outcome((0, 1), alone=peer) for peer in range(2))]


def replay(
    data: list[Any], computed_at: list[list[int]], outcome: Outcome, make: Callable[..., Any]
) -> torch.nn.Module:
    """Plain torch: peer p's gradients of epoch e are of the weights with which epoch ``computed_at[p][e]`` began."""
    net, probe = make_model(), make_model()
    optimizer, history = make(net.parameters()), []
    for epoch, batch in enumerate(data):
        counted = outcome.counted if epoch == FAILS else (0, 1)
        if epoch == FAILS and outcome.alone is not None:
            net.zero_grad()
            backward(net, *mine(batch, outcome.alone))
            optimizer.step()
        history.append(copy.deepcopy(net.state_dict()))
        probe.zero_grad()
        for peer in counted:
            probe.load_state_dict(history[computed_at[peer][epoch]])
            backward(probe, *mine(batch, peer))
        for parameter, gathered in zip(net.parameters(), probe.parameters(), strict=True):
            parameter.grad = gathered.grad / len(counted)
        optimizer.step()
    return net


class Pair:
    """Two peers of one policy; each trains in a thread of its own."""

    def __init__(self, make_dht: Callable[..., DHT], policy: str | None):
        self.models = [make_model(), make_model()]
        # Without momentum the mean of two local steps is one step with the mean of their gradients.
        self.make = OPTIMIZERS["plain SGD" if policy == "use_local_updates" else "SGD"]
        options = {"delay_state_averaging": False, **({policy: True} if policy else {})}
        self.opts = [
            potluck.Optimizer(
                dht=make_dht(),
                run_id="r",
                target_batch_size=2 * HALF,
                batch_size_per_step=HALF,
                optimizer=self.make,
                params=model.parameters(),
                average_state_every=1,
                **options,
            )
            for model in self.models
        ]
        self.settled = threading.Barrier(2)

    def until(self, me: int, reached: Callable[[], bool]) -> None:
        while not reached():
            self.opts[me]._session.changed(0.05)
            self.opts[me]._follow(0)

    def step(self, me: int, batch: Any) -> None:
        backward(self.models[me], *mine(batch, me))
        self.opts[me].step()
        self.opts[me].zero_grad()

    def fail(self, me: int, batch: Any) -> None:
        """Nothing is on its way before and after, so that all runs are alike."""

        def both_past() -> bool:
            return all(opt.local_epoch > FAILS for opt in self.opts)

        def both_failed() -> bool:
            return all(opt.status()["rounds_failed"] for opt in self.opts)

        self.until(me, lambda: all(opt.local_epoch == FAILS for opt in self.opts))
        self.settled.wait(60)
        if me == 1:
            self.opts[1]._session = TooLate(self.opts[1]._session, self.opts[0])
        self.step(me, batch)
        while not both_past():
            # Given up by both, or dropped for the other's history: it is computed again.
            own = sum(peer["samples"] for peer in self.opts[me].status()["peers"] if peer["is_me"])
            if both_failed() and not own and self.opts[me].local_epoch == FAILS:
                self.step(me, batch)
            self.opts[me]._session.changed(0.05)
            self.opts[me]._follow(0)
        self.settled.wait(60)

    def train(self, me: int, data: list[Any]) -> list[int]:
        """The epochs at which the gradients of each epoch were computed."""
        computed_at = []
        for epoch, batch in enumerate(data):
            if epoch == FAILS:
                computed_at.append(epoch)
                self.fail(me, batch)
                continue
            computed_at.append(self.opts[me].local_epoch)
            self.step(me, batch)
            # One batch of each peer is an epoch: the next one when this one is on its way.
            self.until(me, lambda: waiting(self.opts[me]) == 0)
        self.until(me, lambda: self.opts[me].local_epoch == EPOCHS)
        return computed_at


@pytest.mark.parametrize("policy", POLICIES)
def test_after_a_failed_round_all_have_what_plain_torch_has_with_the_gradients_that_counted(
    loopback_dht: Callable[..., DHT], policy: str | None
) -> None:
    data, pair = batches(EPOCHS, 2 * HALF), Pair(loopback_dht, policy)
    computed_at = together(lambda: pair.train(0, data), lambda: pair.train(1, data))
    assert pair.opts[0].status()["rounds_failed"] >= 1
    for opt in pair.opts:
        opt.shutdown()
    # The last average of the parameters, of equal ones, is not applied yet if it runs beside the gradients.
    assert distance(*pair.models) < 1e-6
    assert policy == "delay_state_averaging" or equal(*pair.models)
    nets = {outcome: replay(data, computed_at, outcome, pair.make) for outcome in OUTCOMES}
    assert all(distance(one, other) > 1e-3 for one, other in combinations(nets.values(), 2))
    closest = min(OUTCOMES, key=lambda outcome: distance(nets[outcome], pair.models[0]))
    assert distance(nets[closest], pair.models[0]) < 1e-6
