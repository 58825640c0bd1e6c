"""Tensors that peers average with one another, round by round."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from potluck import _core, _settings
from potluck._state import REFUSED, encode_blobs, parsed, plain_blobs, tensor_of
from potluck._tensors import FlatTensors, views_of
from potluck.averaging.control import AveragingStage, StepControl
from potluck.compression import CompressionBase, CompressionInfo, NoCompression
from potluck.compression.adaptive import check_names
from potluck.p2p.peer_id import PeerID
from potluck.utils.logging import get_logger
from potluck.utils.serializer import MSGPackSerializer
from potluck.utils.timed_storage import DHTExpiration, get_dht_time

logger = get_logger("potluck")
_NO_EFFECT = {
    "bandwidth": None,
    "target_group_size": None,
    "min_vector_size": 0,
    "initial_group_bits": "",
    "part_size_bytes": 2**19,
}


class DecentralizedAverager:
    """Averages ``averaged_tensors`` in place with the peers that have the same ``prefix`` and shapes.

    ``step()`` waits for the peers that are there and replaces the tensors by the weighted mean, bit for bit the same at
    everybody. Timing arguments are accepted and none is needed.
    """

    def __init__(
        self,
        averaged_tensors: Sequence[torch.Tensor],
        dht: Any,
        *,
        start: bool,
        prefix: str,
        target_group_size: int | None = None,
        min_group_size: int = 2,
        initial_group_bits: str = "",
        min_matchmaking_time: float = 5.0,
        request_timeout: float = 3.0,
        averaging_alpha: float = 1.0,
        part_size_bytes: int | None = None,
        allreduce_timeout: float | None = None,
        next_chunk_timeout: float | None = None,
        sender_timeout: float | None = None,
        reducer_timeout: float | None = None,
        compression: CompressionBase = NoCompression(),  # noqa: B008 - immutable
        state_compression: CompressionBase = NoCompression(),  # noqa: B008
        tensor_infos: Sequence[CompressionInfo] | None = None,
        bandwidth: float | None = None,
        min_vector_size: int = 0,
        auxiliary: bool = False,
        allow_state_sharing: bool | None = None,
        declare_state_period: float = 30,
        client_mode: bool | None = None,
        daemon: bool = True,
        shutdown_timeout: float = 5,
        flat: FlatTensors | None = None,
        extra_values: int = 0,
    ):
        if not prefix or "." in prefix:
            raise ValueError(f"prefix={prefix!r}: expected text without a dot")
        given = {
            "bandwidth": bandwidth,
            "target_group_size": target_group_size,
            "min_vector_size": min_vector_size,
            "initial_group_bits": initial_group_bits,
            "part_size_bytes": part_size_bytes,
        }
        for name, value in given.items():
            # Or hivemind's default.
            if value not in (None, _NO_EFFECT[name]):
                raise ValueError(f"{name}={value!r} cannot have an effect: {_settings.REASONS[name]}")
        if not 0 < averaging_alpha <= 1:
            raise ValueError(f"averaging_alpha={averaging_alpha!r}: expected 0 < alpha <= 1")
        if any(t.grad_fn is not None for t in averaged_tensors):
            raise ValueError("averaged_tensors: expected tensors that are not the result of a computation")
        if isinstance(min_group_size, bool) or not isinstance(min_group_size, int) or min_group_size < 1:
            raise ValueError(f"min_group_size={min_group_size!r}: expected a whole number of at least 1")
        self.dht, self.prefix = dht, prefix
        self.min_group_size, self.averaging_alpha = min_group_size, averaging_alpha
        self.compression = _settings.check_compression("compression", compression)
        self.state_compression = _settings.check_compression("state_compression", state_compression)
        self.request_timeout, self.shutdown_timeout = request_timeout, shutdown_timeout
        self.client_mode = bool(getattr(dht, "client_mode", False) if client_mode is None else client_mode)
        self.auxiliary = auxiliary
        if auxiliary and self.client_mode:
            raise ValueError(
                "client_mode=True and auxiliary=True contradict: an auxiliary peer is there for others"
            )
        if not daemon:
            raise ValueError(
                "daemon=False cannot have an effect: potluck runs in threads of this process, which end with it"
            )
        if allow_state_sharing is None:
            allow_state_sharing = not self.client_mode and not auxiliary
        self._allow_state_sharing = self._checked_sharing(allow_state_sharing)
        self._priority = 0.0
        self._infos = tensor_infos
        self._tensors = list(averaged_tensors)
        self._check_names()
        self._flat = flat or FlatTensors([t.shape for t in self._tensors])
        self.lock_averaged_tensors = threading.RLock()
        self._round_lock = threading.Lock()
        self._session: _core.Session | None = None
        self._held: list[_core.Held] = []
        self._pid = os.getpid()
        if start:
            self.run_in_background()

    # Which compressions name tensors as rounds do.
    _named_alike = ("compression", "state_compression")

    def _check_names(self) -> None:
        infos = self._infos or []
        keys = [str(info.key) for info in infos] or [str(i) for i in range(len(self._tensors))]
        for argument in self._named_alike:
            check_names(argument, getattr(self, argument), keys)

    # Life.

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """Join the peers of this prefix."""
        if self._session is not None:
            raise RuntimeError("this averager runs already")
        infos = self._infos or [
            CompressionInfo(index, _Shape(t.shape)) for index, t in enumerate(self._tensors)
        ]
        tensors = [
            {
                "key": str(info.key),
                "shape": list(tensor.shape),
                "role": info.role.name.capitalize(),
            }
            for info, tensor in zip(infos, self._tensors, strict=True)
        ]
        shapes = self._flat.shapes[len(self._tensors) :]
        tensors += [
            {"key": f"extra.{i}", "shape": list(s), "role": "Unspecified"} for i, s in enumerate(shapes)
        ]
        options = _settings.session_options(
            run_id=self.prefix,
            target_batch_size=1,
            tensors=tensors,
            grad_compression=self.compression.policy(),
            powersgd=self.powersgd(),
            client_mode=self.client_mode,
            auxiliary=self.auxiliary,
        )
        self._session = _core.Session.join(self.dht.node, options)
        self._show_memory(self._session)
        # Tensors differ between peers on purpose, so the first state that is offered names none of them.
        self._session.publish({}, {})
        self.dht.own(weakref.WeakMethod(self.shutdown))

    def powersgd(self) -> dict[str, Any] | None:
        """Settings of low-rank compression; see :class:`potluck.optim.PowerSGDGradientAverager`."""
        return None

    def _show_memory(self, session: _core.Session) -> None:
        """Let the status of ``session`` count what is held here."""
        session.hold("tensors", self._flat.buffer)

    @property
    def session(self) -> _core.Session:
        """The Rust side; an error before the start and after the end."""
        if self._session is None:
            raise RuntimeError(
                "this averager does not run: call run_in_background(), or create it with start=True"
            )
        return self._session

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Returns at once: joining has happened in :meth:`run_in_background`."""
        self.session.status()

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._session is not None

    def shutdown(self) -> None:
        """Leave. Idempotent."""
        if os.getpid() != self._pid:
            return
        session, self._session = self._session, None
        self._held.clear()
        if session is not None:
            session.leave(float(self.shutdown_timeout))

    def __enter__(self) -> DecentralizedAverager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    @property
    def peer_id(self) -> PeerID:
        """Who this peer is."""
        return PeerID.from_base58(self.dht.node.peer_id)

    # Rounds.

    def step(
        self,
        gather: Any = None,
        scheduled_time: DHTExpiration | None = None,
        weight: float | None = None,
        timeout: float | None = None,
        allow_retries: bool = True,
        require_trigger: bool = False,
        wait: bool = True,
    ) -> Any:
        """Average once. ``{peer: its gather}`` of all members, or a :class:`StepControl` with ``wait=False``.

        Without a group within ``timeout`` the tensors stay as they are and the answer is None; the same where all
        weights are 0. Without a timeout nobody is waited for who is not there. With one, a round that fails although
        others are there is tried again until then, unless ``allow_retries=False``.
        """
        if require_trigger and wait:
            raise ValueError("require_trigger=True needs wait=False: the trigger comes from this thread")
        if weight is None:
            weight = 0.0 if self.auxiliary else 1.0
        if not (isinstance(weight, (int, float)) and 0 <= weight < float("inf")):
            raise ValueError(f"weight={weight!r}: expected a finite number >= 0")
        now = get_dht_time()
        deadline = None if timeout is None else now + timeout
        when = now if scheduled_time is None else scheduled_time
        if deadline is not None and when >= deadline:
            raise ValueError("scheduled_time: expected a time before the timeout")
        data = MSGPackSerializer.dumps(gather)
        if len(data) > _core.GATHER_BYTES_MAX:
            raise ValueError(f"gather: {len(data)} bytes, expected at most {_core.GATHER_BYTES_MAX}")
        session = self.session
        control = StepControl(when, deadline, allow_retries, float(weight), data)
        if not require_trigger:
            control.allow_allreduce()
        if wait:
            control.run(lambda c: self._round(session, c))
            return control.result()
        control.thread = threading.Thread(
            target=control.run, args=(lambda c: self._round(session, c),), name="potluck-round", daemon=True
        )
        control.thread.start()
        return control

    def _round(self, session: _core.Session, control: StepControl) -> dict[PeerID, Any] | None:
        while True:
            control.stage = AveragingStage.LOOKING_FOR_GROUP
            if not self._wait_until(session, control):
                return None
            control.stage = AveragingStage.AWAITING_TRIGGER
            control.wait_for_trigger()
            left = control.get_timeout()
            if not self._round_lock.acquire(timeout=-1 if left is None else left):
                return None
            try:
                outcome, failed = self._attempt(session, control)
            finally:
                self._round_lock.release()
            if not failed or not control.allow_retries or not control.get_timeout():
                return outcome
            # Those who went on without us have their result in a moment.
            session.changed(0.1)

    def _attempt(self, session: _core.Session, control: StepControl) -> tuple[dict[PeerID, Any] | None, bool]:
        """What came of one round, and whether another may do better: others are there, and it failed or was too small."""
        self._catch_up(session)
        weight = control.begin()
        self._fill()
        vector, alone, members, total = session.gather_gradients(
            self._flat.buffer, weight, control.data_for_gather, control.get_timeout()
        )
        # Rounds that others do elsewhere are numbered on, too: who counted alone would part from them.
        failed = alone and (session.round_void() or self._others_are_here(session))
        enough = len(members) >= self.min_group_size
        used = enough and not alone and total > 0
        if used and not self.auxiliary:
            self._use(vector)
        if not failed:
            session.epoch_done(None)
            self._share(session, vector if used else None)
        self._log(session)
        done = used or (enough and alone and not failed)
        if not done:
            return None, failed or not enough
        said = {**dict(members), str(self.peer_id): control.data_for_gather}
        return {PeerID.from_base58(peer): _said(said[peer]) for peer, _ in members}, False

    @staticmethod
    def _others_are_here(session: _core.Session) -> bool:
        peers = json.loads(session.status())["peers"]
        return any(not (peer["is_me"] or peer["auxiliary"]) for peer in peers)

    def _wait_until(self, session: _core.Session, control: StepControl) -> bool:
        """Until the round's time has come and somebody is there to average with; whether to begin."""
        while not control.done():
            left = control.scheduled_time - get_dht_time()
            if left <= 0:
                # Somebody to average with: the round itself waits for no fixed time.
                deadline = control.get_timeout()
                here = len(json.loads(session.status())["peers"])
                if deadline is None or here >= self.min_group_size:
                    return True
                if deadline <= 0:
                    # Alone, it counts as a round: whoever comes later takes this peer's number.
                    return here < 2
                left = deadline
            session.changed(min(left, 0.25))
            session.step(0)
        return True

    def _catch_up(self, session: _core.Session) -> None:
        # Rounds are numbered; who comes late takes the number of the others, not their tensors.
        if self.powersgd() is None:
            session.step(0)
            session.follow()
            return
        # The factors go with the number.
        while session.step(0) == "load_state":
            if session.load_state() is None:
                return

    @torch.no_grad()
    def _fill(self) -> None:
        with self.lock_averaged_tensors:
            for view, tensor in zip(self._flat.views, self._tensors, strict=False):
                if view is not tensor:
                    view.copy_(tensor)

    @torch.no_grad()
    def _use(self, vector: _core.FlatBuffer) -> None:
        with self.lock_averaged_tensors:
            for tensor, mean in zip(self._tensors, views_of(vector, self._flat.shapes), strict=False):
                if self.averaging_alpha == 1.0:
                    tensor.copy_(mean)
                else:
                    change = mean.to(tensor.device) - tensor
                    tensor.add_(change.to(tensor.dtype), alpha=self.averaging_alpha)

    def _log(self, session: _core.Session) -> None:
        for loud, line, _ in session.take_events():
            logger.log(30 if loud else 20, "%s: %s", self.prefix, line)

    @contextmanager
    def get_tensors(self) -> Iterator[Sequence[torch.Tensor]]:
        """The tensors, safe from a round that ends meanwhile."""
        with self.lock_averaged_tensors:
            yield self._tensors

    # State of others.

    @property
    def allow_state_sharing(self) -> bool:
        """Whether others may load this peer's tensors."""
        return self._allow_state_sharing

    @allow_state_sharing.setter
    def allow_state_sharing(self, value: bool) -> None:
        self._allow_state_sharing = self._checked_sharing(value)
        if self._session is not None:
            self._share(self._session)

    def _checked_sharing(self, value: bool) -> bool:
        if value and self.client_mode:
            raise ValueError("a client-mode peer cannot be reached, and so it cannot share its state")
        if value and self.auxiliary:
            raise ValueError("an auxiliary peer has no values of its own, and so it has no state to share")
        return bool(value)

    @property
    def state_sharing_priority(self) -> float:
        """Kept for hivemind's scripts: newcomers load the newest round's state, whoever has it."""
        return self._priority

    @state_sharing_priority.setter
    def state_sharing_priority(self, value: float) -> None:
        self._priority = float(value)

    def get_current_state(self) -> tuple[Any, Sequence[torch.Tensor], Sequence[CompressionInfo]]:
        """What others load: facts, tensors and their descriptions."""
        with self.get_tensors() as tensors:
            copies = [t.detach().cpu().clone() for t in tensors]
        described = self._infos or [CompressionInfo(index, None) for index in range(len(copies))]
        infos = [
            CompressionInfo.from_tensor(copy, key=info.key, role=info.role)
            for copy, info in zip(copies, described, strict=True)
        ]
        return {"group_key": self.get_group_bits()}, copies, infos

    def _share(self, session: _core.Session, average: _core.FlatBuffer | None = None) -> None:
        if session.epoch == 0:
            return
        if not self._allow_state_sharing:
            session.publish({}, {})
            return
        if average is not None and self._is_offered_as_it_is():
            facts = {"group_key": self.get_group_bits()}
            sizes = [(f"tensor.{i:06}", 4 * t.numel()) for i, t in enumerate(self._tensors)]
            session.publish_average({"facts": json.dumps(facts)}, average, sizes)
            return
        facts, tensors, infos = self.get_current_state()
        blobs = {f"tensor.{i:06}": t.contiguous() for i, t in enumerate(tensors)}
        encoded = encode_blobs(blobs, list(zip(blobs, infos, strict=True)), self.state_compression)
        session.publish({"facts": json.dumps(facts), **encoded}, blobs)

    def _is_offered_as_it_is(self) -> bool:
        """Whether what others load is what the last round left, which nobody writes to: it need not be copied."""
        own = type(self).get_current_state is not DecentralizedAverager.get_current_state
        plain = self.averaging_alpha == 1.0 and type(self.state_compression) is NoCompression
        return plain and not own and all(t.dtype == torch.float32 for t in self._tensors)

    def load_state_from_peers(self, wait: bool = True, timeout: float | None = None) -> Any:
        """Replace the tensors by the newest state that others offer: ``(facts, tensors)``, or None if none fits."""
        if not wait:
            return self._beside(lambda: self.load_state_from_peers(timeout=timeout))
        if self.session.step(0) != "load_state":
            return None
        loaded = self.session.load_state(timeout)
        if loaded is None:
            return None
        if "facts" not in loaded[1]:
            # Others share no state: only their history is taken over.
            self.session.accept_state()
            return None
        _, meta, blobs = loaded
        try:
            facts, blobs = parsed(meta, "facts", dict), plain_blobs(meta, blobs)
            names = [f"tensor.{i:06}" for i in range(len(self._tensors))]
            tensors = [
                tensor_of(blobs, name, t.dtype, t.shape).clone()
                for name, t in zip(names, self._tensors, strict=True)
            ]
        except ValueError as error:
            return self._refuse(error)
        with torch.no_grad(), self.get_tensors() as mine:
            for tensor, value in zip(mine, tensors, strict=True):
                tensor.copy_(value)
        self.session.accept_state()
        return facts, tensors

    def _refuse(self, reason: ValueError) -> None:
        """Stay with what is here: the state that came does not fit."""
        self.session.refuse_state(str(reason), True)
        # Others are offered what this peer has, and not what it was sent.
        self._share(self.session)
        logger.warning(REFUSED, self.prefix, "", reason)

    @staticmethod
    def _beside(work: Callable[[], Any]) -> StepControl:
        """The outcome of work that a thread of its own does."""
        control = StepControl(get_dht_time(), None, True, 0.0, b"")
        control.allow_allreduce()
        control.thread = threading.Thread(
            target=control.run, args=(lambda _: work(),), name="potluck-beside", daemon=True
        )
        control.thread.start()
        return control

    def get_group_bits(self) -> str:
        """Always empty: potluck averages with every live peer, and divides large swarms by itself."""
        return ""

    def set_group_bits(self, group_bits: str, wait: bool = True) -> None:
        """Refused, unless empty: potluck chooses groups by itself."""
        if group_bits:
            raise ValueError(
                f"group_bits={group_bits!r} cannot have an effect: potluck averages with every live peer"
            )


def _said(raw: bytes) -> Any:
    """What a peer handed to all; None where it is nothing that can be read."""
    try:
        return MSGPackSerializer.loads(raw)
    except (ValueError, TypeError):
        return None


class _Shape:
    def __init__(self, size: Sequence[int]):
        self.size = tuple(size)


def compute_schema_hash(tensors: Sequence[torch.Tensor]) -> bytes:
    """A hash over shapes and types; equal at peers that can average."""
    import hashlib

    described = "|".join(f"{tuple(t.shape)}:{t.dtype}" for t in tensors)
    return hashlib.sha1(described.encode(), usedforsecurity=False).digest()
