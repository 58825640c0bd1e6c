"""Which of the run's Lightning peers writes shared artefacts (checkpoints, logs), and the learning rate they share.

Each peer keeps one short-lived record in the DHT. The writer is the peer that arrived first: a newcomer takes a number
above all that it sees, also after it has announced itself, ties go to the lower peer id, and when the writer's record expires the next in order takes over.
Numbers, not clocks, so that peers whose clocks differ agree.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("potluck.lightning")

_REFRESH_SECONDS = 2.0
_LIFETIME_SECONDS = 10.0
_FAREWELL_SECONDS = 1.0

_LEFT, _NEVER, _AUTOMATIC, _ALWAYS = -2, -1, 0, 1

# What is believed of a record, which anybody may have written. msgpack has room for more, and so have own numbers.
_COUNT_MAX = 2**62
# One for each parameter group; no record of the DHT has room for more.
_RATES_MAX = 8192


@dataclass(frozen=True)
class Plan:
    """Learning rates, one per parameter group, that hold from a shared epoch on."""

    epoch: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class _Record:
    number: int
    choice: int
    plan: Plan | None

    def encode(self) -> list[Any]:
        plan = None if self.plan is None else [self.plan.epoch, list(self.plan.rates)]
        return [self.number, self.choice, plan]

    @classmethod
    def decode(cls, value: Any) -> _Record | None:
        """None for what is not a record: another program's, a newer version's, or what a stranger made up."""
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            return None
        number, choice, plan = value
        if not _is_count(number) or type(choice) is not int or not _LEFT <= choice <= _ALWAYS:
            return None
        if plan is None:
            return cls(number, choice, None)
        if not isinstance(plan, (list, tuple)) or len(plan) != 2:
            return None
        epoch, rates = plan
        if not _is_count(epoch) or not isinstance(rates, (list, tuple)) or len(rates) > _RATES_MAX:
            return None
        if not all(type(rate) is float and 0 <= rate < math.inf for rate in rates):
            return None
        return cls(number, choice, Plan(epoch, tuple(rates)))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _COUNT_MAX


class Roster:
    """This peer's entry among the run's Lightning peers, refreshed in the background."""

    def __init__(self, dht: Any, run_id: str, writer: bool | None) -> None:
        self._dht = dht
        self._key = f"{run_id}_lightning"
        self._me = str(dht.peer_id)
        self._choice = _AUTOMATIC if writer is None else (_ALWAYS if writer else _NEVER)
        self._plan: Plan | None = None
        self._others: dict[str, _Record] = {}
        self._look()
        self._number = self._next_number()
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._announce()
        # Of several that start at once, each has announced itself before it looks: none is the first that sees another.
        self._look()
        if self._number < self._next_number():
            self._number = self._next_number()
            self._announce()
        self._thread = threading.Thread(target=self._keep, name="potluck-roster", daemon=True)
        self._thread.start()

    @property
    def is_writer(self) -> bool:
        """Whether this peer is the one that writes shared artefacts."""
        if self._choice != _AUTOMATIC:
            return self._choice == _ALWAYS
        others = self._others
        if any(record.choice == _ALWAYS for record in others.values()):
            return False
        mine = (self._number, self._me)
        return all(mine < (r.number, peer) for peer, r in others.items() if r.choice == _AUTOMATIC)

    @property
    def alone(self) -> bool:
        """Whether no other Lightning peer is known in this run."""
        return not self._others

    def publish(self, plan: Plan) -> None:
        """Tell the others, as the writer, which learning rates hold from which epoch on."""
        self._plan = plan
        self._changed.set()

    def plan(self) -> Plan | None:
        """The plan that holds for the whole run: the writer's."""
        if self.is_writer:
            return self._plan
        plans = [r for _, r in sorted(self._others.items()) if r.plan is not None and r.choice != _NEVER]
        best = min(plans, key=lambda r: (r.choice != _ALWAYS, r.number), default=None)
        return None if best is None else best.plan

    def close(self) -> None:
        """Stop refreshing and say that this peer left, so that the next in order takes over at once.

        Whoever cannot be told within a moment sees the record expire: a network that is down holds nobody here. Idempotent.
        """
        self.leave()
        self._thread.join(_FAREWELL_SECONDS)

    def leave(self) -> None:
        """As :meth:`close`, without waiting for it."""
        self._stop.set()
        self._changed.set()

    def _next_number(self) -> int:
        """Above all that are known, and one that the others believe."""
        return min(_COUNT_MAX, 1 + max((record.number for record in self._others.values()), default=-1))

    def _keep(self) -> None:
        while not self._stop.is_set():
            self._changed.wait(_REFRESH_SECONDS)
            self._changed.clear()
            if not self._stop.is_set():
                self._announce()
                self._look()
        # In the DHT the later expiry wins, so a record is taken back by a newer one that says so.
        self._announce(_LEFT)

    def _announce(self, choice: int | None = None) -> None:
        from potluck.utils import get_dht_time

        record = _Record(self._number, self._choice if choice is None else choice, self._plan)
        expiration = get_dht_time() + _LIFETIME_SECONDS
        try:
            self._dht.store(self._key, record.encode(), expiration_time=expiration, subkey=self._me)
        except Exception as error:  # the DHT may be shutting down; the record then expires by itself
            _log.debug("the roster record was not stored: %s", error)

    def _look(self) -> None:
        try:
            found = self._dht.get(self._key, latest=True)
        except Exception as error:  # keep the last view; the next look corrects it
            _log.debug("the roster was not read: %s", error)
            return
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        # A stranger's record without subkeys may be a dictionary, too, and has no entries of the DHT in it.
        decoded = {
            peer: _Record.decode(getattr(entry, "value", None))
            for peer, entry in entries.items()
            if isinstance(peer, str) and peer != self._me
        }
        self._others = {peer: r for peer, r in decoded.items() if r is not None and r.choice != _LEFT}
