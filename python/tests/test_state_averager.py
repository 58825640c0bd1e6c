"""TrainingStateAverager: its optimizer, its delayed averages, its state, and every argument of both."""

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
from potluck.optim import TrainingStateAverager
from potluck.optim.state_averager import (
    dump_optimizer_state,
    initialize_optimizer_state_,
    load_optimizer_state,
)

SGD = partial(torch.optim.SGD, lr=0.1)


def averager(
    model: torch.nn.Module, dht: DHT, *, offload: bool = False, **options: Any
) -> TrainingStateAverager:
    make = options.pop("optimizer", SGD)
    inner = (
        {"optimizer": make, "params": model.parameters(), "offload_optimizer": True}
        if offload
        else {"optimizer": make(model.parameters())}
    )
    return TrainingStateAverager(dht=dht, prefix="s", start=True, **inner, **options)


def one_value(value: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def learn(layer: torch.nn.Linear, peer: TrainingStateAverager) -> None:
    """A step that lowers the one value by 0.1 times 10."""
    layer.weight.grad = torch.full((1, 1), 10.0)
    peer.step(optimizer_step=True, zero_grad=True)


# What the statistics begin with.

OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.5},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adadelta": {},
    "Adagrad": {"initial_accumulator_value": 0.5},
    "Adafactor": {},
    "ASGD": {},
    "Rprop": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_initialized_optimizer_steps_as_a_new_one(name: str) -> None:
    weights = []
    for initialized in (False, True):
        model = make_model()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **OPTIMIZERS[name])
        if initialized:
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            initialize_optimizer_state_(optimizer)
            assert all(optimizer.state[p] for p in model.parameters()), "there is nothing to begin with"
            assert all(
                torch.equal(a, b) for a, b in zip(model.parameters(), make_model().parameters(), strict=True)
            )
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                assert {k: v for k, v in group.items() if k != "params"} == before
        for x, y in batches(3, 8):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_what_has_no_statistics_gets_none() -> None:
    model = make_model()
    optimizer = SGD(model.parameters())
    initialize_optimizer_state_(optimizer)
    assert optimizer.state_dict()["state"] == {}


def test_a_dumped_optimizer_state_is_loaded_elsewhere() -> None:
    one, two = make_model(0), make_model(1)
    mine, other = (torch.optim.Adam(m.parameters(), lr=lr) for m, lr in ((one, 0.1), (two, 0.2)))
    for model, optimizer, steps in ((one, mine, 3), (two, other, 1)):
        for x, y in batches(steps, 8):
            backward(model, x, y)
            optimizer.step()
    facts, tensors = dump_optimizer_state(mine)
    load_optimizer_state(other, facts, [t.clone() for t in tensors])
    assert other.param_groups[0]["lr"] == 0.1
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert mine.state[a].keys() == other.state[b].keys()
        assert all(torch.equal(value, other.state[b][key]) for key, value in mine.state[a].items())
    with pytest.raises(ValueError, match="not a fact"):
        load_optimizer_state(other, [{"type": "code"}, *facts[1:]], tensors)


# The optimizer.


@pytest.mark.parametrize("offload", [False, True])
def test_zero_grad_reaches_the_model(local_dht: Callable[[], DHT], offload: bool) -> None:
    model = make_model()
    peer = averager(model, local_dht(), offload=offload)
    for set_to_none in (True, False):
        backward(model, *batches(1, 8)[0])
        peer.step(optimizer_step=True, zero_grad=True, set_to_none=set_to_none)
        grads = [p.grad for p in model.parameters()]
        assert all(g is None for g in grads) if set_to_none else all(not g.any() for g in grads)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("make", [torch.amp.GradScaler, potluck.GradScaler])
def test_a_scaler_unscales_and_skips_overflows(
    local_dht: Callable[[], DHT], make: Any, offload: bool
) -> None:
    model, reference = make_model(), make_model()
    peer, plain = averager(model, local_dht(), offload=offload), SGD(reference.parameters())
    scaler = make("cpu", init_scale=1024.0)
    for x, y in batches(2, 8):
        backward(reference, x, y)
        plain.step()
        plain.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        peer.step(optimizer_step=True, zero_grad=True, grad_scaler=scaler)
        scaler.update()
    for mine, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, expected, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    peer.step(optimizer_step=True, grad_scaler=scaler)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("offload", [False, True], ids=["in place", "offload"])
@pytest.mark.parametrize("make", [torch.amp.GradScaler, potluck.GradScaler], ids=["torch", "potluck"])
def test_hooks_of_a_scaled_step_run_once_on_unscaled_gradients(
    local_dht: Callable[[], DHT], make: Any, offload: bool
) -> None:
    """Clipping of the model's gradients in a hook, as everybody writes it, is one of what is applied."""
    model, reference, (x, y) = make_model(), make_model(), batches(1, 8)[0]
    peer, plain = averager(model, local_dht(), offload=offload), SGD(reference.parameters())
    seen: list[tuple[str, list[torch.Tensor | None]]] = []

    def clip(of: torch.nn.Module) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen.append(("pre", [None if p.grad is None else p.grad.clone() for p in of.parameters()]))
            torch.nn.utils.clip_grad_norm_(of.parameters(), 0.1)

        return hook

    plain.register_step_pre_hook(clip(reference))
    backward(reference, x, y)
    plain.step()
    peer.optimizer.register_step_pre_hook(clip(model))
    peer.optimizer.register_step_post_hook(lambda *_: seen.append(("post", [])))
    scaler = make("cpu", init_scale=1024.0)
    scaler.scale(torch.nn.functional.mse_loss(model(x), y)).backward()
    peer.step(optimizer_step=True, zero_grad=True, grad_scaler=scaler)
    scaler.update()
    (_, expected), (_, found), _ = seen
    assert [kind for kind, _ in seen] == ["pre", "pre", "post"]
    for mine, wanted in zip(found, expected, strict=True):
        assert mine is not None and torch.allclose(mine, wanted, atol=1e-7)
    for mine, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-7)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    peer.step(optimizer_step=True, grad_scaler=scaler)
    assert len(seen) == 3, "not for an overflow"
    assert all(bool(p.grad.isinf().all()) for p in model.parameters())


def test_custom_gradients_are_those_of_the_offloaded_parameters(local_dht: Callable[[], DHT]) -> None:
    layer = one_value(5.0)
    peer = averager(layer, local_dht(), offload=True, custom_gradients=True)
    layer.weight.grad = torch.full((1, 1), 1e6)
    peer._inner.main[0].grad = torch.full((1, 1), 10.0)
    peer.step(optimizer_step=True)
    assert layer.weight.item() == pytest.approx(4.0)


def test_the_schedule_follows_the_epochs(local_dht: Callable[[], DHT]) -> None:
    layer = one_value(5.0)
    halves = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    peer = averager(layer, local_dht(), scheduler=halves)
    learn(layer, peer)
    peer.step(increment_epoch=True)
    assert (peer.local_epoch, peer.optimizer.param_groups[0]["lr"]) == (1, 0.05)
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs a loss"):
        averager(
            layer, local_dht(), scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5)
        )


def test_arguments_that_cannot_have_an_effect_say_why(local_dht: Callable[[], DHT]) -> None:
    with pytest.raises(ValueError, match="reuse_tensors=False"):
        averager(one_value(1.0), local_dht(), reuse_tensors=False)
    with pytest.raises(ValueError, match="keeps no tensor 'exp_avg'"):
        averager(one_value(1.0), local_dht(), average_opt_statistics=("exp_avg",))
    with pytest.raises(ValueError, match="needs initialize_optimizer"):
        averager(one_value(1.0), local_dht(), initialize_optimizer=False, average_opt_statistics=("exp_avg",))
    peer = averager(one_value(1.0), local_dht(), reuse_tensors=True, sync_epoch_when_averaging=True)
    for options, reason in (
        ({"delay_optimizer_step": True}, "potluck.Optimizer"),
        ({"delay_averaging": True}, "without averaging_round"),
        ({"averaging_opts": {"timeout": 1}}, "without averaging_round"),
        ({"averaging_round": True, "averaging_opts": {"gather": 1}}, "it holds the epoch"),
    ):
        with pytest.raises(ValueError, match=reason):
            peer.step(**options)


# Averages.


def pair(
    local_dht: Callable[[], DHT], **options: Any
) -> tuple[list[torch.nn.Linear], list[TrainingStateAverager]]:
    layers = [one_value(1.0), one_value(3.0)]
    return layers, [averager(layer, local_dht(), **options) for layer in layers]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("delta_rule", [False, True])
def test_a_delayed_average_changes_nothing_until_it_is_applied(
    local_dht: Callable[[], DHT], offload: bool, delta_rule: bool
) -> None:
    layers, peers = pair(local_dht, offload=offload, delta_rule_averaging=delta_rule)
    controls = [p.step(averaging_round=True, delay_averaging=True) for p in peers]
    assert all(control.result(30) is not None for control in controls)
    assert [layer.weight.item() for layer in layers] == [1.0, 3.0] and not any(
        p.averaging_in_progress for p in peers
    )
    for layer, peer in zip(layers, peers, strict=True):
        layer.weight.grad = torch.full((1, 1), 10.0)
        peer.step(apply_delayed_updates=False, optimizer_step=True, zero_grad=True)
    assert [layer.weight.item() for layer in layers] == pytest.approx([0.0, 2.0], abs=1e-6)
    for peer in peers:
        peer.step(wait_for_delayed_updates=True)
    expected = [1.0, 1.0] if delta_rule else [2.0, 2.0]
    assert [layer.weight.item() for layer in layers] == pytest.approx(expected)


def test_what_is_averaged_is_what_was_there_when_asked(local_dht: Callable[[], DHT]) -> None:
    layers, peers = pair(local_dht)
    early = peers[0].step(averaging_round=True, delay_averaging=True, averaging_opts={"timeout": 30})
    assert peers[0].averaging_in_progress
    learn(layers[0], peers[0])
    assert layers[0].weight.item() == pytest.approx(0.0, abs=1e-6)
    peers[1].step(averaging_round=True)
    assert early.result(30) is not None and layers[1].weight.item() == pytest.approx(2.0)
    # Another round waits for the one before.
    together(*(lambda p=p: p.step(averaging_round=True) for p in peers))
    assert [layer.weight.item() for layer in layers] == pytest.approx([2.0, 2.0])


def test_a_delayed_average_that_does_not_come_is_a_warning(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture
) -> None:
    layer = one_value(1.0)
    peer = averager(layer, local_dht())
    control = peer.step(averaging_round=True, delay_averaging=True, averaging_opts={"timeout": 60})
    control.cancel()
    peer.step(wait_for_delayed_updates=True)
    assert "did not come" in caplog.text and layer.weight.item() == 1.0 and not peer.averaging_in_progress


def test_a_scheduled_round_begins_with_the_step(local_dht: Callable[[], DHT]) -> None:
    layers, peers = pair(local_dht)
    control = peers[0].schedule_step(timeout=60)
    assert not control.triggered
    with pytest.raises(ValueError, match="asked for before"):
        peers[0].step(averaging_round=True, averaging_control=control, averaging_opts={"weight": 2.0})
    order: list[str] = []
    results = together(
        lambda: peers[0].step(
            averaging_round=True, averaging_control=control, wait_for_trigger=lambda: order.append("asked")
        ),
        lambda: peers[1].step(averaging_round=True, averaging_opts={"weight": 3.0}),
    )
    assert None not in results and order == ["asked"]
    assert [layer.weight.item() for layer in layers] == pytest.approx([2.5, 2.5])


def test_peers_agree_on_the_epoch_if_told_to(local_dht: Callable[[], DHT]) -> None:
    _, peers = pair(local_dht, sync_epoch_when_averaging=True)
    peers[1].local_epoch = 7
    together(*(lambda p=p: p.step(averaging_round=True, increment_epoch=True) for p in peers))
    assert [p.local_epoch for p in peers] == [8, 8]
    for peer in peers:
        peer.shutdown()
    _, others = pair(local_dht)
    others[1].local_epoch = 7
    together(*(lambda p=p: p.step(averaging_round=True) for p in others))
    assert [p.local_epoch for p in others] == [0, 7]


def test_names_statistics_and_further_tensors_are_averaged(local_dht: Callable[[], DHT]) -> None:
    layers, extras = [one_value(1.0), one_value(3.0)], [torch.zeros(2), torch.ones(2)]
    adam = partial(torch.optim.Adam, lr=0.1)
    peers = [
        averager(
            layer,
            local_dht(),
            optimizer=adam,
            parameter_names=["weight"],
            extra_tensors=[extra],
            average_opt_statistics=("exp_avg",),
        )
        for layer, extra in zip(layers, extras, strict=True)
    ]
    assert [info.key for info in peers[0]._infos or ()] == ["weight", "exp_avg.weight", "extra.0"]
    statistics = [
        peer.optimizer.state[layer.weight]["exp_avg"] for peer, layer in zip(peers, layers, strict=True)
    ]
    statistics[1].fill_(4.0)
    together(*(lambda p=p: p.step(averaging_round=True) for p in peers))
    for layer, statistic, extra in zip(layers, statistics, extras, strict=True):
        assert (layer.weight.item(), statistic.item(), extra.tolist()) == (2.0, 2.0, [0.5, 0.5])
    with pytest.raises(ValueError, match="expected 1 names, got 2"):
        averager(one_value(1.0), local_dht(), parameter_names=["a", "b"])


def test_the_round_is_logged_as_loud_as_wished(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "potluck")
    _, peers = pair(local_dht, status_loglevel=logging.INFO)
    together(*(lambda p=p: p.step(averaging_round=True) for p in peers))
    levels = {r.levelno for r in caplog.records if r.getMessage().startswith("s: ")}
    assert levels == {logging.INFO}


@pytest.mark.parametrize("delay", [False, True], ids=["at once", "delayed"])
@pytest.mark.parametrize("delta", [False, True], ids=["values", "changes"])
def test_values_of_before_are_let_go_with_the_round(
    local_dht: Callable[[], DHT], delay: bool, delta: bool
) -> None:
    layers, peers = pair(local_dht, delta_rule_averaging=delta)
    together(*(lambda p=p: p.step(averaging_round=True, delay_averaging=delay) for p in peers))
    if delay:
        assert all(peer._before for peer in peers)
        for peer in peers:
            peer.step(wait_for_delayed_updates=True)
    assert [layer.weight.item() for layer in layers] == [2.0, 2.0]
    assert not any(peer._before for peer in peers)


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("odd"), TimeoutError()], ids=repr)
def test_whatever_a_delayed_average_failed_with_is_met_once(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    layers, peers = pair(local_dht)

    class Failed:
        def done(self) -> bool:
            return True

        def result(self) -> Any:
            raise error

    peers[0]._delayed, peers[0]._before = Failed(), [torch.zeros(1)]
    peers[0].step()
    assert "the delayed average did not come" in caplog.text
    assert peers[0]._delayed is None and not peers[0]._before
    together(*(lambda p=p: p.step(averaging_round=True) for p in peers))
    assert [layer.weight.item() for layer in layers] == [2.0, 2.0]


# State.


def test_a_newcomer_gets_everything(local_dht: Callable[[], DHT]) -> None:
    halves = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    adam = partial(torch.optim.Adam, lr=0.1)

    def make(value: float, offload: bool) -> tuple[torch.nn.Linear, TrainingStateAverager, torch.Tensor]:
        layer, extra = one_value(value), torch.full((2,), value)
        peer = averager(
            layer, local_dht(), offload=offload, optimizer=adam, scheduler=halves, extra_tensors=[extra]
        )
        return layer, peer, extra

    layers, peers, _ = zip(make(1.0, False), make(3.0, True), strict=True)
    for layer, peer in zip(layers, peers, strict=True):
        learn(layer, peer)
    together(*(lambda p=p: p.step(averaging_round=True, increment_epoch=True) for p in peers))
    layer, newcomer, extra = make(100.0, True)
    assert newcomer.load_state_from_peers(timeout=30) is not None
    assert layer.weight.item() == layers[0].weight.item() == layers[1].weight.item()
    assert (newcomer.local_epoch, newcomer.optimizer.param_groups[0]["lr"]) == (1, 0.05)
    assert newcomer.scheduler.last_epoch == 1 and extra.tolist() == [2.0, 2.0]
    (statistics,) = newcomer.optimizer.state.values()
    assert statistics["step"].item() == 1.0 and statistics["exp_avg"].item() == pytest.approx(1.0)
    assert newcomer.load_state_from_peers() is None, "nobody is ahead any more"


def test_what_newcomers_get_is_applied_already(local_dht: Callable[[], DHT]) -> None:
    layers, peers = pair(local_dht)
    controls = [p.step(averaging_round=True, delay_averaging=True, increment_epoch=True) for p in peers]
    assert all(control.result(30) is not None for control in controls)
    for peer in peers:
        peer.step()
    newcomer = one_value(9.0)
    assert averager(newcomer, local_dht()).load_state_from_peers(timeout=30) is not None
    assert newcomer.weight.item() == layers[0].weight.item() == 2.0


def test_gradients_of_copies_that_there_are_not_are_refused(local_dht: Callable[[], DHT]) -> None:
    with pytest.raises(ValueError, match="without offload_optimizer=True"):
        averager(one_value(1.0), local_dht(), custom_gradients=True)
    peer = averager(one_value(1.0), local_dht())
    with pytest.raises(ValueError, match="without optimizer_step=True"):
        peer.step(increment_epoch=True, grad_scaler=torch.amp.GradScaler("cpu"))
