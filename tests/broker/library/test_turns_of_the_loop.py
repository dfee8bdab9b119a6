"""Long conversations are indexed, imported, forked and exported in steps: others have their turn in between."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import Core

import broker.library.filling
import broker.library.forking
import broker.library.indexing
import broker.library.jsonl
import broker.timeline.sqlite
from broker.pauses import BYTES_PER_STEP, ROWS_PER_STEP
from broker.security import Principal

ME = Principal("me")
MESSAGES = 3000


class Steps:
    """Counts for each turn of the loop, as another task sees them, how much was done of each kind in it."""

    def __init__(self) -> None:
        self.turn = 0
        self.rows: dict[str, Counter[int]] = {}
        self.sizes: dict[str, Counter[int]] = {}

    def watch(
        self, patch: pytest.MonkeyPatch, module: Any, name: str, size: Callable[..., int] = lambda *_, **__: 0
    ) -> None:
        done, loop = getattr(module, name), threading.current_thread()
        rows, sizes = self.rows.setdefault(name, Counter()), self.sizes.setdefault(name, Counter())

        def counted(*args: Any, **more: Any) -> Any:
            if threading.current_thread() is loop:
                rows[self.turn] += 1
                sizes[self.turn] += size(*args, **more)
            return done(*args, **more)

        patch.setattr(module, name, counted)

    def most(self) -> dict[str, int]:
        """The most rows of each kind in one turn."""
        return {name: max(rows.values(), default=0) for name, rows in self.rows.items()}

    def total(self) -> dict[str, int]:
        return {name: sum(rows.values()) for name, rows in self.rows.items()}

    @asynccontextmanager
    async def counting(self) -> AsyncIterator[None]:
        async def go_round() -> None:
            while True:
                self.turn += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(go_round())
        try:
            yield
        finally:
            other.cancel()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    steps.watch(monkeypatch, broker.library.indexing, "terms_of", len)
    steps.watch(monkeypatch, broker.library.forking, "drafts_of", lambda entity, **_: len(entity.props["text"]))
    steps.watch(monkeypatch, broker.library.filling, "encode_json", len)
    steps.watch(monkeypatch, broker.library.forking, "_unheard")
    steps.watch(monkeypatch, broker.library.jsonl, "_object", lambda _, line: len(line))
    steps.watch(monkeypatch, broker.timeline.sqlite, "_entity")
    steps.watch(monkeypatch, broker.timeline.sqlite, "_row")
    return steps


def a_file(texts: list[str]) -> bytes:
    lines: list[dict[str, Any]] = [
        {"format": "conversation-broker.conversation", "version": 1, "convId": "x", "exportedAtMs": 1}
    ]
    for number, text in enumerate(texts):
        kind = "llm.final" if number % 2 else "user.message"
        lines.append(
            {"type": kind, "id": f"m{number}", "channel": "sem", "timeMs": 1000 + number, "data": {"text": text}}
        )
    lines.append({"end": True, "envelopes": len(texts), "title": None, "metadata": {}})
    return b"\n".join(map(orjson.dumps, lines))


async def test_import_index_fork_and_export_take_many_turns(tmp_path: Path, steps: Steps) -> None:
    texts = [f"word{number} of many" for number in range(MESSAGES)]
    db = str(tmp_path / "broker.db")
    async with steps.counting(), Core(db) as core:
        library = core.broker.doors.library
        await library.import_(ME, a_file(texts), new_id="long")
        await library.fork(ME, "long", f"m{MESSAGES - 1}", new_id="copy")
        exported = [line async for line in await library.export(ME, "copy")]
        assert len(exported) == MESSAGES + 2
        assert len((await library.find(ME, query="many")).conversations) == 2
    async with steps.counting(), Core(db) as core:  # nothing of it is in memory
        await core.broker.doors.library.fork(ME, "long", f"m{MESSAGES - 1}", new_id="another")
    assert min(steps.total()[name] for name in ("terms_of", "drafts_of", "_object", "_entity")) >= MESSAGES
    limits = dict.fromkeys(steps.rows, 2 * ROWS_PER_STEP) | {"_entity": 257, "encode_json": 202}
    assert {name: most for name, most in steps.most().items() if most > limits[name]} == {}


async def test_large_texts_make_small_steps(tmp_path: Path, steps: Steps) -> None:
    texts = ["x y " * 5000 for _ in range(60)]  # 20,000 characters each
    async with steps.counting(), Core(str(tmp_path / "broker.db")) as core:
        library = core.broker.doors.library
        await library.import_(ME, a_file(texts), new_id="long")
        await library.fork(ME, "long", "m59", new_id="copy")
    largest = {name: max(steps.sizes[name].values(), default=0) for name in ("terms_of", "drafts_of", "_object")}
    assert min(largest.values()) > 0
    # A text more than a step, and two may be at it in one turn: the copy, and who saves what it has so far.
    assert max(largest.values()) < 2 * (BYTES_PER_STEP + 20_000), largest
