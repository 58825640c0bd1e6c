"""Peers over loopback sockets: records, addresses, tokens, validators, manners."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from pasted import CTRL_C_SECONDS

from potluck import _core
from potluck.dht import DHT, DHTRecord, RecordValidatorBase
from potluck.utils import BatchTensorDescriptor, MSGPackSerializer, get_dht_time

LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False}


@pytest.fixture
def peer() -> Iterator[Callable[..., DHT]]:
    made: list[DHT] = []

    def make(*initial: DHT, **kwargs: Any) -> DHT:
        addresses = [address for dht in initial for address in dht.get_visible_maddrs()]
        made.append(DHT(addresses, start=True, **{**LOOPBACK, **kwargs}))
        return made[-1]

    yield make
    for dht in made:
        dht.shutdown()


def eventually(check: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(0.05)


def test_what_is_stored_before_the_dht_has_joined_is_with_others_at_once(peer: Callable[..., DHT]) -> None:
    one = peer()
    two = peer(one, await_ready=False)
    assert two.store("early", 1, get_dht_time() + 60)
    assert one.get("early", latest=True).value == 1


def test_records_with_and_without_subkeys(peer: Callable[..., DHT]) -> None:
    one = peer()
    two = peer(one)
    expires = get_dht_time() + 60
    assert eventually(lambda: two.store("colour", {"name": "blue", "rgb": (0, 0, 255)}, expires))
    found = eventually(lambda: one.get("colour", latest=True))
    assert found.value == {"name": "blue", "rgb": (0, 0, 255)}
    assert abs(found.expiration_time - expires) < 5
    assert two.store("scores", 3, expires, subkey="a") and one.store("scores", [4], expires, subkey=b"b")
    values = eventually(lambda: (v := two.get("scores", latest=True)) and len(v.value) == 2 and v).value
    assert {key: entry.value for key, entry in values.items()} == {"a": 3, b"b": [4]}
    assert one.get("nothing") is None
    assert not one.store("late", 1, get_dht_time() - 1)
    assert one.store("future", 1, expires, return_future=True).result(20)


def test_the_latest_value_is_asked_of_all_who_may_have_it(peer: Callable[..., DHT]) -> None:
    one = peer(num_replicas=2)
    two = peer(one, num_replicas=1)
    keys, now = [f"key {index}" for index in range(24)], get_dht_time()
    for key in keys:
        # With both of them; the next one only with the nearer, which is the other one for some of the keys.
        assert one.store(key, "old", now + 60) and two.store(key, "new", now + 120)
    assert [one.get(key, latest=True).value for key in keys] == ["new"] * len(keys)
    assert {one.get(key).value for key in keys} == {"old", "new"}, "its own copy is enough"


def test_a_token_and_a_comma_list_are_ways_to_join(peer: Callable[..., DHT]) -> None:
    one = peer()
    for initial in (one.token("run"), ",".join(map(str, one.get_visible_maddrs()))):
        with DHT(initial, start=True, **LOOPBACK) as two:
            assert two.peer_id != one.peer_id
            assert str(one.peer_id) in str(one.get_visible_maddrs()[0])


def test_unreachable_initial_peers_are_named_with_the_reason() -> None:
    dead = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    with pytest.raises(_core.PeerError, match=r"127\.0\.0\.1/tcp/9"):
        DHT([dead], start=True, bootstrap_timeout=3, **LOOPBACK)
    with pytest.raises(ValueError, match="lacks the peer id"):
        DHT(["/ip4/127.0.0.1/tcp/9"], start=False)
    with pytest.raises(ValueError, match="not a multiaddress"):
        DHT(["127.0.0.1:9"], start=False)
    with pytest.raises(TypeError, match="unexpected keyword"):
        DHT(start=False, initial_pears=[])


@pytest.mark.parametrize(
    ("option", "useless", "useful", "reason"),
    [
        ("use_relay", False, True, "no direct way"),
        ("tls", False, True, "encrypted"),
        ("dht_mode", "client", "server", "client_mode=True"),
        ("cache_locally", "yes", False, ""),
        ("cache_on_store", "yes", False, ""),
        ("strict", False, True, "identity"),
        ("quic", True, None, "host_maddrs"),
        ("use_relay_hop", True, None, "host_maddrs"),
        ("use_relay_discovery", True, None, "host_maddrs"),
        ("use_ipfs", True, False, "initial_peers"),
        ("auto_nat", False, True, "by itself"),
        ("conn_manager", False, True, "bounds"),
        ("relay_hop_limit", 3, 0, "relay_server=True"),
        ("persistent_conn_max_msg_size", 1, 4 << 20, "in pieces"),
        ("check_if_identity_free", False, True, "one identity"),
        ("bucket_size", 8, 20, "by itself"),
        ("depth_modulo", 3, 5, "by itself"),
        ("parallel_rpc", 4, None, "by itself"),
        ("chunk_size", 4, 16, "by itself"),
        ("cache_size", 100, None, "no copies"),
        ("cache_nearest", 3, 0, "no copies"),
        ("reuse_get_requests", False, True, "by itself"),
        ("daemon", False, True, "threads of this process"),
        ("p2p", object(), None, "no side daemon"),
        ("node_id", 5, None, "key"),
        ("no_listen", True, False, "client_mode=True"),
        ("trusted_relays", ["x"], None, "relays"),
        ("force_reachability", "private", None, "by itself"),
        ("authorizer", object(), None, "invites"),
        ("record_validator", object(), None, "record_validators"),
    ],
)
def test_an_option_that_cannot_have_an_effect_says_so(
    option: str, useless: Any, useful: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"{option}=.* cannot have an effect: .*{reason}"):
        DHT(start=False, **{option: useless})
    DHT(start=False, **{option: useful})


def test_hiveminds_clocks_are_accepted() -> None:
    DHT(
        start=False,
        blacklist_time=1.0,
        backoff_rate=3.0,
        refresh_timeout=9.0,
        idle_timeout=1,
        startup_timeout=1,
    )
    DHT(start=False, cache_refresh_before_expiry=1, use_auto_relay=True)


def test_a_peer_may_start_although_its_initial_peers_are_away(
    peer: Callable[..., DHT], caplog: pytest.LogCaptureFixture
) -> None:
    dead = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    options = {**LOOPBACK, "bootstrap_timeout": 0.5, "ensure_bootstrap_success": False}
    with DHT([dead], start=True, **options) as alone:
        assert alone.is_alive() and "going on alone" in caplog.text and "127.0.0.1/tcp/9" in caplog.text
        assert peer(alone).peer_id != alone.peer_id, "others can join it"


class EvenOnly(RecordValidatorBase):
    def validate(self, record: DHTRecord) -> bool:
        return record.value[-1] % 2 == 0


def test_validators_hide_what_breaks_their_rule(peer: Callable[..., DHT]) -> None:
    one = peer()
    two = peer(one)
    expires = get_dht_time() + 60
    assert eventually(lambda: two.store("n", 3, expires, subkey="odd"))
    assert two.store("n", 4, expires, subkey="even")
    assert eventually(lambda: (v := one.get("n", latest=True)) and len(v.value) == 2)
    one.add_validators([EvenOnly()])
    assert list(one.get("n", latest=True).value) == ["even"]


def test_a_coroutine_runs_beside(peer: Callable[..., DHT]) -> None:
    one = peer()

    async def work(dht: DHT, node: Any) -> Any:
        await node.store("k", 5, get_dht_time() + 30)
        return (await node.get("k")).value

    assert one.run_coroutine(work) == 5
    assert one.run_coroutine(work, return_future=True).result(20) == 5


def test_a_coroutines_node_takes_several_keys_and_no_argument_without_effect(
    peer: Callable[..., DHT],
) -> None:
    one = peer()

    async def work(dht: DHT, node: Any) -> Any:
        await node.store("k", 5, get_dht_time() + 30)
        found = await node.get_many(["k", "none"])
        assert await node.get_visible_maddrs() == dht.get_visible_maddrs()
        with pytest.raises(TypeError, match="await_all_replicas"):
            await node.store("k", 6, get_dht_time() + 30, await_all_replicas=False)
        with pytest.raises(TypeError, match="sufficient_expiration_time"):
            await node.get("k", sufficient_expiration_time=0.0)
        return found

    found = one.run_coroutine(work)
    assert found["k"].value == 5 and found["none"] is None


def test_the_description_of_a_batch_is_a_value(peer: Callable[..., DHT]) -> None:
    """Extension 0x51 of msgpack, as in hivemind."""
    torch = pytest.importorskip("torch")
    one = peer()
    described = BatchTensorDescriptor(
        4, 3, dtype=torch.float16, device=torch.device("cpu"), requires_grad=True
    )
    assert one.store("batch", described, get_dht_time() + 30)
    found = one.get("batch").value
    assert type(found) is BatchTensorDescriptor and found == described
    assert found.make_zeros(2).shape == (2, 4, 3)
    for damaged in ({"size": [0, 1], "other": 1}, {"size": [0, 1], "dtype": "torch.load"}, [0], {"size": 3}):
        with pytest.raises(ValueError):
            BatchTensorDescriptor.unpackb(MSGPackSerializer.dumps(damaged))


def test_a_coroutine_that_fails_says_why(peer: Callable[..., DHT]) -> None:
    one = peer()

    async def fails(dht: DHT, node: Any) -> None:
        raise LookupError(f"nothing at {node.peer_id}")

    with pytest.raises(LookupError, match=str(one.peer_id)):
        one.run_coroutine(fails)
    future = one.run_coroutine(fails, return_future=True)
    assert isinstance(future.exception(20), LookupError)


def test_a_coroutine_does_not_outlive_its_dht(peer: Callable[..., DHT]) -> None:
    one, began, ended = peer(), threading.Event(), threading.Event()

    async def waits(dht: DHT, node: Any) -> None:
        began.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    future = one.run_coroutine(waits, return_future=True)
    assert began.wait(20)
    one.shutdown()
    with pytest.raises(CancelledError):
        future.result(20)
    assert ended.wait(20)
    with pytest.raises(RuntimeError, match="does not run"):
        one.run_coroutine(waits)
    names = [thread.name for thread in threading.enumerate()]
    assert eventually(lambda: "potluck-asyncio" not in [t.name for t in threading.enumerate()]), names


def test_the_identity_file_keeps_the_peer_id(peer: Callable[..., DHT], tmp_path: Path) -> None:
    path = tmp_path / "identity"
    first = peer(identity_path=path)
    name = first.peer_id
    with pytest.raises(ValueError, match="identity_path"):
        DHT(start=True, identity_path=path, **LOOPBACK)
    first.shutdown()
    assert peer(identity_path=path).peer_id == name


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
def test_ctrl_c_interrupts_a_wait_and_leaves_nothing() -> None:
    code = """
import sys, threading
from potluck import DHT
dht = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
main = threading.main_thread().ident
def tell():
    # The next thing that this function of the main thread does, or what it does already, is to wait without the GIL.
    while sys._current_frames()[main].f_code.co_name != "wait_until_ready":
        pass
    print("waits", flush=True)
threading.Thread(target=tell, daemon=True).start()
try:
    DHT(["/ip4/127.0.0.1/tcp/9/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"], start=True,
        bootstrap_timeout=60, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=CTRL_C_SECONDS)
    assert out == "interrupted\n" and process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be stopped there")
def test_a_store_that_nobody_answers_ends_with_the_dht(peer: Callable[..., DHT]) -> None:
    """The other one is there and silent; what waits for it would wait on after this one has left."""
    code = """
import sys
from potluck import DHT
dht = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
print(dht.get_visible_maddrs()[0], flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    silent = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    try:
        assert silent.stdout is not None
        one = DHT([silent.stdout.readline().strip()], start=True, wait_timeout=600, **LOOPBACK)
        assert one.store("k", 1, get_dht_time() + 60)
        silent.send_signal(signal.SIGSTOP)
        waiting = [
            one.store("k", 2, get_dht_time() + 90, return_future=True),
            one.get("k", latest=True, return_future=True),
        ]
        assert eventually(lambda: all(future.running() for future in waiting))
        one.shutdown()
        for future in waiting:
            # Its streams end first, and then what this one holds itself may be the answer.
            error = future.exception(20)
            assert error is None or "shut down" in str(error) or "does not run" in str(error)
    finally:
        silent.kill()
        silent.communicate()
