"""Background tasks that end with their owner."""

from __future__ import annotations

import asyncio
import gc

import pytest

from broker.tasks import Tasks


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
