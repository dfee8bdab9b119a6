"""Long work on the event loop, in steps: between them everybody else has their turn."""

from __future__ import annotations

import asyncio

ROWS_PER_STEP = 100
BYTES_PER_STEP = 65_536
"""Of JSON or text, whichever comes first: some milliseconds. One row is never divided; the largest is an envelope."""


class Pauses:
    """Counts what was done in this turn of the loop. Call `after` each row."""

    __slots__ = ("_rows", "_size")

    def __init__(self) -> None:
        self._rows = self._size = 0

    async def after(self, size: int) -> None:
        """Take note of a row of `size` bytes or characters; let others go on if it was enough for one turn."""
        self._rows += 1
        self._size += size
        if self._rows >= ROWS_PER_STEP or self._size >= BYTES_PER_STEP:
            self._rows = self._size = 0
            await asyncio.sleep(0)
