"""Exactly one Lightning peer writes shared artefacts, and a plateau's learning rate is one for the whole run."""

from __future__ import annotations

import itertools
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import together

import potluck.utils
from potluck.lightning import _roster, _schedulers
from potluck.lightning._roster import Plan, Roster
from potluck.utils import MSGPackSerializer

_Value = namedtuple("_Value", "value expiration_time")
_PATIENCE_SECONDS = 20.0


class Network:
    """A DHT in memory: the later expiry wins, expired records are gone. Its clock stands unless it is advanced."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, _Value]] = {}
        self.now, self._moments = 1e9, itertools.count()

    def time(self) -> float:
        """A moment later than every one before, or two records of a peer would be equally late."""
        return self.now + 1e-6 * next(self._moments)

    def peer(self, peer_id: str) -> Any:
        return _Door(self, peer_id)


class _Door:
    def __init__(self, network: Network, peer_id: str) -> None:
        self.peer_id, self._network, self.broken = peer_id, network, False
        self.looks = 0

    def store(self, key: str, value: Any, expiration_time: float, subkey: str) -> bool:
        if self.broken:
            raise RuntimeError("shut down")
        entries = self._network.records.setdefault(key, {})
        if subkey in entries and entries[subkey].expiration_time >= expiration_time:
            return False
        entries[subkey] = _Value(value, expiration_time)
        return True

    def get(self, key: str, latest: bool = False) -> Any:
        if self.broken:
            raise RuntimeError("shut down")
        self.looks += 1
        entries = self._network.records.get(key, {})
        live = {
            name: entry for name, entry in entries.items() if entry.expiration_time > self._network.time()
        }
        return _Value(live, 0.0) if live else None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_roster, "_REFRESH_SECONDS", 0.02)


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Any:
    network, entered = Network(), []
    monkeypatch.setattr(potluck.utils, "get_dht_time", network.time)

    def make(peer_id: str, writer: bool | None = None) -> Roster:
        entered.append(Roster(network.peer(peer_id), "run", writer))
        return entered[-1]

    make.network = network
    yield make
    for roster in entered:
        roster.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def test_the_first_peer_writes_whatever_its_name(enter: Any) -> None:
    first, second, third = enter("z"), enter("m"), enter("a")
    assert first.is_writer, "from the beginning"
    eventually(lambda: not first.alone and not third.alone)
    assert [peer.is_writer for peer in (first, second, third)] == [True, False, False]


def test_the_next_takes_over_when_the_writer_leaves(enter: Any) -> None:
    first, second, third = enter("a"), enter("b"), enter("c")
    assert not second.is_writer
    first.close()
    eventually(lambda: second.is_writer and not first._thread.is_alive())
    third._look()
    assert len(third._others) == 1 and not third.is_writer, "it knows that the first has gone"


def test_the_next_takes_over_when_the_writer_dies(enter: Any) -> None:
    first, second = enter("a"), enter("b")
    assert not second.is_writer
    first._dht.broken = True
    enter.network.now += _roster._LIFETIME_SECONDS - 1
    looked = second._dht.looks
    eventually(lambda: second._dht.looks > looked + 1)
    assert not second.is_writer, "its record still holds"
    enter.network.now += 2
    eventually(lambda: second.is_writer)


def test_a_network_that_is_down_does_not_hold_whoever_leaves(
    enter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_roster, "_FAREWELL_SECONDS", 0.1)
    roster, asked, answer = enter("a"), threading.Event(), threading.Event()

    def store(*_args: Any, **_kwargs: Any) -> bool:
        asked.set()
        return answer.wait(10 * _PATIENCE_SECONDS)

    monkeypatch.setattr(roster._dht, "store", store)
    assert asked.wait(_PATIENCE_SECONDS)
    leaving = threading.Thread(target=roster.close)
    leaving.start()
    leaving.join(_PATIENCE_SECONDS)
    assert not leaving.is_alive() and not answer.is_set()
    answer.set()
    eventually(lambda: not roster._thread.is_alive())


def test_a_tie_goes_to_the_lower_id(enter: Any) -> None:
    one, other = enter("b"), enter("a")
    other._number = one._number = 0
    other._changed.set()
    one._changed.set()
    eventually(lambda: other.is_writer and not one.is_writer)


def test_of_those_that_start_at_once_one_writes_from_the_beginning(enter: Any) -> None:
    network = enter.network
    doors = {name: network.peer(name) for name in "ab"}
    both_looked = threading.Barrier(2, timeout=_PATIENCE_SECONDS)

    def first_look_together(door: Any) -> None:
        plain = door.get

        def get(key: str, latest: bool = False) -> Any:
            found = plain(key, latest)
            if door.get is get:
                door.get = plain
                both_looked.wait()
            return found

        door.get = get

    for door in doors.values():
        first_look_together(door)
    rosters = together(*(partial(Roster, door, "run", None) for door in doors.values()))
    try:
        assert sum(roster.is_writer for roster in rosters) <= 1, "two think that they are the first"
        eventually(lambda: sum(roster.is_writer for roster in rosters) == 1)
    finally:
        for roster in rosters:
            roster.close()


def test_told_otherwise(enter: Any) -> None:
    quiet, automatic = enter("a", writer=False), enter("b")
    assert not quiet.is_writer
    eventually(lambda: automatic.is_writer)
    forced = enter("c", writer=True)
    assert forced.is_writer
    eventually(lambda: not automatic.is_writer)


def test_foreign_records_are_passed_over(enter: Any) -> None:
    first = enter("a")
    door = enter.network.peer("x")
    for subkey, value in (("x", "hello"), ("y", [1]), ("w", [1, 0, ["?", None]]), ("v", None)):
        door.store("run_lightning", value, enter.network.time() + 60, subkey)
    second = enter("b")
    assert not second.is_writer
    eventually(lambda: not first.alone)
    assert first.is_writer and list(first._others) == ["b"] and list(second._others) == ["a"]


@pytest.mark.parametrize(
    "value",
    [
        [float("inf"), 0, None],
        [0, float("nan"), None],
        [-1, 0, None],
        [2**64 - 1, 0, None],
        [0, 0, [float("inf"), [0.5]]],
        *([0, 1, [0, [rate]]] for rate in (float("inf"), float("nan"), -0.5, 10**400, "0.5")),
        [0, 1, [0, [0.5] * 10_000]],
        [0, 7, None],
    ],
    ids=str,
)
def test_a_record_that_a_stranger_made_up_stops_nobody(enter: Any, value: Any) -> None:
    first = enter("m")
    enter.network.peer("x").store("run_lightning", value, enter.network.time() + 60, "x")
    looked = first._dht.looks
    eventually(lambda: first._dht.looks > looked + 1)
    second = enter("z")
    eventually(lambda: list(first._others) == ["z"])
    assert list(second._others) == ["m"] and second.plan() is None
    assert (first.is_writer, second.is_writer) == (True, False)
    assert first._thread.is_alive() and second._thread.is_alive()


def test_the_highest_number_of_a_stranger_leaves_newcomers_one_that_can_be_sent(enter: Any) -> None:
    first = enter("m")
    stranger = [_roster._COUNT_MAX, -1, None]
    enter.network.peer("x").store("run_lightning", stranger, enter.network.time() + 60, "x")
    second = enter("z")
    eventually(lambda: sorted(first._others) == ["x", "z"])
    MSGPackSerializer.dumps(enter.network.records["run_lightning"]["z"].value)
    assert (first.is_writer, second.is_writer) == (True, False)


def test_a_strangers_record_without_subkeys_is_passed_over(enter: Any) -> None:
    first = enter("m")
    door = first._dht
    door.get = lambda key, latest=False: _Value({"x": 5, "y": [0, 0, None], 7: None}, 0.0)
    first._look()
    assert first.alone and first.is_writer


def plateau(roster: Roster, epoch: list[int]) -> tuple[Any, _schedulers.SharedPlateau]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return scheduler, _schedulers.SharedPlateau(scheduler, roster, lambda: epoch[0])


def rate(scheduler: Any) -> float:
    return scheduler.optimizer.param_groups[0]["lr"]


def test_a_plateau_alone_is_plain_torch(enter: Any) -> None:
    roster, epoch = enter("a"), [3]
    scheduler, shared = plateau(roster, epoch)
    plain = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), factor=0.5, patience=0
    )
    for metric in (1.0, 2.0, 0.5, 0.6, 0.7):
        scheduler.step(metric)
        plain.step(metric)
        shared.follow()
        assert rate(scheduler) == rate(plain)
    state = scheduler.state_dict()
    assert state.keys() == plain.state_dict().keys()
    shared.release()
    assert type(scheduler) is torch.optim.lr_scheduler.ReduceLROnPlateau


def test_all_peers_take_the_writers_rate_at_the_same_epoch(enter: Any) -> None:
    writer, follower = enter("a"), enter("b")
    eventually(lambda: not writer.alone)
    at, behind = [5], [5]
    mine, my_share = plateau(writer, at)
    theirs, their_share = plateau(follower, behind)
    mine.step(1.0)
    mine.step(2.0)
    for _ in range(9):
        theirs.step(100.0)  # the follower's own metric decides nothing
    eventually(lambda: follower.plan() is not None)
    plan = follower.plan()
    assert plan == Plan(plan.epoch, (0.5,)) and plan.epoch > at[0]
    for share in (my_share, their_share):
        share.follow()
    assert (rate(mine), rate(theirs)) == (1.0, 1.0)
    at[0] = behind[0] = plan.epoch
    for share in (my_share, their_share):
        share.follow()
    assert (rate(mine), rate(theirs)) == (0.5, 0.5)


def test_fast_epochs_give_the_others_time_to_hear(enter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, _follower = enter("a"), enter("b")
    eventually(lambda: not writer.alone)
    at, now = [0], [0.0]
    mine, share = plateau(writer, at)
    share._pace = _schedulers.Pace(lambda: now[0])
    for epoch in range(50):  # four a second
        at[0], now[0] = epoch, epoch * 0.25
        share.follow()
    monkeypatch.setattr(_roster, "_REFRESH_SECONDS", 2.0)
    mine.step(1.0)
    mine.step(2.0)
    plan = writer.plan()
    assert plan is not None and plan.epoch == 49 + 6 * 4, "three looks of two seconds each"
    mine.step(3.0)
    assert writer.plan() == plan, "one decision at a time"
    at[0] = plan.epoch
    share.follow()
    assert rate(mine) == 0.5
    mine.step(3.0)
    assert writer.plan().rates == (0.25,)  # type: ignore[union-attr]
