"""The loss that a peer reports: an epoch's mean, without waiting for an accelerator in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optimizer import SGD, backward, batches, make_model

import potluck
from potluck.dht import DHT
from potluck.optim._losses import LossTally

READS: list[str] = []


class Far(torch.Tensor):
    """A tensor on an accelerator that is not there: it says so, and notes who waits for its values."""

    device = property(lambda _: torch.device("cuda"))  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__bool__", "__float__", "cpu", "item", "numpy", "tolist"):
            READS.append(func.__name__)
        # Nothing is moved: there is nowhere to go.
        if func.__name__ == "to":
            args = [arg for arg in args if not isinstance(arg, torch.device)]
        return super().__torch_function__(func, types, tuple(args), kwargs or {})


def far(value: float) -> torch.Tensor:
    return torch.tensor(value).as_subclass(Far)


@pytest.fixture(autouse=True)
def nothing_read() -> None:
    READS.clear()


def test_the_mean_is_that_of_the_epoch() -> None:
    tally = LossTally()
    assert tally.mean() is None
    assert (
        tally.add(1.0) and tally.add(torch.tensor(2.0)) and tally.add(torch.tensor(6.0, dtype=torch.bfloat16))
    )
    assert tally.mean() == 3.0
    tally.end_epoch()
    assert tally.mean() == 3.0, "until there is another one"
    tally.add(float("nan"))
    assert tally.mean() is None
    tally.add(torch.tensor(5.0, requires_grad=True) * 1)
    tally.add(float("inf"))
    assert tally.mean() == 5.0, "of those that are finite"
    with pytest.raises(RuntimeError):
        tally.add(torch.ones(2))


def test_one_loss_is_itself_to_the_bit() -> None:
    for value in (torch.tensor(0.1), torch.tensor(1 / 3, dtype=torch.float64), 0.1):
        tally = LossTally()
        tally.add(value)
        assert tally.mean() == float(value)


def test_an_accelerator_is_waited_for_once_an_epoch() -> None:
    tally = LossTally()
    for value in (1.0, 2.0, float("nan")):
        assert not tally.add(far(value))
    assert READS == []
    assert tally.mean() == tally.mean() == 1.5
    assert READS == ["tolist"]


@pytest.mark.parametrize("local", [False, True], ids=["gradients", "local updates"])
def test_what_everybody_sees_is_the_epochs_mean(local_dht: Callable[[], DHT], local: bool) -> None:
    model, data = make_model(), batches(4, 4)
    plateau = lambda inner: torch.optim.lr_scheduler.ReduceLROnPlateau(inner)  # noqa: E731
    with potluck.Optimizer(
        dht=local_dht(),
        run_id="r",
        target_batch_size=16,
        batch_size_per_step=4,
        optimizer=SGD(model.parameters()),
        scheduler=plateau,
        use_local_updates=local,
    ) as opt:
        shown = []
        for index, (x, y) in enumerate(data):
            backward(model, x, y)
            opt.report_loss(far(float(index)))
            assert READS == []
            opt.step()
            opt.zero_grad()
            shown.append(opt.status()["loss"])
            if index < 3:
                assert READS == []
        assert shown == [None, None, None, 1.5] and READS == ["tolist"]
        assert opt.scheduler.best == 1.5 and opt.local_epoch == 1
        opt.report_loss(7.0)
        opt._session.step(0)
        assert opt.status()["loss"] == 7.0, "a number is there at once"
