"""Mixed precision, clipping, frozen parameters, groups and the delayed policies, each against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
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


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, potluck.GradScaler], ids=["torch", "potluck"])
def test_gradient_scalers(local_dht: Callable[[], DHT], scaler_class: Any) -> None:
    def train(model: torch.nn.Module, optimizer: Any, scaler: Any) -> float:
        for index, (x, y) in enumerate(batches(10, 8)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if index == 4:
                next(model.parameters()).grad[0] = float("inf")
                scaler._per_optimizer_states.clear()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return scaler.get_scale()

    reference, model = make_model(), make_model()
    scales = [train(reference, SGD(reference.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0))]
    with potluck.Optimizer(dht=local_dht(), optimizer=SGD(model.parameters()), **COMMON) as opt:
        scales.append(train(model, opt, scaler_class("cpu", init_scale=1024.0)))
        # The pass that overflowed was left out.
        assert opt.local_epoch == 9
    assert scales[0] == scales[1]
    assert equal(reference, model)


def test_float16_parameters_with_potlucks_scaler(local_dht: Callable[[], DHT]) -> None:
    model, reference = make_model(dtype=torch.float16), make_model()
    data = batches(8, 8)
    plain(SGD, data, reference)
    scaler = potluck.GradScaler("cpu", init_scale=256.0)
    with potluck.Optimizer(
        dht=local_dht(), optimizer=SGD, params=model.parameters(), offload_optimizer=True, **COMMON
    ) as opt:
        for x, y in data:
            loss = torch.nn.functional.mse_loss(model(x.half()).float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert opt.local_epoch == 8
    pairs = zip(reference.parameters(), model.parameters(), strict=True)
    assert max(float((a - b.float()).detach().abs().max()) for a, b in pairs) < 5e-3


def test_clipping_what_everybody_averaged(local_dht: Callable[[], DHT]) -> None:
    reference = make_model()
    optimizer = SGD(reference.parameters())
    for x, y in batches(6, 16):
        backward(reference, x, y)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    def clipped(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        made = SGD(parameters)

        def clip(*_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)

        made.register_step_pre_hook(clip)
        return made

    models = train_together(local_dht, [8, 8], 6, clipped, delay_state_averaging=False)
    assert distance(reference, models[0]) < 1e-6
    assert equal(models[0], models[1])


def test_frozen_parameters_and_groups(local_dht: Callable[[], DHT]) -> None:
    data = batches(6, 8)
    reference, model = make_model(), make_model()
    for net in (reference, model):
        net[0].weight.requires_grad_(False)

    def groups(net: Any) -> list[dict[str, Any]]:
        return [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}]

    optimizer = SGD(groups(reference))
    for x, y in data:
        backward(reference, x, y)
        optimizer.step()
        optimizer.zero_grad()
    with potluck.Optimizer(
        dht=local_dht(), optimizer=SGD, params=groups(model), offload_optimizer=True, **COMMON
    ) as opt:
        assert len(opt.param_groups) == 2 and len(opt.grad_averager.parameters) == 3
        for x, y in data:
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
        with pytest.raises(ValueError, match="cannot be added"):
            opt.add_param_group({"params": []})
    assert equal(reference, model)


@pytest.mark.parametrize(
    "compression", [potluck.Float16Compression(), potluck.Uniform8BitQuantization()], ids=str
)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_delayed_state_averaging_keeps_peers_equal(
    local_dht: Callable[[], DHT], compression: Any, name: str
) -> None:
    models = train_together(
        local_dht, [8, 8], 6, OPTIMIZERS[name], grad_compression=compression, delay_state_averaging=True
    )
    assert distance(*models) < 1e-5
