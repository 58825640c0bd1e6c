"""``HivemindStrategy``: a Lightning Trainer as one peer of a shared run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import potluck
from potluck.lightning import _joining, _options, _schedulers
from potluck.lightning._data import shuffle_differently
from potluck.lightning._packages import bound_class, package_of, packages_in_use, submodule
from potluck.lightning._roster import Roster

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as _StrategyBase
else:
    _StrategyBase = object

_log = logging.getLogger("potluck.lightning")

# Open to other machines; a loopback-only default would make the printed addresses useless.
_LISTEN_EVERYWHERE = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1")

_DEFAULT_RUN = "lightning_run"
_MATCHMAKING_SECONDS = 5.0
_AVERAGING_SECONDS = 30.0


class HivemindStrategy(_StrategyBase):
    """Train one model with peers that come and go, each with its own Trainer on one device.

    Works with the Trainer of ``lightning`` and of ``pytorch_lightning``, version 2.2 or newer. The first peer prints a
    line that starts a further peer when pasted elsewhere. A later peer learns whom to join from ``token``,
    ``initial_peers``, or one of the environment variables ``POTLUCK_TOKEN``, ``INITIAL_PEERS``, ``PL_INITIAL_PEERS``.

    All peers step together: an epoch of the run ends when they have processed ``target_batch_size`` samples between
    them, and is one optimizer step with the average of all their gradients. Learning-rate schedulers count these epochs.

    Args:
        target_batch_size: samples that all peers together process per optimizer step.
        run_id: name of the run; peers of different runs do not see one another. If left out, that of the token.
        batch_size: samples per batch of this peer; by default read off every batch.
        delay_state_averaging, delay_optimizer_step, delay_grad_averaging, offload_optimizer, reuse_grad_buffers,
        matchmaking_time, averaging_timeout, verbose, dashboard, averager_opts: as in ``potluck.Optimizer``.
        scheduler_fn: makes the learning-rate scheduler from the optimizer, instead of ``configure_optimizers``.
        dht: a ``potluck.DHT`` that runs already, instead of one of the strategy's own; it is left running at the end.
        token: joins the run whose peer printed this token.
        initial_peers: joins by addresses: a list, or one comma-separated string. A token is taken as well. Where an
            argument and a variable, or two variables, name different peers, that is an error.
        host_maddrs, announce_maddrs, use_ipfs, wait_timeout, bootstrap_timeout, use_relay, use_auto_relay,
        identity_path, client_mode: as in ``potluck.DHT``.
        writer: whether this peer writes what a run needs once (checkpoints, logs). By default exactly one peer does:
            the one that joined first, then the next when it leaves.
        shuffle_differently: whether shuffling data loaders get an order of this peer's own. By default yes for peers that
            join others, so that equal seeds do not make all peers train on the same samples.
        owner: peer id of the owner of a closed run: only peers whose token holds an invite signed by it can join.
        **optimizer_kwargs: any further argument of ``potluck.Optimizer``, such as ``grad_compression``.
    """

    strategy_name = "hivemind"

    def __new__(cls, *_args: Any, **_kwargs: Any) -> HivemindStrategy:
        if not hasattr(cls, "_unbound"):
            cls = bound_class(cls, packages_in_use())
        return object.__new__(cls)

    def __init__(
        self,
        target_batch_size: int,
        run_id: str = _DEFAULT_RUN,
        batch_size: int | None = None,
        delay_state_averaging: bool = False,
        delay_optimizer_step: bool | None = None,
        delay_grad_averaging: bool = False,
        offload_optimizer: bool | None = None,
        reuse_grad_buffers: bool = False,
        scheduler_fn: Callable[[torch.optim.Optimizer], Any] | None = None,
        matchmaking_time: float = _MATCHMAKING_SECONDS,
        averaging_timeout: float = _AVERAGING_SECONDS,
        verbose: bool = False,
        averager_opts: dict[str, Any] | None = None,
        host_maddrs: Sequence[str] | None = None,
        initial_peers: str | Sequence[str] | None = None,
        use_ipfs: bool = False,
        wait_timeout: float | None = None,
        bootstrap_timeout: float | None = None,
        use_relay: bool = True,
        use_auto_relay: bool = False,
        identity_path: str | None = None,
        *,
        dht: potluck.DHT | None = None,
        dashboard: bool | str = False,
        owner: Any = None,
        token: str | None = None,
        announce_maddrs: Sequence[str] | None = None,
        client_mode: bool | None = None,
        writer: bool | None = None,
        shuffle_differently: bool | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        super().__init__()
        _require_positive("target_batch_size", target_batch_size)
        if batch_size is not None:
            _require_positive("batch_size", batch_size)
        self._run_id, self._owner = run_id, owner
        self._batch_size = None if batch_size is None else int(batch_size)
        self._scheduler_fn = scheduler_fn
        self._writer = writer
        self._reuse_grad_buffers = reuse_grad_buffers
        # Given to potluck.Optimizer only if given here, so that its own defaults and its own refusals hold.
        delays = {
            "delay_optimizer_step": delay_optimizer_step,
            "delay_grad_averaging": delay_grad_averaging or None,
            "offload_optimizer": offload_optimizer,
            "reuse_grad_buffers": reuse_grad_buffers or None,
            "averager_opts": averager_opts,
            "verbose": verbose or None,
            "dashboard": dashboard or None,
            "owner": owner,
        }
        self._rebuild = bool(delay_optimizer_step or delay_grad_averaging or offload_optimizer)
        self._optimizer_kwargs = {
            "run_id": run_id,
            "target_batch_size": int(target_batch_size),
            "delay_state_averaging": delay_state_averaging,
            "matchmaking_time": matchmaking_time,
            "averaging_timeout": averaging_timeout,
            **{name: value for name, value in delays.items() if value is not None},
            **optimizer_kwargs,
        }
        _options.check(dht, self._rebuild, optimizer_kwargs, self._optimizer_kwargs)
        if not use_relay:
            raise ValueError(
                "use_relay=False cannot have an effect: where two peers find no direct way, a third one relays for them, "
                "or they could not average"
            )
        network = {
            "use_ipfs": use_ipfs or None,
            "wait_timeout": wait_timeout,
            "bootstrap_timeout": bootstrap_timeout,
            "use_auto_relay": use_auto_relay or None,
            "identity_path": identity_path,
            "announce_maddrs": None if announce_maddrs is None else [str(a) for a in announce_maddrs],
            "client_mode": client_mode,
        }
        network = {name: value for name, value in network.items() if value is not None}
        if dht is not None:
            given = {"token": token, "initial_peers": initial_peers, "host_maddrs": host_maddrs, **network}
            useless = [name for name, value in given.items() if value is not None]
            if useless:
                raise ValueError(
                    f"{', '.join(useless)} cannot have an effect beside dht=: give it to potluck.DHT"
                )
            _joining.check_beside(dht)
        self._own_dht = dht is None
        self._joins = (
            _joining.whom_to_join(initial_peers, token) if dht is None else (dht.initial_peers or None)
        )
        self._shuffle_differently = (
            self._joins is not None if shuffle_differently is None else shuffle_differently
        )
        self._dht_kwargs = {
            "initial_peers": self._joins,
            "host_maddrs": list(_LISTEN_EVERYWHERE if host_maddrs is None else map(str, host_maddrs)),
            **network,
        }
        self._parallel_devices: list[torch.device] | None = None
        self._optimizer: potluck.Optimizer | None = None
        self._roster: Roster | None = None
        self._plateaus: list[_schedulers.SharedPlateau] = []
        self._undo: list[Callable[[], None]] = []
        self._samples = 0
        self._last_batch_samples = 0
        self._wrote_last_run = True
        self._said_not_writer = False
        self._dht = dht
        if dht is not None:
            self._take_run_of_token()
        self._open_dht()

    # -- what users read -------------------------------------------------------------------------------------

    @property
    def dht(self) -> potluck.DHT:
        """This peer's door to the network."""
        return self._open_dht()

    @property
    def num_peers(self) -> int:
        """Peers now in the run, this one included; 1 before training starts."""
        status = self.status
        return 1 if status is None else max(1, sum(not peer["auxiliary"] for peer in status["peers"]))

    @property
    def local_epoch(self) -> int:
        """Optimizer steps of the whole run so far, as far as this peer has come."""
        return 0 if self._optimizer is None else int(self._optimizer.local_epoch)

    @property
    def status(self) -> dict[str, Any] | None:
        """Everything known about the run, as plain data (see ``potluck.Optimizer.status``); None outside training."""
        return None if self._optimizer is None or not self._optimizer.is_alive() else self._optimizer.status()

    @property
    def joining_text(self) -> str:
        """What to paste on another machine to join this peer."""
        dht = self.dht
        token = dht.token(self._run_id) if hasattr(dht, "token") else None
        return _joining.joining_text([str(address) for address in dht.get_visible_maddrs()], token)

    # -- the seat that the Trainer gives us ------------------------------------------------------------------

    @property
    def accelerator(self) -> Any:
        """The Trainer's accelerator."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        # Only now is it certain which of the two Lightning packages the Trainer comes from.
        if accelerator is not None:
            self.__class__ = bound_class(type(self)._unbound, (package_of(accelerator),))
        self._accelerator = accelerator

    @property
    def _lightning(self) -> ModuleType:
        return package_of(self._accelerator)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device of this peer, as the Trainer chose it."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: Sequence[torch.device] | None) -> None:
        devices = list(devices or [])
        if len(devices) > 1:
            raise ValueError(
                f"HivemindStrategy trains on one device per peer, and this Trainer has {len(devices)}: a peer joins, "
                "leaves and averages on its own. Use Trainer(devices=1) and start one process per device (select it "
                "with devices=[0], devices=[1], ...); the others join with the line that the first one prints"
            )
        self._parallel_devices = devices or None

    @property
    def num_nodes(self) -> int:
        """Always 1: every machine is a peer of its own."""
        return 1

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count != 1:
            raise ValueError(
                f"num_nodes={count} has no meaning with HivemindStrategy: start the program once on every machine"
            )

    @property
    def _layer_sync(self) -> None:
        return None

    @_layer_sync.setter
    def _layer_sync(self, layer_sync: Any) -> None:
        if layer_sync is not None:
            raise ValueError(
                "sync_batchnorm=True needs all peers in lock-step in every batch; peers here are not"
            )

    @property
    def root_device(self) -> torch.device:
        """The device that this peer trains on."""
        return self._parallel_devices[0] if self._parallel_devices else torch.device("cpu")

    def model_to_device(self) -> None:
        """Move the model to this peer's device."""
        self.model.to(self.root_device)

    # Other peers are no ranks: they come and go, and each runs its own loops. So collective calls are local.

    @property
    def is_global_zero(self) -> bool:
        """Whether this peer writes what the run needs once. After training: whether it did to the end."""
        return self._wrote_last_run if self._roster is None else self._roster.is_writer

    @property
    def global_rank(self) -> int:
        """0 on the peer that writes shared artefacts, else 1."""
        return 0 if self.is_global_zero else 1

    local_rank = 0
    node_rank = 0
    world_size = 1

    def reduce(self, tensor: Any, *_args: Any, **_kwargs: Any) -> Any:
        """The peer's own value."""
        return tensor

    def all_gather(self, tensor: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """The peer's own value."""
        return tensor

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The peer's own value."""
        return obj

    def barrier(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to wait for."""

    # -- starting --------------------------------------------------------------------------------------------

    def _open_dht(self) -> potluck.DHT:
        if self._dht is None:
            self._dht = potluck.DHT(start=True, **self._dht_kwargs)
            self._take_run_of_token()
            try:
                # Before anything is printed: the line for others holds the invite of a closed run.
                self._dht.admission(self._run_id, self._owner)
            except ValueError:
                self._dht.shutdown()
                raise
            if self._joins is None:
                print(self.joining_text, file=sys.stderr, flush=True)
        return self._dht

    def _take_run_of_token(self) -> None:
        """A token leads to its run; whoever names another one is warned by the DHT."""
        named = getattr(self._dht, "named_runs", list)()
        if self._run_id == _DEFAULT_RUN and len(named) == 1:
            self._run_id = self._optimizer_kwargs["run_id"] = named[0]

    def setup_environment(self) -> None:
        """Enter the run, if this is going to be a training."""
        super().setup_environment()
        trainer = self.lightning_module.trainer
        if trainer.state.fn == submodule(self._lightning, "trainer.states").TrainerFn.FITTING:
            self._roster = Roster(self.dht, self._run_id, self._writer)
            rank_zero_only = submodule(self._lightning, "utilities.rank_zero").rank_zero_only
            self._undo.append(partial(setattr, rank_zero_only, "rank", getattr(rank_zero_only, "rank", 0)))
            self._tell_rank()

    def _tell_rank(self) -> None:
        """Loggers ask this function attribute, not the strategy, whether to write."""
        submodule(self._lightning, "utilities.rank_zero").rank_zero_only.rank = self.global_rank

    def setup(self, trainer: Any) -> None:
        """Prepare the model and make the shared optimizer."""
        super().setup(trainer)
        if self._roster is None:
            return
        self._show_progress(trainer)
        plain = self._the_only_optimizer()
        counting = self._prepare_schedulers(plain)
        self._move_clipping(trainer, plain)
        self._check_precision()
        self._optimizer = potluck.Optimizer(
            dht=self.dht,
            scheduler=counting,
            batch_size_per_step=None,
            **self._wrapped(plain),
            **self._optimizer_kwargs,
        )
        self.optimizers = [self._optimizer]
        if self._reuse_grad_buffers:
            # Gradients of several batches add up in .grad, and the Trainer would clear them before every batch.
            self._shadow(self.lightning_module, "optimizer_zero_grad", lambda *_args, **_kwargs: None)

    def _wrapped(self, plain: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer as an argument: as it is or, for work beside the training, to be moved onto copies."""
        if not self._rebuild:
            return {"optimizer": plain}

        def onto_copies(groups: Any) -> torch.optim.Optimizer:
            # The same object, so that constructor arguments, hooks and attached schedulers all stay.
            for group, copied in zip(plain.param_groups, groups, strict=True):
                group["params"] = list(copied["params"])
            return plain

        return {"optimizer": onto_copies, "params": [dict(group) for group in plain.param_groups]}

    def _the_only_optimizer(self) -> torch.optim.Optimizer:
        if len(self.optimizers) != 1:
            raise ValueError(
                f"HivemindStrategy needs exactly one optimizer, configure_optimizers returned {len(self.optimizers)}: "
                "peers agree on one step per epoch. Use parameter groups for different settings"
            )
        if isinstance(self.optimizers[0], torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times per step; peers average one gradient per step"
            )
        return self.optimizers[0]

    def _prepare_schedulers(self, plain: torch.optim.Optimizer) -> Any:
        """What potluck.Optimizer shall step per epoch, or None; plateaus are followed here."""
        if self._scheduler_fn is not None:
            if self.lr_scheduler_configs:
                raise ValueError(
                    "give either scheduler_fn= or a scheduler from configure_optimizers, not both"
                )
            types = submodule(self._lightning, "utilities.types")
            self.lr_scheduler_configs = [types.LRSchedulerConfig(self._scheduler_fn(plain), interval="step")]
        counting, watching = _schedulers.split(self.lr_scheduler_configs)
        _schedulers.leave_to_epochs(self.lr_scheduler_configs)
        self._plateaus = [
            _schedulers.SharedPlateau(p, self._roster, lambda: self.local_epoch) for p in watching
        ]
        if not counting:
            return None
        module = self.lightning_module
        hook = type(module).lr_scheduler_step
        if len(counting) == 1 and hook is self._lightning.LightningModule.lr_scheduler_step:
            return counting[0]
        return _schedulers.EpochSchedulers(
            counting, lambda scheduler: module.lr_scheduler_step(scheduler, None)
        )

    def _move_clipping(self, trainer: Any, plain: torch.optim.Optimizer) -> None:
        """Clip the averaged gradient of the epoch, as one machine with one big batch would, not each local batch's."""
        value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        module = self.lightning_module
        overridden = type(module).configure_gradient_clipping is not (
            self._lightning.LightningModule.configure_gradient_clipping
        )
        if not value and not overridden:
            return

        def clip(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            module.configure_gradient_clipping(
                optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm
            )

        self._undo.append(plain.register_step_pre_hook(clip).remove)
        self._shadow(self.precision_plugin, "_clip_gradients", lambda *_args, **_kwargs: None)

    def _check_precision(self) -> None:
        if self._reuse_grad_buffers and getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "reuse_grad_buffers=True cannot work with 16-mixed precision: the gradient scaler would unscale the "
                "gradients of earlier batches again, and one overflow would spoil them all. Leave reuse_grad_buffers "
                "out, or take precision='bf16-mixed'"
            )

    def _show_progress(self, trainer: Any) -> None:
        """Every peer has somebody watching; Lightning hides the bar where is_global_zero is false."""
        bar = getattr(trainer, "progress_bar_callback", None)
        if bar is not None and not self.is_global_zero:
            bar.enable()

    def _shadow(self, owner: Any, name: str, value: Any) -> None:
        """Override an instance attribute until teardown."""
        own = vars(owner)
        had, before = name in own, own.get(name)
        own[name] = value

        def restore() -> None:
            if had:
                own[name] = before
            else:
                own.pop(name, None)

        self._undo.append(restore)

    def process_dataloader(self, dataloader: object) -> object:
        """Leave the loader as it is, but shuffle unlike the other peers."""
        if self._roster is not None and self._shuffle_differently:
            shuffle_differently(dataloader, str(self.dht.peer_id))
        return dataloader

    # -- training --------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Take over the run's state, if others are already training."""
        super().on_train_start()
        if self._optimizer is not None:
            self._optimizer.load_state_from_peers()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count the samples that the next optimizer step will stand for."""
        super().on_train_batch_start(batch, batch_idx)
        self._tell_rank()
        samples = self._batch_size
        if samples is None:
            samples = submodule(self._lightning, "utilities.data").extract_batch_size(batch)
        self._last_batch_samples = int(samples)
        self._samples += self._last_batch_samples

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Add this peer's gradients to the epoch; the run steps when it has target_batch_size samples."""
        # Several steps in one batch happen only in manual optimization; each then stands for the batch.
        kwargs.setdefault("batch_size", self._samples or self._last_batch_samples)
        self._samples = 0
        # The loss is reported here, because with a gradient scaler the optimizer does not see the closure.
        return super().optimizer_step(optimizer, partial(self._reporting, closure), model, **kwargs)

    def _reporting(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        if isinstance(loss, Tensor) and self._optimizer is not None:
            self._optimizer.report_loss(loss.detach())
        return loss

    # -- checkpoints -----------------------------------------------------------------------------------------

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; the shared optimizer restores its epoch with its state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, on the peer that writes for the run."""
        if not self.is_global_zero and not self._said_not_writer:
            self._said_not_writer = True
            _log.info("%s is written by another peer of the run; to write here too: writer=True", filepath)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    # -- ending ----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Leave the run and give everything back as it was."""
        for plateau in self._plateaus:
            plateau.release()
        self._plateaus = []
        while self._undo:
            self._undo.pop()()
        roster, self._roster = self._roster, None
        if roster is not None:
            self._wrote_last_run = roster.is_writer
            roster.leave()  # it tells the others while the optimizer does
        if self._optimizer is not None:
            self._optimizer.shutdown()
        if roster is not None:
            roster.close()
        if self._dht is not None and self._own_dht:
            self._dht.shutdown()
            self._dht = None
            if roster is not None:
                roster.close()  # what it may have waited for in vain has ended with the DHT
        super().teardown()


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) <= 0:
        raise ValueError(f"{name} must be a whole number of samples above 0, got {value!r}")
    if int(value) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value!r}")
