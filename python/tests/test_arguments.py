"""Every argument of the optimizer that others do not test has the effect that its name says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import together
from test_optimizer import SGD, backward, batches, distance, equal, make_model, plain, train_together

import potluck
from potluck._settings import TIMING, TRACKER_TIMING
from potluck.compression import CompressionInfo
from potluck.dht import DHT
from potluck.optim import PowerSGDGradientAverager

HALF = potluck.Float16Compression()
COMMON: dict[str, Any] = {"run_id": "r", "target_batch_size": 8, "batch_size_per_step": 8}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The last status of every optimizer that was shut down."""
    seen: list[dict[str, Any]] = []
    shutdown = potluck.Optimizer.shutdown

    def spy(self: potluck.Optimizer) -> None:
        if self.is_alive():
            seen.append(self.status())
        shutdown(self)

    monkeypatch.setattr(potluck.Optimizer, "shutdown", spy)
    return seen


def assert_rounds(watched: list[dict[str, Any]], rounds: int) -> None:
    """So many at each, or one less that is told as failed: a busy machine may stall a peer until it is given up."""
    for status in watched:
        failed = status["rounds_failed"]
        assert failed <= 1 and rounds - failed <= status["rounds"] <= rounds, status


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({}, 1),
        # 57 values in half the bytes, and for each of 4 parameters whether it was touched, which is exact.
        ({"grad_compression": HALF}, 4 * 61 / (2 * 57 + 4 * 4)),
        # Equal states are not sent: those of local updates differ.
        ({"use_local_updates": True}, 1),
        ({"use_local_updates": True, "state_averaging_compression": HALF}, 2),
    ],
    ids=["none", "gradients", "no state", "state"],
)
def test_each_compression_shrinks_what_it_names(
    loopback_dht: Callable[..., DHT], watched: list[Any], options: dict[str, Any], ratio: float
) -> None:
    train_together(loopback_dht, [8, 8], 3, delay_state_averaging=False, **options)
    assert [status["compression_ratio"] for status in watched] == pytest.approx([ratio] * 2, rel=1e-3)
    assert_rounds(watched, 3 if "use_local_updates" in options else 6)


def test_the_factory_of_the_gradient_averager_is_used(
    loopback_dht: Callable[..., DHT], watched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.nn.Linear(64, 64, bias=False)
    monkeypatch.setattr("test_optimizer.make_model", lambda seed=0: _copied(wide))
    data = [(torch.randn(16, 64), torch.randn(16, 64)) for _ in range(3)]
    monkeypatch.setattr("test_optimizer.batches", lambda steps, size: data)
    factory = partial(PowerSGDGradientAverager, averager_rank=2, min_compression_ratio=0.5)
    models = train_together(loopback_dht, [8, 8], 3, grad_averager_factory=factory, average_state_every=100)
    assert equal(*models)
    # Two factors of 64 times 2 instead of 64 times 64.
    assert watched[0]["compression_ratio"] == pytest.approx(16, rel=0.05)


def _copied(net: torch.nn.Module) -> torch.nn.Module:
    made = torch.nn.Linear(64, 64, bias=False)
    made.load_state_dict(net.state_dict())
    return made


@pytest.mark.parametrize(("every", "rounds"), [(1, 12), (2, 9), (4, 7)])
def test_state_is_averaged_every_so_many_epochs(
    local_dht: Callable[[], DHT], watched: list[Any], every: int, rounds: int
) -> None:
    train_together(local_dht, [8, 8], 6, delay_state_averaging=False, average_state_every=every)
    assert_rounds(watched, rounds)


@pytest.mark.parametrize("statistics", [(), ("momentum_buffer",)], ids=str)
def test_named_statistics_are_averaged(
    local_dht: Callable[[], DHT], monkeypatch: pytest.MonkeyPatch, statistics: tuple[str, ...]
) -> None:
    made: list[torch.optim.Optimizer] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        made.append(SGD(parameters))
        return made[-1]

    models = train_together(
        local_dht, [8, 8], 3, make, use_local_updates=True, average_opt_statistics=statistics
    )
    buffers = [
        [inner.state[p]["momentum_buffer"] for p in net.parameters()]
        for inner, net in zip(made, models, strict=True)
    ]
    same = all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    assert same == bool(statistics)


def test_extra_tensors_are_averaged_and_loaded(local_dht: Callable[[], DHT]) -> None:
    extras, models = [torch.zeros(3) for _ in range(3)], [make_model() for _ in range(3)]

    def join(index: int) -> potluck.Optimizer:
        opt = potluck.Optimizer(
            dht=local_dht(),
            run_id="r",
            target_batch_size=16,
            batch_size_per_step=8,
            optimizer=SGD(models[index].parameters()),
            extra_tensors=[extras[index]],
            delay_state_averaging=False,
        )
        opt.load_state_from_peers()
        return opt

    opts = [join(0), join(1)]

    def train(index: int) -> None:
        extras[index].fill_(index)
        backward(models[index], *batches(1, 8)[0])
        opts[index].step()
        while opts[index].local_epoch < 1:
            opts[index]._session.changed(0.05)
            opts[index]._follow(0)

    together(lambda: train(0), lambda: train(1))
    assert torch.equal(extras[0], torch.full((3,), 0.5)) and torch.equal(extras[1], extras[0])
    opts.append(join(2))
    assert torch.equal(extras[2], extras[0])
    for opt in opts:
        opt.shutdown()


def test_a_client_peer_is_not_dialled_and_counts_fully(loopback_dht: Callable[..., DHT]) -> None:
    reference, made = make_model(), []
    plain(SGD, batches(4, 16), reference)

    def make() -> DHT:
        made.append(loopback_dht(client_mode=bool(made)))
        return made[-1]

    models = train_together(make, [8, 8], 4, delay_state_averaging=False)
    assert [bool(dht.get_visible_maddrs()) for dht in made] == [True, False]
    assert distance(reference, models[0]) < 1e-6 and equal(*models)


def test_client_mode_follows_the_dht_unless_given(loopback_dht: Callable[..., DHT]) -> None:
    dht_of_a_client = loopback_dht(client_mode=True)
    for dht, given, expected in [
        (loopback_dht(), None, False),
        (dht_of_a_client, None, True),
        (loopback_dht(client_mode=True), True, True),
        (loopback_dht(), True, True),
    ]:
        with potluck.Optimizer(
            dht=dht, optimizer=SGD(make_model().parameters()), client_mode=given, **COMMON
        ) as opt:
            assert opt.client_mode is expected and opt.local_progress.client_mode is expected
    with pytest.raises(ValueError, match="client_mode=False cannot have an effect"):
        potluck.Optimizer(
            dht=dht_of_a_client, optimizer=SGD(make_model().parameters()), client_mode=False, **COMMON
        )


@pytest.mark.parametrize("local", [False, True], ids=["gradients", "local updates"])
def test_an_auxiliary_peer_helps_and_changes_nothing(
    loopback_dht: Callable[..., DHT], local_dht: Callable[[], DHT], local: bool
) -> None:
    done = threading.Event()
    options = {"use_local_updates": True} if local else {"delay_state_averaging": False}
    # The same without a helper.
    reference, _ = train_together(local_dht, [8, 8], 4, **options)
    first = loopback_dht()
    helper = potluck.Optimizer(
        dht=loopback_dht(),
        run_id="r",
        target_batch_size=16,
        optimizer=SGD(make_model(9).parameters()),
        auxiliary=True,
        **options,
    )
    handed = iter([first])

    def assist() -> int:
        rounds = 0
        while not done.is_set():
            helper.step()
            rounds = helper.status()["rounds"]
        return rounds

    def train() -> list[torch.nn.Module]:
        try:
            return train_together(lambda: next(handed, None) or loopback_dht(), [8, 8], 4, **options)
        finally:
            done.set()

    rounds, models = together(assist, train)
    assert distance(reference, models[0]) < 1e-6 and equal(*models)
    assert rounds >= 3 and helper.local_epoch >= 3
    with pytest.raises(ValueError, match="no samples"):
        helper.step(batch_size=8)
    helper.shutdown()


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.Adam, lr=0.01)], ids=["SGD", "Adam"])
def test_a_state_download_travels_compressed(loopback_dht: Callable[..., DHT], optimizer: Any) -> None:
    torch.manual_seed(0)
    nets = [torch.nn.Linear(100, 100) for _ in range(3)]
    sizes: list[int] = []
    for compression, net in [(potluck.NoCompression(), nets[1]), (HALF, nets[2])]:
        common = {"run_id": f"r{len(sizes)}", "target_batch_size": 8, "load_state_compression": compression}
        donor = potluck.Optimizer(
            dht=loopback_dht(), optimizer=optimizer(nets[0].parameters()), batch_size_per_step=8, **common
        )
        backward(nets[0], torch.randn(8, 100), torch.randn(8, 100))
        donor.step()
        with potluck.Optimizer(
            dht=loopback_dht(), optimizer=optimizer(net.parameters()), **common
        ) as newcomer:
            load = newcomer._session.catch_up
            newcomer._session = _Measured(newcomer._session, load, sizes)
            newcomer.load_state_from_peers()
            assert newcomer.local_epoch == 1
            for mine, theirs in zip(net.parameters(), nets[0].parameters(), strict=True):
                kept = theirs if len(sizes) == 1 else theirs.half().float()
                assert torch.equal(mine, kept)
                for name, value in donor.state[theirs].items():
                    exact = value.numel() == 1 or len(sizes) == 1
                    assert torch.equal(newcomer.state[mine][name], value if exact else value.half().float())
        donor.shutdown()
    assert sizes[1] < 0.52 * sizes[0]


class _Measured:
    """A session that notes how many bytes a state had."""

    def __init__(self, session: Any, load: Callable[[], Any], sizes: list[int]):
        self._session, self._load, self._sizes = session, load, sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def catch_up(self) -> Any:
        kind, loaded = self._load()
        assert kind == "state"
        self._sizes.append(sum(map(len, loaded[2].values())))
        return kind, loaded


def test_a_state_that_a_scheme_cannot_express_travels_as_it_is(local_dht: Callable[[], DHT]) -> None:
    nets = [make_model(), make_model(3)]
    inner = [SGD(net.parameters()) for net in nets]
    options = {**COMMON, "load_state_compression": potluck.Uniform8BitQuantization()}
    with potluck.Optimizer(dht=local_dht(), optimizer=inner[0], **options) as donor:
        backward(nets[0], *batches(1, 8)[0])
        donor.step()
        sent = inner[0].state[nets[0][0].weight]["momentum_buffer"]
        sent[0, 0] = float("nan")
        donor._publish()
        with potluck.Optimizer(dht=local_dht(), optimizer=inner[1], **options) as newcomer:
            newcomer.load_state_from_peers()
            assert newcomer.local_epoch == 1
    received = inner[1].state[nets[1][0].weight]["momentum_buffer"]
    assert torch.equal(received.isnan(), sent.isnan()) and received.isnan().any()


def test_state_averaging_removes_what_rounding_did_to_a_newcomer(local_dht: Callable[[], DHT]) -> None:
    nets = [make_model(), make_model(3)]
    common = {
        **COMMON,
        "target_batch_size": 16,
        "load_state_compression": HALF,
        "delay_state_averaging": False,
    }
    opts = [potluck.Optimizer(dht=local_dht(), optimizer=SGD(nets[0].parameters()), **common)]
    for x, y in batches(2, 8):
        backward(nets[0], x, y)
        opts[0].step()
        opts[0].zero_grad()
    opts.append(potluck.Optimizer(dht=local_dht(), optimizer=SGD(nets[1].parameters()), **common))
    opts[1].load_state_from_peers()
    assert opts[1].local_epoch == opts[0].local_epoch == 1 and 0 < distance(*nets) < 1e-3

    def train(index: int) -> None:
        backward(nets[index], *batches(1, 8, seed=index)[0])
        opts[index].step()
        while opts[index].local_epoch < 2:
            opts[index]._session.changed(0.05)
            opts[index]._follow(0)

    together(partial(train, 0), partial(train, 1))
    assert equal(*nets)
    for opt in opts:
        opt.shutdown()


@pytest.mark.parametrize("seconds", [0.001, 3600.0], ids=["too short", "an hour"])
def test_timing_arguments_are_neither_waited_for_nor_deadlines(
    loopback_dht: Callable[..., DHT], watched: list[Any], seconds: float
) -> None:
    names = ("matchmaking_time", "averaging_timeout", "allreduce_timeout", "next_chunk_timeout")
    models = train_together(
        loopback_dht,
        [8, 8],
        3,
        delay_state_averaging=False,
        performance_ema_alpha=0.5,
        averager_opts=dict.fromkeys(sorted(TIMING), seconds),
        tracker_opts=dict.fromkeys(sorted(TRACKER_TIMING), seconds),
        **dict.fromkeys(names, seconds),
    )
    assert equal(*models)
    assert_rounds(watched, 6)


@pytest.mark.parametrize(
    ("options", "beside"),
    [({}, True), ({"delay_state_averaging": False}, False), ({"use_local_updates": True}, False)],
    ids=str,
)
def test_state_is_averaged_beside_the_training_unless_told_otherwise(
    local_dht: Callable[[], DHT], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], beside: bool
) -> None:
    rounds: list[str] = []

    class Session:
        """Notes how the state is averaged."""

        def __init__(self, inner: Any):
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            if name in ("start_state", "average_state"):
                rounds.append(name)
            return getattr(self._inner, name)

    join = potluck.Optimizer._join

    def watched_join(self: potluck.Optimizer, **how: Any) -> None:
        join(self, **how)
        self._session = Session(self._session)

    monkeypatch.setattr(potluck.Optimizer, "_join", watched_join)
    train_together(local_dht, [8, 8], 2, **options)
    assert set(rounds) == {"start_state" if beside else "average_state"}


def test_verbose_says_every_epoch(local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="potluck")
    for verbose in (False, True):
        with potluck.Optimizer(
            dht=local_dht(), optimizer=SGD(make_model().parameters()), verbose=verbose, **COMMON
        ) as opt:
            backward(opt_model := make_model(), *batches(1, 8)[0])
            for parameter, source in zip(opt.model_parameters, opt_model.parameters(), strict=True):
                parameter.grad = source.grad
            opt.step()
        assert ("now at epoch 1" in caplog.text) == verbose


def test_options_that_could_have_no_effect_are_refused(local_dht: Callable[[], DHT]) -> None:
    def refused(match: str, **kwargs: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=match):
            given = {"optimizer": SGD(make_model().parameters()), **COMMON, **kwargs}
            potluck.Optimizer(dht=local_dht(), **given)

    sizes = ("bandwidth", "part_size_bytes", "min_vector_size", "target_group_size")
    for name in (*sizes, "averaging_alpha", "compression", "client_mode"):
        refused(rf"averager_opts\['{name}'\] cannot have an effect", averager_opts={name: 1})
    refused("averager_opts.*expected one of", averager_opts={"request_timout": 1})
    refused("tracker_opts.*expected one of", tracker_opts={"private_key": 1})
    refused("no state to offer", auxiliary=True, batch_size_per_step=None, load_state_compression=HALF)
    refused("expected names", average_opt_statistics=[3])
    refused("expected a whole number", average_state_every=0)
    refused("expected at most 4294967295", average_state_every=2**32)
    refused("expected at most 9223372036854775807", target_batch_size=2**63)
    refused("not a potluck GradientAverager", grad_averager_factory=lambda *_, **__: None)
    auxiliary = {"auxiliary": True, "batch_size_per_step": None}
    refused("scheduler cannot have an effect", **auxiliary, scheduler=torch.optim.lr_scheduler.ExponentialLR)
    refused("reuse_grad_buffers cannot have an effect", **auxiliary, reuse_grad_buffers=True)
    refused("ends every epoch", use_local_updates=True, average_state_every=2)
    refused("everybody waits for it", use_local_updates=True, delay_state_averaging=True)
    for delayed in ("delay_optimizer_step", "delay_grad_averaging"):
        offloaded = {"optimizer": SGD, "params": make_model().parameters(), delayed: True}
        refused("beside a delayed step", delay_state_averaging=True, **offloaded)
    refused("keeps momentum_buffer", average_opt_statistics=["exp_avgg"])
    adam = torch.optim.Adam(make_model().parameters())
    refused("no 'step' in the shape", average_opt_statistics=["exp_avg", "step"], optimizer=adam)
    still = torch.optim.SGD(make_model().parameters(), lr=0.1)
    refused("keeps nothing", average_opt_statistics=["momentum_buffer"], optimizer=still)
    refused("several times per step", optimizer=torch.optim.LBFGS(make_model().parameters()))
    refused("take Adam", optimizer=torch.optim.SparseAdam(list(make_model().parameters())))
    turning = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    refused("view_as_real", optimizer=SGD([turning]))
    refused("or a function that makes one", scheduler=3)
    for name in (*sizes, "averaging_alpha", "min_group_size", "compression", "auxiliary", "warn", "prefix"):
        factory = partial(potluck.GradientAverager, **{name: 1})
        refused(rf"grad_averager_factory\['{name}'\] cannot have an effect", grad_averager_factory=factory)
    likewise: dict[str, Callable[[list[torch.Tensor]], Any]] = {
        "averaging_alpha": lambda _: 0.5,
        "min_group_size": lambda _: 3,
        "compression": lambda _: HALF,
        "allow_state_sharing": lambda _: False,
        "tensor_infos": lambda values: [CompressionInfo.from_tensor(value, key=0) for value in values],
        "averaged_grads": lambda values: [torch.zeros_like(value) for value in values],
        "warn": lambda _: True,
        "reuse_grad_buffers": lambda _: True,
        "client_mode": lambda _: True,
    }
    for name, value in likewise.items():
        function = lambda values, name=name, value=value, **kwargs: potluck.GradientAverager(  # noqa: E731
            values, **{**kwargs, name: value(values)}
        )
        refused(rf"grad_averager_factory\['{name}'\] cannot have an effect", grad_averager_factory=function)


@pytest.mark.parametrize("where", ["grad", "state_averaging", "load_state"])
def test_a_rule_for_a_tensor_that_there_is_not_is_refused(local_dht: Callable[[], DHT], where: str) -> None:
    first, none = {"grad": ("0", 4)}.get(where, ("param.000000", "0"))
    further = {"load_state": "momentum_buffer.000003", "state_averaging": "param.000003"}.get(where, 3)

    def make(rule: Any) -> None:
        potluck.Optimizer(
            dht=local_dht(),
            optimizer=SGD(make_model().parameters()),
            **{f"{where}_compression": rule},
            **COMMON,
        ).shutdown()

    make(potluck.PerTensorCompression({first: HALF, further: HALF}))
    wrong = potluck.PerTensorCompression({first: HALF, none: HALF})
    for rule in (wrong, potluck.SizeAdaptiveCompression(16, HALF, wrong)):
        with pytest.raises(ValueError, match=f"{where}_compression: PerTensorCompression names '{none}'"):
            make(rule)


@pytest.mark.parametrize("number", [np.int64(8), np.int32(8), torch.tensor(8)], ids=str)
def test_whole_numbers_of_every_kind_are_taken(local_dht: Callable[[], DHT], number: Any) -> None:
    model = make_model()
    with potluck.Optimizer(
        dht=local_dht(), run_id="r", target_batch_size=number, optimizer=SGD(model.parameters())
    ) as opt:
        backward(model, *batches(1, 8)[0])
        opt.step(batch_size=number)
        assert opt.local_epoch == 1
        for wrong in (8.0, np.float64(8), True, np.int64(0)):
            with pytest.raises(ValueError, match="expected a whole number"):
                opt.step(batch_size=wrong)


def test_a_schedule_is_that_of_the_given_optimizer(local_dht: Callable[[], DHT]) -> None:
    given, other = (SGD(make_model().parameters()) for _ in range(2))
    schedule = torch.optim.lr_scheduler.StepLR(given, 3)
    with potluck.Optimizer(dht=local_dht(), optimizer=given, scheduler=schedule, **COMMON) as opt:
        assert opt.scheduler is schedule
    with pytest.raises(ValueError, match="made for another optimizer"):
        potluck.Optimizer(dht=local_dht(), optimizer=other, scheduler=schedule, **COMMON)


def test_a_schedulers_class_is_a_function_of_the_optimizer(local_dht: Callable[[], DHT]) -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with potluck.Optimizer(
        dht=local_dht(), optimizer=SGD(make_model().parameters()), scheduler=plateau, **COMMON
    ) as opt:
        assert isinstance(opt.scheduler, plateau) and opt.scheduler.optimizer is opt.opt
    with pytest.raises(TypeError, match="step_size"):
        potluck.Optimizer(
            dht=local_dht(),
            optimizer=SGD(make_model().parameters()),
            scheduler=torch.optim.lr_scheduler.StepLR,
            **COMMON,
        )
    # Timing is measured; what hivemind's scripts set is taken and none of it is needed.
    with potluck.Optimizer(
        dht=local_dht(),
        optimizer=SGD(make_model().parameters()),
        averager_opts={"request_timeout": 1, "min_matchmaking_time": 2},
        tracker_opts={"min_refresh_period": 1, "metadata_expiration": 3},
        matchmaking_time=0.1,
        averaging_timeout=0.1,
        **COMMON,
    ) as opt:
        assert opt.is_alive()
