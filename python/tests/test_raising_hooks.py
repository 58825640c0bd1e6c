"""An error between an average and the end of its epoch, caught by the program: training goes on, and peers are equal."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import together
from test_optimizer import SGD, backward, batches, equal, make_model, plain, see_each_other

import potluck
from potluck.dht import DHT

POLICIES: dict[str, dict[str, Any]] = {
    "synchronous": {"delay_state_averaging": False},
    "delayed state": {"delay_state_averaging": True},
    "delayed step": {"delay_optimizer_step": True},
    "delayed gradients": {"delay_grad_averaging": True},
}
EPOCHS = 5
TARGET = 16


class OnceError(Exception):
    """What a hook raises, once, in the third epoch."""


def make(dht: DHT, model: torch.nn.Module, target: int, policy: str, where: str | None) -> potluck.Optimizer:
    offload = policy in ("delayed step", "delayed gradients")
    how = (
        {"optimizer": SGD, "params": model.parameters()}
        if offload
        else {"optimizer": SGD(model.parameters())}
    )
    opt = potluck.Optimizer(
        dht=dht, run_id="r", target_batch_size=target, batch_size_per_step=8, **how, **POLICIES[policy]
    )
    raised: list[bool] = []

    def hook(*_: Any) -> None:
        if opt.local_epoch == 2 and not raised:
            raised.append(True)
            raise OnceError

    if where is not None:
        getattr(opt, f"register_step_{where}_hook")(hook)
    return opt


def give(opt: potluck.Optimizer, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """One batch; how many errors the program caught."""
    try:
        opt.step(lambda: backward(model, x, y))
    except OnceError:
        return 1
    finally:
        opt.zero_grad()
    return 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("where", "who"),
    [("pre", (0,)), ("post", (0,)), ("post", (0, 1))],
    ids=["before", "behind", "both behind"],
)
def test_peers_go_on_and_are_equal(
    loopback_dht: Callable[..., DHT], policy: str, where: str, who: tuple[int, ...]
) -> None:
    models, data = [make_model(), make_model()], batches(1000, 8)
    opts = [
        make(loopback_dht(), model, TARGET, policy, where if peer in who else None)
        for peer, model in enumerate(models)
    ]
    see_each_other(opts)
    trained = threading.Barrier(2)
    in_step, lock, settled = [False, False], threading.Lock(), threading.Event()

    def may_step(index: int) -> bool:
        """Until nobody is in a step, the histories are equal, and the samples that are left make no round."""
        with lock:
            seen = [opt.status() for opt in opts]
            if (
                not in_step[1 - index]
                and seen[0]["lineage"] == seen[1]["lineage"]
                and sum(me["samples"] for status in seen for me in status["peers"] if me["is_me"]) < TARGET
            ):
                settled.set()
            in_step[index] = not settled.is_set()
            return in_step[index]

    def peer(index: int) -> int:
        opt, model, caught = opts[index], models[index], 0
        for x, y in itertools.cycle(data):
            if opt.local_epoch >= EPOCHS:
                break
            caught += give(opt, model, x, y)
            opt._session.changed(0.02)
        trained.wait(50)
        while may_step(index):
            opt._follow(0)
            with lock:
                in_step[index] = False
            opt._session.changed(0.05)
        return caught

    caught = together(lambda: peer(0), lambda: peer(1))
    assert caught == [int(0 in who), int(1 in who)]
    assert all(opt.local_epoch >= EPOCHS for opt in opts)
    for opt in opts:
        opt.shutdown()
    assert equal(*models)


@pytest.mark.parametrize("policy", ["synchronous", "delayed step", "delayed gradients"])
def test_alone_only_the_batch_of_the_error_is_missing(local_dht: Callable[[], DHT], policy: str) -> None:
    reference, model, data = make_model(), make_model(), batches(6, 8)
    plain(SGD, data[:2] + data[3:], reference)
    with make(local_dht(), model, 8, policy, "pre") as opt:
        caught = 0
        for count, (x, y) in enumerate(data, 1):
            caught += give(opt, model, x, y)
            # Until it was applied, or given up.
            while opt.local_epoch + caught < count:
                opt._session.changed(0.05)
                try:
                    opt._follow(0)
                except OnceError:
                    caught += 1
        assert caught == 1 and opt.local_epoch == 5
    assert equal(reference, model)


def test_the_next_step_works_after_ctrl_c_in_a_round(loopback_dht: Callable[..., DHT]) -> None:
    """Nothing was to be applied yet: the gathered gradients are those of the next try."""
    model, x, y = make_model(), *batches(1, 8)[0]
    reference = make_model()
    plain(SGD, [(x, y)], reference)
    with make(loopback_dht(), model, 8, "synchronous", None) as opt:
        session = opt._session

        class Interrupted:
            def __getattr__(self, name: str) -> Any:
                return getattr(session, name)

            def average_gradients(self, *_: Any) -> Any:
                opt._session = session
                raise KeyboardInterrupt

        opt._session = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            opt.step(lambda: backward(model, x, y))
        assert opt.local_epoch == 0 and opt._gradients.local_samples_accumulated == 8
        opt._follow(0)
        assert opt.local_epoch == 1
    assert equal(reference, model)


def test_ctrl_c_while_a_state_is_loaded(
    loopback_dht: Callable[..., DHT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it was replaced: nobody is told that the whole is here, and it is loaded again."""
    models, data = [make_model(), make_model()], batches(3, 8)
    with make(loopback_dht(), models[0], 8, "synchronous", None) as first:
        for x, y in data:
            give(first, models[0], x, y)
        second = make(loopback_dht(), models[1], 8, "synchronous", None)
        see_each_other([first, second])

        def interrupted(*_: Any) -> None:
            with torch.no_grad():
                next(models[1].parameters()).zero_()
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(second._codec, "restore", interrupted)
            with pytest.raises(KeyboardInterrupt):
                second.load_state_from_peers()
        lineages = [opt.status()["lineage"] for opt in (first, second)]
        assert lineages[0] != lineages[1] and second.local_epoch == 0
        second.load_state_from_peers()
        lineages = [opt.status()["lineage"] for opt in (first, second)]
        assert lineages[0] == lineages[1] and second.local_epoch == 3
        second.shutdown()
    assert equal(*models)
