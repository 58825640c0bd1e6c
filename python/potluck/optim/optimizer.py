"""A torch optimizer whose steps are shared by all peers of a run."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from potluck import _core, _dashboard, _settings
from potluck._state import REFUSED
from potluck._tensors import flat, views_of
from potluck.compression import CompressionBase, NoCompression
from potluck.optim import _checkpoint
from potluck.optim._inner import InnerOptimizer
from potluck.optim._losses import LossTally
from potluck.optim._marks import GradientMarks
from potluck.optim._outlook import Outlook
from potluck.optim._parts import OptimizerParts
from potluck.optim._worker import StepWorker
from potluck.optim.grad_averager import GradientAverager
from potluck.optim.progress_tracker import SessionTracker
from potluck.utils.logging import get_logger

logger = get_logger("potluck")
# How long a newcomer that found nobody yet waits before it takes itself for the first.
_HEARING_SECONDS = 3.0


class Optimizer(OptimizerParts):
    """Gathers gradients, and steps ``optimizer`` once ``target_batch_size`` samples are in over all peers.

    Arguments are hivemind's. Timing arguments (``matchmaking_time`` and so on) are accepted and none is needed:
    potluck's deadlines follow what it measures. An argument that cannot have an effect is an error.

    ``dashboard=True`` serves a page that shows the run on a free port of this machine only (``dashboard_url``), and
    ``dashboard="127.0.0.1:8080"`` on that one.

    ``owner=`` the peer id of a person or machine makes the run closed: only peers whose token holds an invite signed by
    that peer can join it (``docs/operating.md``). The owner itself needs none.

    To clip what all peers averaged, register a hook: ``opt.register_step_pre_hook(lambda opt, args, kwargs:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))``; clipping between ``backward()`` and ``step()`` clips
    this peer's own gradients.
    """

    def __init__(
        self,
        *,
        dht: Any,
        run_id: str,
        target_batch_size: int,
        optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
        batch_size_per_step: int | None = None,
        params: Iterable[Any] | None = None,
        scheduler: Any = None,
        matchmaking_time: float | None = 15.0,
        averaging_timeout: float | None = 60.0,
        allreduce_timeout: float | None = None,
        next_chunk_timeout: float | None = None,
        load_state_timeout: float = 600.0,
        reuse_grad_buffers: bool = False,
        offload_optimizer: bool | None = None,
        delay_optimizer_step: bool | None = None,
        delay_grad_averaging: bool = False,
        delay_state_averaging: bool | None = None,
        average_state_every: int = 1,
        use_local_updates: bool = False,
        client_mode: bool | None = None,
        auxiliary: bool = False,
        grad_compression: CompressionBase = NoCompression(),  # noqa: B008 - immutable
        state_averaging_compression: CompressionBase = NoCompression(),  # noqa: B008
        load_state_compression: CompressionBase = NoCompression(),  # noqa: B008
        grad_averager_factory: Callable[..., GradientAverager] | None = None,
        average_opt_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
        averager_opts: dict[str, Any] | None = None,
        tracker_opts: dict[str, Any] | None = None,
        performance_ema_alpha: float = 0.1,
        shutdown_timeout: float = 5,
        verbose: bool = False,
        dashboard: bool | str = False,
        owner: Any = None,
    ):
        if delay_optimizer_step is None:
            delay_optimizer_step = delay_grad_averaging
        if offload_optimizer is None:
            offload_optimizer = params is not None and not use_local_updates
        # Every argument at once, because most checks are about two of them.
        _settings.check_arguments(**{k: v for k, v in locals().items() if k not in ("self", "__class__")})
        self.run_id, self.dht = run_id, dht
        self.target_batch_size = _settings.positive("target_batch_size", target_batch_size)
        self.batch_size_per_step = _settings.positive(
            "batch_size_per_step", batch_size_per_step, optional=True
        )
        self.offload_optimizer, self.auxiliary = offload_optimizer, auxiliary
        self.reuse_grad_buffers, self.use_local_updates = reuse_grad_buffers, use_local_updates
        self.use_gradient_averaging = not use_local_updates
        self.delay_optimizer_step, self.delay_grad_averaging = delay_optimizer_step, delay_grad_averaging
        self.delay_state_averaging = (
            not use_local_updates if delay_state_averaging is None else delay_state_averaging
        )
        self.shutdown_timeout, self.verbose = shutdown_timeout, verbose
        self.client_mode = bool(getattr(dht, "client_mode", False) if client_mode is None else client_mode)
        self._inner = InnerOptimizer(optimizer, params, offload_optimizer, scheduler)
        self._marks = GradientMarks(self._inner.model, reuse_grad_buffers)
        self._adopt_hooks()
        self._hold_state(average_opt_statistics, extra_tensors, load_state_compression)
        self.grad_averager = self._make_grad_averager(grad_averager_factory)
        self._join(
            grad_compression=grad_compression,
            state_compression=state_averaging_compression,
            load_compression=load_state_compression,
            average_state_every=_settings.positive(
                "average_state_every", average_state_every, most=2**32 - 1
            ),
            load_state_timeout=float(load_state_timeout),
            admission=dht.admission(run_id, owner),
        )
        self.dashboard_url = _dashboard.serve(self._session, run_id, dashboard)

    def _join(
        self,
        *,
        grad_compression: CompressionBase,
        state_compression: CompressionBase,
        load_compression: CompressionBase,
        average_state_every: int,
        load_state_timeout: float,
        admission: tuple[str | None, str | None],
    ) -> None:
        tensors, state_tensors = self._tensor_infos()
        _settings.check_keys("grad_compression", grad_compression, tensors)
        _settings.check_keys("state_averaging_compression", state_compression, state_tensors)
        # What an optimizer keeps is known after its first step only.
        _settings.check_keys("load_state_compression", load_compression, state_tensors, r"\D.*\.\d{6}")
        options = _settings.session_options(
            run_id=self.run_id,
            target_batch_size=self.target_batch_size,
            tensors=tensors,
            state_tensors=state_tensors,
            grad_compression=grad_compression.policy(),
            state_compression=state_compression.policy(),
            powersgd=None if self.grad_averager is None else self.grad_averager.powersgd(),
            policy=_settings.choose_policy(
                use_local_updates=self.use_local_updates,
                delay_grad=self.delay_grad_averaging,
                delay_optimizer=self.delay_optimizer_step,
                delay_state=self.delay_state_averaging,
            ),
            average_state_every="never" if self.use_local_updates else {"epochs": average_state_every},
            manifest_extra={
                "optimizer": type(self._inner.optimizer).__name__,
                "parameter_groups": self._inner.groups_text(),
            },
            auxiliary=self.auxiliary,
            client_mode=self.client_mode,
            load_state_timeout=load_state_timeout,
            owner=admission[0],
            invite=admission[1],
        )
        self._session = _core.Session.join(self.dht.node, options)
        self._show_memory()
        self.tracker = SessionTracker(
            self.status,
            target_batch_size=self.target_batch_size,
            client_mode=self.client_mode,
            epoch_of=lambda epoch: epoch,
        )
        self._outlook = Outlook(self.target_batch_size)
        self._worker = StepWorker(self._session.optimizer_ready)
        self._losses = LossTally()
        self._refused = ""
        self._closed = False
        self._pid = os.getpid()
        if not self.auxiliary:
            self._publish()
        self.dht.own(weakref.WeakMethod(self.shutdown))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``."""
        if self.reuse_grad_buffers:
            raise ValueError(
                "with reuse_grad_buffers=True the gradients gather in .grad and step() clears them: "
                "remove zero_grad() from the training loop"
            )
        for parameter in self._inner.model_all:
            if parameter.grad is not None:
                if set_to_none:
                    parameter.grad = None
                else:
                    parameter.grad.detach_().zero_()

    # Training.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What every scaler asks first of all in its ``step()``."""
        if self.reuse_grad_buffers:
            raise ValueError(
                "reuse_grad_buffers=True cannot work with a gradient scaler: it would unscale the gradients of earlier "
                "passes in .grad again, and one overflow would spoil them all. Leave reuse_grad_buffers out"
            )
        return False

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], torch.Tensor] | None = None,
        batch_size: int | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> torch.Tensor | None:
        """Count the gradients of one backward pass, and do whatever the run asks for next.

        ``batch_size`` is the number of samples behind the gradients, unless ``batch_size_per_step`` said it.
        ``step(grad_scaler=scaler)`` is ``scaler.step(optimizer)``. A pass without any gradients (a skipped batch) counts
        no samples.

        An error of a hook, of the optimizer or of the schedule is raised here, of a delayed step in the next call. The
        epoch's gradients are dropped, and a program that catches it goes on: with the state of whoever has finished the
        epoch, or else by making it again with the next samples.
        """
        self._check_usable()
        self._inner.check_frozen()
        samples = self._samples(batch_size, closure, grad_scaler)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, torch.Tensor):  # Lightning's closure has no loss when a batch is skipped
                self.report_loss(loss.detach())
        if self.auxiliary:
            self._assist()
            return None
        if self._marks.nothing_new(closure is not None and loss is None):
            samples = 0
        elif grad_scaler is not None:
            # It calls step() again, with gradients of their own scale, or not at all after an overflow.
            grad_scaler.step(self, batch_size=samples)
            return loss
        elif self.use_local_updates:
            with torch.no_grad():
                self._inner.step([p.grad for p in self._inner.model])
                self._inner.copy_to_model()
        else:
            self._gradients.accumulate_grads_(samples)
        self._follow(samples)
        self._marks.take()
        return loss

    def _samples(self, batch_size: int | None, closure: Any, grad_scaler: Any) -> int:
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler={grad_scaler!r}: expected a torch.amp.GradScaler or potluck's")
        if self.auxiliary:
            if batch_size is not None or closure is not None or grad_scaler is not None:
                raise ValueError("an auxiliary peer has no samples: call step() without arguments")
            return 0
        samples = self.batch_size_per_step if batch_size is None else batch_size
        if samples is None:
            raise ValueError(
                "batch_size is not known: give batch_size_per_step= to the optimizer or batch_size= to step()"
            )
        return int(_settings.positive("batch_size", samples))

    def _follow(self, samples: int) -> None:
        action = self._session.step(samples)
        self._log_events()
        with self._whole_or_abandoned():
            while action != "accumulate":
                if action == "load_state":
                    if not self._load_state():
                        break
                else:
                    getattr(self, f"_do_{action}")()
                self._log_events()
                action = self._session.step(0)
        if not self._outlook.done and (line := self._outlook.look(self.status())):
            logger.info("%s: %s", self.run_id, line)

    @contextmanager
    def _whole_or_abandoned(self) -> Iterator[None]:
        """What fails in here, such as a hook of the program, leaves nothing that later steps would wait for."""
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """An average that was not applied, or only in part, is given up: its epoch is still to be made.

        Whoever has applied it, or has at least the state of before, has the state that is loaded next.
        """
        # A delayed step that is on its way will end, and be taken then.
        if self._worker.waits or not self._session.abandon():
            return
        if self.grad_averager is not None:
            self.grad_averager.reset_accumulated_grads_()
        self._losses.end_epoch()
        self._inner.copy_to_model()
        self._publish()

    def _do_average(self) -> None:
        vector, weight = self._gathered()
        if self.delay_grad_averaging:
            self._session.start_gradients(vector, weight)
            return
        found = self._session.average_gradients(vector, weight)
        if found is None:
            return  # the others finished without us; what they have is loaded next
        averaged, alone, _, _ = found
        grads, loss = self._average_to_grads(averaged, alone)
        if self.delay_optimizer_step:
            self._gradients.reset_accumulated_grads_()
            # Hooks may look at the model, which the next batch uses meanwhile.
            ready = self._inner.hooked(grads) if any(grad is not None for grad in grads) else grads
            self._worker.start(lambda: self._step_inner(ready, loss))
            return
        self._step_inner(grads, loss)
        self._gradients.reset_accumulated_grads_()
        self._inner.copy_to_model()
        self._epoch_done()

    @property
    def _gradients(self) -> GradientAverager:
        if self.grad_averager is None:
            raise RuntimeError("with use_local_updates=True gradients are not averaged")
        return self.grad_averager

    def _gathered(self) -> tuple[Any, float]:
        averager = self._gradients
        weight = float(averager.local_samples_accumulated)
        averager.load_accumulators_into_averager_()
        touched = torch.tensor(averager._touched, dtype=torch.float32)
        averager.extra_view.copy_(torch.cat([touched, self._own_loss()]) if self._averages_loss else touched)
        self._end_losses()
        if self.delay_grad_averaging:
            averager.reset_accumulated_grads_()
        return averager.flat_buffer, weight

    def _own_grads(self) -> list[torch.Tensor | None]:
        """What this peer has gathered: not one bit differs from plain torch."""
        own = [self._gradients.mean_grad(i) for i in range(len(self._inner.model))]
        if self.delay_optimizer_step:
            # The next gradients gather in the same memory while the step still reads these.
            own = [None if grad is None else grad.clone() for grad in own]
        return own

    def _average_to_grads(self, averaged: Any, alone: bool) -> tuple[list[torch.Tensor | None], float | None]:
        if alone and not self.delay_grad_averaging:
            return self._own_grads(), self._mean_loss(None) if self._averages_loss else None
        shapes = [p.shape for p in self._inner.model]
        *grads, touched = views_of(averaged, [*shapes, torch.Size([len(shapes)])])
        loss = self._mean_loss(flat(averaged)[-2:]) if self._averages_loss else None
        # Where nobody's loss touched a parameter plain torch has no gradient, and not one of zeros.
        return [grad if share else None for grad, share in zip(grads, touched.tolist(), strict=True)], loss

    def _step_inner(self, grads: Sequence[torch.Tensor | None], loss: float | None) -> None:
        if any(grad is not None for grad in grads):
            apply = self._inner.apply if self._worker.is_here else self._inner.step
            apply(grads)
        self._inner.step_scheduler(loss)

    def _do_apply(self) -> None:
        if self._worker.waits:
            self._finish_step()
            return
        started = self._session.take_started()
        if started is None:
            raise RuntimeError("the session announced an average and has none")
        channel, found = started
        if found is None:
            return
        averaged, alone, _, _ = found
        if channel == "gradients":
            grads, loss = self._average_to_grads(averaged, alone)
            self._step_inner(grads, loss)
            self._inner.copy_to_model()
            self._epoch_done()
            return
        if not alone:
            self._write_state(views_of(averaged, self._state.shapes), sent=self._state.views)
        self._publish()

    def _do_average_state(self) -> None:
        for cell in self._loss_cells:
            cell.copy_(self._own_loss())
        if self.use_local_updates:
            self._end_losses()
        self._read_state()
        delayed = self.delay_grad_averaging or self.delay_optimizer_step
        background = self.delay_state_averaging and not delayed
        # Alone there is nothing to wait for, and nothing to do beside it.
        if background and len(self.status()["peers"]) > 1:
            self._session.start_state(self._state.buffer)
            return
        found = self._session.average_state(self._state.buffer)
        if found is None:
            return
        averaged, alone, _, _ = found
        if not alone:
            self._write_state(views_of(averaged, self._state.shapes), sent=None)
        if self.use_local_updates:
            self._inner.step_scheduler(self._local_updates_loss(alone))
            self._epoch_done()
        else:
            self._publish()

    def _local_updates_loss(self, alone: bool) -> float | None:
        """What a plateau looks at; the mean came with the state."""
        return self._mean_loss(None if alone else self._loss_cells[0]) if self._loss_cells else None

    def _state_tensors(self) -> list[torch.Tensor | None]:
        inner = self._inner
        tensors: list[torch.Tensor | None] = list(inner.main)
        for name in self._statistics:
            tensors += [inner.optimizer.state.get(p, {}).get(name) for p in inner.main]
        return tensors + self._extra_tensors + self._loss_cells

    @torch.no_grad()
    def _read_state(self) -> None:
        for view, tensor in zip(self._state.views, self._state_tensors(), strict=True):
            if tensor is None:
                view.zero_()
            else:
                view.copy_(tensor)

    @torch.no_grad()
    def _write_state(self, averaged: list[torch.Tensor], sent: list[torch.Tensor] | None) -> None:
        for index, (tensor, mean) in enumerate(zip(self._state_tensors(), averaged, strict=True)):
            if tensor is None:
                continue
            if sent is None:
                tensor.copy_(mean)
            elif torch.equal(tensor, sent[index].to(tensor.device, tensor.dtype)):
                tensor.copy_(mean)  # to the bit what all the others have
            else:
                # Training went on meanwhile: only what the average differs by is added.
                tensor.add_((mean - sent[index]).to(tensor.device, tensor.dtype))
        self._inner.copy_to_model()

    def _epoch_done(self) -> None:
        meta, blobs = self._codec.capture()
        self._session.epoch_done((meta, blobs))
        self._status_line()

    def _publish(self) -> None:
        meta, blobs = self._codec.capture()
        self._session.publish(meta, blobs)

    def _assist(self) -> None:
        action = self._session.step(0)
        if action == "accumulate":
            self._session.changed(0.5)
            action = self._session.step(0)
        if action == "average":
            averager = self._gradients
            averager.load_accumulators_into_averager_()
            if self._session.average_gradients(averager.flat_buffer, 0.0) is not None:
                self._session.epoch_done(None)
        elif action == "average_state":
            if self._session.average_state(self._state.buffer) is not None and self.use_local_updates:
                self._session.epoch_done(None)
        elif action == "load_state":
            self._session.load_state()
        self._log_events()

    def _finish_step(self, timeout: float | None = None, show: bool = True) -> None:
        """End a delayed step that is on its way: weights, optimizer and epoch belong together again."""
        with self._whole_or_abandoned():
            if self._worker.take(timeout):
                if show:
                    self._inner.copy_to_model()
                self._epoch_done()

    # State of others, checkpoints.

    def load_state_from_peers(self, **kwargs: Any) -> None:
        """Load the newest state, if anybody is ahead. Does nothing when this peer is."""
        if kwargs:
            raise TypeError(
                f"load_state_from_peers() takes no argument {next(iter(kwargs))!r}: potluck measures"
            )
        self._check_usable()
        self._hear_of_others()
        with self._whole_or_abandoned():
            while self._session.step(0) == "load_state" and self._load_state():
                self._log_events()

    def _hear_of_others(self) -> None:
        """Who joins by somebody's address is hardly alone, and hears of the others within moments."""
        until = time.monotonic() + _HEARING_SECONDS
        # A step looks who is here; the status alone may be a second old.
        while self.dht.initial_peers and self._session.step(0) != "load_state" and time.monotonic() < until:
            if len(self.status()["peers"]) > 1:
                return
            self._session.changed(0.1)

    def _load_state(self) -> bool:
        self._finish_step()
        found = self._session.catch_up()
        self._log_events()
        if found is None:
            return False
        kind, value = found
        if kind == "state" and not self._restored(*value):
            return False
        if self.grad_averager is not None:
            # They were computed at parameters that are gone.
            self.grad_averager.reset_accumulated_grads_()
        self._losses.end_epoch()
        if kind == "gradients":
            self._step_inner(*self._average_to_grads(value, alone=False))
        elif kind == "parameters":
            self._write_state(list(views_of(value, self._state.shapes)), sent=None)
            if self.use_local_updates:
                self._inner.step_scheduler(self._local_updates_loss(alone=False))
        self._inner.copy_to_model()
        # Whoever has made up for a round may be the only one with its state.
        if kind == "gradients" or (kind == "parameters" and self.use_local_updates):
            self._epoch_done()
        elif kind == "parameters":
            self._publish()
        return True

    def _restored(self, epoch: int, meta: dict[str, str], blobs: Any) -> bool:
        """Whether a state of others was taken over. One that does not fit leaves everything as it was."""
        try:
            self._codec.restore(meta, blobs)
        except BaseException as error:
            # After Ctrl-C nobody knows how far it had come.
            kept = isinstance(error, ValueError)
            self._session.refuse_state(str(error) if kept else "interrupted", kept)
            # Others are offered what this peer has, and not what it was sent.
            self._publish()
            if not kept:
                raise
            if str(error) != self._refused:
                self._refused = str(error)
                logger.warning(REFUSED, self.run_id, f" of epoch {epoch}", error)
            return False
        self._refused = ""
        return True

    def state_dict(self) -> dict[str, Any]:
        """torch's own state, with ``local_epoch`` and ``scheduler`` beside it. A plain torch optimizer can load it.

        A delayed step that is on its way ends first, in the model too: what ``model.state_dict()`` gave before still
        belongs to it unless it was copied.
        """
        self._finish_step()
        return _checkpoint.saved(self._inner, self.local_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of this class, of hivemind's, or of a plain torch optimizer.

        Call it after the model's weights were loaded: an offloaded optimizer copies them.
        """
        # The model may hold the weights of the checkpoint already.
        self._finish_step(show=False)
        saved = _checkpoint.epoch_of(state_dict)
        epoch = self.local_epoch if saved is None else saved
        if epoch < self.local_epoch:
            raise ValueError(
                f"the checkpoint is of epoch {epoch} and this optimizer is at epoch {self.local_epoch}: a run never goes "
                "back. Load it into a new potluck.Optimizer, under another run_id if others train on"
            )
        _checkpoint.load(self._inner, state_dict, saved)
        while self._session.epoch < epoch:
            self._session.epoch_done(None)
        self._publish()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a potluck Optimizer is one peer of a run and cannot be copied: save state_dict() instead"
        )

    def __repr__(self) -> str:
        return f"potluck.Optimizer(run_id={self.run_id!r}, target_batch_size={self.target_batch_size}, {self.opt!r})"

    # Manners.

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("this optimizer was shut down")

    def _log_events(self) -> None:
        for loud, line, _ in self._session.take_events():
            logger.log(30 if loud else 20, "%s: %s", self.run_id, line)

    def _status_line(self) -> None:
        if self.verbose:
            logger.info("%s: now at epoch %d", self.run_id, self.local_epoch)

    def shutdown(self) -> None:
        """Leave the run, within ``shutdown_timeout``. Idempotent; also done at exit and by ``with``."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        deadline = time.monotonic() + self.shutdown_timeout
        try:
            self._finish_step(0.8 * self.shutdown_timeout)  # the rest is for the farewell
        except Exception as error:  # to leave in good manners matters more than the last step
            logger.warning("%s: the last optimizer step failed: %s", self.run_id, error)
        self._release_memory()
        self._session.leave(max(0.0, deadline - time.monotonic()))
        self._log_events()

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
