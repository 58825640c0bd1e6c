"""What programs do with any torch optimizer, done with a shared one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optimizer import SGD, backward, batches, equal, make_model, plain

import potluck
from potluck.dht import DHT

COMMON: dict[str, Any] = {"run_id": "r", "target_batch_size": 8, "batch_size_per_step": 8}


def make(local_dht: Callable[[], DHT], model: torch.nn.Module, offload: bool) -> potluck.Optimizer:
    how = (
        {"optimizer": SGD, "params": model.parameters()}
        if offload
        else {"optimizer": SGD(model.parameters())}
    )
    return potluck.Optimizer(dht=local_dht(), **how, **COMMON)


OFFLOAD = pytest.mark.parametrize("offload", [False, True], ids=["in place", "offload"])


@OFFLOAD
@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR", "LambdaLR", "CosineAnnealingLR"])
def test_a_schedule_of_the_programs_own(local_dht: Callable[[], DHT], kind: str, offload: bool) -> None:
    """Made for the shared optimizer, and stepped by the program."""
    options: dict[str, Any] = {
        "StepLR": {"step_size": 2},
        "OneCycleLR": {"max_lr": 0.2, "total_steps": 10},
        "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
        "CosineAnnealingLR": {"T_max": 6},
    }
    schedule = lambda opt: getattr(torch.optim.lr_scheduler, kind)(opt, **options[kind])  # noqa: E731
    reference, model, data = make_model(), make_model(), batches(6, 8)
    plain(SGD, data, reference, schedule)
    with make(local_dht, model, offload) as opt:
        scheduler = schedule(opt)
        for x, y in data:
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
            scheduler.step()
        assert opt.param_groups[0]["lr"] == opt.opt.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        assert opt.local_epoch == 6
    assert equal(reference, model)


@OFFLOAD
def test_hooks_are_those_of_the_optimizer(local_dht: Callable[[], DHT], offload: bool) -> None:
    model, seen = make_model(), []
    with make(local_dht, model, offload) as opt:
        for kind in ("step_pre", "step_post", "state_dict_post", "load_state_dict_pre"):
            getattr(opt, f"register_{kind}_hook")(lambda *_, kind=kind: seen.append(kind))
        backward(model, *batches(1, 8)[0])
        opt.step()
        # What newcomers would get is a state_dict() too.
        assert seen[:2] == ["step_pre", "step_post"] and set(seen[2:]) <= {"state_dict_post"}
        seen.clear()
        saved = opt.state_dict()
        assert seen == ["state_dict_post"]
        opt.load_state_dict(saved)
        assert "load_state_dict_pre" in seen


@OFFLOAD
def test_what_holds_the_state_is_the_optimizer_itself(local_dht: Callable[[], DHT], offload: bool) -> None:
    with make(local_dht, make_model(), offload) as opt:
        assert opt.state_averager is opt


def test_a_peer_cannot_be_copied(local_dht: Callable[[], DHT]) -> None:
    with make(local_dht, make_model(), False) as opt:
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                act(opt)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_are_cleared_as_by_torch(local_dht: Callable[[], DHT], set_to_none: bool) -> None:
    reference, model, data = make_model(), make_model(), batches(3, 8)
    plain(SGD, data, reference)
    with make(local_dht, model, True) as opt:
        for x, y in data:
            opt.zero_grad(set_to_none=set_to_none)
            backward(model, x, y)
            opt.step()
        assert opt.local_epoch == 3
        opt.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
    assert equal(reference, model)


@OFFLOAD
def test_the_state_is_found_by_the_groups_parameters(local_dht: Callable[[], DHT], offload: bool) -> None:
    model = make_model()
    with make(local_dht, model, offload) as opt:
        (group,) = opt.param_groups
        assert not any(p in opt.state for p in group["params"]) and len(opt.state) == 0
        assert [opt.state[p].get("momentum_buffer") for p in group["params"]] == [None] * 4
        backward(model, *batches(1, 8)[0])
        grads = [p.grad.clone() for p in group["params"]]
        opt.step()
        assert list(opt.state) == list(group["params"]) == list(model.parameters())
        for parameter, grad in zip(group["params"], grads, strict=True):
            assert torch.equal(opt.state[parameter]["momentum_buffer"], grad)
        opt.state[group["params"][0]]["momentum_buffer"].zero_()
        assert not opt.state_dict()["state"][0]["momentum_buffer"].any()
