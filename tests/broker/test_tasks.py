"""Background tasks that end with their owner."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from broker.tasks import Tasks, each


async def test_a_task_is_kept_until_it_is_done_and_no_longer() -> None:
    tasks, gate = Tasks(), asyncio.Event()

    async def work() -> str:
        await gate.wait()
        return "done"

    task = tasks.spawn(work(), name="work")
    await asyncio.sleep(0)
    gc.collect()
    assert list(tasks) == [task]
    assert len(tasks) == 1
    assert task.get_name() == "work"
    gate.set()
    assert await task == "done"
    await asyncio.sleep(0)
    assert not tasks


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


async def test_waiting_ends_with_the_tasks_or_with_the_time() -> None:
    tasks, gate = Tasks(), asyncio.Event()
    await tasks.wait()  # nothing to wait for
    task = tasks.spawn(gate.wait())
    await tasks.wait(0.01)
    assert not task.done()
    gate.set()
    await tasks.wait()
    assert task.done()


async def test_closing_cancels_what_runs_and_waits_for_its_end() -> None:
    tasks, ended = Tasks(), []

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    async def failing() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("at the end")

    tasks.spawn(work())
    failed = tasks.spawn(failing())
    await asyncio.sleep(0)
    await tasks.close()
    assert ended == [True]
    assert not tasks
    with pytest.raises(ValueError, match="at the end"):
        failed.result()


async def test_each_step_is_taken_whatever_the_others_do_and_the_first_failure_is_raised() -> None:
    taken: list[str] = []

    async def first() -> None:
        taken.append("first")
        raise ValueError("first")

    def second() -> None:
        taken.append("second")
        raise KeyError("second")

    async def third() -> None:
        taken.append("third")

    with pytest.raises(ValueError, match="first"):
        await each(first, second, third)
    assert taken == ["first", "second", "third"]
    await each(third)
