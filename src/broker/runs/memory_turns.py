"""Recorded turns in memory: for tests, and for a server that is told to keep nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from broker.runs.turn_pieces import SWEEP_AFTER, Packed, names_and_blocks, names_in, pack, unpacked
from broker.runs.turns import Turn


@dataclass(slots=True)
class _Kept:
    """Of one conversation: turns, oldest first, and their pieces. forgotten: turns since the pieces were looked through."""

    turns: list[Packed] = field(default_factory=list)
    pieces: dict[str, bytes] = field(default_factory=dict)
    forgotten: int = 0


class MemoryTurnStore:
    """Turns kept in memory, bounded by what `add` is told to keep."""

    name = "memory"

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def add(self, turn: Turn, *, keep: int) -> None:
        packed = await pack(turn)
        kept = self._kept.setdefault(turn.conv_id, _Kept())
        for name, body in packed.pieces.items():
            kept.pieces.setdefault(name, body)
        kept.turns.append(Packed(_without_content(turn), packed.body, packed.names, {}, {}))
        self._forget(kept, kept.turns[: max(0, len(kept.turns) - keep)])

    async def get(self, conv_id: str, turn_id: str) -> Turn | None:
        found = [packed for packed in self._newest_first(conv_id) if packed.turn.turn_id == turn_id]
        return next(iter(self._unpacked(conv_id, found[:1])), None)

    async def turns(
        self, conv_id: str, *, run_id: str | None = None, phase: str | None = None, limit: int = 100
    ) -> list[Turn]:
        found = [
            packed
            for packed in self._newest_first(conv_id)
            if run_id in (None, packed.turn.run_id) and phase in (None, packed.turn.phase)
        ]
        return self._unpacked(conv_id, found[:limit])

    async def prune(self, before_ms: int) -> int:
        count = 0
        for conv_id, kept in list(self._kept.items()):
            old = [packed for packed in kept.turns if packed.turn.created_at_ms < before_ms]
            count += len(old)
            self._forget(kept, old)
            if not kept.turns:
                del self._kept[conv_id]
        return count

    async def erase(self, conv_id: str) -> None:
        self._kept.pop(conv_id, None)

    def size_bytes(self, conv_id: str) -> int:
        """Return how much is kept of a conversation."""
        kept = self._kept.get(conv_id, _Kept())
        return sum(len(packed.body) for packed in kept.turns) + sum(map(len, kept.pieces.values()))

    def _newest_first(self, conv_id: str) -> Iterator[Packed]:
        return reversed(self._kept.get(conv_id, _Kept()).turns)

    def _unpacked(self, conv_id: str, found: list[Packed]) -> list[Turn]:
        pieces = self._kept.get(conv_id, _Kept()).pieces
        return unpacked(
            [packed.body for packed in found], lambda names: [(name, pieces[name]) for name in names if name in pieces]
        )

    def _forget(self, kept: _Kept, turns: list[Packed]) -> None:
        if not turns:
            return
        gone = {id(packed) for packed in turns}
        kept.turns = [packed for packed in kept.turns if id(packed) not in gone]
        kept.forgotten += len(turns)
        if kept.forgotten >= SWEEP_AFTER:
            kept.forgotten = 0
            used, blocks = names_and_blocks(packed.body for packed in kept.turns)
            used.update(names_in(kept.pieces[block] for block in blocks))
            kept.pieces = {name: body for name, body in kept.pieces.items() if name in used}


def _without_content(turn: Turn) -> Turn:
    return Turn(turn.turn_id, turn.conv_id, turn.session_id, turn.run_id, turn.phase, turn.created_at_ms)
