"""A peer of the network, and the records that peers share."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import signal
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from potluck import _core
from potluck.dht import _hivemind_options
from potluck.dht.validation import CompositeValidator, DHTRecord, RecordValidatorBase
from potluck.p2p.multiaddr import Multiaddr
from potluck.p2p.peer_id import PeerID
from potluck.utils.logging import get_logger
from potluck.utils.serializer import MSGPackSerializer
from potluck.utils.timed_storage import DHTExpiration, ValueWithExpiration, get_dht_time

logger = get_logger("potluck")
# What the token of a `potluck node` says that was not told of a run: it is there for all of them.
_NO_RUN = "potluck"
# Every join token begins so, and no address.
TOKEN_PREFIX = "potluck"
T = TypeVar("T")
_live: weakref.WeakSet[DHT] = weakref.WeakSet()


class DHT:
    """One peer: give it to optimizers and averagers, or store and get small records with it.

    ``initial_peers`` are addresses (``/ip4/…/tcp/…/p2p/…``) or one join token of peers that are there already; none
    starts a new swarm. It runs in threads of this process; nothing is forked and nothing is left behind.
    """

    def __init__(
        self,
        initial_peers: Sequence[Multiaddr | str] | str | None = None,
        *,
        start: bool,
        p2p: None = None,
        daemon: bool = True,
        num_workers: int = 4,
        record_validators: Iterable[RecordValidatorBase] = (),
        shutdown_timeout: float = 3,
        await_ready: bool = True,
        host_maddrs: Sequence[Multiaddr | str] | None = None,
        announce_maddrs: Sequence[Multiaddr | str] | None = None,
        client_mode: bool = False,
        identity_path: str | os.PathLike[str] | None = None,
        nat_port_map: bool = True,
        num_replicas: int = 5,
        wait_timeout: float = 3.0,
        bootstrap_timeout: float | None = None,
        relay_server: bool = False,
        ensure_bootstrap_success: bool = True,
        **kwargs: Any,
    ):
        _hivemind_options.check({"p2p": p2p, "daemon": daemon, **kwargs})
        self._invites: dict[str, str] = {}
        self._token_runs: set[str] = set()
        self.initial_peers = _addresses(initial_peers, self._invites, self._token_runs)
        self.client_mode = bool(client_mode)
        self.shutdown_timeout = shutdown_timeout
        self._ensure_bootstrap = bool(ensure_bootstrap_success)
        self._bootstrap_seconds = 20.0 if bootstrap_timeout is None else float(bootstrap_timeout)
        self._options = {
            "listen": None if host_maddrs is None else [_modern(str(Multiaddr(a))) for a in host_maddrs],
            "announce": [str(Multiaddr(a)) for a in announce_maddrs or ()],
            "bootstrap": self.initial_peers,
            "identity_path": None if identity_path is None else os.fspath(identity_path),
            "client_mode": self.client_mode,
            "relay_server": relay_server,
            "port_mapping": bool(nat_port_map),
            "num_replicas": num_replicas,
            "rpc_timeout": float(wait_timeout),
        }
        self._validators = CompositeValidator(record_validators)
        self._node: _core.Node | None = None
        self._owned: list[weakref.ReferenceType[Any]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._num_workers = num_workers
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        if start:
            self.run_in_background(await_ready=await_ready)

    @classmethod
    def within_process(cls, hub: _core.Hub) -> DHT:
        """A peer that meets others of this process only, for tests and notebooks. It stores no records."""
        dht = cls(start=False)
        dht._node = _core.Node.local(hub)
        dht._ready.set()
        _live.add(dht)
        return dht

    # Life.

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """Start. Waits until an initial peer is connected, unless there is none or ``await_ready`` is false.

        If none comes it is an error, or with ``ensure_bootstrap_success=False`` a warning: they are tried again.
        """
        if self._node is not None:
            raise RuntimeError("this DHT runs already")
        self._node = _core.Node.start(json.dumps(self._options))
        _live.add(self)
        _leave_on_sigterm()
        if self.initial_peers and await_ready:
            try:
                self.wait_until_ready(timeout)
            except _core.PeerError as error:
                if self._ensure_bootstrap:
                    self.shutdown()
                    raise
                logger.warning("going on alone, and trying them again meanwhile: %s", error)
            except BaseException:
                self.shutdown()
                raise
        self._ready.set()

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait for a connection to one of the initial peers; if none comes, say what failed for each address."""
        connected, lines = self.node.wait_bootstrapped(
            self._bootstrap_seconds if timeout is None else timeout
        )
        if not connected and self.initial_peers:
            raise _core.PeerError("could not reach any of the initial peers:\n  " + "\n  ".join(lines))

    @property
    def node(self) -> _core.Node:
        """The Rust side; an error before the start and after the end."""
        if self._node is None:
            raise RuntimeError(
                "this DHT does not run: call run_in_background(), or create it with start=True"
            )
        return self._node

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._node is not None

    def own(self, shutdown: weakref.ReferenceType[Any]) -> None:
        """Something that is to be shut down before the network goes."""
        self._owned = [reference for reference in self._owned if reference() is not None]
        self._owned.append(shutdown)

    def shutdown(self) -> None:
        """Leave. Idempotent; done at exit as well."""
        if os.getpid() != self._pid:
            return
        for reference in self._owned:
            stop = reference()
            if stop is not None:
                stop()
        self._owned = []
        with self._lock:
            node, self._node = self._node, None
            loop, self._loop = self._loop, None
            pool, self._pool = self._pool, None
        if loop is not None:
            loop.call_soon_threadsafe(_cancel_and_stop, loop)
        if node is not None:
            node.shutdown(float(self.shutdown_timeout))
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> DHT:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    # Records.

    def store(
        self,
        key: Any,
        value: Any,
        expiration_time: DHTExpiration,
        subkey: Any = None,
        return_future: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Keep a value under a key (or a subkey of it) until ``expiration_time``; whether a node holds it now."""
        if kwargs:
            raise TypeError(f"store() got an unexpected keyword argument {next(iter(kwargs))!r}")
        return self._call(lambda: self._store(key, value, expiration_time, subkey), return_future)

    def _store(self, key: Any, value: Any, expiration_time: DHTExpiration, subkey: Any) -> bool:
        lifetime = expiration_time - get_dht_time()
        if lifetime <= 0:
            return False
        key_bytes = _key(key)
        subkey_bytes = None if subkey is None else MSGPackSerializer.dumps(subkey)
        record = DHTRecord(
            key_bytes, subkey_bytes or b"\xc0", MSGPackSerializer.dumps(value), expiration_time
        )
        signed = self._validators.sign_value(record)
        return self.node.store(key_bytes, subkey_bytes, signed, lifetime) > 0

    def get(self, key: Any, latest: bool = False, return_future: bool = False, **kwargs: Any) -> Any:
        """The value under a key with its expiration, a dictionary of them if it has subkeys, or None."""
        if kwargs:
            raise TypeError(f"get() got an unexpected keyword argument {next(iter(kwargs))!r}")
        return self._call(lambda: self._get(key, latest), return_future)

    def _get(self, key: Any, latest: bool) -> ValueWithExpiration[Any] | None:
        key_bytes = _key(key)
        now, found = get_dht_time(), self.node.get(key_bytes, latest)
        if found is None:
            return None
        values: dict[Any, ValueWithExpiration[Any]] = {}
        for subkey, raw, left in found:
            record = DHTRecord(key_bytes, subkey or b"\xc0", raw, now + left)
            if not self._validators.validate(record):
                continue
            try:
                value = MSGPackSerializer.loads(self._validators.strip_value(record))
                if subkey is None:
                    return ValueWithExpiration(value, now + left)
                values[MSGPackSerializer.loads(subkey)] = ValueWithExpiration(value, now + left)
            except (ValueError, TypeError):
                # A stranger wrote something that is no value; others' records are not affected.
                continue
        return (
            ValueWithExpiration(values, max(v.expiration_time for v in values.values())) if values else None
        )

    def _call(self, work: Callable[[], T], return_future: bool) -> T | Future[T]:
        if not return_future:
            return work()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="potluck-dht")
        return self._pool.submit(work)

    def add_validators(self, record_validators: Iterable[RecordValidatorBase]) -> None:
        """Rules that records must obey from now on."""
        self._validators.extend(record_validators)

    def run_coroutine(
        self, coro: Callable[[DHT, DHTNode], Awaitable[T]], return_future: bool = False
    ) -> T | Future[T]:
        """Run ``await coro(dht, node)`` in a thread of this process; ``node`` has async ``get`` and ``store``.

        What still runs when the DHT is shut down is cancelled.
        """
        node = DHTNode(self)
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run_loop, args=(self._loop,), name="potluck-asyncio", daemon=True
                ).start()
        future = asyncio.run_coroutine_threadsafe(_awaited(coro(self, node)), self._loop)
        return future if return_future else future.result()

    # Identity.

    @property
    def peer_id(self) -> PeerID:
        """Who this peer is."""
        return PeerID.from_base58(self.node.peer_id)

    def get_visible_maddrs(self, latest: bool = False) -> list[Multiaddr]:
        """Addresses under which others reach this peer, best first; always the latest."""
        return [Multiaddr(address) for address in self.node.addresses()]

    def token(self, run_id: str, invite: bool = False) -> str:
        """One line that lets another machine join a run: ``DHT(initial_peers=token)``.

        The token of a closed run that this peer is in holds the invite, so whoever gets it can join.
        ``invite=True`` signs one: this peer is the owner of the closed run.
        """
        if invite:
            self._invites[run_id] = self.node.invite(run_id)
        return self.node.token(run_id, self._invites.get(run_id))

    def admission(self, run_id: str, owner: PeerID | str | None) -> tuple[str | None, str | None]:
        """Owner and invite of a run, for those who join it: both None if it is open.

        Raises ``ValueError`` if the run is closed to this peer.
        """
        self._warn_of_another_run(run_id)
        if owner is None:
            if run_id in self._invites:
                raise ValueError(
                    f"the token holds an invite, so the run {run_id!r} is closed: give owner=, its owner's peer id"
                )
            return None, None
        name = str(owner)
        if len(PeerID.from_base58(name).to_bytes()) < 34:
            raise ValueError(
                f"owner={name!r}: expected a peer id such as 12D3KooW…, as `potluck keygen` prints"
            )
        if name == self.node.peer_id:
            self._invites[run_id] = self.node.invite(run_id)
        if run_id not in self._invites:
            raise ValueError(
                f"the run {run_id!r} is closed and this peer has no invite: join with a token that holds one, or be "
                "the owner, with identity_path= of the owner's key"
            )
        return name, self._invites[run_id]

    def named_runs(self) -> list[str]:
        """The runs that the tokens in ``initial_peers`` are for."""
        return sorted(self._token_runs - {_NO_RUN})

    def _warn_of_another_run(self, run_id: str) -> None:
        """Whoever joins another run than the token's meets nobody of it, which looks like a broken network."""
        if run_id in self._token_runs or not (others := self.named_runs()):
            return
        names = " and ".join(map(repr, others))
        logger.warning(
            "the token is for the run %s, this program joins the run %r: it will not meet those who train the other",
            names,
            run_id,
        )
        self._token_runs.add(run_id)

    def __repr__(self) -> str:
        where = "not running" if self._node is None else self._node.peer_id
        return f"DHT({where})"


class DHTNode:
    """What ``run_coroutine`` hands to the coroutine: the same DHT with async methods."""

    def __init__(self, dht: DHT):
        self._dht = dht
        self.peer_id = dht.peer_id

    async def store(self, key: Any, value: Any, expiration_time: DHTExpiration, subkey: Any = None) -> bool:
        """As :meth:`DHT.store`."""
        return await asyncio.to_thread(self._dht._store, key, value, expiration_time, subkey)

    async def get(self, key: Any, latest: bool = False) -> ValueWithExpiration[Any] | None:
        """As :meth:`DHT.get`."""
        return await asyncio.to_thread(self._dht._get, key, latest)

    async def get_many(
        self, keys: Iterable[Any], sufficient_expiration_time: float | None = None
    ) -> dict[Any, ValueWithExpiration[Any] | None]:
        """Several keys at once."""
        wanted = list(keys)
        found = await asyncio.gather(
            *(self.get(key, sufficient_expiration_time is not None) for key in wanted)
        )
        return dict(zip(wanted, found, strict=True))

    async def get_visible_maddrs(self, latest: bool = False) -> list[Multiaddr]:
        """As :meth:`DHT.get_visible_maddrs`."""
        return self._dht.get_visible_maddrs(latest)


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _cancel_and_stop(loop: asyncio.AbstractEventLoop) -> None:
    """Who waits for a coroutine that can no longer end learns so."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    ended = asyncio.gather(*tasks, return_exceptions=True) if tasks else None
    if ended is None:
        loop.stop()
    else:
        ended.add_done_callback(lambda _: loop.stop())


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _key(key: Any) -> bytes:
    return MSGPackSerializer.dumps(key)


def _addresses(
    initial_peers: Sequence[Multiaddr | str] | str | None, invites: dict[str, str], runs: set[str]
) -> list[str]:
    """Addresses of the peers to ask first; what their tokens say of runs goes into ``invites`` and ``runs``."""
    if initial_peers is None:
        return []
    given = initial_peers.split(",") if isinstance(initial_peers, str) else list(initial_peers)
    addresses: list[str] = []
    for item in given:
        text = str(item).strip()
        if text.startswith(TOKEN_PREFIX):
            run_id, bootstrap, invite = _core.Node.read_token(text)
            addresses += bootstrap
            runs.add(run_id)
            if invite is not None:
                invites[run_id] = invite
        else:
            maddr = Multiaddr(text)
            if maddr.peer_id is None:
                raise ValueError(
                    f"initial_peers: {text} lacks the peer id: expected …/p2p/<peer id> at its end"
                )
            addresses.append(_modern(str(maddr)))
    return addresses


def initial_addresses(initial_peers: Sequence[Multiaddr | str] | str) -> list[str]:
    """The addresses that these peers would be asked at, whether they are addresses or a token."""
    return _addresses(initial_peers, {}, set())


def _modern(address: str) -> str:
    # hivemind's documents recommend the draft of QUIC that nobody speaks any more.
    return address if "/quic-v1" in address else address.replace("/quic", "/quic-v1")


def _shutdown_all() -> None:
    for dht in list(_live):
        with contextlib.suppress(Exception):
            dht.shutdown()


def _leave_on_sigterm() -> None:
    """Say goodbye when the system asks us to end (containers, spot machines), unless the program handles that."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def leave(signum: int, frame: object) -> None:
        _shutdown_all()
        # End as the sender of the signal expects: by the signal.
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)

    signal.signal(signal.SIGTERM, leave)


atexit.register(_shutdown_all)
