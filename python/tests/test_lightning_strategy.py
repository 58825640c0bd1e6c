"""One Lightning peer equals plain Lightning, bit for bit, with everything that a Trainer can be asked to do."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_support import PACKAGES, QUIET, equal, loader, model_class, package, trainer, weights

from potluck import _core
from potluck.dht import DHT
from potluck.lightning import HivemindStrategy

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POTLUCK_TOKEN", "INITIAL_PEERS", "PL_INITIAL_PEERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> Any:
    return package(request.param)


@pytest.fixture
def lightning() -> Any:
    return package(PACKAGES[0])


_made: list[DHT] = []


@pytest.fixture(autouse=True)
def shut_down() -> Any:
    yield
    while _made:
        _made.pop().shutdown()


def strategy(**kwargs: Any) -> HivemindStrategy:
    """A peer of this process that steps after every batch of 8."""
    if "dht" not in kwargs:
        _made.append(DHT.within_process(_core.Hub()))
        kwargs["dht"] = _made[-1]
    return HivemindStrategy(**{"target_batch_size": 8, **kwargs})


def networked(**kwargs: Any) -> HivemindStrategy:
    """A peer with sockets, on loopback only."""
    return HivemindStrategy(**{"target_batch_size": 8, "host_maddrs": ["/ip4/127.0.0.1/tcp/0"], **kwargs})


def fit(pl: Any, chosen: Any, model_arguments: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Train a fresh model; the module and its Trainer."""
    module = model_class(pl)(**(model_arguments or {}))
    driver = trainer(pl, chosen, **kwargs)
    driver.fit(module, loader(), loader())
    return module, driver


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def chained(optimizer: torch.optim.Optimizer) -> Any:
    schedulers = torch.optim.lr_scheduler
    warmup = schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.ExponentialLR(optimizer, 0.9)], [4])


def fp16(pl: Any) -> dict[str, Any]:
    """Mixed precision with the stock scaler on the CPU, where the Trainer's own argument falls back to bf16."""
    return {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu")]}


CASES = {
    "plain": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed with the stock scaler": {"fp16": True},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "16-mixed and clipping": {"fp16": True, "gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_alone_equals_plain_lightning(pl: Any, case: str) -> None:
    ended = []
    for chosen in (strategy(), "auto"):
        settings = dict(CASES[case])
        extra = fp16(pl) if settings.pop("fp16", False) else {}
        module, driver = fit(pl, chosen, **settings, **extra)
        assert bool(getattr(driver.precision_plugin, "scaler", None)) == bool(extra)
        ended.append(module)
    together, alone = ended
    assert equal(weights(together), weights(alone))


def test_accumulation_equals_plain_lightning(lightning: Any) -> None:
    together, driver = fit(lightning, strategy(target_batch_size=32), accumulate_grad_batches=4)
    alone, _ = fit(lightning, "auto", accumulate_grad_batches=4)
    assert equal(weights(together), weights(alone))
    assert driver.strategy.local_epoch == 4


@pytest.mark.parametrize("make", [step_lr, chained])
def test_schedulers_count_shared_epochs(pl: Any, make: Any) -> None:
    together, _ = fit(pl, strategy(), {"make_scheduler": make})
    alone, _ = fit(pl, "auto", {"make_scheduler": make})
    assert together.rates == alone.rates
    assert len(set(together.rates)) > 2
    assert equal(weights(together), weights(alone))


def test_a_scheduler_stands_still_between_shared_epochs(lightning: Any) -> None:
    together, _ = fit(lightning, strategy(target_batch_size=32), {"make_scheduler": step_lr})
    # 16 batches of 8 are 4 shared epochs; the rate halves after 3 of them.
    assert together.rates == [0.05] * 12 + [0.025] * 4


@pytest.mark.parametrize("config", [{}, {"interval": "epoch"}, {"interval": "step", "frequency": 3}], ids=str)
def test_a_scheduler_counts_shared_epochs_whatever_its_interval(
    lightning: Any, config: dict[str, Any]
) -> None:
    class Configured(model_class(lightning)):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step_lr(optimizer), **config}}

    module = Configured()
    trainer(lightning, strategy(target_batch_size=32)).fit(module, loader())
    assert module.rates == [0.05] * 12 + [0.025] * 4


def test_scheduler_fn(lightning: Any) -> None:
    together, _driver = fit(lightning, strategy(scheduler_fn=step_lr))
    alone, _ = fit(lightning, "auto", {"make_scheduler": step_lr})
    assert together.rates == alone.rates
    with pytest.raises(ValueError, match="either scheduler_fn= or a scheduler"):
        fit(lightning, strategy(scheduler_fn=step_lr), {"make_scheduler": step_lr})


def test_reduce_on_plateau(lightning: Any) -> None:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)

    arguments = {"make_scheduler": make, "monitor": "val"}
    together, _ = fit(lightning, strategy(), arguments, max_epochs=6)
    alone, _ = fit(lightning, "auto", arguments, max_epochs=6)
    assert together.rates == alone.rates
    assert together.rates[-1] < together.rates[0]


@pytest.mark.parametrize("make", [None, step_lr, chained])
def test_resuming_equals_never_having_stopped(pl: Any, make: Any, tmp_path: Path) -> None:
    arguments = {"make_scheduler": make}
    whole, _ = fit(pl, "auto", arguments, max_epochs=4)
    first, driver = fit(pl, strategy(), arguments, max_epochs=2)
    assert driver.strategy.local_epoch == 16
    driver.save_checkpoint(tmp_path / "half.ckpt")
    second = model_class(pl)(**arguments)
    driver = trainer(pl, strategy(), max_epochs=4)
    driver.fit(second, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert driver.strategy.local_epoch == 32
    assert first.rates + second.rates == whole.rates
    assert equal(weights(second), weights(whole))


def test_a_checkpoint_opens_in_plain_lightning(lightning: Any, tmp_path: Path) -> None:
    _, driver = fit(lightning, strategy(), max_epochs=1)
    driver.save_checkpoint(tmp_path / "potluck.ckpt")
    module = model_class(lightning)()
    plain = trainer(lightning, "auto", max_epochs=2)
    plain.fit(module, loader(), loader(), ckpt_path=tmp_path / "potluck.ckpt")
    whole, _ = fit(lightning, "auto", max_epochs=2)
    assert equal(weights(module), weights(whole))


def test_callbacks_loggers_and_early_stopping(lightning: Any, tmp_path: Path) -> None:
    callbacks = lightning.callbacks
    saver = callbacks.ModelCheckpoint(dirpath=tmp_path / "kept", monitor="val", save_last=True)
    stopper = callbacks.EarlyStopping("val", patience=0, min_delta=1e9)
    rates = callbacks.LearningRateMonitor()
    logger = lightning.loggers.CSVLogger(tmp_path)
    _, driver = fit(
        lightning,
        strategy(),
        {"make_scheduler": step_lr},
        max_epochs=9,
        callbacks=[saver, stopper, rates],
        logger=logger,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    assert driver.current_epoch == 2
    assert (tmp_path / "kept" / "last.ckpt").exists() and Path(saver.best_model_path).exists()
    metrics = next(tmp_path.glob("lightning_logs/*/metrics.csv")).read_text()
    assert "lr-AdamW" in metrics and "val" in metrics


def test_validation_and_prediction_need_no_run(lightning: Any) -> None:
    module, driver = fit(lightning, strategy())
    assert driver.strategy._roster is None and driver.strategy.status is None
    with torch.no_grad():
        errors = [float(module.error(batch)) for batch in loader()]
        outputs = [module.net(x) for x, _ in loader()]
    (found,) = driver.validate(module, loader(), verbose=False)
    assert found["val"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    module.predict_step = lambda batch, *_: module.net(batch[0])
    predicted = driver.predict(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(predicted, outputs, strict=True))
    assert driver.is_global_zero and driver.strategy.status is None


def test_the_batch_size_is_read_off_every_batch(lightning: Any) -> None:
    # 64 samples in batches of 12 end with one of 4; two passes are 128 samples and 2 shared epochs of 64.
    module = model_class(lightning)()
    driver = trainer(lightning, strategy(target_batch_size=64), max_epochs=2)
    driver.fit(module, loader(12))
    assert driver.strategy.local_epoch == 2


def test_batch_size_can_be_given(lightning: Any) -> None:
    module = model_class(lightning)()
    driver = trainer(lightning, strategy(target_batch_size=64, batch_size=32), max_epochs=1)
    driver.fit(module, loader(8))
    assert driver.strategy.local_epoch == 4


def test_reusing_gradient_buffers(lightning: Any) -> None:
    together, _driver = fit(lightning, strategy(target_batch_size=32, reuse_grad_buffers=True))
    alone, _ = fit(lightning, "auto", accumulate_grad_batches=4)
    torch.testing.assert_close(weights(together), weights(alone), rtol=1e-5, atol=1e-6)
    assert "optimizer_zero_grad" not in vars(together)


@pytest.mark.parametrize(
    "options",
    [
        {"delay_state_averaging": True},
        {"offload_optimizer": True},
        {"offload_optimizer": True, "delay_optimizer_step": True},
        {"offload_optimizer": True, "delay_optimizer_step": True, "delay_grad_averaging": True},
    ],
    ids=str,
)
def test_work_beside_the_training(lightning: Any, options: dict[str, Any]) -> None:
    def slow(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 40, 0.5)

    class UntilTrained(lightning.Callback):  # type: ignore[name-defined]
        """How many batches one shared epoch takes depends on the machine here, so shared epochs are counted."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.strategy.local_epoch >= 60
            assert {name: getattr(trainer.strategy._optimizer, name) for name in options} == options

    module, _ = fit(
        lightning,
        strategy(**options),
        {"make_scheduler": slow},
        max_epochs=1000,
        callbacks=[UntilTrained()],
    )
    start = model_class(lightning)()
    with torch.no_grad():
        before = float(sum(start.error(batch) for batch in loader()))
        after = float(sum(module.error(batch) for batch in loader()))
    assert after < 0.5 * before
    assert module.rates[-1] < module.rates[0]


def test_manual_optimization(lightning: Any) -> None:
    class Manual(model_class(lightning)):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.error(batch))
            optimizer.step()

    module = Manual()
    trainer(lightning, strategy()).fit(module, loader())
    alone, _ = fit(lightning, "auto")
    assert equal(weights(module), weights(alone))


def test_frozen_parameters_and_groups(lightning: Any) -> None:
    class Grouped(model_class(lightning)):
        def configure_optimizers(self) -> Any:
            self.net[0].bias.requires_grad_(False)
            return torch.optim.AdamW(
                [{"params": self.net[0].weight, "lr": 0.01}, {"params": self.net[2].parameters()}], lr=0.05
            )

    ended = []
    for chosen in (strategy(), "auto"):
        module = Grouped()
        trainer(lightning, chosen).fit(module, loader())
        ended.append(weights(module))
    assert equal(*ended)


REFUSED = {
    "two devices": (lambda pl: trainer(pl, strategy(), devices=2), "devices=1"),
    "two nodes": (lambda pl: trainer(pl, strategy(), num_nodes=2), "once on every machine"),
    "sync_batchnorm": (lambda pl: trainer(pl, strategy(), sync_batchnorm=True), "lock-step"),
    "no batch": (lambda pl: strategy(target_batch_size=0), "above 0"),
    "a fraction": (lambda pl: strategy(batch_size=2.5), "whole number"),
    "a token beside a DHT": (lambda pl: strategy(dht=object(), token="abc"), "beside dht="),
    "an unknown argument": (lambda pl: strategy(grad_compresion=None), "grad_compresion"),
    "a schedule": (lambda pl: strategy(scheduler=step_lr), "use scheduler_fn="),
    "samples by another name": (lambda pl: strategy(batch_size_per_step=8), "use batch_size="),
    "a peer without gradients": (lambda pl: strategy(auxiliary=True), "potluck keeper"),
    "averages beside, steps not": (
        lambda pl: strategy(delay_grad_averaging=True, delay_optimizer_step=False),
        "leave delay_optimizer_step out",
    ),
    "a delayed step in place": (
        lambda pl: strategy(delay_optimizer_step=True, offload_optimizer=False),
        "needs offload_optimizer=True",
    ),
    "part sizes": (lambda pl: strategy(averager_opts={"part_size_bytes": 1}), "measured bandwidth"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(lightning: Any, case: str) -> None:
    act, reason = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=reason):
        act(lightning)


def test_several_optimizers_and_lbfgs_are_refused(lightning: Any) -> None:
    class Two(model_class(lightning)):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[0].parameters()), torch.optim.SGD(self.net[2].parameters())

    class Search(model_class(lightning)):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    for module, reason in ((Two(), "exactly one optimizer"), (Search(), "LBFGS")):
        with pytest.raises(ValueError, match=reason):
            trainer(lightning, strategy()).fit(module, loader())


def test_either_package_when_both_are_imported() -> None:
    for name in PACKAGES:
        pl = package(name)
        driver = trainer(pl, networked())
        assert isinstance(driver.strategy, HivemindStrategy)
        assert isinstance(driver.strategy, pl.strategies.Strategy)
        driver.strategy.teardown()


def test_nothing_is_left_behind(lightning: Any) -> None:
    before = {thread.name for thread in threading.enumerate()}
    _module, driver = fit(lightning, networked(), gradient_clip_val=0.1)
    after = {thread.name for thread in threading.enumerate()}
    assert after <= before
    assert "_clip_gradients" not in vars(driver.strategy.precision_plugin)
    assert lightning.utilities.rank_zero.rank_zero_only.rank == 0


def test_a_failing_training_leaves_the_run(lightning: Any) -> None:
    class Broken(model_class(lightning)):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("out of luck")

    driver = trainer(lightning, networked())
    with pytest.raises(RuntimeError, match="out of luck"):
        driver.fit(Broken(), loader())
    assert driver.strategy._dht is None and driver.strategy._roster is None


def test_fit_twice(lightning: Any) -> None:
    peer = networked()
    module = model_class(lightning)()
    driver = trainer(lightning, peer)
    driver.fit(module, loader())
    driver.fit_loop.max_epochs = 4
    driver.fit(module, loader())
    assert driver.current_epoch == 4


def test_the_join_text_is_printed_by_the_first_peer_only(
    lightning: Any, capsys: pytest.CaptureFixture
) -> None:
    first = networked()
    printed = capsys.readouterr().err
    assert first.joining_text in printed
    second = networked(initial_peers=[str(address) for address in first.dht.get_visible_maddrs()])
    assert capsys.readouterr().err == ""
    for peer in (first, second):
        peer.dht.shutdown()


@pytest.mark.parametrize(
    "named, given, joined, warnings",
    [
        ("potluck", {}, "lightning_run", 0),  # as the token of a `potluck node` without --run is
        ("theirs", {}, "theirs", 0),
        ("theirs", {"run_id": "mine"}, "mine", 1),
    ],
)
def test_a_token_leads_to_its_run(
    lightning: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
    given: dict[str, str],
    joined: str,
    warnings: int,
) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "train.py"])
    seen: set[str] = set()

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.add(trainer.strategy.status["run_id"])

    door = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    _made.append(door)
    token = door.token(named)
    with caplog.at_level("WARNING", logger="potluck"):
        fit(lightning, networked(token=token, **given), callbacks=[Look()])
    assert seen == {joined}
    assert sum("it will not meet those" in record.message for record in caplog.records) == warnings
    by_hand = DHT(initial_peers=token, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    _made.append(by_hand)
    assert strategy(dht=by_hand, **given).joining_text.count(by_hand.token(joined)) == 2
