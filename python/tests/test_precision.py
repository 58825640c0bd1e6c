"""Mixed precision, clipping, frozen parameters, groups and the delayed policies, each against plain torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import together
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


SCALERS = pytest.mark.parametrize(
    "scaler_class", [torch.amp.GradScaler, potluck.GradScaler], ids=["torch", "potluck"]
)


@SCALERS
@pytest.mark.parametrize("offload", [False, True], ids=["in place", "offload"])
def test_gradient_scalers(local_dht: Callable[[], DHT], scaler_class: Any, offload: bool) -> None:
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
    how = (
        {"optimizer": SGD, "params": model.parameters()}
        if offload
        else {"optimizer": SGD(model.parameters())}
    )
    with potluck.Optimizer(dht=local_dht(), **how, **COMMON) as opt:
        assert opt.offload_optimizer == offload
        scales.append(train(model, opt, scaler_class("cpu", init_scale=1024.0)))
        # The pass that overflowed was left out.
        assert opt.local_epoch == 9
    assert scales[0] == scales[1]
    assert equal(reference, model)


@SCALERS
def test_a_scaler_given_to_step_unscales_and_skips(local_dht: Callable[[], DHT], scaler_class: Any) -> None:
    reference, model, data = make_model(), make_model(), batches(6, 8)
    plain(SGD, data[:3] + data[4:], reference)
    scaler = scaler_class("cpu", init_scale=1024.0)
    with potluck.Optimizer(dht=local_dht(), optimizer=SGD(model.parameters()), **COMMON) as opt:
        for index, (x, y) in enumerate(data):
            loss = torch.nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            if index == 3:
                model[0].bias.grad[0] = float("inf")
            opt.step(grad_scaler=scaler)
            scaler.update()
            opt.zero_grad()
        assert opt.local_epoch == 5
        with pytest.raises(TypeError, match="expected a torch"):
            opt.step(grad_scaler=1024.0)
    assert scaler.get_scale() == 512.0
    assert equal(reference, model)


@SCALERS
@pytest.mark.parametrize("form", ["scaler.step", "unscale_", "step(grad_scaler=)"])
def test_a_scaler_and_reused_buffers_are_refused(
    local_dht: Callable[[], DHT], scaler_class: Any, form: str
) -> None:
    model = make_model()
    with potluck.Optimizer(
        dht=local_dht(), optimizer=SGD(model.parameters()), reuse_grad_buffers=True, **COMMON
    ) as opt:
        scaler = scaler_class("cpu", init_scale=4.0)
        scaler.scale(torch.nn.functional.mse_loss(model(torch.ones(8, 5)), torch.ones(8, 2))).backward()
        with pytest.raises(ValueError, match="cannot work with a gradient scaler"):
            if form == "step(grad_scaler=)":
                opt.step(grad_scaler=scaler)
            else:
                if form == "unscale_":
                    scaler.unscale_(opt)
                scaler.step(opt)


def test_one_peers_overflow_does_not_skip_the_others(local_dht: Callable[[], DHT]) -> None:
    """Two scales; the first peer's second pass overflows, so that the epoch is what the other one has of it."""
    scales, data = [1024.0, 4.0], batches(4, 16)
    models, optimizers = [make_model(), make_model()], []
    for model in models:
        optimizers.append(
            potluck.Optimizer(
                dht=local_dht(),
                run_id="r",
                target_batch_size=16,
                batch_size_per_step=8,
                optimizer=SGD(model.parameters()),
                delay_state_averaging=False,
            )
        )
    # What every epoch is made of: the second epoch lacks the first peer's half and gets the other's twice.
    both = [(x, y) for x, y in data]
    half = data[1][0][8:], data[1][1][8:]
    reference = make_model()
    plain(SGD, [both[0], half, *both[2:]], reference)
    overflown = threading.Event()

    def peer(index: int) -> Callable[[], float]:
        def run() -> float:
            opt, model = optimizers[index], models[index]
            scaler = torch.amp.GradScaler("cpu", init_scale=scales[index])

            def give(epoch: int, overflow: bool = False) -> None:
                x, y = (part[8 * index : 8 * index + 8] for part in data[epoch])
                scaler.scale(torch.nn.functional.mse_loss(model(x), y)).backward()
                if overflow:
                    model[0].bias.grad[0] = float("inf")
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()

            for epoch in range(len(data)):
                give(epoch, overflow=(index, epoch) == (0, 1))
                if epoch == 1:
                    if index == 0:
                        overflown.set()
                    else:
                        assert overflown.wait(30)
                        give(epoch)
                while opt.local_epoch <= epoch:
                    opt._session.changed(0.05)
                    opt._follow(0)
            return scaler.get_scale()

        return run

    assert together(peer(0), peer(1)) == [512.0, 4.0]
    assert distance(reference, models[0]) < 1e-6 and equal(*models)
    for opt in optimizers:
        opt.shutdown()


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


@pytest.mark.parametrize("how", ["in place", "offload", "delayed average", "delayed step"])
def test_the_docstrings_hook_clips_what_is_applied(local_dht: Callable[[], DHT], how: str) -> None:
    data, reference, model = batches(6, 8), make_model(), make_model()
    optimizer = SGD(reference.parameters())
    for x, y in data:
        backward(reference, x, y)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    given: dict[str, Any] = {"optimizer": SGD, "params": model.parameters()}
    if how == "in place":
        given = {"optimizer": SGD(model.parameters())}
    with potluck.Optimizer(
        dht=local_dht(),
        delay_grad_averaging=how == "delayed average",
        delay_optimizer_step=how.startswith("delayed"),
        **given,
        **COMMON,
    ) as opt:
        opt.register_step_pre_hook(
            lambda opt, args, kwargs: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) and None
        )
        for epoch, (x, y) in enumerate(data):
            backward(model, x, y)
            opt.step()
            kept = [p.grad for p in model.parameters()]
            opt.zero_grad()
            while opt.local_epoch <= epoch:
                opt._session.changed(0.05)
                opt._follow(0)
            assert [p.grad for p in model.parameters()] == [None] * len(kept)
    assert equal(reference, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_an_offloaded_optimizer_are_the_models(
    local_dht: Callable[[], DHT], dtype: torch.dtype
) -> None:
    model = make_model(dtype=dtype)
    with potluck.Optimizer(dht=local_dht(), optimizer=SGD, params=model.parameters(), **COMMON) as opt:
        (group,) = opt.param_groups
        assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))
        group["lr"] = 0.0
        assert opt.opt.param_groups[0]["lr"] == 0.0
        with pytest.raises(ValueError, match="cannot change"):
            group["params"] = []
        before = make_model(dtype=dtype)
        backward(model, *batches(1, 8)[0])
        opt.step()
        assert equal(before, model) and opt.local_epoch == 1


def test_what_was_frozen_at_first_stays_so(local_dht: Callable[[], DHT]) -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    with potluck.Optimizer(dht=local_dht(), optimizer=SGD(model.parameters()), **COMMON) as opt:
        model[0].weight.requires_grad_(True)
        backward(model, *batches(1, 8)[0])
        with pytest.raises(ValueError, match=r"shape \(7, 5\) requires gradients now and was frozen"):
            opt.step()
        model[0].weight.requires_grad_(False)
        opt.step()
        assert torch.equal(model[0].weight, make_model()[0].weight) and opt.local_epoch == 1


@pytest.mark.parametrize("how", [{}, {"delay_state_averaging": False, "average_state_every": 100}], ids=str)
def test_a_parameter_that_no_loss_touches_stands_still(local_dht: Callable[[], DHT], how: Any) -> None:
    """A gradient of zeros is something else than none: AdamW decays the weight."""

    def without_bias(net: torch.nn.Module) -> torch.nn.Module:
        net.spare = torch.nn.Parameter(torch.ones(3))
        net[2].register_forward_pre_hook(lambda _, args: (args[0] * 0,))
        return net

    def forward(net: torch.nn.Module) -> None:
        net.forward = lambda x: net[2](net[1](net[0](x)))

    def make(seed: int = 0) -> torch.nn.Module:
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
        forward(without_bias(net))
        return net

    reference = make()
    plain(OPTIMIZERS["AdamW"], batches(4, 16), reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_optimizer.make_model", make)
        models = train_together(local_dht, [8, 8], 4, OPTIMIZERS["AdamW"], **how)
    assert torch.equal(reference.spare, torch.ones(3)), "no gradient"
    assert not torch.equal(reference[2].weight, make()[2].weight), "a gradient of zeros"
    assert distance(reference, models[0]) < 1e-6 and equal(*models)
    for model in models:
        assert torch.equal(model.spare, torch.ones(3))


@pytest.mark.parametrize("reuse", [False, True], ids=["", "reuse"])
def test_a_skipped_batch_has_no_samples(local_dht: Callable[[], DHT], reuse: bool) -> None:
    reference, model, data = make_model(), make_model(), batches(4, 4)
    optimizer = SGD(reference.parameters())
    for first, second in (data[:2], data[2:]):
        backward(reference, *first)
        backward(reference, *second)
        for parameter in reference.parameters():
            parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    with potluck.Optimizer(
        dht=local_dht(),
        optimizer=SGD(model.parameters()),
        reuse_grad_buffers=reuse,
        run_id="r",
        target_batch_size=8,
        batch_size_per_step=4,
    ) as opt:
        for x, y in data:
            opt.step()
            opt.step(lambda: None)
            opt.step(lambda x=x, y=y: backward(model, x, y))
            if not reuse:
                opt.zero_grad()
        assert opt.local_epoch == 2
    assert equal(reference, model)


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
    loopback_dht: Callable[..., DHT], compression: Any, name: str
) -> None:
    models = train_together(
        loopback_dht, [8, 8], 6, OPTIMIZERS[name], grad_compression=compression, delay_state_averaging=True
    )
    assert distance(*models) < 1e-5
    plainly = make_model()
    plain(OPTIMIZERS[name], batches(6, 16), plainly)
    assert distance(plainly, models[0]) > 1e-6, "compressed"
