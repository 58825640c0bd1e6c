"""What a shared optimizer tells about itself, to torch's own code and to users."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from potluck import _core
from potluck._tensors import FlatTensors
from potluck.optim._inner import InnerOptimizer
from potluck.optim._losses import LossTally
from potluck.optim.grad_averager import GradientAverager
from potluck.optim.progress_tracker import SessionTracker
from potluck.utils.logging import get_logger

logger = get_logger("potluck")


class OptimizerFacts(torch.optim.Optimizer):
    """What :class:`potluck.Optimizer` shows, and the memory that it shows."""

    _inner: InnerOptimizer
    _session: _core.Session
    _state: FlatTensors
    _held: list[_core.Held]
    grad_averager: GradientAverager | None
    _closed: bool
    _losses: LossTally
    _said_no_loss = False
    run_id: str
    tracker: SessionTracker

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The optimizer inside."""
        return self._inner.optimizer

    @property
    def scheduler(self) -> Any:
        """The learning rate scheduler that steps once per epoch."""
        return self._inner.scheduler

    @property
    def model_parameters(self) -> list[torch.Tensor]:
        """The trainable parameters of the model."""
        return self._inner.model

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside, with the model's parameters; changes count."""
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the optimizer inside, by the model's parameters."""
        return self._inner.state

    @property
    def local_epoch(self) -> int:
        """Shared optimizer steps so far."""
        return int(self._session.epoch)

    @property
    def local_progress(self) -> Any:
        """This peer's progress."""
        return self.tracker.local_progress

    @property
    def state_averager(self) -> OptimizerFacts:
        """The part that holds parameters and optimizer state: here the optimizer itself."""
        return self

    def status(self) -> dict[str, Any]:
        """Everything known about the run, as plain data: peers, rounds, bytes, memory."""
        return json.loads(self._session.status())  # type: ignore[no-any-return]

    def _show_memory(self) -> None:
        """Let the status count what is held for the run."""
        self._session.hold("state", self._state.buffer)
        self._held = [self._session.hold_bytes("offloaded", self._inner.offloaded_bytes)]
        if self.grad_averager is not None:
            self.grad_averager._show_memory(self._session)

    def _release_memory(self) -> None:
        """After the last step. Offloaded parameters stay: they are those of the optimizer inside."""
        self._state.release()
        self._held.clear()
        if self.grad_averager is not None:
            self.grad_averager._release()

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """The loss of a batch. Its mean over an epoch is shown to everybody, and averaged over peers for
        ``ReduceLROnPlateau``. One that lies on an accelerator is read when the epoch ends: nothing waits for it before.
        """
        if self._losses.add(loss):
            self._show_loss()

    def _show_loss(self) -> None:
        loss = self._losses.mean()
        self._session.report_loss(math.nan if loss is None else loss)

    def _end_losses(self) -> None:
        """The losses until now are those of an epoch."""
        self._show_loss()
        self._losses.end_epoch()

    def _own_loss(self) -> torch.Tensor:
        """This peer's part in the mean loss: the loss and that there is one, or zeros."""
        loss = self._losses.mean()
        return torch.zeros(2) if loss is None else torch.tensor([loss, 1.0])

    def _mean_loss(self, averaged: torch.Tensor | None) -> float | None:
        """The loss that a plateau looks at: of averaged parts, or of this peer alone."""
        loss = self._losses.mean()
        if averaged is not None:
            total, share = averaged.tolist()
            # Rounding may leave a trace of nobody's share.
            loss = total / share if share > 1e-6 else None
        if loss is None and not self._said_no_loss:
            self._said_no_loss = True
            logger.warning(
                "%s: ReduceLROnPlateau has no loss to look at, so the rate stays: call report_loss(loss) before step(), "
                "or give step() a closure",
                self.run_id,
            )
        return loss

    def is_alive(self) -> bool:
        """Whether this peer takes part."""
        return not self._closed

    def is_synchronized_with_peers(self) -> bool:
        """Whether nobody is ahead."""
        return self.tracker.global_epoch <= self.local_epoch

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: all peers agreed on the tensors when they joined."""
        raise ValueError(
            "parameters cannot be added while a run is on: all peers agreed on them when they joined. Give the optimizer "
            "all of them, and freeze those that are to wait after it was made"
        )
