"""Peers over loopback sockets: records, addresses, tokens, validators, manners."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck import _core
from potluck.dht import DHT, DHTRecord, RecordValidatorBase
from potluck.utils import get_dht_time

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
    with pytest.raises(ValueError, match="cannot have an effect"):
        DHT(start=False, use_ipfs=True)


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
from potluck import DHT
dht = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
print("ready", flush=True)
try:
    DHT(["/ip4/127.0.0.1/tcp/9/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"], start=True,
        bootstrap_timeout=60, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out == "interrupted\n" and process.returncode == 0
    assert time.monotonic() - begun < 5
