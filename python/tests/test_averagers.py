"""Averagers on their own, without the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import together
from test_optimizer import SGD, backward, batches, make_model

import potluck
from potluck import _core
from potluck.averaging import AveragingStage, DecentralizedAverager
from potluck.dht import DHT
from potluck.optim import GradientAverager, ProgressTracker, TrainingAverager, TrainingStateAverager


def averagers(local_dht: Callable[[], DHT], values: list[float]) -> list[DecentralizedAverager]:
    return [
        DecentralizedAverager(
            [torch.full((3,), v), torch.full((2, 2), -v)], local_dht(), prefix="a", start=True
        )
        for v in values
    ]


def test_tensors_become_the_weighted_mean(local_dht: Callable[[], DHT]) -> None:
    peers = averagers(local_dht, [1.0, 2.0, 6.0])
    results = together(
        *(lambda p=p, w=w: p.step(weight=w) for p, w in zip(peers, [1.0, 1.0, 2.0], strict=True))
    )
    for peer, result in zip(peers, results, strict=True):
        assert set(result) == {p.peer_id for p in peers}
        with peer.get_tensors() as tensors:
            assert torch.equal(tensors[0], torch.full((3,), 3.75))
            assert torch.equal(tensors[1], torch.full((2, 2), -3.75))


def test_newcomers_load_the_average_of_a_round_whatever_became_of_the_tensors(
    local_dht: Callable[[], DHT],
) -> None:
    peers = averagers(local_dht, [1.0, 3.0])
    together(*(lambda p=p: p.step() for p in peers))
    for peer in peers:
        with peer.get_tensors() as tensors:
            tensors[0].fill_(100.0)
    (newcomer,) = averagers(local_dht, [7.0])
    loaded = newcomer.load_state_from_peers(timeout=30)
    assert loaded is not None
    with newcomer.get_tensors() as tensors:
        assert torch.equal(tensors[0], torch.full((3,), 2.0))
        assert torch.equal(tensors[1], torch.full((2, 2), -2.0))
    # The memory that is offered is not that of the next round: another one later changes neither.
    together(*(lambda p=p: p.step() for p in [*peers, newcomer]))
    for given, expected in zip(loaded[1], [2.0, -2.0], strict=True):
        assert torch.equal(given, torch.full_like(given, expected))
    for peer in peers:
        with peer.get_tensors() as tensors:
            assert torch.equal(tensors[1], torch.full((2, 2), -2.0))


def test_a_loaded_state_is_read_where_it_arrived(local_dht: Callable[[], DHT]) -> None:
    peers = averagers(local_dht, [1.0, 3.0])
    together(*(lambda p=p: p.step() for p in peers))
    (newcomer,) = averagers(local_dht, [7.0])
    assert newcomer.session.step(0) == "load_state"
    loaded = newcomer.session.load_state()
    assert loaded is not None
    arrived = loaded[2]["tensor.000000"]
    one, other = torch.from_dlpack(arrived), torch.from_dlpack(arrived)
    assert one.data_ptr() == other.data_ptr(), "nothing is copied"
    assert (one.dtype, len(arrived), bytes(arrived)) == (torch.uint8, 12, bytes(one.tolist()))
    del loaded, arrived, other
    assert torch.equal(one.view(torch.float32), torch.full((3,), 2.0)), "a tensor keeps its memory"
    decoded = _core.decode(bytes(one.tolist()), [3], "float32", 0)
    assert (len(decoded), bytes(decoded)) == (3, bytes(one.tolist()))


def test_without_a_group_nothing_changes(local_dht: Callable[[], DHT]) -> None:
    (alone,) = averagers(local_dht, [5.0])
    assert alone.step(timeout=0.2) is None
    with alone.get_tensors() as tensors:
        assert torch.equal(tensors[0], torch.full((3,), 5.0))


def test_a_round_waits_for_its_trigger(local_dht: Callable[[], DHT]) -> None:
    one, two = averagers(local_dht, [0.0, 4.0])
    control = one.step(require_trigger=True, wait=False)
    other = two.step(wait=False)
    assert not control.triggered and control.stage != AveragingStage.FINISHED
    control.weight = 3.0
    control.allow_allreduce()
    assert other.result(30) is not None and control.result(30) is not None
    assert control.stage == AveragingStage.FINISHED
    with pytest.raises(RuntimeError, match="cannot change"):
        control.weight = 1.0
    with one.get_tensors() as tensors:
        assert torch.equal(tensors[0], torch.full((3,), 1.0))


def test_gradients_are_weighted_by_samples(local_dht: Callable[[], DHT]) -> None:
    reference = make_model()
    ((x, y),) = batches(1, 12)
    backward(reference, x, y)
    peers = []
    for start, size in ((0, 4), (4, 8)):
        model = make_model()
        backward(model, x[start : start + size], y[start : start + size])
        averager = GradientAverager(model.parameters(), dht=local_dht(), prefix="g", start=True)
        averager.accumulate_grads_(size)
        peers.append((model, averager))
    together(*(averager.step for _, averager in peers))
    for model, averager in peers:
        with averager.use_averaged_gradients():
            for mine, expected in zip(model.parameters(), reference.parameters(), strict=True):
                assert torch.allclose(mine.grad, expected.grad, atol=1e-6)
        assert averager.local_samples_accumulated == 0


def test_the_state_averager_steps_and_averages(local_dht: Callable[[], DHT]) -> None:
    peers = []
    for seed in (0, 1):
        model = make_model(seed)
        averager = TrainingStateAverager(
            dht=local_dht(), optimizer=SGD(model.parameters()), prefix="s", start=True
        )
        peers.append((model, averager))
    expected = [(a + b) / 2 for a, b in zip(*(m.parameters() for m, _ in peers), strict=True)]
    together(*(lambda a=a: a.step(averaging_round=True, increment_epoch=True) for _, a in peers))
    for model, averager in peers:
        assert averager.local_epoch == 1
        for mine, mean in zip(model.parameters(), expected, strict=True):
            assert torch.allclose(mine, mean, atol=1e-6)


def test_the_training_averager(local_dht: Callable[[], DHT]) -> None:
    models = [make_model(0), make_model(1)]
    expected = [(a + b) / 2 for a, b in zip(*(m.parameters() for m in models), strict=True)]
    peers = [
        TrainingAverager(
            SGD(m.parameters()),
            average_parameters=True,
            average_gradients=False,
            dht=local_dht(),
            prefix="t",
            start=True,
        )
        for m in models
    ]
    together(*(p.step for p in peers))
    for model in models:
        for mine, mean in zip(model.parameters(), expected, strict=True):
            assert torch.allclose(mine, mean, atol=1e-6)


def test_the_tracker_adds_up_samples(local_dht: Callable[[], DHT]) -> None:
    one, two = (ProgressTracker(local_dht(), "p", 100, start=True) for _ in range(2))
    one.report_local_progress(0, 30)
    two.report_local_progress(0, 40)
    assert one.global_progress.samples_accumulated == 70
    assert one.global_progress.num_peers == 2 and not one.ready_to_update_epoch
    two.report_local_progress(0, 75)
    assert one.ready_to_update_epoch
    assert two.update_epoch() == 1 and one.global_epoch == 1
    with pytest.raises(ValueError, match="never falls"):
        two.report_local_progress(0, 1)


def test_powersgd_arguments_are_checked(local_dht: Callable[[], DHT]) -> None:
    parameters = make_model().parameters()
    with pytest.raises(ValueError, match="averager_rank=0"):
        potluck.PowerSGDGradientAverager(parameters, 0, dht=local_dht(), prefix="p", start=False)
