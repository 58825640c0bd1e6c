"""Values that expire, and the clock they expire by."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

DHTExpiration = float
MAX_DHT_TIME_DISCREPANCY_SECONDS = 3
ROOT = 0
KeyType = TypeVar("KeyType")
ValueType = TypeVar("ValueType")


def get_dht_time() -> DHTExpiration:
    """Seconds since 1970: what expiration times of records are given in."""
    return time.time()


class ValueWithExpiration(NamedTuple, Generic[ValueType]):
    """A value, and the DHT time until which it may be used."""

    value: ValueType
    expiration_time: DHTExpiration


class TimedStorage(Generic[KeyType, ValueType]):
    """A dictionary of at most ``maxsize`` values that expire; of two values for a key the later expiry wins."""

    def __init__(self, maxsize: int | None = None):
        self.maxsize = float("inf") if maxsize is None else maxsize
        self.data: dict[KeyType, ValueWithExpiration[ValueType]] = {}
        self.expiration_heap: list[tuple[DHTExpiration, int, KeyType]] = []
        self.frozen = False
        self._serial = 0

    def _remove_outdated(self) -> None:
        if self.frozen:
            return
        while self.expiration_heap and (
            self.expiration_heap[0][0] < get_dht_time() or len(self.data) > self.maxsize
        ):
            expiration, _, key = heapq.heappop(self.expiration_heap)
            held = self.data.get(key)
            if held is not None and held.expiration_time == expiration:
                del self.data[key]

    def store(self, key: KeyType, value: ValueType, expiration_time: DHTExpiration) -> bool:
        """Keep a value; false if it has expired or a value that lives longer is held."""
        held = self.data.get(key)
        if expiration_time < get_dht_time() and not self.frozen:
            return False
        if held is not None and held.expiration_time >= expiration_time:
            return False
        self.data[key] = ValueWithExpiration(value, expiration_time)
        self._serial += 1
        heapq.heappush(self.expiration_heap, (expiration_time, self._serial, key))
        self._remove_outdated()
        return key in self.data

    def get(self, key: KeyType) -> ValueWithExpiration[ValueType] | None:
        """The value, or None if there is none or it has expired."""
        self._remove_outdated()
        return self.data.get(key)

    def items(self) -> Iterator[tuple[KeyType, ValueWithExpiration[ValueType]]]:
        """Every live key and value."""
        self._remove_outdated()
        return iter(list(self.data.items()))

    def top(self) -> tuple[KeyType, ValueWithExpiration[ValueType]] | None:
        """The entry that expires first."""
        self._remove_outdated()
        if not self.data:
            return None
        return min(self.data.items(), key=lambda entry: entry[1].expiration_time)

    def clear(self) -> None:
        """Forget everything."""
        self.data.clear()
        self.expiration_heap.clear()

    def __contains__(self, key: KeyType) -> bool:
        self._remove_outdated()
        return key in self.data

    def __len__(self) -> int:
        self._remove_outdated()
        return len(self.data)

    def __delitem__(self, key: KeyType) -> None:
        self.data.pop(key, None)

    def __bool__(self) -> bool:
        return len(self) > 0

    def __iter__(self) -> Iterator[KeyType]:
        self._remove_outdated()
        return iter(list(self.data))

    @contextmanager
    def freeze(self) -> Iterator[TimedStorage[KeyType, ValueType]]:
        """Inside this context nothing expires."""
        before, self.frozen = self.frozen, True
        try:
            yield self
        finally:
            self.frozen = before
