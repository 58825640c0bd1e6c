"""TrainingAverager, hivemind's older interface: what it averages, what it tells, and what newcomers get."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together

from potluck.averaging import StepControl
from potluck.compression import TensorRole
from potluck.dht import DHT
from potluck.optim import TrainingAverager

ADAM = partial(torch.optim.Adam, lr=0.1)


def averager(value: float, dht: DHT, **options: Any) -> tuple[torch.nn.Linear, TrainingAverager]:
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(layer.weight, value)
    make = options.pop("optimizer", ADAM)
    options = {"average_parameters": True, "average_gradients": False, **options}
    return layer, TrainingAverager(make(layer.parameters()), dht=dht, prefix="t", start=True, **options)


def test_everything_that_was_asked_for_is_averaged(local_dht: Callable[[], DHT]) -> None:
    extras = [torch.zeros(2), torch.ones(2)]
    made = [
        averager(
            value,
            local_dht(),
            average_gradients=True,
            average_opt_statistics=("exp_avg",),
            extra_tensors=[extra],
            parameter_names=["weight"],
        )
        for value, extra in zip((1.0, 3.0), extras, strict=True)
    ]
    (one, first), (two, second) = made
    two.weight.grad = torch.full((1, 2), 8.0)
    second.opt.state[two.weight]["exp_avg"].fill_(4.0)
    infos = first.tensor_infos()
    assert [(info.key, info.role) for info in infos] == [
        ("weight", TensorRole.PARAMETER),
        ("grad.weight", TensorRole.GRADIENT),
        ("exp_avg.weight", TensorRole.OPTIMIZER),
        ("extra.0", TensorRole.UNSPECIFIED),
    ]
    assert [tuple(info.descriptor.size) for info in infos] == [tuple(t.shape) for t in first.local_tensors()]
    assert None not in together(first.step, second.step)
    for layer, peer, extra in ((one, first, extras[0]), (two, second, extras[1])):
        assert layer.weight.tolist() == [[2.0, 2.0]] and layer.weight.grad is not None
        assert layer.weight.grad.tolist() == [[4.0, 4.0]] and extra.tolist() == [0.5, 0.5]
        assert peer.opt.state[layer.weight]["exp_avg"].tolist() == [[2.0, 2.0]] and peer.local_step == 1


class Guard:
    """A lock that tells when it was given back for the first time."""

    def __init__(self) -> None:
        self._lock, self.was_used = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        self.was_used.set()


def test_a_step_beside_the_training_keeps_what_happened_meanwhile(local_dht: Callable[[], DHT]) -> None:
    (one, first), (_, second) = averager(1.0, local_dht()), averager(3.0, local_dht())
    lock = Guard()
    control = first.step(data_lock=lock, wait=False, timeout=60)
    assert isinstance(control, StepControl)
    assert lock.was_used.wait(60) and not control.done(), (
        "its contribution is taken, and nobody else is there"
    )
    with lock, torch.no_grad():
        one.weight.add_(10.0)
    assert second.step(timeout=60) is not None and set(control.result(60)) == {first.peer_id, second.peer_id}
    assert one.weight.tolist() == [[12.0, 12.0]]


def test_newcomers_load_the_model_and_its_optimizer(local_dht: Callable[[], DHT]) -> None:
    (one, first), (_, second) = averager(1.0, local_dht()), averager(3.0, local_dht())
    one.weight.grad = torch.ones(1, 2)
    first.opt.step()
    together(first.step, second.step)
    layer, newcomer = averager(100.0, local_dht())
    assert newcomer.load_state_from_peers(timeout=30) is not None
    assert torch.equal(layer.weight, one.weight) and newcomer.local_step == 1
    assert newcomer.opt.state[layer.weight].keys() == first.opt.state[one.weight].keys()
    assert newcomer.load_state_from_peers() is None, "nobody is ahead any more"
    later = averager(5.0, local_dht())[1].load_state_from_peers(wait=False, timeout=30)
    assert isinstance(later, StepControl) and later.result(30) is not None


def test_what_cannot_have_an_effect_says_why(local_dht: Callable[[], DHT]) -> None:
    for options, reason in (
        ({"parameter_names": ["a", "b"]}, "expected 1 names, got 2"),
        ({"average_opt_statistics": ("nothing",)}, "keeps no tensor 'nothing'"),
        ({"average_opt_statistics": ("exp_avg",), "initialize_optimizer": False}, "must exist"),
        ({"average_parameters": False}, "nothing to average"),
    ):
        with pytest.raises(ValueError, match=reason):
            averager(1.0, local_dht(), **options)
