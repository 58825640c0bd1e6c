"""What an averager may be told when it is made, and whom it offers its tensors to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together

import potluck
from potluck.averaging import DecentralizedAverager
from potluck.compression import CompressionInfo, TensorRole
from potluck.dht import DHT
from potluck.optim import GradientAverager, TrainingStateAverager

HALF = potluck.Float16Compression()
# No power of two is near it.
ODD = 1.0 + 2.0**-20


def averager(dht: DHT, value: float, **options: Any) -> DecentralizedAverager:
    return DecentralizedAverager([torch.full((2,), value)], dht, prefix="o", start=True, **options)


def values(*peers: DecentralizedAverager) -> list[list[float]]:
    return [peer._tensors[0].tolist() for peer in peers]


def test_alpha_is_how_far_towards_the_mean(local_dht: Callable[[], DHT]) -> None:
    peers = [averager(local_dht(), value, averaging_alpha=0.25) for value in (1.0, 5.0)]
    together(*(p.step for p in peers))
    assert values(*peers) == [[1.5, 1.5], [4.5, 4.5]]
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="averaging_alpha"):
            averager(local_dht(), 1.0, averaging_alpha=wrong)
    # Wherever the tensors are: the mean comes in host memory.
    peers[0]._tensors = [torch.empty(2, device="meta")]
    peers[0]._use(peers[0]._flat.buffer)


def test_an_auxiliary_peer_helps_and_keeps_its_tensors(loopback_dht: Callable[..., DHT]) -> None:
    one, two = (averager(loopback_dht(), value) for value in (1.0, 3.0))
    helper = averager(loopback_dht(), -50.0, auxiliary=True)
    assert not helper.allow_state_sharing
    results = together(*(partial(p.step, timeout=30) for p in (one, two, helper)))
    assert None not in results and {one.peer_id, two.peer_id} <= set(results[2])
    assert values(one, two, helper) == [[2.0, 2.0], [2.0, 2.0], [-50.0, -50.0]]
    with pytest.raises(ValueError, match="no state to share"):
        helper.allow_state_sharing = True
    with pytest.raises(ValueError, match="no state to share"):
        averager(loopback_dht(), 1.0, auxiliary=True, allow_state_sharing=True)


def test_a_peer_that_only_dials_out_is_a_member(loopback_dht: Callable[..., DHT]) -> None:
    one, other = averager(loopback_dht(), 1.0), averager(loopback_dht(client_mode=True), 3.0)
    assert (other.client_mode, other.allow_state_sharing, one.allow_state_sharing) == (True, False, True)
    assert None not in together(*(partial(p.step, timeout=30) for p in (one, other)))
    assert values(one, other) == [[2.0, 2.0]] * 2
    for options in (
        {"client_mode": True, "allow_state_sharing": True},
        {"client_mode": True, "auxiliary": True},
    ):
        with pytest.raises(ValueError, match="client"):
            averager(loopback_dht(), 1.0, **options)
    with pytest.raises(ValueError, match="cannot be reached"):
        other.allow_state_sharing = True


@pytest.mark.parametrize("shares", [False, True])
def test_what_is_not_shared_is_not_loaded(local_dht: Callable[[], DHT], shares: bool) -> None:
    peers = [averager(local_dht(), value, allow_state_sharing=False) for value in (1.0, 3.0)]
    together(*(p.step for p in peers))
    for peer in peers:
        peer.allow_state_sharing = shares
    newcomer = averager(local_dht(), 7.0)
    assert (newcomer.load_state_from_peers(timeout=5) is not None) is shares
    assert values(newcomer) == ([[2.0, 2.0]] if shares else [[7.0, 7.0]])


def test_loading_ends_at_its_timeout(local_dht: Callable[[], DHT]) -> None:
    ahead, newcomer = averager(local_dht(), 1.0), averager(local_dht(), 7.0)
    ahead.session.epoch_done(None)
    ahead.session.epoch_done(None)
    begun = time.monotonic()
    assert newcomer.load_state_from_peers(timeout=0.5) is None and time.monotonic() - begun < 10


def test_a_newcomer_gets_a_compressed_state_where_told_so(local_dht: Callable[[], DHT]) -> None:
    loaded = []
    for prefix, compression in (("plain", potluck.NoCompression()), ("half", HALF)):
        make = partial(DecentralizedAverager, prefix=prefix, start=True, state_compression=compression)
        peers = [make([torch.full((2,), ODD)], local_dht()) for _ in range(2)]
        together(*(p.step for p in peers))
        newcomer = make([torch.zeros(2)], local_dht())
        assert newcomer.load_state_from_peers(timeout=30) is not None
        loaded += values(newcomer)
    assert loaded == [[ODD, ODD], [1.0, 1.0]]


def test_the_compression_is_of_the_tensors_it_names(local_dht: Callable[[], DHT]) -> None:
    def make() -> DecentralizedAverager:
        tensors = [torch.full((64,), ODD), torch.full((64,), ODD)]
        infos = [
            CompressionInfo.from_tensor(t, key=k, role=TensorRole.PARAMETER)
            for t, k in zip(tensors, "ab", strict=True)
        ]
        rule = potluck.PerTensorCompression({"b": HALF})
        return DecentralizedAverager(
            tensors,
            local_dht(),
            prefix="o",
            start=True,
            tensor_infos=infos,
            compression=rule,
            state_compression=rule,
        )

    peers = [make(), make()]
    together(*(p.step for p in peers))
    newcomer = make()
    assert newcomer.load_state_from_peers(timeout=30) is not None
    assert [t[0].item() for t in newcomer._tensors] == [ODD, 1.0]


def gradient_averager(dht: DHT, **options: Any) -> GradientAverager:
    return GradientAverager(torch.nn.Linear(2, 1).parameters(), dht=dht, prefix="g", start=False, **options)


def state_averager(dht: DHT, **options: Any) -> TrainingStateAverager:
    inner = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
    return TrainingStateAverager(dht=dht, optimizer=inner, prefix="s", start=False, **options)


@pytest.mark.parametrize(
    ("make", "argument", "keys"),
    [
        (partial(averager, value=1.0), "compression", "0"),
        (partial(averager, value=1.0), "state_compression", "0"),
        (gradient_averager, "compression", "0, 1"),
        (state_averager, "compression", "0, 1"),
        (state_averager, "state_compression", "param.000000, param.000001"),
    ],
)
def test_a_rule_for_a_tensor_that_does_not_exist_is_an_error(
    local_dht: Callable[[], DHT], make: Callable[..., Any], argument: str, keys: str
) -> None:
    rule = potluck.RoleAdaptiveCompression(default=potluck.PerTensorCompression({"weigth": HALF}))
    said = f"^{argument}: PerTensorCompression names 'weigth' .* keys are {re.escape(keys)}$"
    with pytest.raises(ValueError, match=said):
        make(local_dht(), **{argument: rule})
    names = {"param.000001": HALF, "exp_avg.000000": HALF} if "param" in keys else {"0": HALF}
    make(local_dht(), **{argument: potluck.PerTensorCompression(names)})
    with pytest.raises(ValueError, match=r"names 'exp_avg\.000002'"):
        make(local_dht(), **{argument: potluck.PerTensorCompression({"exp_avg.000002": HALF})})


@pytest.mark.parametrize(
    ("option", "useless", "default"),
    [
        ("bandwidth", 0.0, None),
        ("target_group_size", 4, None),
        ("min_vector_size", 10, 0),
        ("initial_group_bits", "01", ""),
        ("part_size_bytes", 1000, 2**19),
        ("daemon", False, True),
    ],
)
def test_options_that_cannot_have_an_effect_say_why(
    local_dht: Callable[[], DHT], option: str, useless: Any, default: Any
) -> None:
    with pytest.raises(ValueError, match=f"{option}=.* cannot have an effect: potluck"):
        averager(local_dht(), 1.0, **{option: useless})
    averager(local_dht(), 1.0, **{option: default}).shutdown()


# Who comes late.


@pytest.mark.parametrize("kind", ["local_dht", "loopback_dht"])
def test_a_late_peer_is_in_the_next_round_and_holds_up_nobody(
    kind: str, request: pytest.FixtureRequest
) -> None:
    make = request.getfixturevalue(kind)
    running = [averager(make(), value) for value in (1.0, 3.0)]
    stop, sizes, longest = threading.Event(), [[], []], [0.0, 0.0]  # type: ignore[var-annotated]

    def train(index: int) -> None:
        while not stop.is_set() and len(sizes[index]) < 2000:
            begun = time.monotonic()
            result = running[index].step(timeout=30)
            longest[index] = max(longest[index], time.monotonic() - begun)
            sizes[index].append(0 if result is None else len(result))
            time.sleep(0.02)  # What else a peer does between rounds.

    def come_late() -> tuple[Any, list[Any], int]:
        try:
            while min(map(len, sizes)) < 5:
                time.sleep(0.01)
            late = averager(make(), -7.0)
            loaded = late.load_state_from_peers(timeout=30)
            rounds = [late.step(timeout=30) for _ in range(5)]
            return loaded, rounds, late.session.epoch
        finally:
            stop.set()

    *_, (loaded, rounds, epoch) = together(partial(train, 0), partial(train, 1), come_late)
    assert loaded is not None and loaded[1][0].tolist() == [2.0, 2.0], "what the others have"
    assert None not in rounds, "it is in a round each time"
    full = [len(result) == 3 for result in rounds]
    # The hub waits for those who have said that they are at the epoch, and two may say so before the third.
    assert all(full) if kind == "loopback_dht" else any(full), "with everybody else"
    assert epoch >= 10 and max(longest) < 15, longest
    assert 0 not in sizes[0][:-1] and 0 not in sizes[1][:-1], "no round of the others failed"
