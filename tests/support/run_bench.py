"""A bench for runs: a tiny broker (log in a list, timeline folded by the real handlers) around a real RunService."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVarTuple

from tests.support.run_stores import OneStore, Process, RunPlace

from broker.clock import Clock, SystemClock
from broker.envelope import SEM, Draft, Envelope, seal
from broker.plugins import PluginHost
from broker.runs.limits import RunLimits
from broker.runs.ports import ConversationPorts
from broker.runs.service import RunService
from broker.runs.state import Run
from broker.runs.store import RunStore
from broker.security import Principal
from broker.sequence import next_seq
from broker.settings import Settings
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.entity import Entity

Given = TypeVarTuple("Given")
ALICE = Principal("alice")
TERMINAL = {"run.finished", "run.failed", "run.cancelled", "run.interrupted"}

END_WITHIN_S = 10.0

FAST = RunLimits(retry_delay_s=0.001, stop_grace_s=0.5, engine_idle_timeout_s=20.0)


class Journal:
    """The log and the timeline of the bench: what survives a process.

    refuse: set to an exception to make every publish fail with it. on_publish: called with each batch before it counts.
    """

    def __init__(self) -> None:
        self.envelopes: dict[str, list[Envelope]] = {}
        self.entities_by_conv: dict[str, dict[str, Entity]] = {}
        self.late: list[Exception] = []
        self.batches: list[int] = []
        self.refuse: Exception | None = None
        self.on_publish: Callable[[str, Sequence[Draft]], None] | None = None
        self._keys: dict[tuple[str, str], int] = {}
        self._handlers = {handler.event_type: handler for handler in BUILTIN_HANDLERS}

    async def publish(self, conv_id: str, drafts: Sequence[Draft]) -> list[int]:
        await asyncio.sleep(0)
        if self.on_publish is not None:
            self.on_publish(conv_id, drafts)
        if self.refuse is not None:
            raise self.refuse
        self.batches.append(len(drafts))
        sealed = [
            seal(conv_id, d, channel=d.channel or SEM, id=d.id or f"x{i}", time_ms=1, max_bytes=1 << 20)
            for i, d in enumerate(drafts)
        ]
        return [self._append(envelope) for envelope in sealed]

    def _append(self, envelope: Envelope) -> int:
        log = self.envelopes.setdefault(envelope.conv_id, [])
        if envelope.dedupe_key is not None:
            known = self._keys.get((envelope.conv_id, envelope.dedupe_key))
            if known is not None:
                return known
        envelope.seq = next_seq(log[-1].seq if log else 0, 1_763_690_000_000)
        if envelope.dedupe_key is not None:
            self._keys[envelope.conv_id, envelope.dedupe_key] = envelope.seq
        log.append(envelope)
        entities = self.entities_by_conv.setdefault(envelope.conv_id, {})
        handler = self._handlers.get(envelope.type)
        if handler is not None:
            try:
                for entity in handler.fold({k: entities[k] for k in handler.keys(envelope) if k in entities}, envelope):
                    entities[entity.id] = replace(entity, version=envelope.seq)
            except Exception as exc:
                self.late.append(exc)
        return envelope.seq

    async def entities(self, conv_id: str) -> list[Entity]:
        return sorted(self.entities_by_conv.get(conv_id, {}).values(), key=lambda entity: entity.position)

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        found = self.entities_by_conv.get(conv_id, {})
        return {entity_id: found[entity_id] for entity_id in ids if entity_id in found}


class Bench:
    """A RunService on a journal and stores; `kill` makes a new one over the same, as after the end of a process.

    place: where the runs are kept; None: what `Bench.place` makes, a new one in memory unless a test says otherwise.
    """

    place: ClassVar[Callable[[], RunPlace]] = OneStore

    def __init__(
        self,
        *plugins: Any,
        place: RunPlace | None = None,
        journal: Journal | None = None,
        limits: RunLimits = FAST,
        clock: Clock | None = None,
        process: Process | None = None,
    ) -> None:
        self.plugins = plugins
        self.process = process or Process()
        self.kept = place or type(self).place()
        store, self.turns = self.kept.of(self.process)
        self.journal = journal or Journal()
        self.limits = limits
        self.clock = clock or SystemClock()
        self.holds: dict[str, int] = {}
        self.host = PluginHost()
        for plugin in plugins:
            self.host.add(plugin)
        self.killed = False
        self.runs = RunService(
            store=store,
            turns=self.turns,
            plugins=self.host,
            clock=self.clock,
            settings=Settings(),
            conversations=ConversationPorts(
                publish=self.process.mortal(self.journal).publish,
                timeline=self.journal,
                hold=lambda conv_id: self._hold(conv_id, 1),
                release=lambda conv_id: self._hold(conv_id, -1),
            ),
            limits=limits,
        )

    @property
    def store(self) -> RunStore:
        """The runs, looked at from outside of the process."""
        return self.kept.store

    def _hold(self, conv_id: str, change: int) -> None:
        self.holds[conv_id] = self.holds.get(conv_id, 0) + change

    async def start(self) -> None:
        """Begin the life of this process."""
        await self.kept.open()
        await self.runs.start()

    async def __aenter__(self) -> Bench:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if not self.killed:
            await self.runs.stop(drain_s=0)
        self.host.close()

    async def kill(self, *plugins: Any) -> Bench:
        """End this 'process' where it stands; return a fresh one over the same stores and journal, not started yet.

        The test must have no other task of its own going.
        """
        self.killed = True
        self.process.dead.set()
        await _end_all_tasks()
        await self.kept.died()
        return Bench(
            *(plugins or self.plugins),
            place=self.kept,
            journal=self.journal,
            limits=self.limits,
            clock=self.clock,
        )

    # -- looking at what happened -----------------------------------------------------------------------------------

    def types(self, conv_id: str) -> list[str]:
        return [envelope.type for envelope in self.journal.envelopes.get(conv_id, [])]

    def events(self, conv_id: str, *types: str) -> list[Envelope]:
        return [e for e in self.journal.envelopes.get(conv_id, []) if not types or e.type in types]

    def entity(self, conv_id: str, kind: str, index: int = 0, **props: Any) -> Entity:
        found = [
            e
            for e in sorted(self.journal.entities_by_conv[conv_id].values(), key=lambda e: e.position)
            if e.kind == kind and all(e.props.get(k) == v for k, v in props.items())
        ]
        return found[index]

    async def ended(self, run_id: str, *, within_s: float = 10.0) -> Run:
        """Wait until the run has its terminal event; return it."""
        deadline = time.monotonic() + within_s
        while True:
            run = await self.store.get(run_id)
            if run is not None and run.ended and run.terminal_published:
                return run
            assert time.monotonic() < deadline, f"run {run_id} did not end: {run}"
            await asyncio.sleep(0.002)

    async def until(self, condition: Callable[[*Given], Any], *given: *Given, within_s: float = 10.0) -> Any:
        """Wait until `condition(*given)` is true; return what it gave. Its result may be awaitable."""
        deadline = time.monotonic() + within_s
        while True:
            value = condition(*given)
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            assert time.monotonic() < deadline, "the condition did not come true in time"
            await asyncio.sleep(0.002)

    async def status(self, run_id: str, status: str) -> Run:
        """Wait until the run has this status."""

        async def there() -> Run | None:
            run = await self.store.get(run_id)
            return run if run is not None and run.status == status else None

        found: Run = await self.until(there)
        return found

    def check_one_end_each(self) -> None:
        """Every run has at most one terminal event, and nothing of it comes after that."""
        for conv_id, envelopes in self.journal.envelopes.items():
            over: set[str] = set()
            for envelope in envelopes:
                run_id = str(envelope.data.get("runId"))
                assert run_id not in over, f"{conv_id}: {envelope.type} after the end of {run_id}"
                if envelope.type in TERMINAL:
                    over.add(run_id)
        assert not self.journal.late, self.journal.late


async def _end_all_tasks() -> None:
    """Cancel every task but this one until none is left.

    More than once: a task whose children fail at the moment in which it is cancelled hears only of their failure (Python
    before 3.13), and goes on. A process that is killed has no task that goes on.
    """
    deadline_s = time.monotonic() + END_WITHIN_S
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        ended, going_on = await asyncio.wait(tasks, timeout=0.5)
        await asyncio.gather(*ended, return_exceptions=True)
        assert time.monotonic() < deadline_s, f"these do not end: {going_on}"
