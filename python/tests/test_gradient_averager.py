"""GradientAverager: where gradients gather, what is said of forgotten ones, and the scaler beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together
from test_optimizer import backward, batches, make_model

import potluck
from potluck.dht import DHT
from potluck.optim import GradientAverager, PowerSGDGradientAverager, ProgressTracker


def averager(dht: DHT, model: torch.nn.Module, **options: Any) -> GradientAverager:
    return GradientAverager(model.parameters(), dht=dht, prefix="g", start=True, **options)


def test_gradients_gather_where_they_are_told_to(local_dht: Callable[[], DHT]) -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    here, there = averager(local_dht(), layer), averager(local_dht(), layer, accumulate_grads_on="meta")
    assert [t.device.type for t in (*here._accumulators, *there._accumulators)] == ["cpu", "meta"]
    layer.weight.grad = torch.ones(1, 2)
    there.accumulate_grads_(4)
    assert there.local_samples_accumulated == 4 and there.local_times_accumulated == 1
    with pytest.raises(ValueError, match="has no effect with reuse_grad_buffers=True"):
        averager(local_dht(), layer, accumulate_grads_on="cpu", reuse_grad_buffers=True)


@pytest.mark.parametrize("how", ["used", "told", "forgotten", "unwarned"])
def test_averaged_gradients_that_nobody_used_are_named(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    model = make_model()
    peer = averager(local_dht(), model, warn=how != "unwarned")
    backward(model, *batches(1, 8)[0])
    peer.accumulate_grads_(8)
    peer.step(timeout=0.1)
    if how == "used":
        with peer.use_averaged_gradients():
            pass
    elif how == "told":
        peer.notify_used_averaged_gradients()
    peer.accumulate_grads_(8)
    assert ("were never used" in caplog.text) is (how == "forgotten")
    caplog.clear()
    peer.accumulate_grads_(8)
    assert "never used" not in caplog.text, "once is enough"


def test_only_what_shrinks_enough_is_factored(loopback_dht: Callable[..., DHT]) -> None:
    """A matrix of 4 by 4 has rank-1 factors of 8 numbers: half of it."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(4, 4, generator=generator) for _ in range(2)]
    errors, dhts = [], [loopback_dht(), loopback_dht()]
    for ratio in (0.4, 0.6):
        peers = []
        for grad, dht in zip(grads, dhts, strict=True):
            layer = torch.nn.Linear(4, 4, bias=False)
            layer.weight.grad = grad.clone()
            made = PowerSGDGradientAverager(
                layer.parameters(),
                1,
                dht=dht,
                prefix=f"p{10 * ratio:.0f}",
                start=True,
                min_compression_ratio=ratio,
            )
            made.accumulate_grads_(1)
            peers.append(made)
        together(*(partial(p.step, timeout=30) for p in peers))
        with peers[0].use_averaged_gradients() as averaged:
            errors.append(float((averaged[0] - (grads[0] + grads[1]) / 2).abs().max()))
    assert errors[1] < 1e-6 < 1e-2 < errors[0], errors


def test_the_tracker_counts_peers_that_only_dial_out(loopback_dht: Callable[..., DHT]) -> None:
    one = ProgressTracker(loopback_dht(), "p", 100, start=True)
    two = ProgressTracker(loopback_dht(client_mode=True), "p", 100, start=True)
    deadline = time.monotonic() + 30
    while one.global_progress.num_peers < 2 or two.global_progress.num_peers < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert one.global_progress.num_clients == two.global_progress.num_clients == 1


def test_loading_a_state_that_does_not_come_ends_in_time(local_dht: Callable[[], DHT]) -> None:
    def make() -> potluck.Optimizer:
        inner = torch.optim.SGD(make_model().parameters(), lr=0.1)
        return potluck.Optimizer(
            dht=local_dht(), run_id="r", target_batch_size=8, optimizer=inner, load_state_timeout=0.5
        )

    ahead, late = make(), make()
    ahead._session.epoch_done(None)
    ahead._session.epoch_done(None)
    begun = time.monotonic()
    late.load_state_from_peers()
    assert 0.2 < time.monotonic() - begun < 10 and late.local_epoch == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_scaler_knows_whether_gradients_are_finite(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(2, 1, bias=False, dtype=dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    scaler = potluck.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1)).sum()
    before = layer.weight.detach().clone()
    for gradient, finite in ((8.0, True), (float("inf"), False)):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        with scaler.running_global_step():
            assert scaler.are_grads_finite(optimizer) is finite
            scaler.unscale_(optimizer)
            assert scaler.are_grads_finite(optimizer, use_cached=True) is finite
            scaler.step(optimizer)
        scaler.update()
    assert torch.equal(layer.weight, before - 0.5 * 2.0), "8 / 4, and nothing of the overflow"
    assert scaler.get_scale() == 2.0


def seen(peer: GradientAverager) -> list[int]:
    """The epochs at which a peer sees everybody."""
    peer.session.step(0)
    return [other["epoch"] for other in json.loads(peer.session.status())["peers"]]


def test_a_late_peer_takes_over_the_factors_and_is_in_the_next_round(
    loopback_dht: Callable[..., DHT],
) -> None:
    def make(value: float) -> PowerSGDGradientAverager:
        layer = torch.nn.Linear(16, 16, bias=False)
        layer.weight.grad = torch.full((16, 16), value)
        return PowerSGDGradientAverager(layer.parameters(), 2, dht=loopback_dht(), prefix="late", start=True)

    def step(peer: PowerSGDGradientAverager) -> Any:
        peer.accumulate_grads_(1)
        gathered = peer.step(timeout=30)
        with peer.use_averaged_gradients() as averaged:
            return None if gathered is None else len(gathered), averaged[0].mean().item()

    peers = [make(1.0), make(3.0)]
    for _round in range(3):
        assert together(*(partial(step, p) for p in peers)) == [(2, pytest.approx(2.0))] * 2
    peers.append(make(-7.0))
    assert peers[2].load_state_from_peers(timeout=30) is not None
    # These step in turn, not on and on: the others must have heard of it before they do.
    deadline = time.monotonic() + 30
    while any(seen(peer) != [peers[0].session.epoch] * 3 for peer in peers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _round in range(3):
        assert together(*(partial(step, p) for p in peers)) == [(3, pytest.approx(-1.0))] * 3
