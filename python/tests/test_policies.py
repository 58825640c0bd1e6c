"""Every policy against what it means in a single process, and a run that peers join and leave."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import together, waiting
from test_checkpoints import Gate
from test_optimizer import (
    OPTIMIZERS,
    SGD,
    backward,
    batches,
    distance,
    equal,
    make_model,
    plain,
    train_together,
)

import potluck
from potluck.dht import DHT

COMMON: dict[str, Any] = {"run_id": "r", "target_batch_size": 8, "batch_size_per_step": 8}


def replay(data: list[Any], computed_at: list[int], applied: int) -> torch.nn.Module:
    """Plain torch with stale gradients: the i-th is computed after ``computed_at[i]`` steps and applied as step i."""
    net = make_model()
    optimizer, grads, steps = SGD(net.parameters()), [], 0

    def step_until(wanted: int) -> None:
        nonlocal steps
        while steps < wanted:
            for parameter, grad in zip(net.parameters(), grads[steps], strict=True):
                parameter.grad = grad
            optimizer.step()
            steps += 1
        optimizer.zero_grad()

    for (x, y), at in zip(data, computed_at, strict=True):
        step_until(at)
        backward(net, x, y)
        grads.append([p.grad for p in net.parameters()])
    step_until(applied)
    return net


@pytest.mark.parametrize("policy", ["delay_optimizer_step", "delay_grad_averaging"])
def test_a_delayed_step_is_plain_torch_with_gradients_of_before(
    local_dht: Callable[[], DHT], policy: str
) -> None:
    model, data, computed_at = make_model(), batches(9, 8), []
    with potluck.Optimizer(
        dht=local_dht(), optimizer=SGD, params=model.parameters(), **COMMON, **{policy: True}
    ) as opt:
        for x, y in data:
            computed_at.append(opt.local_epoch)
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
            # Until it was applied, or will be in the next step.
            while opt.local_epoch <= len(computed_at) - 1 and opt._session.step(0) == "accumulate":
                opt._session.changed(0.05)
        opt._follow(0)
        assert opt.local_epoch == 9
    assert computed_at[-1] >= 7, "one step at most is on its way"
    assert equal(replay(data, computed_at, 9), model)


def test_gradients_gathered_during_a_slow_step_do_not_change_it(local_dht: Callable[[], DHT]) -> None:
    gate, model, data = Gate(), make_model(), batches(2, 8)
    with potluck.Optimizer(
        dht=local_dht(), optimizer=gate, params=model.parameters(), delay_optimizer_step=True, **COMMON
    ) as opt:
        for x, y in data:
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
        assert opt.local_epoch == 0
        gate.may_step.set()
        while opt.local_epoch < 2:
            opt._worker.wait(30)
            opt._follow(0)
    assert equal(replay(data, [0, 0], 2), model)


def replay_together(data: list[Any], computed_at: list[list[int]]) -> torch.nn.Module:
    """Plain torch on the means of stale gradients: peer p's i-th is of the weights after ``computed_at[p][i]`` steps."""
    net, probe = make_model(), make_model()
    optimizer, history = SGD(net.parameters()), [copy.deepcopy(net.state_dict())]
    size = len(data[0][0]) // len(computed_at)
    for epoch, (x, y) in enumerate(data):
        probe.zero_grad()
        for peer, at in enumerate(computed_at):
            probe.load_state_dict(history[at[epoch]])
            mine = slice(peer * size, peer * size + size)
            backward(probe, x[mine], y[mine])
        for parameter, gathered in zip(net.parameters(), probe.parameters(), strict=True):
            parameter.grad = gathered.grad / len(computed_at)
        optimizer.step()
        history.append(copy.deepcopy(net.state_dict()))
    return net


@pytest.mark.parametrize("policy", ["delay_optimizer_step", "delay_grad_averaging"])
@pytest.mark.parametrize("every", [1, 3])
def test_two_peers_with_delayed_steps_are_plain_torch_with_gradients_of_before(
    local_dht: Callable[[], DHT], policy: str, every: int
) -> None:
    data, models = batches(9, 16), [make_model(), make_model()]
    opts = [
        potluck.Optimizer(
            dht=local_dht(),
            run_id="r",
            target_batch_size=16,
            batch_size_per_step=8,
            optimizer=SGD,
            params=model.parameters(),
            average_state_every=every,
            **{policy: True},
        )
        for model in models
    ]

    def peer(index: int) -> Callable[[], list[int]]:
        def run() -> list[int]:
            opt, model, computed_at = opts[index], models[index], []
            for x, y in data:
                computed_at.append(opt.local_epoch)
                backward(model, x[8 * index : 8 * index + 8], y[8 * index : 8 * index + 8])
                opt.step()
                opt.zero_grad()
                # One batch of each peer is an epoch: the next one when this one is on its way.
                while opt._gradients.local_samples_accumulated:
                    opt._session.changed(0.05)
                    opt._follow(0)
            while opt.local_epoch < len(data):
                opt._session.changed(0.05)
                opt._follow(0)
            return computed_at

        return run

    computed_at = together(peer(0), peer(1))
    for opt in opts:
        opt.shutdown()
    assert equal(*models)
    assert distance(replay_together(data, computed_at), models[0]) < 1e-6
    assert all(epoch - at in (0, 1) for ats in computed_at for epoch, at in enumerate(ats))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("delayed", [False, True], ids=["state waits", "state beside"])
def test_state_averaging_does_not_disturb_equal_peers(
    local_dht: Callable[[], DHT], delayed: bool, every: int
) -> None:
    reference = make_model()
    plain(SGD, batches(6, 16), reference)
    models = train_together(local_dht, [8, 8], 6, delay_state_averaging=delayed, average_state_every=every)
    assert distance(reference, models[0]) < 1e-6
    assert distance(*models) < 1e-6


@pytest.mark.parametrize("sizes", [[8, 8], [3, 13]], ids=str)
def test_local_updates_are_local_steps_and_the_mean_of_the_parameters(
    local_dht: Callable[[], DHT], sizes: list[int]
) -> None:
    nets = [make_model() for _ in sizes]
    steppers = [SGD(net.parameters()) for net in nets]
    for x, y in batches(6, sum(sizes)):
        start = 0
        for net, stepper, size in zip(nets, steppers, sizes, strict=True):
            backward(net, x[start : start + size], y[start : start + size])
            stepper.step()
            stepper.zero_grad()
            start += size
        with torch.no_grad():
            for parameters in zip(*(net.parameters() for net in nets), strict=True):
                mean = sum(p * size for p, size in zip(parameters, sizes, strict=True)) / sum(sizes)
                for parameter in parameters:
                    parameter.copy_(mean)
    models = train_together(local_dht, sizes, 6, use_local_updates=True)
    assert distance(nets[0], models[0]) < 1e-6
    assert distance(*models) == 0


# Peer 2 joins for epoch 3, peer 0 leaves after epoch 5.
PRESENT = [[0, 1]] * 3 + [[0, 1, 2]] * 3 + [[1, 2]] * 3
POLICIES = ["delay_optimizer_step", "delay_grad_averaging"]


def piece_of(epoch: int, peer: int) -> slice:
    """Which of the epoch's 12 samples are this peer's."""
    size, at = 12 // len(PRESENT[epoch]), PRESENT[epoch].index(peer)
    return slice(at * size, at * size + size)


def replay_story(
    data: list[Any], computed_at: dict[tuple[int, int], int], make: Callable[..., Any]
) -> torch.nn.Module:
    """Plain torch: peer p's gradients of epoch e are of the weights after ``computed_at[p, e]`` steps."""
    net, probe = make_model(), make_model()
    optimizer, history = make(net.parameters()), [copy.deepcopy(net.state_dict())]
    for epoch, (x, y) in enumerate(data):
        probe.zero_grad()
        for peer in PRESENT[epoch]:
            probe.load_state_dict(history[computed_at[peer, epoch]])
            backward(probe, x[piece_of(epoch, peer)], y[piece_of(epoch, peer)])
        for parameter, gathered in zip(net.parameters(), probe.parameters(), strict=True):
            parameter.grad = gathered.grad / len(PRESENT[epoch])
        optimizer.step()
        history.append(copy.deepcopy(net.state_dict()))
    return net


@pytest.mark.parametrize("policy", [None, "delay_state_averaging", "use_local_updates", *POLICIES])
def test_a_run_that_peers_join_and_leave_is_one_big_batch(
    local_dht: Callable[[], DHT], policy: str | None
) -> None:
    """Each epoch is a batch over who is there."""
    # Without momentum the mean of local steps is one step with the mean of their gradients.
    make = OPTIMIZERS["plain SGD" if policy == "use_local_updates" else "SGD"]
    data, models = batches(len(PRESENT), 12), [make_model(), make_model(), make_model(7)]
    computed_at: dict[tuple[int, int], int] = {}
    joins, here = threading.Event(), threading.Event()

    def until(opt: potluck.Optimizer, reached: Callable[[], bool]) -> None:
        while not reached():
            opt._session.changed(0.05)
            opt._follow(0)

    def together_again(me: int, opt: potluck.Optimizer, epoch: int) -> None:
        """Where somebody comes or goes nothing is on its way any more, so that all runs are alike."""
        until(opt, lambda: opt.local_epoch == epoch)
        if epoch == 3 and me != 2:
            joins.set()
            assert here.wait(60)
        until(opt, lambda: len(opt.status()["peers"]) == len(PRESENT[epoch]))

    def train(me: int, opt: potluck.Optimizer, epoch: int, x: torch.Tensor, y: torch.Tensor) -> None:
        while True:
            computed_at[me, epoch] = opt.local_epoch
            backward(models[me], x, y)
            opt.step(batch_size=len(x))
            opt.zero_grad()
            # One batch of each peer is an epoch: the next one when this one is on its way.
            until(opt, lambda: waiting(opt) == 0)
            # A newcomer that has missed an average of the state loads it, and its batch is computed again.
            if policy in POLICIES or opt.local_epoch > epoch:
                return

    def peer(me: int) -> None:
        if me == 2:
            assert joins.wait(60)
        options = {} if policy is None else {policy: True}
        opt = potluck.Optimizer(
            dht=local_dht(),
            run_id="r",
            target_batch_size=12,
            optimizer=make,
            params=models[me].parameters(),
            average_state_every=1,
            **{"delay_state_averaging": False, **options},
        )
        opt.load_state_from_peers()
        here.set() if me == 2 else None
        for epoch, (x, y) in enumerate(data):
            if me not in PRESENT[epoch]:
                continue
            if epoch == 0 or PRESENT[epoch] != PRESENT[epoch - 1]:
                together_again(me, opt, epoch)
            train(me, opt, epoch, x[piece_of(epoch, me)], y[piece_of(epoch, me)])
        last = max(epoch for epoch, there in enumerate(PRESENT) if me in there)
        until(opt, lambda: opt.local_epoch == last + 1)
        opt.shutdown()

    together(*(lambda me=me: peer(me) for me in range(3)))
    assert distance(replay_story(data, computed_at, make), models[1]) < 1e-6
    if policy == "delay_state_averaging":
        # The last average of the parameters, of equal ones, may not be applied yet.
        assert distance(models[1], models[2]) < 1e-6
    else:
        assert equal(models[1], models[2])
    if policy not in POLICIES:
        assert all(epoch == at for (_, epoch), at in computed_at.items()), "nothing is delayed"
