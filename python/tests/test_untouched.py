"""A gradient of zeros is a gradient, and none is none: all peers take the same one for it, whoever's loss touched what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together
from test_optimizer import OPTIMIZERS, backward, batches, distance, equal, make_model, see_each_other

import potluck
from potluck import compression
from potluck.dht import DHT

SIZES = [1, 15]
# Which peers' losses touch the spare parameter in an epoch. Its gradient is zero, and AdamW decays what has one.
TOUCHED = [set(), {0}, {1}, {0, 1}, set()]
STILL = {"average_state_every": 100}
COMPRESSIONS = {
    "none": {},
    "float16": {"grad_compression": compression.Float16Compression()},
    "uniform": {"grad_compression": compression.Uniform8BitQuantization()},
    "quantile": {"grad_compression": compression.Quantile8BitQuantization()},
    "blockwise": {"grad_compression": compression.BlockwiseQuantization()},
    "4 bit": {"grad_compression": compression.Blockwise4BitQuantization()},
    "error feedback": {"grad_compression": compression.ErrorFeedback(compression.Uniform8BitQuantization())},
    "low rank": {
        "grad_averager_factory": partial(
            potluck.PowerSGDGradientAverager, averager_rank=1, min_compression_ratio=0.1
        )
    },
}


def with_spare() -> torch.nn.Module:
    net = make_model()
    net.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    net.forward = lambda x: net[2](net[1](net[0](x)))
    return net


def give(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, touch: bool) -> None:
    backward(net, x, y)
    if touch:
        (net.spare * 0).sum().backward()


def reference(epochs: int = len(TOUCHED)) -> torch.nn.Module:
    net = with_spare()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    for (x, y), touched in zip(batches(epochs, sum(SIZES)), TOUCHED, strict=False):
        give(net, x, y, bool(touched))
        optimizer.step()
        optimizer.zero_grad()
    return net


def peers_of(make_dht: Callable[[], DHT], count: int, **options: Any) -> list[Any]:
    nets = [with_spare() for _ in range(count)]
    how = [{"optimizer": OPTIMIZERS["AdamW"](net.parameters())} for net in nets]
    if "delay_optimizer_step" in options or "delay_grad_averaging" in options:
        how = [{"optimizer": OPTIMIZERS["AdamW"], "params": net.parameters()} for net in nets]
    made = [
        potluck.Optimizer(dht=make_dht(), run_id="r", target_batch_size=sum(SIZES), **given, **options)
        for given in how
    ]
    see_each_other(made)
    return list(zip(nets, made, strict=True))


def train(peers: list[Any], epochs: range = range(len(TOUCHED))) -> None:
    """Every epoch is one batch of each."""
    data = batches(len(TOUCHED), sum(SIZES))

    def peer(index: int) -> None:
        net, opt = peers[index]
        start = sum(SIZES[:index])
        for epoch in epochs:
            x, y = (part[start : start + SIZES[index]] for part in data[epoch])
            give(net, x, y, index in TOUCHED[epoch])
            opt.step(batch_size=SIZES[index])
            opt.zero_grad()
            while opt.local_epoch <= epoch:
                opt._session.changed(0.05)
                opt._follow(0)

    together(*(partial(peer, index) for index in range(len(SIZES))))


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_it_is_touched_if_anybodys_loss_touched_it(loopback_dht: Callable[..., DHT], form: str) -> None:
    peers = peers_of(loopback_dht, 2, delay_state_averaging=False, **STILL, **COMPRESSIONS[form])
    train(peers)
    (one, first), (other, second) = peers
    assert equal(one, other)
    expected = reference()
    assert torch.equal(one.spare, expected.spare) and float(expected.spare.detach()[0]) < 1
    if form == "none":
        assert distance(one, expected) < 1e-6
    for net, opt in ((one, first), (other, second)):
        assert int(opt.state[net.spare]["step"]) == 3, "not in the epochs without a gradient"
        opt.shutdown()


@pytest.mark.parametrize("policy", ["delay_optimizer_step", "delay_grad_averaging", "delay_state_averaging"])
def test_also_under_the_delayed_policies(local_dht: Callable[[], DHT], policy: str) -> None:
    peers = peers_of(local_dht, 2, **{policy: True}, **STILL)
    train(peers)
    assert equal(peers[0][0], peers[1][0])
    assert torch.equal(peers[0][0].spare, reference().spare)
    for _, opt in peers:
        opt.shutdown()


def test_whoever_makes_up_for_the_rounds_takes_the_same_for_none(loopback_dht: Callable[..., DHT]) -> None:
    peers = peers_of(loopback_dht, 3, delay_state_averaging=False, **STILL)
    late_net, late = peers[2]
    made_up: list[Any] = []
    catch_up = late._session.catch_up
    late._session = _Spy(late._session, lambda: made_up.append(catch_up()) or made_up[-1])
    # One by one: those of a small model are not kept for long, because its state is as small.
    for epoch in range(3):
        train(peers[:2], range(epoch, epoch + 1))
        while late.local_epoch <= epoch:
            late._session.changed(0.1)
            late.load_state_from_peers()
    assert [kind for kind, _ in made_up] == ["gradients"] * 3
    assert equal(late_net, peers[0][0]) and torch.equal(late_net.spare, reference(3).spare)
    for _, opt in peers:
        opt.shutdown()


class _Spy:
    """A session whose ``catch_up`` is another."""

    def __init__(self, session: Any, catch_up: Callable[[], Any]):
        self._inner, self.catch_up = session, catch_up

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
