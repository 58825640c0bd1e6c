"""Peers that would silently compute something else are refused, and told by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optimizer import SGD, make_model

import potluck
from potluck.dht import DHT


def join(
    dht: DHT, make: Callable[..., torch.optim.Optimizer], params: Any, **options: Any
) -> potluck.Optimizer:
    return potluck.Optimizer(
        dht=dht, run_id="r", target_batch_size=16, optimizer=make, params=params, **options
    )


def refused(loopback_dht: Callable[..., DHT], match: str, make: Any, first: Any, second: Any) -> None:
    with (
        join(loopback_dht(), make, first),
        pytest.raises(ValueError, match=f"configured differently: the manifests differ: {match}"),
    ):
        join(loopback_dht(), make, second)


def groups(*sizes: int, frozen: int | None = None) -> list[dict[str, Any]]:
    """The parameters of a model in groups of so many."""
    rest = list(make_model().parameters())
    if frozen is not None:
        rest[frozen].requires_grad_(False)
    split = []
    for size in sizes:
        split.append({"params": rest[:size]})
        rest = rest[size:]
    assert not rest
    return split


def test_another_split_into_groups(loopback_dht: Callable[..., DHT]) -> None:
    """The vectors are the same, and what each group's settings are for is not."""
    field = r'extra.parameter_groups: "1 of 4 parameters, \w{16}" and "2 of 2, 2 parameters, \w{16}"$'
    refused(loopback_dht, field, SGD, groups(4), groups(2, 2))
    refused(
        loopback_dht,
        'extra.parameter_groups: "2 of 1, 3 [^;]*of 2, 2 [^;]*$',
        SGD,
        groups(1, 3),
        groups(2, 2),
    )


def test_many_groups_are_one_short_line(local_dht: Callable[[], DHT]) -> None:
    many = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(500)]
    with join(local_dht(), SGD, many) as opt:
        text = opt._inner.groups_text()
    assert text.startswith("500 of 1, 1, 1, 1, 1, 1, 1, 1, … parameters, ") and len(text) < 80
    with join(
        local_dht(), SGD, [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(500)]
    ) as opt:
        assert opt._inner.groups_text() == text, "of shapes, not of values or objects"


def test_another_parameter_frozen_in_the_same_place(loopback_dht: Callable[..., DHT]) -> None:
    """Two of one shape: which of them trains shows in nothing else."""

    def pair(frozen: int) -> list[dict[str, Any]]:
        both = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
        both[frozen].requires_grad_(False)
        return [{"params": both}]

    refused(loopback_dht, r'extra.parameter_groups: "1 of 2 [^;]*$', SGD, pair(0), pair(1))


def test_the_same_groups_on_copies_or_not_are_the_same(loopback_dht: Callable[..., DHT]) -> None:
    with (
        join(loopback_dht(), SGD, groups(2, 2, frozen=1), offload_optimizer=True),
        join(loopback_dht(), SGD, groups(2, 2, frozen=1), offload_optimizer=False) as second,
    ):
        assert len(second.param_groups) == 2


def test_another_layout_of_the_vector(loopback_dht: Callable[..., DHT]) -> None:
    """Of a version that does not say what was touched: what they would add up is not the same."""
    with pytest.MonkeyPatch.context() as patch:
        infos = potluck.Optimizer._tensor_infos
        patch.setattr(
            potluck.Optimizer,
            "_tensor_infos",
            lambda self: ([i for i in infos(self)[0] if i["key"] != "touched"], infos(self)[1]),
        )
        old = join(loopback_dht(), SGD, make_model().parameters())
    with (
        old,
        pytest.raises(ValueError, match=r'differ: gradients: "4 tensors, 58 [^;]*and "5 tensors, 62 [^;]*$'),
    ):
        join(loopback_dht(), SGD, make_model().parameters())
