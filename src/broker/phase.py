"""The phase of a process: whether it has started, is draining, or could not start. Small, so that anybody may hold it."""

from __future__ import annotations


class Phase:
    """Where a process stands between start and stop. Written by the lifecycle, read by everybody else.

    started: it serves. draining: it is shutting down, which is never taken back. start_problem: why the last try to start
    failed, None if none did.
    """

    __slots__ = ("draining", "start_problem", "started")

    def __init__(self) -> None:
        self.started = False
        self.draining = False
        self.start_problem: str | None = None

    @property
    def serves(self) -> bool:
        """Whether new callers are taken: started, and not draining."""
        return self.started and not self.draining
