"""One peer of the demonstration, or the plain reference: a process with one Lightning Trainer.

With ``--events`` it reports to the director in JSON lines on stdout and takes the words ``open`` (connect), ``train``
(begin) and ``leave`` from stdin, so that the story does not depend on how long a process takes to load torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import sys
import threading
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from potluck import Float16Compression, SizeAdaptiveCompression, Uniform8BitQuantization
from potluck.demo import _corpus
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


class Reporter(_pl.Callback):
    """Ends the training at the last epoch and, if asked to, says on stdout how it goes."""

    def __init__(self, scale: Scale, events: bool) -> None:
        self._scale = scale
        self._events = events
        self._samples = 0
        self._words: queue.Queue[str] = queue.Queue()
        if events:
            threading.Thread(target=self._listen, daemon=True).start()
        self._held_out = _corpus.load(scale.context)[1].spread(_HELD_OUT_CROPS)

    def say(self, kind: str, **fields: Any) -> None:
        """One JSON line to the director."""
        if self._events:
            print(json.dumps({"kind": kind, **fields}), flush=True)

    def wait_for(self, word: str, timeout: float | None = None) -> str | None:
        """Block until the director says ``word`` or is gone; what it said after the word."""
        if not self._events:
            return None
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

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, and stop when the run is complete."""
        self._samples += len(batch[0])
        loss = float(outputs["loss"])
        epoch = _epoch(trainer)
        network = _network(trainer.strategy)
        self.say("step", epoch=epoch, loss=loss, samples=self._samples, at=time.monotonic(), **network)
        if epoch >= self._scale.epochs:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stay until everyone has the last epoch, then say what this peer ended with."""
        self.say("arrived", epoch=_epoch(trainer))
        self.wait_for("leave", timeout=_LEAVE_SECONDS)
        with torch.no_grad():
            held_out = float(pl_module.loss(*self._held_out))
        self.say(
            "end",
            epoch=_epoch(trainer),
            held_out=held_out,
            digest=digest(pl_module),
            samples=self._samples,
            **_network(trainer.strategy),
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


def run(scale: Scale, *, join: str | None, plain: bool, events: bool, threads: int | None) -> int:
    """Train as one peer, or alone without potluck."""
    if threads:
        torch.set_num_threads(threads)
    if events:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    _pl.seed_everything(_SEED, verbose=False)
    model = NextByte(scale)
    # The reference takes the whole target batch at once; a peer takes its small share of it.
    batch_size = scale.target_batch_size if plain else scale.batch_size
    loader = DataLoader(_corpus.load(scale.context)[0], batch_size=batch_size, shuffle=True)
    reporter = Reporter(scale, events)
    reporter.say("loaded")
    join = reporter.wait_for("open") or join
    trainer = _pl.Trainer(
        strategy="auto" if plain else _strategy(scale, join, reporter),
        accelerator="cpu" if events else "auto",
        devices=1,
        max_epochs=-1,
        callbacks=[reporter],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not events,
    )
    trainer.fit(model, loader)
    return 0


def _strategy(scale: Scale, join: str | None, reporter: Reporter) -> HivemindStrategy:
    lossy = compression(scale)
    where = {} if join is None else ({"initial_peers": join} if join.startswith("/") else {"token": join})
    strategy = HivemindStrategy(
        target_batch_size=scale.target_batch_size,
        run_id=_RUN_ID,
        grad_compression=lossy,
        state_averaging_compression=lossy,
        shuffle_differently=True,
        **where,
    )
    reporter.say("open", join=_join_argument(strategy))
    return strategy


def _join_argument(strategy: HivemindStrategy) -> str:
    dht = strategy.dht
    if hasattr(dht, "token"):
        return str(dht.token(_RUN_ID))
    return ",".join(str(address) for address in dht.get_visible_maddrs())
