"""Background tasks: kept while they run, forgotten when they are over, ended with their owner."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from broker.tasks import Tasks


async def test_a_task_that_nobody_else_holds_runs_to_its_end() -> None:
    """The event loop alone would let the collector take it."""
    tasks = Tasks()
    done: list[str] = []
    wakers: weakref.WeakSet[asyncio.Future[None]] = weakref.WeakSet()

    async def work() -> None:
        waker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wakers.add(waker)
        await waker
        done.append("done")

    tasks.spawn(work())
    await asyncio.sleep(0)
    assert len(tasks) == 1
    gc.collect()
    for waker in list(wakers):
        waker.set_result(None)
    del waker
    for _ in range(3):
        await asyncio.sleep(0)
    assert done == ["done"]
    assert len(tasks) == 0


async def test_a_result_and_an_error_reach_whoever_awaits_the_task() -> None:
    tasks = Tasks()

    async def work(fails: bool) -> int:
        if fails:
            raise LookupError("nothing there")
        return 7

    assert await tasks.spawn(work(False)) == 7
    with pytest.raises(LookupError, match="nothing there"):
        await tasks.spawn(work(True))
    assert len(tasks) == 0


async def test_the_end_cancels_what_runs_and_waits_for_it() -> None:
    """Also for one that takes its time to end, and for one that ends with an error of its own."""
    tasks = Tasks()
    ended: list[str] = []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            for _ in range(5):
                await asyncio.sleep(0)
            ended.append(name)
            if name == "fails":
                raise RuntimeError("on its way out") from None
            raise

    spawned = [tasks.spawn(work(name)) for name in ("slow", "fails")]
    await asyncio.sleep(0)
    await tasks.close()
    assert sorted(ended) == ["fails", "slow"]
    assert [task.done() for task in spawned] == [True, True]
    assert spawned[0].cancelled()
    assert len(tasks) == 0


async def test_the_end_of_nothing_is_nothing() -> None:
    await Tasks().close()
