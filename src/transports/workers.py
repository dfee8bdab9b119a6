"""Several server processes behind one listening socket: started together, replaced when one dies, ended together."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

logger = logging.getLogger("broker.workers")

RESPAWN_DELAY_S = 1.0
"""A worker that dies is replaced after this time, so that one that cannot live does not burn the machine."""


class Workers:
    """The parent of `count` worker processes. work(index): what a worker does; returns its exit code.

    final_codes: exit codes after which nobody is replaced: the others are ended, and the code is the result.
    """

    def __init__(self, count: int, work: Callable[[int], int], *, final_codes: frozenset[int]) -> None:
        self._count = count
        self._work = work
        self._final_codes = final_codes
        self._pids: dict[int, int] = {}
        self._stopping = False
        self._result = 0

    def run(self) -> int:
        """Start the workers and stay until all have ended after a signal; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for index in range(self._count):
            self._start(index)
        while self._pids:
            pid, status = os.waitpid(-1, 0)  # a signal only interrupts it: it goes on waiting
            if pid in self._pids:
                self._ended(self._pids.pop(pid), pid, os.waitstatus_to_exitcode(status))
        return self._result

    def _ended(self, index: int, pid: int, code: int) -> None:
        if self._stopping:
            if code not in (-signal.SIGTERM, -signal.SIGINT):  # else it had not begun to serve yet
                self._result = self._result or code
            return
        if code in self._final_codes:
            self._result = code
            self._stop(signal.SIGTERM)
            return
        logger.error("worker %d (process %d) ended with %d: another one takes its place", index, pid, code)
        time.sleep(RESPAWN_DELAY_S)
        if not self._stopping:
            self._start(index)

    def _start(self, index: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._pids[pid] = index
            return
        code = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            code = self._work(index)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            logger.exception("worker %d failed", index)
        finally:
            os._exit(code)  # the parent's way out of here is not the worker's

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        self._stopping = True
        for pid in list(self._pids):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
