"""hivemind's small helpers for asynchronous code do what their names say."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from potluck.utils import asyncio as helpers


async def listed(aiterable: Any) -> list[Any]:
    return [item async for item in aiterable]


def test_iterators() -> None:
    async def main() -> None:
        numbers = helpers.as_aiter
        assert await listed(helpers.azip(numbers(1, 2, 3), helpers.iter_as_aiter("ab"))) == [
            (1, "a"),
            (2, "b"),
        ]
        assert await listed(helpers.achain(numbers(1), numbers(), numbers(2, 3))) == [1, 2, 3]
        assert await listed(helpers.aenumerate(numbers("x", "y"))) == [(0, "x"), (1, "y")]
        assert await helpers.asingle(numbers(7)) == 7
        for wrong in (numbers(), numbers(1, 2)):
            with pytest.raises(ValueError, match="exactly one"):
                await helpers.asingle(wrong)
        iterator = numbers(5).__aiter__()
        assert await helpers.anext(iterator) == 5
        with pytest.raises(StopAsyncIteration):
            await helpers.anext(iterator)
        finished = asyncio.Event()
        assert await listed(helpers.attach_event_on_finished(numbers(1), finished)) == [1]
        assert finished.is_set()

    asyncio.run(main())


def test_threads_keep_the_order_and_hand_errors_on() -> None:
    def slower_first(number: int) -> int:
        time.sleep(0.02 if number == 1 else 0)
        if number == 9:
            raise RuntimeError("nine")
        return -number

    async def endless() -> AsyncIterator[int]:
        number = 0
        while True:
            number += 1
            yield number

    async def main() -> None:
        mapped = helpers.amap_in_executor(slower_first, helpers.as_aiter(1, 2, 3), max_prefetch=3)
        assert await listed(mapped) == [-1, -2, -3]
        seen = []
        with pytest.raises(RuntimeError, match="nine"):
            async for value in helpers.amap_in_executor(slower_first, endless(), max_prefetch=2):
                seen.append(value)
        assert seen == [-n for n in range(1, 9)]
        async for value in (mapped := helpers.amap_in_executor(abs, endless())):
            if value == 3:
                break
        await mapped.aclose()

    asyncio.run(main())


def test_waiting_and_cancelling() -> None:
    async def stuck() -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    async def main() -> None:
        seen = []
        with pytest.raises(asyncio.TimeoutError):
            async for item in helpers.aiter_with_timeout(stuck(), 0.05):
                seen.append(item)
        assert seen == [1]
        task = asyncio.create_task(asyncio.Event().wait())
        assert await helpers.cancel_and_wait(task)
        helpers.cancel_task_if_running(task)
        helpers.cancel_task_if_running(None)
        running = asyncio.create_task(asyncio.Event().wait())
        helpers.cancel_task_if_running(running)
        assert await helpers.await_cancelled(running)
        assert not await helpers.await_cancelled(asyncio.sleep(0))

    asyncio.run(main())


def test_a_lock_is_entered_beside_the_event_loop() -> None:
    async def main() -> None:
        lock = threading.Lock()
        lock.acquire()

        async def enter() -> None:
            async with helpers.enter_asynchronously(lock):
                assert lock.locked()

        waiting = asyncio.create_task(enter())
        await asyncio.sleep(0.02)
        assert not waiting.done(), "and yet the event loop runs"
        given_up = asyncio.create_task(enter())
        await asyncio.sleep(0.02)
        given_up.cancel()
        lock.release()
        await waiting
        assert await helpers.await_cancelled(given_up)
        assert lock.acquire(timeout=5), "whoever gave up has let go"

    asyncio.run(main())
