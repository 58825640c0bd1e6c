"""What may be said about one round of an averager, and what becomes of it: every argument of ``step``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest
import torch
from conftest import together

from potluck.averaging import AveragingStage, DecentralizedAverager, StepControl
from potluck.dht import DHT
from potluck.optim import GradientAverager
from potluck.utils import MSGPackSerializer, get_dht_time


def averager(dht: DHT, value: float, **options: object) -> DecentralizedAverager:
    return DecentralizedAverager([torch.full((2,), value)], dht, prefix="r", start=True, **options)  # type: ignore[arg-type]


def values(*peers: DecentralizedAverager) -> list[list[float]]:
    return [peer._tensors[0].tolist() for peer in peers]


def with_gradient(dht: DHT, value: float, samples: int = 1, **options: object) -> GradientAverager:
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.full((1, 2), value)
    made = GradientAverager(layer.parameters(), dht=dht, prefix="g", start=True, **options)  # type: ignore[arg-type]
    made.accumulate_grads_(samples)
    return made


def gradient(peer: GradientAverager) -> list[float]:
    with peer.use_averaged_gradients() as grads:
        return [float(value) for value in grads[0].flatten()]


# What members hand to one another.


def test_gather_brings_what_everybody_gave_in_one_order(local_dht: Callable[[], DHT]) -> None:
    peers = [averager(local_dht(), value) for value in (1.0, 2.0, 3.0)]
    given = [{"a": 1, "b": [2, b"x"]}, None, (1.5, "text")]
    for _round in range(2):
        results = together(*(lambda p=p, g=g: p.step(gather=g) for p, g in zip(peers, given, strict=True)))
        expected = {peer.peer_id: said for peer, said in zip(peers, given, strict=True)}
        assert results == [expected] * 3, "who gave nothing learns of the others too"
        assert len({tuple(result) for result in results}) == 1, "the order is the same at all members"
        given = given[1:] + given[:1]


def test_gather_over_the_network(loopback_dht: Callable[..., DHT]) -> None:
    peers = [averager(loopback_dht(), value) for value in (1.0, 3.0)]
    results = together(lambda: peers[0].step(gather={"a": 1}, timeout=30), lambda: peers[1].step(timeout=30))
    assert results == [{peers[0].peer_id: {"a": 1}, peers[1].peer_id: None}] * 2
    assert values(*peers) == [[2.0, 2.0]] * 2


def test_gather_is_bounded_and_plain(local_dht: Callable[[], DHT]) -> None:
    peers = [averager(local_dht(), value) for value in (1.0, 3.0)]
    most = b"x" * (16 * 1024 - 32 - 3)
    assert together(lambda: peers[0].step(gather=most), peers[1].step)[1][peers[0].peer_id] == most
    with pytest.raises(ValueError, match="gather: 16353 bytes"):
        peers[0].step(gather=most + b"x")
    with pytest.raises(TypeError, match="cannot store a object"):
        peers[0].step(gather=object())


def test_gradient_averagers_gather_too(local_dht: Callable[[], DHT]) -> None:
    peers = [with_gradient(local_dht(), value) for value in (1.0, 3.0)]
    results = together(*(lambda p=p, i=i: p.step(gather=i) for i, p in enumerate(peers)))
    assert results == [{peers[0].peer_id: 0, peers[1].peer_id: 1}] * 2


# Weights.


def test_who_weighs_nothing_receives_and_nobody_with_weight_is_no_round(
    local_dht: Callable[[], DHT],
) -> None:
    peers = [averager(local_dht(), value) for value in (1.0, 3.0)]
    together(*(lambda p=p, w=w: p.step(weight=w) for p, w in zip(peers, (0.0, 2.0), strict=True)))
    assert values(*peers) == [[3.0, 3.0]] * 2
    peers[0]._tensors[0].fill_(1.0)
    assert together(*(lambda p=p: p.step(weight=0.0) for p in peers)) == [None, None]
    assert values(*peers) == [[1.0, 1.0], [3.0, 3.0]], "there is no mean of nothing"
    assert None not in together(*(p.step for p in peers)), "the next round is one"
    assert values(*peers) == [[2.0, 2.0]] * 2


def test_the_weight_may_change_until_the_round_begins(local_dht: Callable[[], DHT]) -> None:
    one, two = (averager(local_dht(), value) for value in (0.0, 4.0))
    control = one.step(weight=5.0, require_trigger=True, wait=False)
    assert control.weight == 5.0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a finite number >= 0"):
            control.weight = wrong
    control.weight = 3.0
    control.allow_allreduce()
    two.step(timeout=30)
    assert control.result(30) is not None and values(one) == [[1.0, 1.0]]


# Time.


def test_a_round_that_others_do_not_come_to_ends_at_its_timeout(local_dht: Callable[[], DHT]) -> None:
    one, two = (averager(local_dht(), value) for value in (1.0, 3.0))
    for retries in (True, False):
        begun = time.monotonic()
        assert one.step(timeout=0.5, allow_retries=retries) is None
        assert 0.4 < time.monotonic() - begun < 10, "two is there and never steps"
    assert values(one) == [[1.0, 1.0]]
    assert None not in together(*(lambda p=p: p.step(timeout=30) for p in (one, two)))
    assert values(one, two) == [[2.0, 2.0]] * 2, "the failed round has divided nobody"


def test_a_failed_round_is_tried_again_unless_told_otherwise(
    local_dht: Callable[[], DHT], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (averager(local_dht(), value) for value in (1.0, 3.0))
    attempts: list[StepControl] = []
    really = DecentralizedAverager._attempt

    def fails_at_first(self: DecentralizedAverager, session: object, control: StepControl) -> object:
        attempts.append(control)
        return (None, True) if len(attempts) == 1 else really(self, session, control)  # type: ignore[arg-type]

    monkeypatch.setattr(DecentralizedAverager, "_attempt", fails_at_first)
    assert one.step(timeout=30, allow_retries=False) is None and len(attempts) == 1
    attempts.clear()
    assert None not in together(*(lambda p=p: p.step(timeout=30) for p in (one, two)))
    assert len(attempts) == 3 and values(one, two) == [[2.0, 2.0]] * 2


def test_a_round_begins_at_its_time(local_dht: Callable[[], DHT]) -> None:
    one, two = (averager(local_dht(), value) for value in (1.0, 3.0))
    when = get_dht_time() + 1.0
    control = one.step(scheduled_time=when, timeout=30, wait=False)
    assert isinstance(control, StepControl) and control.scheduled_time == when
    assert control.deadline is not None and control.deadline == pytest.approx(get_dht_time() + 30, abs=5)
    assert control.get_timeout() == pytest.approx(30, abs=5)
    assert two.step(timeout=30) is not None and get_dht_time() >= when
    assert control.result(30) is not None
    with pytest.raises(ValueError, match="before the timeout"):
        one.step(scheduled_time=get_dht_time() + 10, timeout=5)
    later = one.step(scheduled_time=get_dht_time() + 60, timeout=90, wait=False)
    with pytest.raises(ValueError, match="before the deadline"):
        later.scheduled_time = get_dht_time() + 100
    later.scheduled_time = get_dht_time()
    assert two.step(timeout=30) is not None and later.result(30) is not None
    with pytest.raises(RuntimeError, match="has begun"):
        later.scheduled_time = get_dht_time()


def test_a_cancelled_round_averages_nothing(local_dht: Callable[[], DHT]) -> None:
    one, two = (averager(local_dht(), value) for value in (1.0, 3.0))
    control = one.step(scheduled_time=get_dht_time() + 60, wait=False)
    assert control.get_timeout() is None and control.deadline is None and control.allow_retries
    assert control.cancel() and control.cancelled() and not control.cancel()
    with pytest.raises(CancelledError):
        control.result(30)
    assert control.thread is not None
    control.thread.join(30)
    assert not control.thread.is_alive() and control.stage == AveragingStage.FINISHED
    assert None not in together(*(p.step for p in (one, two))) and values(one) == [[2.0, 2.0]]
    done = one.step(timeout=0.1, wait=False)
    assert done.result(30) is None and not done.cancel(), "it has ended"


def test_a_round_that_is_never_triggered_ends_at_its_deadline(local_dht: Callable[[], DHT]) -> None:
    one, _two = (averager(local_dht(), value) for value in (1.0, 3.0))
    with pytest.raises(ValueError, match="needs wait=False"):
        one.step(require_trigger=True)
    control = one.step(gather=7, require_trigger=True, timeout=0.5, wait=False)
    assert MSGPackSerializer.loads(control.data_for_gather) == 7
    with pytest.raises(TimeoutError, match="never triggered"):
        control.result(30)


# Groups.


def test_too_small_a_group_averages_nothing(local_dht: Callable[[], DHT]) -> None:
    peers = [averager(local_dht(), value, min_group_size=3) for value in (1.0, 2.0)]
    assert together(*(lambda p=p: p.step(timeout=0.3) for p in peers)) == [None, None]
    assert together(*(p.step for p in peers)) == [None, None], "without a timeout nobody is waited for"
    assert values(*peers) == [[1.0, 1.0], [2.0, 2.0]]
    waiting = [peer.step(timeout=60, wait=False) for peer in peers]
    peers.append(averager(local_dht(), 6.0, min_group_size=3))
    assert peers[2].step(timeout=60) is not None
    assert all(len(control.result(60)) == 3 for control in waiting)
    assert values(*peers) == [[3.0, 3.0]] * 3
    alone = DecentralizedAverager([torch.ones(2)], local_dht(), prefix="alone", start=True, min_group_size=1)
    assert alone.step(gather="me") == {alone.peer_id: "me"} and values(alone) == [[1.0, 1.0]]
    with pytest.raises(ValueError, match="min_group_size=0"):
        averager(local_dht(), 1.0, min_group_size=0)


# Gradients.


def test_gradients_without_a_group_stay_ones_own(local_dht: Callable[[], DHT]) -> None:
    alone = with_gradient(local_dht(), 3.0, samples=4)
    begun = time.monotonic()
    assert alone.step(timeout=0.3) is None and time.monotonic() - begun < 10
    assert gradient(alone) == [3.0, 3.0] and alone.local_samples_accumulated == 0


def test_gradients_may_take_longer_to_load_than_the_round_may_last(
    local_dht: Callable[[], DHT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that is busy with something else."""
    alone = with_gradient(local_dht(), 3.0, samples=4)
    load = alone.load_accumulators_into_averager_

    def slow() -> None:
        load()
        # Until a round that has been asked for by now is at its end.
        for thread in threading.enumerate():
            if thread.name == "potluck-round":
                thread.join(30)

    monkeypatch.setattr(alone, "load_accumulators_into_averager_", slow)
    assert alone.step(timeout=0.1) is None and gradient(alone) == [3.0, 3.0]


def test_a_scheduled_round_of_gradients(local_dht: Callable[[], DHT]) -> None:
    one, two = (with_gradient(local_dht(), value, samples=1) for value in (1.0, 4.0))
    with pytest.raises(ValueError, match="weight is set by step"):
        one.schedule_step(weight=1.0)
    control = one.schedule_step(get_dht_time() + 0.2, timeout=60)
    assert not control.triggered and control.deadline is not None
    with pytest.raises(ValueError, match="given to schedule_step already"):
        one.step(control=control, gather=1)
    other = two.step(wait=False)
    assert isinstance(other, StepControl) and not control.done()
    assert one.step(weight=2.0, control=control, reset_accumulators=False) is not None
    assert other.result(30) is not None
    assert gradient(one) == gradient(two) == [2.0, 2.0], "(2 * 1 + 1 * 4) / 3"
    assert (one.local_samples_accumulated, two.local_samples_accumulated) == (1, 0)
    with pytest.raises(RuntimeError, match="triggered before"):
        one.step(control=control)
    ended = one.schedule_step(timeout=0.1)
    with pytest.raises(TimeoutError, match="never triggered"):
        ended.result(30)
    with pytest.raises(RuntimeError, match="has ended before"):
        one.step(control=ended)
    with pytest.raises(RuntimeError, match="has ended: the weight"):
        ended.weight = 1.0


def test_a_timeout_brings_the_end_of_a_scheduled_round_forward(local_dht: Callable[[], DHT]) -> None:
    one, _idle = (with_gradient(local_dht(), value) for value in (1.0, 4.0))
    begun = time.monotonic()
    assert one.step(control=one.schedule_step(), timeout=0.5) is None
    assert time.monotonic() - begun < 10


def test_given_tensors_hold_the_averaged_gradients(local_dht: Callable[[], DHT]) -> None:
    given = [[torch.full((1, 2), -100.0, dtype=torch.float64)] for _ in range(2)]
    peers = [
        with_gradient(local_dht(), value, averaged_grads=grads)
        for value, grads in zip((1.0, 3.0), given, strict=True)
    ]
    together(*(p.step for p in peers))
    assert [grads[0].tolist() for grads in given] == [[[2.0, 2.0]]] * 2
    assert gradient(peers[0]) == [2.0, 2.0]
    for wrong, match in (([torch.zeros(3)], r"\(1, 2\)"), ([torch.zeros(1, 2)] * 2, "1 tensors")):
        with pytest.raises(ValueError, match=match):
            with_gradient(local_dht(), 1.0, averaged_grads=wrong)
    nowhere = with_gradient(local_dht(), 5.0, averaged_grads=[])
    nowhere.step(timeout=0.1)
    assert gradient(nowhere) == [5.0, 5.0], "none given are those of its own"
