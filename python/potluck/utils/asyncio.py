"""hivemind's small helpers for asynchronous code."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")
_DONE: Any = object()


def switch_to_uvloop() -> asyncio.AbstractEventLoop:
    """A new event loop, made the current one. It is asyncio's own: potluck's network is not in Python."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_event_loop_policy().get_event_loop().stop()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


async def anext(aiter: AsyncIterator[T]) -> T:
    """The next item; ``StopAsyncIteration`` at the end."""
    return await aiter.__anext__()


async def iter_as_aiter(iterable: Iterable[T]) -> AsyncIterator[T]:
    """An iterable as an asynchronous one."""
    for item in iterable:
        yield item


async def as_aiter(*args: T) -> AsyncIterator[T]:
    """The arguments, one by one."""
    for item in args:
        yield item


async def azip(*iterables: AsyncIterable[Any]) -> AsyncIterator[tuple[Any, ...]]:
    """As ``zip``: ends with the shortest."""
    iterators = [iterable.__aiter__() for iterable in iterables]
    while iterators:
        try:
            yield tuple(await asyncio.gather(*(iterator.__anext__() for iterator in iterators)))
        except StopAsyncIteration:
            return


async def achain(*async_iters: AsyncIterable[T]) -> AsyncIterator[T]:
    """One after the other."""
    for iterable in async_iters:
        async for item in iterable:
            yield item


async def aenumerate(aiterable: AsyncIterable[T]) -> AsyncIterator[tuple[int, T]]:
    """As ``enumerate``."""
    index = 0
    async for item in aiterable:
        yield index, item
        index += 1


async def asingle(aiter: AsyncIterable[T]) -> T:
    """The only item; ``ValueError`` if there is none or a second."""
    found = [item async for item in _at_most(aiter, 2)]
    if len(found) != 1:
        raise ValueError("asingle() expects exactly one item, found " + ("none" if not found else "more"))
    return found[0]


async def _at_most(aiterable: AsyncIterable[T], count: int) -> AsyncIterator[T]:
    async for item in aiterable:
        yield item
        count -= 1
        if count == 0:
            return


async def await_cancelled(awaitable: Awaitable[Any]) -> bool:
    """Wait; whether it ended by being cancelled."""
    try:
        await awaitable
        return False
    except (asyncio.CancelledError, concurrent.futures.CancelledError):
        return True
    except Exception:
        # It ended, though not by being cancelled: its owner reads the error.
        return False


async def cancel_and_wait(awaitable: asyncio.Future[Any]) -> bool:
    """Cancel; whether it ended by that."""
    awaitable.cancel()
    return await await_cancelled(awaitable)


def cancel_task_if_running(task: asyncio.Task[Any] | None) -> None:
    """Cancel, unless it has ended or was never there."""
    if task is not None and not task.done() and not task.get_loop().is_closed():
        task.cancel()


async def amap_in_executor(
    func: Callable[..., T],
    *iterables: AsyncIterable[Any],
    max_prefetch: int = 1,
    executor: concurrent.futures.Executor | None = None,
) -> AsyncIterator[T]:
    """Apply ``func`` in threads, at most ``max_prefetch`` ahead of the reader; results keep their order."""
    if max_prefetch < 1:
        raise ValueError(f"max_prefetch={max_prefetch!r}: expected at least 1")
    results: asyncio.Queue[Any] = asyncio.Queue(max_prefetch)
    loop = asyncio.get_running_loop()

    async def feed() -> None:
        try:
            async for arguments in azip(*iterables):
                await results.put(loop.run_in_executor(executor, func, *arguments))
            await results.put(_DONE)
        except Exception as error:
            failed: asyncio.Future[Any] = loop.create_future()
            failed.set_exception(error)
            await results.put(failed)

    feeder = asyncio.create_task(feed())
    try:
        while (result := await results.get()) is not _DONE:
            yield await result
    finally:
        feeder.cancel()
        await await_cancelled(feeder)
        while not results.empty():
            left = results.get_nowait()
            if left is not _DONE:
                left.cancel()


async def aiter_with_timeout(iterable: AsyncIterable[T], timeout: float | None) -> AsyncIterator[T]:
    """Each item must come within ``timeout`` seconds, else ``asyncio.TimeoutError``."""
    iterator = iterable.__aiter__()
    while True:
        try:
            item = await asyncio.wait_for(iterator.__anext__(), timeout)
        except StopAsyncIteration:
            return
        yield item


async def attach_event_on_finished(iterable: AsyncIterable[T], event: asyncio.Event) -> AsyncIterator[T]:
    """Set ``event`` when the reader has read all, or gives up."""
    try:
        async for item in iterable:
            yield item
    finally:
        event.set()


@contextlib.asynccontextmanager
async def enter_asynchronously(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter a context, such as a lock that may be held for long, without stopping the event loop."""
    loop = asyncio.get_running_loop()
    entering = loop.run_in_executor(None, context.__enter__)
    try:
        value = await asyncio.shield(entering)
    except asyncio.CancelledError:
        # The thread still gets in; it must get out again.
        await asyncio.shield(entering)
        context.__exit__(None, None, None)
        raise
    try:
        yield value
    except BaseException as error:
        if not context.__exit__(type(error), error, error.__traceback__):
            raise
    else:
        context.__exit__(None, None, None)
