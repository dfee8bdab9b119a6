"""Runs kept in memory: for tests, and for a server that is told to keep nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from broker.runs.state import ACTIVE, Run, RunStatus, Verdict, changed, decided, given_up, next_to_begin
from broker.runs.store import Admitted, ConversationState, KeyRecord, Prepared, answer_of, queue_full


class MemoryRunStore:
    """A RunStore in dicts. No method awaits anything, which is what makes each atomic on the event loop."""

    name = "memory"

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._by_conv: dict[str, list[str]] = {}
        self._keys: dict[tuple[str, str], KeyRecord] = {}
        self._conversations: dict[str, ConversationState] = {}
        self._opaque: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        self._saves = 0
        self._saves_skipped = 0

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def prepare(self, run: Run, *, record: KeyRecord | None, max_queued: int) -> Prepared:
        if record is not None and (known := self._keys.get((record.scope, record.key))):
            return Prepared(None, record=known)
        mine = self._of(run.conv_id)
        waiting = [other for other in mine if other.status == "queued"]
        free = not waiting and not any(other.status in ACTIVE for other in mine)
        if not free and len(waiting) >= max_queued:
            raise queue_full(run.conv_id, max_queued)
        run = replace(run, order=max((other.order for other in mine), default=0) + 1)
        status: Literal["started", "queued"] = "started" if free else "queued"
        position = 0 if free else len(waiting) + 1
        self._put(run)
        self._by_conv.setdefault(run.conv_id, []).append(run.run_id)
        if record is not None:
            record = replace(record, conv_id=run.conv_id, answer=answer_of(run, status, position))
            self._keys[record.scope, record.key] = record
        before = self._conversations.get(run.conv_id) or ConversationState(run.conv_id, run.session_id)
        self._conversations[run.conv_id] = replace(before, engine_profile=run.engine_profile)
        return Prepared(run, status, position, record)

    async def discard(self, run_id: str) -> bool:
        run = self._runs.get(run_id)
        if run is None or run.status != "queued" or run.announced:
            return False
        del self._runs[run_id]
        self._by_conv[run.conv_id].remove(run_id)
        self._keys = {k: r for k, r in self._keys.items() if r.answer.get("run_id") != run_id}
        self._saves += 1
        return True

    async def admit(self, run_id: str, now_ms: int) -> Admitted:
        run = self._runs.get(run_id)
        if run is None:
            return Admitted(None, None)
        first = next_to_begin(self._of(run.conv_id), admitted=run_id)
        begins = first is not None and first.run_id == run_id
        changes = {"announced": True, **({"status": "running"} if begins else {})}
        run = await self.update(run_id, frozenset({"queued"}), changes, now_ms) or run
        return Admitted(run, run if begins else await self.claim(run.conv_id, now_ms))

    async def claim(self, conv_id: str, now_ms: int) -> Run | None:
        first = next_to_begin(self._of(conv_id))
        if first is None:
            return None
        return await self.update(first.run_id, frozenset({"queued"}), {"status": "running"}, now_ms)

    async def update(
        self, run_id: str, expect: frozenset[RunStatus], changes: Mapping[str, Any], now_ms: int
    ) -> Run | None:
        run = self._runs.get(run_id)
        new = changed(run, expect, changes, now_ms) if run else None
        if new is run:
            self._saves_skipped += new is not None
        elif new is not None:
            self._put(new)
        return new

    async def decide(self, run_id: str, verdict: Verdict, now_ms: int) -> tuple[Run | None, dict[str, str]]:
        run = self._runs.get(run_id)
        if run is None or run.status != "awaiting_tool_approval":
            return None, {}
        calls, outcomes = decided(run, verdict)
        return await self.update(run_id, frozenset({run.status}), {"calls": calls}, now_ms), outcomes

    async def give_up_calls(self, run_id: str, call_ids: frozenset[str], now_ms: int) -> Run | None:
        run = self._runs.get(run_id)
        if run is None or run.status != "awaiting_tool_approval":
            return None
        return await self.update(run_id, frozenset({run.status}), {"calls": given_up(run, call_ids)}, now_ms)

    async def move_to_front(self, run_id: str, now_ms: int) -> Run | None:
        run = self._runs.get(run_id)
        if run is None or run.status != "queued":
            return None
        first = min(other.order for other in self._of(run.conv_id) if other.status == "queued")
        order = run.order if run.order == first else first - 1
        return await self.update(run_id, frozenset({"queued"}), {"order": order}, now_ms)

    async def get(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    async def active(self, conv_id: str) -> Run | None:
        return next((run for run in self._of(conv_id) if run.status in ACTIVE), None)

    async def queued(self, conv_id: str) -> list[Run]:
        return sorted((run for run in self._of(conv_id) if run.status == "queued"), key=lambda run: run.order)

    async def runs(self, conv_id: str, *, limit: int | None) -> list[Run]:
        return self._of(conv_id)[::-1][:limit]

    async def unsettled(self) -> list[Run]:
        open_runs = [run for run in self._runs.values() if not run.settled]
        return sorted(open_runs, key=lambda run: (run.conv_id, run.order))

    async def key(self, scope: str, key: str) -> KeyRecord | None:
        return self._keys.get((scope, key))

    async def prune_keys(self, before_ms: int) -> int:
        count = len(self._keys)
        self._keys = {k: record for k, record in self._keys.items() if record.created_at_ms >= before_ms}
        return count - len(self._keys)

    async def conversation(self, conv_id: str) -> ConversationState | None:
        return self._conversations.get(conv_id)

    async def save_conversation(self, state: ConversationState, *, of_run: str | None = None) -> None:
        if self._conversations.get(state.conv_id) == state or (of_run is not None and of_run not in self._runs):
            self._saves_skipped += 1
            return
        self._conversations[state.conv_id] = state
        self._saves += 1

    async def save_opaque(
        self, conv_id: str, message_id: str, data: Sequence[Mapping[str, Any]], *, of_run: str | None = None
    ) -> None:
        if of_run is None or of_run in self._runs:
            self._opaque.setdefault(conv_id, {})[message_id] = list(data)

    async def opaque(self, conv_id: str) -> dict[str, list[Mapping[str, Any]]]:
        return dict(self._opaque.get(conv_id, {}))

    async def erase(self, conv_id: str) -> None:
        for run_id in self._by_conv.pop(conv_id, ()):
            del self._runs[run_id]
        self._keys = {k: record for k, record in self._keys.items() if record.conv_id != conv_id}
        self._conversations.pop(conv_id, None)
        self._opaque.pop(conv_id, None)

    def stats(self) -> dict[str, int]:
        return {"saves": self._saves, "saves_skipped": self._saves_skipped}

    def _of(self, conv_id: str) -> list[Run]:
        return [self._runs[run_id] for run_id in self._by_conv.get(conv_id, ())]

    def _put(self, run: Run) -> None:
        self._runs[run.run_id] = run
        self._saves += 1
