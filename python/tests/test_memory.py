"""The memory that a status shows, by purpose, against what torch's own tensors say."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together

import potluck
from potluck import _core
from potluck.averaging import DecentralizedAverager
from potluck.dht import DHT
from potluck.optim import GradientAverager, PowerSGDGradientAverager, TrainingStateAverager


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)).to(dtype)


def backward(model: torch.nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    model(torch.randn(4, 24, dtype=dtype)).square().mean().backward()


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def shown(session: _core.Session) -> dict[str, int]:
    """The memory in a status that was made just now."""
    gc.collect()
    session.step(0)
    return json.loads(session.status())["memory"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_purpose_is_what_the_tensors_are(local_dht: Callable[[], DHT], dtype: torch.dtype) -> None:
    model, extra = make_model(dtype), [torch.zeros(11), torch.zeros(2, 3, dtype=torch.float64)]
    values = sum(p.numel() for p in model.parameters())
    wide = torch.promote_types(dtype, torch.float32).itemsize
    opt = potluck.Optimizer(
        dht=local_dht(),
        run_id="r",
        target_batch_size=4,
        batch_size_per_step=4,
        params=model.parameters(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        offload_optimizer=True,
        average_opt_statistics=("exp_avg", "exp_avg_sq"),
        extra_tensors=extra,
    )
    state = 4 * (3 * values + 11 + 6)
    held = {
        "gathering": wide * values,
        "gradients": 4 * (values + 4),  # and which of the four parameters were touched
        "offloaded": wide * values,
        "state": state,
        "snapshot": wide * values + nbytes(extra),
    }
    assert shown(opt._session) == held
    for _ in range(3):
        backward(model)
        opt.step()
        opt.zero_grad()
    statistics = [t for entries in opt.state.values() for t in entries.values()]
    assert len(statistics) == 3 * 4
    # One vector of each kind waits for the next round.
    held |= {"snapshot": held["snapshot"] + nbytes(statistics), "rounds": held["gradients"] + state}
    assert shown(opt._session) == held
    opt.shutdown()
    assert opt.status()["memory"] == {}
    # What was offloaded is the inner optimizer's, and is still there.
    assert opt.state_dict()["local_epoch"] == 3


def test_what_is_not_needed_is_not_held(local_dht: Callable[[], DHT]) -> None:
    def memory(**how: Any) -> dict[str, int]:
        model = make_model()
        settings: dict[str, Any] = {"target_batch_size": 4, "batch_size_per_step": 4, "run_id": str(how)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with potluck.Optimizer(dht=local_dht(), optimizer=optimizer, **settings, **how) as opt:
            return shown(opt._session)

    size, touched = nbytes(make_model().parameters()), 4 * 4
    every = {"gathering": size, "gradients": size + touched, "state": size, "snapshot": size}
    assert memory() == every
    assert memory(reuse_grad_buffers=True) == {k: v for k, v in every.items() if k != "gathering"}
    assert memory(use_local_updates=True) == {"state": size, "snapshot": size}


def test_means_are_not_kept_beside_the_vector_of_a_round(
    local_dht: Callable[[], DHT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made one by one when the vector is filled, and again only where the round was one of nobody else."""
    made: list[int] = []
    mean_grad = GradientAverager.mean_grad
    monkeypatch.setattr(
        GradientAverager, "mean_grad", lambda self, index: made.append(index) or mean_grad(self, index)
    )
    models = [make_model(), make_model()]
    opts = [
        potluck.Optimizer(
            dht=local_dht(),
            run_id="r",
            target_batch_size=16,
            batch_size_per_step=4,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )
        for model in models
    ]

    def train(index: int) -> None:
        # Two passes each, so that a mean is not what was gathered.
        for _ in range(2):
            backward(models[index])
            opts[index].step()
            opts[index].zero_grad()
        while opts[index].local_epoch < 1:
            opts[index]._session.changed(0.05)
            opts[index]._follow(0)

    together(partial(train, 0), partial(train, 1))
    assert sorted(made) == sorted(2 * [0, 1, 2, 3])
    for opt in opts:
        opt.shutdown()


def test_low_rank_compression_shows_what_it_owes(loopback_dht: Callable[..., DHT]) -> None:
    rank, rows, columns = 2, 40, 24
    models = [make_model(), make_model()]
    optimizers = [
        potluck.Optimizer(
            dht=loopback_dht(),
            run_id="low rank",
            target_batch_size=8,
            batch_size_per_step=4,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            grad_averager_factory=partial(PowerSGDGradientAverager, averager_rank=rank),
            average_state_every=100,
        )
        for model in models
    ]
    fresh = [shown(opt._session) for opt in optimizers]

    def train(opt: potluck.Optimizer, model: torch.nn.Module) -> None:
        for epoch in range(2):
            backward(model)
            opt.step()
            opt.zero_grad()
            while opt.local_epoch <= epoch:
                opt._session.changed(0.05)
                opt._follow(0)

    together(*(partial(train, opt, model) for opt, model in zip(optimizers, models, strict=True)))
    used = [shown(opt._session) for opt in optimizers]
    size = 4 * rows * columns
    for before, after in zip(fresh, used, strict=True):
        assert (before["error_feedback"], after["error_feedback"]) == (size, 2 * size)
        # Q as it starts and as it travels; then P and Q of the round and of what was sent.
        assert before["factors"] >= 2 * 4 * rank * columns
        assert after["factors"] >= before["factors"] + 2 * 4 * rank * (rows + columns)
    for opt in optimizers:
        assert opt.status()["rounds"] == 2
        opt.shutdown()
        assert opt.status()["memory"] == {}


def test_averagers_show_their_copies(local_dht: Callable[[], DHT]) -> None:
    model = make_model(torch.float64)
    tensors, size = [p.detach() for p in model.parameters()], nbytes(make_model().parameters())
    averager = DecentralizedAverager(tensors, local_dht(), prefix="a", start=True)
    session = averager.session
    assert shown(session) == {"tensors": size}
    with pytest.raises(ValueError, match='purpose="lunch": expected one of agreed, error_feedback'):
        session.hold_bytes("lunch", 1)
    averager.shutdown()
    averager.run_in_background()
    # The same memory, in another session.
    assert shown(averager.session) == {"tensors": size}
    del averager, session
    averager = TrainingStateAverager(
        dht=local_dht(),
        prefix="b",
        start=True,
        params=model.parameters(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        offload_optimizer=True,
    )
    assert shown(averager.session) == {"tensors": size, "offloaded": nbytes(tensors)}
    averager.shutdown()


def test_memory_shows_for_as_long_as_it_is_held(local_dht: Callable[[], DHT]) -> None:
    averager = DecentralizedAverager([torch.zeros(8)], local_dht(), prefix="a", start=True)
    session, before = averager.session, {"tensors": 32}
    buffer, held = _core.FlatBuffer(10), session.hold_bytes("gathering", 7)
    session.hold("state", buffer)
    session.hold("state", buffer)
    assert shown(session) == before | {"gathering": 7, "state": 40}
    view = torch.from_dlpack(buffer)
    del buffer, held
    assert shown(session) == before | {"state": 40}, "a view keeps the memory"
    del view
    assert shown(session) == before
    averager.shutdown()
