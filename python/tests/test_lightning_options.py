"""What a Trainer and the options of the optimizer mean together."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest
import test_lightning_strategy
import torch
from conftest import together
from lightning_support import QUIET, equal, loader, model_class, regression, trainer, weights
from test_lightning_strategy import fit, networked, strategy

import potluck
from potluck import _core
from potluck.dht import DHT

lightning, local = test_lightning_strategy.lightning, test_lightning_strategy.local
shut_down = test_lightning_strategy.shut_down

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

BESIDE = {"offload_optimizer": True, "delay_optimizer_step": True}


def test_checkpoints_beside_a_delayed_step_are_whole(lightning: Any, tmp_path: Path) -> None:
    weights: dict[int, list[torch.Tensor]] = {}

    class Watched(model_class(lightning)):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()

            def note(inner: torch.optim.Optimizer, *_: Any) -> None:
                parameters = inner.param_groups[0]["params"]
                step = int(inner.state[parameters[0]]["step"])
                weights[step] = [p.detach().clone() for p in parameters]

            optimizer.register_step_post_hook(note)
            return optimizer

    saver = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1)
    driver = trainer(
        lightning, strategy(**BESIDE), max_epochs=1, callbacks=[saver], enable_checkpointing=True
    )
    driver.fit(Watched(), loader())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 8
    epochs = []
    for file in files:
        saved = torch.load(file, weights_only=False)
        (optimizer,) = saved["optimizer_states"]
        epoch = optimizer["local_epoch"]
        assert all(int(state["step"]) == epoch for state in optimizer["state"].values())
        for mine, theirs in zip(saved["state_dict"].values(), weights[epoch], strict=True):
            assert torch.equal(mine, theirs)
        epochs.append(epoch)
    assert sorted(epochs) == list(range(1, 9))


def fp16(pl: Any, **scaling: Any) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", **scaling)
    return {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("options", [{}, {"offload_optimizer": True}], ids=["in place", "offload"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_users_scaler_works_and_is_kept(lightning: Any, options: dict[str, Any], clip: Any) -> None:
    ended, scales = [], []
    for chosen in (strategy(**options), "auto"):
        # It grows with every second step, and starts where the first ones overflow.
        precision = fp16(lightning, init_scale=2.0**60, growth_interval=2)
        module, driver = fit(lightning, chosen, max_epochs=6, gradient_clip_val=clip, **precision)
        ended.append(weights(module))
        scales.append(driver.precision_plugin.scaler.get_scale())
    assert equal(*ended)
    assert scales[0] == scales[1] and 2.0**10 < scales[0] < 2.0**60
    assert not equal(ended[0], weights(model_class(lightning)()))


def test_a_scaler_and_reused_buffers_are_refused(lightning: Any) -> None:
    with pytest.raises(ValueError, match="cannot work with 16-mixed"):
        fit(lightning, strategy(reuse_grad_buffers=True), **fp16(lightning))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("options", [{}, {"reuse_grad_buffers": True}], ids=str)
def test_a_skipped_batch_has_no_samples(lightning: Any, options: dict[str, Any]) -> None:
    class Skipping(model_class(lightning)):
        skips = staticmethod(lambda index: index % 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.skips(batch_idx) else super().training_step(batch, batch_idx)

    together, alone = Skipping(), Skipping()
    trainer(lightning, strategy(target_batch_size=16, **options), max_epochs=1).fit(together, loader())
    alone.skips = lambda _: False
    every_other = torch.utils.data.Subset(regression(), [i for i in range(64) if i // 8 % 2 == 0])
    data = torch.utils.data.DataLoader(every_other, batch_size=8)
    trainer(lightning, "auto", max_epochs=1, accumulate_grad_batches=2).fit(alone, data)
    torch.testing.assert_close(weights(together), weights(alone), rtol=1e-5, atol=1e-6)


def test_two_peers_clip_their_average(lightning: Any) -> None:
    """Each batch clipped by itself would give another mean. SGD, as Adam hardly sees the length of a gradient."""

    class Plain(model_class(lightning)):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class InStep(lightning.Callback):  # type: ignore[name-defined]
        """One batch of each peer is an epoch."""

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            while trainer.strategy.num_peers < 2:
                trainer.strategy._optimizer._session.changed(0.05)
                trainer.strategy._optimizer._follow(0)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            while trainer.strategy.local_epoch <= index:
                trainer.strategy._optimizer._session.changed(0.05)
                trainer.strategy._optimizer._follow(0)

    hub, data = _core.Hub(), regression()
    # Not in the threads, which share torch's random numbers.
    made = [Plain(), Plain()]
    settings = {"max_epochs": 1, "gradient_clip_val": 0.1}

    def peer(index: int) -> Any:
        part = torch.utils.data.Subset(data, [i for i in range(64) if i % 16 // 8 == index])
        dht, module = DHT.within_process(hub), made[index]
        chosen = strategy(target_batch_size=16, dht=dht, shuffle_differently=False)
        driver = trainer(lightning, chosen, callbacks=[InStep()], **settings)
        driver.fit(module, torch.utils.data.DataLoader(part, batch_size=8))
        dht.shutdown()
        return module

    modules = together(lambda: peer(0), lambda: peer(1))
    whole = Plain()
    trainer(lightning, "auto", **settings).fit(whole, loader(16))
    assert equal(*map(weights, modules))
    torch.testing.assert_close(weights(modules[0]), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_true_precision_equals_plain_lightning(lightning: Any, precision: str, clip: Any) -> None:
    ended = [
        weights(fit(lightning, chosen, precision=precision, gradient_clip_val=clip)[0])
        for chosen in (strategy(), "auto")
    ]
    assert ended[0][0].dtype == (torch.float64 if precision == "64-true" else torch.bfloat16)
    assert equal(*ended)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_an_offloaded_optimizer_resumes(lightning: Any, clip: Any, tmp_path: Path) -> None:
    options = {"offload_optimizer": True}
    whole, _ = fit(lightning, "auto", max_epochs=4, gradient_clip_val=clip)
    _, driver = fit(lightning, strategy(**options), gradient_clip_val=clip)
    driver.save_checkpoint(tmp_path / "half.ckpt")
    second = model_class(lightning)()
    driver = trainer(lightning, strategy(**options), max_epochs=4, gradient_clip_val=clip)
    driver.fit(second, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert driver.strategy.local_epoch == 32
    assert equal(weights(second), weights(whole))


def samples_in_order(lightning: Any, chosen: Any) -> list[float]:
    """In which order it trains, with the seed that everybody has."""

    class Noting(model_class(lightning)):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.extend(batch[0][:, 0].tolist())
            return super().training_step(batch, batch_idx)

    seen: list[float] = []
    module, driver = Noting(), trainer(lightning, chosen, max_epochs=1)
    torch.manual_seed(7)
    driver.fit(module, loader(shuffle=True))
    return seen


def test_who_joins_shuffles_in_an_order_of_its_own(lightning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # There is nobody to hear of: the door to the network does not train.
    monkeypatch.setattr("potluck.optim.optimizer._HEARING_SECONDS", 0.0)
    door = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
    try:
        plain = samples_in_order(lightning, "auto")
        first, told, joined, other, told_not = (
            samples_in_order(lightning, chosen)
            for chosen in (
                strategy(),
                strategy(shuffle_differently=True),
                networked(token=door.token("r")),
                networked(token=door.token("r")),
                networked(token=door.token("r"), shuffle_differently=False),
            )
        )
    finally:
        door.shutdown()
    assert first == told_not == plain != loader().dataset[:][0][:, 0].tolist()
    own = [plain, told, joined, other]
    assert all(sorted(order) == sorted(plain) for order in own), "everything once"
    assert len(set(map(tuple, own))) == 4


def test_who_stops_early_leaves_and_the_others_go_on(lightning: Any) -> None:
    class Meet(lightning.Callback):  # type: ignore[name-defined]
        """Begins when both are there."""

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            while trainer.strategy.num_peers < 2:
                trainer.strategy._optimizer._session.changed(0.05)
                trainer.strategy._optimizer._follow(0)

    class UntilAlone(Meet):
        """Trains until the other one has left, and some epochs more."""

        last: int | None = None

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if self.last is None and trainer.strategy.num_peers == 1:
                self.last = trainer.strategy.local_epoch + 3
            trainer.should_stop = self.last is not None and trainer.strategy.local_epoch >= self.last

    hub, alone = _core.Hub(), UntilAlone()
    stopper = lightning.callbacks.EarlyStopping("val", patience=0, min_delta=1e9)
    modules = [model_class(lightning)() for _ in range(2)]

    def peer(index: int, validation: Any, max_epochs: int, *callbacks: Any) -> Any:
        dht = DHT.within_process(hub)
        chosen = strategy(target_batch_size=16, dht=dht)
        driver = trainer(lightning, chosen, max_epochs=max_epochs, callbacks=list(callbacks))
        driver.fit(modules[index], loader(), validation)
        dht.shutdown()
        return driver

    stopped, _ = together(
        lambda: peer(0, loader(), 1000, Meet(), stopper), lambda: peer(1, None, -1, alone), timeout=100
    )
    assert stopped.current_epoch == 2, "one without an improvement was enough"
    assert alone.last is not None


def test_the_dashboard_is_there_while_it_trains(lightning: Any) -> None:
    pages: dict[str, str] = {}

    class Look(lightning.Callback):  # type: ignore[name-defined]
        def on_train_end(self, trainer: Any, *_: Any) -> None:
            url = trainer.strategy._optimizer.dashboard_url
            for path in ("", "metrics"):
                pages[url + path] = urllib.request.urlopen(url + path, timeout=30).read().decode()

    fit(lightning, strategy(dashboard=True), callbacks=[Look()])
    page, metrics = pages.values()
    assert "potluck" in page and "potluck_" in metrics
    for url in pages:
        with pytest.raises(OSError):
            urllib.request.urlopen(url, timeout=5)


def test_each_argument_arrives_where_it_belongs(
    lightning: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for_the_dht = {
        "wait_timeout": 4.0,
        "bootstrap_timeout": 3.0,
        "use_auto_relay": True,
        "identity_path": str(tmp_path / "peer.key"),
        "announce_maddrs": ["/ip4/127.0.0.1/tcp/4001"],
        "client_mode": False,
    }
    for_the_optimizer = {
        "matchmaking_time": 7.0,
        "averaging_timeout": 20.0,
        "averager_opts": {"request_timeout": 1.0},
        "tracker_opts": {"min_refresh_period": 1.0},
        "delay_state_averaging": True,
        "average_state_every": 3,
        "verbose": True,
        "run_id": "named",
        "grad_compression": potluck.Float16Compression(),
    }
    given: dict[str, dict[str, Any]] = {}
    optimizer, within_process = potluck.Optimizer, DHT.within_process

    def make_dht(**kwargs: Any) -> DHT:
        given["dht"] = kwargs
        return within_process(_core.Hub())

    def make_optimizer(**kwargs: Any) -> potluck.Optimizer:
        given["optimizer"] = kwargs
        return optimizer(**kwargs)

    monkeypatch.setattr(potluck, "DHT", make_dht)
    chosen = networked(**for_the_dht, **for_the_optimizer)
    monkeypatch.setattr(potluck, "Optimizer", make_optimizer)
    fit(lightning, chosen, max_epochs=1)
    wanted = {**for_the_dht, "start": True, "initial_peers": None, "host_maddrs": ["/ip4/127.0.0.1/tcp/0"]}
    assert given["dht"] == wanted
    assert for_the_optimizer == {name: given["optimizer"][name] for name in for_the_optimizer}
    with pytest.raises(ValueError, match="use_ipfs=True cannot have an effect"):
        monkeypatch.setattr(potluck, "DHT", DHT)
        networked(use_ipfs=True)


def test_local_updates_step_with_every_batch_as_plain_lightning_alone(lightning: Any) -> None:
    ended = []
    for chosen in (strategy(use_local_updates=True, target_batch_size=16), "auto"):
        module, _ = fit(lightning, chosen, max_epochs=2)
        ended.append(weights(module))
    assert equal(*ended)
