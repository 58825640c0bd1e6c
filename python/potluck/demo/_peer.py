"""One peer of the demonstration, or the plain reference: a process with one Lightning Trainer.

A person starts it with ``--host`` or ``--join``. With ``--events`` it reports to the director in JSON lines on stdout and
takes the words ``open`` (connect), ``train`` (begin) and ``leave`` from stdin, so that the story does not depend on how
long a process takes to load torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from potluck import Float16Compression, SizeAdaptiveCompression, Uniform8BitQuantization
from potluck.demo import _corpus
from potluck.demo._invite import joining_line
from potluck.demo._model import NextByte
from potluck.demo._scale import Scale
from potluck.lightning import HivemindStrategy
from potluck.lightning._packages import packages_in_use

_pl = packages_in_use()[0]

# The same first weights everywhere; a peer that joins gets the run's weights anyway.
_SEED = 1
_RUN_ID = "potluck-demo"
_HELD_OUT_CROPS = 64
# How long a peer that is done stays to help stragglers, should the director be gone.
_LEAVE_SECONDS = 30.0


class _Counter(_pl.Callback):
    """Counts samples and ends the training at the last epoch."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self.samples = 0
        self._held_out_crops = _corpus.load(scale.context)[1].spread(_HELD_OUT_CROPS)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of it, and stop when the run is complete."""
        self.samples += len(batch[0])
        self.tell_of_step(trainer, float(outputs["loss"]))
        if _epoch(trainer) >= self._scale.epochs and not self._scale.endless:
            trainer.should_stop = True

    def tell_of_step(self, trainer: Any, loss: float) -> None:
        """One batch is done."""
        raise NotImplementedError

    def held_out(self, pl_module: Any) -> float:
        """The loss on text that is never trained on."""
        with torch.no_grad():
            return float(pl_module.loss(*(crops.to(pl_module.device) for crops in self._held_out_crops)))


class Reporter(_Counter):
    """For a peer of the director's: says on stdout how it goes, and waits for words."""

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self._words: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, kind: str, **fields: Any) -> None:
        """One JSON line to the director."""
        print(json.dumps({"kind": kind, **fields}), flush=True)

    def wait_for(self, word: str, timeout: float | None = None) -> str | None:
        """Block until the director says ``word`` or is gone; what it said after the word."""
        try:
            said, _, rest = self._words.get(timeout=timeout).partition(" ")
        except queue.Empty:
            return None
        if said != word:
            raise SystemExit(f"the director said {said!r} where {word!r} was due")
        return rest or None

    def _listen(self) -> None:
        for line in sys.stdin:
            self._words.put(line.strip())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is prepared; the strategy then takes over the run's state and the training begins."""
        self.say("ready")
        self.wait_for("train")

    def tell_of_step(self, trainer: Any, loss: float) -> None:
        """One line."""
        network = _network(trainer.strategy)
        epoch = _epoch(trainer)
        self.say("step", epoch=epoch, loss=loss, samples=self.samples, at=time.monotonic(), **network)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stay until everyone has the last epoch, then say what this peer ended with."""
        self.say("arrived", epoch=_epoch(trainer))
        self.wait_for("leave", timeout=_LEAVE_SECONDS)
        self.say(
            "end",
            epoch=_epoch(trainer),
            held_out=self.held_out(pl_module),
            digest=digest(pl_module),
            samples=self.samples,
            **_network(trainer.strategy),
        )


class ByHand(_Counter):
    """For a peer that a person started: figures in the progress bar, Ctrl-C to leave, and what it did at the end.

    With ``stay`` it also leaves when it has been alone for so many seconds. Without a progress bar, it says in a line
    who comes and goes.
    """

    def __init__(
        self,
        scale: Scale,
        stay: float | None = None,
        bar: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(scale)
        self._first: int | None = None
        self._stay, self._bar, self._clock = stay, bar, clock
        self._peers, self._in_company = 1, clock()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """From here on, Ctrl-C ends the training as its last epoch would; a second one ends it at once."""
        self._in_company = self._clock()

        def stop(*_signal: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            trainer.should_stop = True

        signal.signal(signal.SIGINT, stop)

    def tell_of_step(self, trainer: Any, loss: float) -> None:
        """What the progress bar shows beside the loss."""
        epoch = _epoch(trainer)
        self._first = epoch if self._first is None else self._first
        peers = _network(trainer.strategy)["peers"]
        shown = {"peers": float(peers), "epoch_of_run": float(epoch)}
        trainer.lightning_module.log_dict(shown, prog_bar=True)
        if peers != self._peers and not self._bar:
            others = "alone" if peers == 1 else f"{peers} peers"
            print(f"{time.strftime('%H:%M:%S')}  {others} in epoch {epoch}, loss {loss:.3f}", flush=True)
        self._peers = peers
        if peers > 1:
            self._in_company = self._clock()
        elif self._stay is not None and self._clock() - self._in_company >= self._stay:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """What came of it."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(
            f"\nThis peer trained on {self.samples} samples in the epochs {self._first} to {_epoch(trainer)} of the run. "
            f"Loss on text never trained on: {self.held_out(pl_module):.3f}",
            flush=True,
        )


def _epoch(trainer: Any) -> int:
    strategy = trainer.strategy
    return strategy.local_epoch if isinstance(strategy, HivemindStrategy) else trainer.global_step


def _network(strategy: Any) -> dict[str, Any]:
    """Peers and bytes, as this peer knows them."""
    status = strategy.status if isinstance(strategy, HivemindStrategy) else None
    if status is None:
        return {"peers": 1}
    sent = status["bytes_sent"]
    return {
        "peers": sum(not peer["auxiliary"] for peer in status["peers"]),
        "bytes_sent": sent,
        "bytes_uncompressed": round(sent * status["compression_ratio"]),
    }


def digest(module: torch.nn.Module) -> str:
    """A hash over every bit of every weight."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def compression(scale: Scale) -> SizeAdaptiveCompression:
    """Large tensors in 8 bits, small ones in 16, as in the seed document."""
    return SizeAdaptiveCompression(
        threshold=scale.size_threshold, less=Float16Compression(), greater_equal=Uniform8BitQuantization()
    )


def run(
    scale: Scale,
    *,
    join: str | None,
    plain: bool,
    events: bool,
    threads: int | None,
    options: list[str],
    stay: float | None = None,
) -> int:
    """Train as one peer, or alone without potluck."""
    if threads:
        torch.set_num_threads(threads)
    _quieten()
    _pl.seed_everything(_SEED, verbose=False)
    model = NextByte(scale)
    # The reference takes the whole target batch at once; a peer takes its small share of it.
    batch_size = scale.target_batch_size if plain else scale.batch_size
    loader = DataLoader(_corpus.load(scale.context)[0], batch_size=batch_size, shuffle=True)
    # Where nobody watches, a bar would be a line for every batch.
    bar = not events and (stay is None or sys.stdout.isatty())
    callback: _Counter
    if events:
        callback = reporter = Reporter(scale)
        reporter.say("loaded")
        join = reporter.wait_for("open") or join
        strategy = "auto" if plain else _strategy(scale, join)
        if not plain:
            reporter.say("open", join=_join_argument(strategy))
    else:
        callback = ByHand(scale, stay, bar)
        strategy = "auto" if plain else _strategy(scale, join)
        if not plain:
            _print_invitation(strategy, scale, options, stay)
    trainer = _pl.Trainer(
        strategy=strategy,
        accelerator="cpu" if events else "auto",
        devices=1,
        max_epochs=-1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
    )
    trainer.fit(model, loader)
    return 0


def _quieten() -> None:
    """Leave out what Lightning says about accelerators, about its products and about itself beside a newer torch."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _strategy(scale: Scale, join: str | None) -> HivemindStrategy:
    lossy = compression(scale)
    where = {} if join is None else ({"initial_peers": join} if join.startswith("/") else {"token": join})
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        strategy = HivemindStrategy(
            target_batch_size=scale.target_batch_size,
            run_id=_RUN_ID,
            grad_compression=lossy,
            state_averaging_compression=lossy,
            shuffle_differently=True,
            **where,
        )
        _ = strategy.dht
    # The strategy's own advice sets a variable, which not every shell can; there is one line to paste, and it is ours.
    sys.stderr.write(said.getvalue().replace(f"{strategy.joining_text}\n", ""))
    return strategy


def _join_argument(strategy: HivemindStrategy) -> str:
    dht = strategy.dht
    if hasattr(dht, "token"):
        return str(dht.token(_RUN_ID))
    return ",".join(str(address) for address in dht.get_visible_maddrs())


def _print_invitation(
    strategy: HivemindStrategy, scale: Scale, options: list[str], stay: float | None
) -> None:
    until = "until Ctrl-C" if scale.endless else f"to epoch {scale.epochs}, or until Ctrl-C"
    if stay is not None:
        until += f" or until it has been alone for {stay:.0f} s"
    print(
        f"This peer trains {until}. To train together with it, paste this on another machine that has potluck:"
    )
    print(f"  {joining_line(_join_argument(strategy), options)}", flush=True)
