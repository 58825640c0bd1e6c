"""Checkpoints of a shared optimizer: what belongs together is saved together, whatever runs beside the training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_optimizer import SGD, backward, batches, distance, equal, make_model, plain

import potluck
from potluck.dht import DHT

COMMON: dict[str, Any] = {"run_id": "r", "target_batch_size": 8, "batch_size_per_step": 8}


class Gate:
    """SGD whose steps wait until they may."""

    def __init__(self) -> None:
        self.may_step = threading.Event()

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        made = SGD(parameters)
        step = made.step

        def wait_and_step() -> None:
            assert self.may_step.wait(30)
            step()

        made.step = wait_and_step
        return made


def delayed(local_dht: Callable[[], DHT], model: torch.nn.Module, make: Any = SGD) -> potluck.Optimizer:
    return potluck.Optimizer(
        dht=local_dht(), optimizer=make, params=model.parameters(), delay_optimizer_step=True, **COMMON
    )


@pytest.mark.parametrize("weights_first", [True, False])
def test_a_checkpoint_during_a_delayed_step_is_whole(
    local_dht: Callable[[], DHT], weights_first: bool
) -> None:
    gate, model, data = Gate(), make_model(), batches(3, 8)
    reference = make_model()
    plain(SGD, data[:1], reference)
    with delayed(local_dht, model, gate) as opt:
        backward(model, *data[0])
        opt.step()
        opt.zero_grad()
        assert opt.local_epoch == 0 and not equal(model, reference), "the step has not ended"
        gate.may_step.set()
        if weights_first:
            weights = model.state_dict()
            state = opt.state_dict()
        else:
            state = opt.state_dict()
            weights = model.state_dict()
        # As saving to a file does.
        state = copy.deepcopy(state)
        assert state["local_epoch"] == 1
        saved = make_model(4)
        saved.load_state_dict(weights)
        assert equal(saved, reference)
        for epoch, (x, y) in enumerate(data[1:], 2):
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
            assert opt.state_dict()["local_epoch"] == epoch
    resumed = make_model(4)
    resumed.load_state_dict(saved.state_dict())
    with delayed(local_dht, resumed) as opt:
        opt.load_state_dict(state)
        assert opt.local_epoch == 1
        for x, y in data[1:]:
            backward(resumed, x, y)
            opt.step()
            opt.zero_grad()
            opt.state_dict()
    plain_all = make_model()
    plain(SGD, data, plain_all)
    # The step after a checkpoint sees the weights that it holds.
    assert equal(model, plain_all) and equal(resumed, plain_all)


def test_a_checkpoint_is_loaded_during_a_delayed_step(local_dht: Callable[[], DHT]) -> None:
    gate, model, data = Gate(), make_model(), batches(2, 8)
    torch_model = make_model(3)
    torch_optimizer = SGD(torch_model.parameters())
    backward(torch_model, *data[0])
    torch_optimizer.step()
    with delayed(local_dht, model, gate) as opt:
        backward(model, *data[0])
        opt.step()
        opt.zero_grad()
        gate.may_step.set()
        model.load_state_dict(torch_model.state_dict())
        opt.load_state_dict({**copy.deepcopy(torch_optimizer.state_dict()), "local_epoch": 1})
        backward(model, *data[1])
        opt.step()
        opt.zero_grad()
        assert opt.state_dict()["local_epoch"] == 2
    torch_optimizer.zero_grad()
    backward(torch_model, *data[1])
    torch_optimizer.step()
    assert equal(model, torch_model)


def test_the_end_takes_a_delayed_step_along(local_dht: Callable[[], DHT]) -> None:
    model, reference, data = make_model(), make_model(), batches(1, 8)
    plain(SGD, data, reference)
    with delayed(local_dht, model) as opt:
        backward(model, *data[0])
        opt.step()
    assert opt.local_epoch == 1 and equal(model, reference)


class Told:
    """Stands for a session or a worker, and notes how long its calls of one name may take."""

    def __init__(self, inner: Any, name: str, seconds: list[float]):
        self._inner, self._name, self._seconds = inner, name, seconds

    def __getattr__(self, name: str) -> Any:
        plain = getattr(self._inner, name)
        if name != self._name:
            return plain
        return lambda seconds: (self._seconds.append(seconds), plain(seconds))[1]


def test_a_last_step_that_does_not_end_leaves_time_for_the_farewell(local_dht: Callable[[], DHT]) -> None:
    """Waiting for the step and leaving share one deadline."""
    gate, model, seconds = Gate(), make_model(), []
    opt = delayed(local_dht, model, gate)
    opt.shutdown_timeout = 0.5
    backward(model, *batches(1, 8)[0])
    opt.step()
    worker = opt._worker
    opt._worker, opt._session = Told(worker, "take", seconds), Told(opt._session, "leave", seconds)
    opt.shutdown()
    gate.may_step.set()
    assert worker.wait(30)
    waited, farewell = seconds
    assert 0 < waited < 0.5 and waited + farewell <= 0.51, seconds


def test_a_delayed_step_that_fails_says_so(local_dht: Callable[[], DHT]) -> None:
    def broken(parameters: Any) -> torch.optim.Optimizer:
        made = SGD(parameters)

        def fail() -> None:
            raise RuntimeError("out of memory")

        made.step = fail
        return made

    model = make_model()
    with delayed(local_dht, model, broken) as opt:
        backward(model, *batches(1, 8)[0])
        # In whichever of them first finds it ended.
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.step()
            opt.state_dict()
        assert distance(model, make_model()) == 0


SCHEDULES: dict[str, Any] = {
    "StepLR": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1),
    "OneCycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=20),
    "Sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [
            torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
        ],
        [2],
    ),
}


@pytest.mark.parametrize("form", ["ours", "hivemind's", "torch's"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_goes_on_where_it_was(local_dht: Callable[[], DHT], name: str, form: str) -> None:
    """hivemind's checkpoint has the epoch among the state and no schedule; torch's has neither."""
    whole, model, data = make_model(), make_model(), batches(6, 8)
    plain(SGD, data, whole, SCHEDULES[name])

    def train(opt: potluck.Optimizer, part: list[Any]) -> None:
        for x, y in part:
            backward(model, x, y)
            opt.step()
            opt.zero_grad()

    def make(optimizer: torch.optim.Optimizer) -> potluck.Optimizer:
        return potluck.Optimizer(dht=local_dht(), optimizer=optimizer, scheduler=SCHEDULES[name], **COMMON)

    with make(SGD(model.parameters())) as opt:
        train(opt, data[:3])
        saved = copy.deepcopy(opt.state_dict())
        schedule = saved["scheduler"]["last_epoch"] if name != "Sequential" else 3
        assert saved["local_epoch"] == schedule == 3
    with make(SGD(model.parameters())) as opt:
        if form != "ours":
            del saved["scheduler"]
            epoch = saved.pop("local_epoch")
            if form == "hivemind's":
                saved["state"]["local_epoch"] = epoch
        opt.load_state_dict(saved)
        if form == "torch's":
            assert opt.local_epoch == opt.scheduler.last_epoch == 0
            return
        assert opt.local_epoch == opt.scheduler.last_epoch == 3
        train(opt, data[3:])
        assert opt.local_epoch == 6
    assert equal(whole, model)


def test_an_older_checkpoint_is_refused(local_dht: Callable[[], DHT]) -> None:
    """An epoch that others know as another one must not come twice."""
    model, data = make_model(), batches(4, 8)
    with potluck.Optimizer(dht=local_dht(), optimizer=SGD(model.parameters()), **COMMON) as opt:
        for index, (x, y) in enumerate(data):
            if index == 2:
                old = copy.deepcopy(opt.state_dict())
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
        before, now = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match="of epoch 2 and this optimizer is at epoch 4"):
            opt.load_state_dict(old)
        assert opt.local_epoch == 4 and equal(before, model)
        for name, value in now["state"][0].items():
            assert torch.equal(opt.state[model[0].weight][name], value)
        # The state of a plain optimizer says nothing of an epoch.
        plain_state = {"state": old["state"], "param_groups": old["param_groups"]}
        opt.load_state_dict(plain_state)
        assert opt.local_epoch == 4
