"""The shared optimizer against plain torch."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together

import potluck
from potluck.dht import DHT

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
OPTIMIZERS = {
    "plain SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD": SGD,
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).to(dtype)


def batches(count: int, size: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 5, generator=generator), torch.randn(size, 2, generator=generator))
        for _ in range(count)
    ]


def backward(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    loss = torch.nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype))
    loss.backward()
    return loss.detach()


def plain(make: Callable[..., Any], data: list[Any], model: torch.nn.Module, schedule: Any = None) -> None:
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    for x, y in data:
        loss = backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", ["instance", "offload", "factory"])
def test_one_peer_is_plain_torch_bit_for_bit(local_dht: Callable[[], DHT], name: str, form: str) -> None:
    make, data = OPTIMIZERS[name], batches(12, 8)
    reference, model = make_model(), make_model()
    plain(make, data, reference)
    if form == "instance":
        how: dict[str, Any] = {"optimizer": make(model.parameters())}
    else:
        how = {"optimizer": make, "params": model.parameters(), "offload_optimizer": form == "offload"}
    with potluck.Optimizer(
        dht=local_dht(), run_id="r", target_batch_size=8, batch_size_per_step=8, **how
    ) as opt:
        for x, y in data:
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
        assert opt.local_epoch == 12
    assert equal(reference, model)


@pytest.mark.parametrize("reuse", [False, True])
def test_one_peer_accumulates_as_torch_does(local_dht: Callable[[], DHT], reuse: bool) -> None:
    data = batches(16, 4)
    reference, model = make_model(), make_model()
    optimizer = SGD(reference.parameters())
    for index, (x, y) in enumerate(data):
        # Four backward passes of a mean each; their mean is the gradient. Powers of two: exact.
        backward(reference, x, y)
        if index % 4 == 3:
            for parameter in reference.parameters():
                parameter.grad /= 4
            optimizer.step()
            optimizer.zero_grad()
    with potluck.Optimizer(
        dht=local_dht(),
        run_id="r",
        target_batch_size=16,
        batch_size_per_step=4,
        optimizer=SGD(model.parameters()),
        reuse_grad_buffers=reuse,
    ) as opt:
        for x, y in data:
            backward(model, x, y)
            opt.step()
            if not reuse:
                opt.zero_grad()
        assert opt.local_epoch == 4
        if reuse:
            with pytest.raises(ValueError, match="remove zero_grad"):
                opt.zero_grad()
    assert equal(reference, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_peer_other_types(local_dht: Callable[[], DHT], dtype: torch.dtype) -> None:
    data = batches(6, 8)
    reference, model = make_model(dtype=dtype), make_model(dtype=dtype)
    plain(SGD, data, reference)
    with potluck.Optimizer(
        dht=local_dht(),
        run_id="r",
        target_batch_size=8,
        batch_size_per_step=8,
        optimizer=SGD(model.parameters()),
    ) as opt:
        for x, y in data:
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
    assert equal(reference, model)


SCHEDULES = {
    "StepLR": partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5),
    "Cosine": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12),
    "OneCycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=20),
    "Lambda": partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "Plateau": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=1, factor=0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_step_once_per_epoch(local_dht: Callable[[], DHT], name: str) -> None:
    data = batches(12, 8)
    reference, model = make_model(), make_model()
    plain(SGD, data, reference, SCHEDULES[name])
    with potluck.Optimizer(
        dht=local_dht(),
        run_id="r",
        target_batch_size=8,
        batch_size_per_step=8,
        optimizer=SGD(model.parameters()),
        scheduler=SCHEDULES[name],
    ) as opt:
        for x, y in data:
            opt.report_loss(backward(model, x, y))
            opt.step()
            opt.zero_grad()
    assert equal(reference, model)


def see_each_other(optimizers: list[potluck.Optimizer]) -> None:
    """Over sockets peers find all the others within moments."""
    for opt in optimizers:
        while len(opt.status()["peers"]) < len(optimizers):
            opt._session.changed(0.1)
            opt._session.step(0)


def train_together(
    make_dht: Callable[[], DHT],
    sizes: list[int],
    steps: int,
    make: Callable[..., Any] = SGD,
    **kwargs: Any,
) -> list[torch.nn.Module]:
    """Peers with batches of these sizes; an epoch is one batch of each."""
    data = batches(steps, sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    models = [make_model() for _ in sizes]
    optimizers = [
        potluck.Optimizer(
            dht=make_dht(),
            run_id="r",
            target_batch_size=sum(sizes),
            batch_size_per_step=size,
            **{"optimizer": make(model.parameters()), **kwargs},
        )
        for size, model in zip(sizes, models, strict=True)
    ]
    see_each_other(optimizers)

    def peer(index: int) -> Callable[[], None]:
        def run() -> None:
            opt, model, size, start = optimizers[index], models[index], sizes[index], starts[index]
            for epoch, (x, y) in enumerate(data):
                backward(model, x[start : start + size], y[start : start + size])
                opt.step()
                opt.zero_grad()
                while opt.local_epoch <= epoch:
                    # The others are still computing: wait for their samples as a slower machine would.
                    opt._session.changed(0.05)
                    opt._follow(0)

        return run

    together(*(peer(i) for i in range(len(sizes))))
    for opt in optimizers:
        assert opt.local_epoch == steps
        opt.shutdown()
    return models


@pytest.mark.parametrize("sizes", [[8, 8], [4, 4, 4, 4], [3, 9], [1, 2, 13]], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_peers_are_one_big_batch(loopback_dht: Callable[..., DHT], sizes: list[int], name: str) -> None:
    """Over the real protocol, because peers of one process have sums of their own."""
    reference = make_model()
    plain(OPTIMIZERS[name], batches(6, sum(sizes)), reference)
    models = train_together(
        loopback_dht, sizes, 6, OPTIMIZERS[name], delay_state_averaging=False, average_state_every=3
    )
    assert distance(reference, models[0]) < 1e-6
    assert all(equal(models[0], model) for model in models[1:])


class Shifted(torch.nn.Module):
    """Adds one number to everything, of which the loss sees only differences: its gradient is what rounding leaves of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(x + self.shift, dim=-1)


def test_adam_moves_by_rounding_only_what_the_loss_does_not_see(
    loopback_dht: Callable[..., DHT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps have one length for every gradient, so that the noise of another order of summation is a step as well.

    Such parameters exist: the bias of the keys of attention is one. Peers are equal in them too, but they and one big
    batch agree only in what can be told from the outputs.
    """
    made = make_model
    monkeypatch.setattr(
        "test_optimizer.make_model", lambda seed=0: torch.nn.Sequential(*made(seed), Shifted())
    )
    reference, data = make_model(), batches(6, 16)
    plain(OPTIMIZERS["Adam"], data, reference)
    models = train_together(loopback_dht, [4, 4, 4, 4], 6, OPTIMIZERS["Adam"], delay_state_averaging=False)
    assert all(equal(models[0], model) for model in models[1:])
    moved = [float(net[3].shift.detach().abs()) for net in (reference, models[0])]
    assert all(1e-6 < far < 6 * 0.01 for far in moved), "in plain torch as well"
    assert distance(reference[:3], models[0][:3]) < 1e-6
    assert torch.allclose(reference(data[0][0]), models[0](data[0][0]), atol=1e-6, rtol=0)


def test_arguments_without_an_effect_are_errors(local_dht: Callable[[], DHT]) -> None:
    model = make_model()

    def refused(match: str, **kwargs: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            potluck.Optimizer(
                **{
                    "dht": local_dht(),
                    "run_id": "r",
                    "target_batch_size": 8,
                    "optimizer": SGD(model.parameters()),
                    **kwargs,
                }
            )

    refused(
        "gradients stay local", use_local_updates=True, delay_grad_averaging=True, delay_optimizer_step=True
    )
    refused(
        "state_averaging_compression", use_local_updates=True, grad_compression=potluck.Float16Compression()
    )
    refused("offload_optimizer=True", delay_optimizer_step=True)
    refused("host memory", offload_optimizer=True)
    refused("params has no effect", params=model.parameters())
    refused("target_batch_size=0", target_batch_size=0)
    refused("it has no samples", auxiliary=True, batch_size_per_step=4)
    refused("measures every peer's bandwidth", averager_opts={"bandwidth": 3})
    refused("expected a compression", grad_compression="float16")
    with (
        pytest.raises(ValueError, match="batch_size is not known"),
        potluck.Optimizer(
            dht=local_dht(), run_id="r", target_batch_size=8, optimizer=SGD(model.parameters())
        ) as opt,
    ):
        opt.step()


def test_a_newcomer_loads_everything(local_dht: Callable[[], DHT]) -> None:
    model, late = make_model(0), make_model(5)
    make, schedule = OPTIMIZERS["Adam"], SCHEDULES["OneCycle"]
    common: dict[str, Any] = {
        "run_id": "r",
        "target_batch_size": 8,
        "batch_size_per_step": 8,
        "scheduler": schedule,
    }
    with potluck.Optimizer(dht=local_dht(), optimizer=make(model.parameters()), **common) as opt:
        for x, y in batches(5, 8):
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
        with potluck.Optimizer(dht=local_dht(), optimizer=make(late.parameters()), **common) as newcomer:
            newcomer.load_state_from_peers()
            assert newcomer.local_epoch == opt.local_epoch == 5
            assert newcomer.is_synchronized_with_peers()
            assert equal(model, late)
            assert newcomer.scheduler.last_epoch == opt.scheduler.last_epoch
            assert newcomer.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
            for mine, theirs in zip(late.parameters(), model.parameters(), strict=True):
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    assert torch.equal(newcomer.state[mine][key], opt.state[theirs][key])
            assert opt.tracker.global_progress.num_peers >= 1


class Decay:
    """A schedule's own object, with a part that is no plain value."""

    def __init__(self) -> None:
        self.factor, self.calls = torch.tensor(0.5), 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return float(self.factor) ** epoch


def test_a_newcomer_keeps_its_own_of_what_cannot_travel(local_dht: Callable[[], DHT]) -> None:
    made: list[Decay] = []

    def schedule(optimizer: Any) -> Any:
        kinds = torch.optim.lr_scheduler
        made.append(Decay())
        inner = [kinds.LambdaLR(optimizer, made[-1]), kinds.StepLR(optimizer, 3, 0.1)]
        return kinds.SequentialLR(optimizer, inner, [2])

    common: dict[str, Any] = {"run_id": "r", "target_batch_size": 8, "batch_size_per_step": 8}
    model, late = make_model(0), make_model(5)
    with potluck.Optimizer(
        dht=local_dht(), optimizer=SGD(model.parameters()), scheduler=schedule, **common
    ) as opt:
        for x, y in batches(4, 8):
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
        with potluck.Optimizer(
            dht=local_dht(), optimizer=SGD(late.parameters()), scheduler=schedule, **common
        ) as newcomer:
            newcomer.load_state_from_peers()
            mine, theirs = newcomer.scheduler, opt.scheduler
            assert mine.last_epoch == theirs.last_epoch == 4
            positions = [[s.last_epoch for s in chain._schedulers] for chain in (mine, theirs)]
            assert positions[0] == positions[1] and positions[0][1] > 0
            assert made[1].calls == made[0].calls and made[1].factor is not made[0].factor
            rates = []
            for chain, peer in ((mine, newcomer), (theirs, opt)):
                peer.opt._opt_called = True
                for _ in range(4):
                    chain.step()
                    rates.append(peer.param_groups[0]["lr"])
            assert rates[:4] == rates[4:] and len(set(rates)) == 2


def test_what_was_downloaded_is_served_on_as_it_came(
    local_dht: Callable[[], DHT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer's tensors are its own: it goes on training while others download from it."""
    make, late = OPTIMIZERS["Adam"], make_model(5)
    common: dict[str, Any] = {"run_id": "r", "target_batch_size": 8, "batch_size_per_step": 8}
    model = make_model(0)
    with potluck.Optimizer(dht=local_dht(), optimizer=make(model.parameters()), **common) as opt:
        backward(model, *batches(1, 8)[0])
        opt.step()
        with potluck.Optimizer(dht=local_dht(), optimizer=make(late.parameters()), **common) as newcomer:
            came: dict[str, Any] = {}
            restore = newcomer._codec.restore
            taking = lambda meta, blobs: (came.update(blobs), restore(meta, blobs))  # noqa: E731
            monkeypatch.setattr(newcomer._codec, "restore", taking)
            newcomer.load_state_from_peers()
            before = {name: bytes(blob) for name, blob in came.items()}
            assert any(name.startswith("opt.") for name in before)
            with torch.no_grad():
                for parameter in late.parameters():
                    for tensor in (parameter, *newcomer.state[parameter].values()):
                        tensor.add_(1)
            assert {name: bytes(blob) for name, blob in came.items()} == before


def test_a_checkpoint_resumes_and_does_not_break_torch(local_dht: Callable[[], DHT]) -> None:
    model, resumed, reference = make_model(), make_model(3), make_model()
    data = batches(8, 8)
    plain(SGD, data, reference)
    common: dict[str, Any] = {"run_id": "r", "target_batch_size": 8, "batch_size_per_step": 8}

    def train(opt: potluck.Optimizer, of: torch.nn.Module, part: list[Any]) -> None:
        for x, y in part:
            backward(of, x, y)
            opt.step()
            opt.zero_grad()

    with potluck.Optimizer(dht=local_dht(), optimizer=SGD(model.parameters()), **common) as opt:
        train(opt, model, data[:4])
        saved = opt.state_dict()
    assert saved["local_epoch"] == 4
    torch_optimizer = SGD(make_model().parameters())
    torch_optimizer.load_state_dict(saved)
    assert "local_epoch" not in torch_optimizer.state_dict()["state"]
    resumed.load_state_dict(model.state_dict())
    with potluck.Optimizer(dht=local_dht(), optimizer=SGD(resumed.parameters()), **common) as opt:
        opt.load_state_dict(saved)
        assert opt.local_epoch == 4
        train(opt, resumed, data[4:])
        assert opt.local_epoch == 8
    assert equal(reference, resumed)


def test_the_dashboard_shows_the_run_and_ends_with_it(local_dht: Callable[[], DHT]) -> None:
    model = torch.nn.Linear(3, 1)
    options = {"target_batch_size": 64, "batch_size_per_step": 8, "dashboard": True}
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with potluck.Optimizer(dht=local_dht(), run_id="shown", optimizer=inner, **options) as shared:
        page = urllib.request.urlopen(shared.dashboard_url, timeout=30).read().decode()
        assert "potluck" in page
        metrics = urllib.request.urlopen(f"{shared.dashboard_url}metrics", timeout=30).read().decode()
        assert "potluck_" in metrics and metrics.rstrip().endswith("# EOF")
        taken = shared.dashboard_url.removeprefix("http://").strip("/")
        second = torch.nn.Linear(3, 1)
        other = potluck.Optimizer(
            dht=local_dht(),
            run_id="elsewhere",
            optimizer=torch.optim.SGD(second.parameters(), lr=0.1),
            target_batch_size=64,
            dashboard=taken,
        )
        assert other.dashboard_url is None
        other.shutdown()
    with pytest.raises(OSError):
        urllib.request.urlopen(shared.dashboard_url, timeout=5)
