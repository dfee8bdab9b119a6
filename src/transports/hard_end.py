"""The end of a process in which something does not end: tasks and threads that plugins started and nobody can stop.

asyncio waits for cancelled tasks and for the threads of `asyncio.to_thread` without a limit. One that swallows its
cancellation, or hangs in a thread, would keep a drained server from ever being replaced.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import sysconfig
import threading
from types import FrameType

logger = logging.getLogger("broker.server")

_STDLIB = sysconfig.get_paths()["stdlib"]

END_TIMEOUT_S = 3.0


async def end_the_rest(timeout_s: float = END_TIMEOUT_S) -> list[str]:
    """Cancel every other task and wait for them and for threads; return what did not end, in words."""
    loop, own = asyncio.get_running_loop(), asyncio.current_task()
    tasks = {task for task in asyncio.all_tasks() if task is not own}
    for task in tasks:
        task.cancel()
    stuck = [_told(task) for task in (await asyncio.wait(tasks, timeout=timeout_s))[1]] if tasks else []
    workers = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    ending = loop.create_task(loop.shutdown_default_executor())
    if not (await asyncio.wait({ending}, timeout=timeout_s))[0]:
        stuck += [_told_thread(thread) for thread in workers if thread.is_alive()] or ["a thread"]
    return stuck


def end_hard(stuck: list[str], code: int) -> None:
    """End the process without waiting for what is `stuck`, named in the log; return where nothing is."""
    if not stuck:
        return
    for each in stuck:
        logger.error("%s did not end; the process ends without it", each)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _told(task: asyncio.Task[object]) -> str:
    frames = task.get_stack(limit=1)
    return f"task {task.get_name()} ({_place(frames[-1]) if frames else task.get_coro()!r})"


def _told_thread(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_STDLIB):
        frame = frame.f_back  # who waits, not how waiting is done
    return f"thread {thread.name} ({_place(frame) if frame is not None else 'nowhere'})"


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_qualname}, {frame.f_code.co_filename}, line {frame.f_lineno}"
