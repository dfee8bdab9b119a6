"""The surroundings shared by all runs, and the writing of a run's end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.clock import Clock
from broker.envelope import Draft
from broker.errors import RunEnded, Unavailable
from broker.runs.ending import closing_drafts, plain_error, plain_terminal_draft, terminal_draft, writable
from broker.runs.engines import EngineCache
from broker.runs.limits import RunLimits
from broker.runs.plan import EngineProfiles
from broker.runs.ports import NOT_NOW, Plugins, Publish, PublishFenced, PublishUnasked, TimelineReader
from broker.runs.state import ACTIVE, TERMINAL, Run, RunStatus
from broker.runs.store import RunStore
from broker.runs.tool_runner import ToolRunner
from broker.runs.turns import TurnStore

log = logging.getLogger(__name__)

END_RETRY_S = 0.2
END_RETRY_MAX_S = 5.0


@dataclass(slots=True)
class Runtime:
    """The parts that runs share. closing: the process goes down; nothing is tried again any more.

    token_of, publish_fenced: where several nodes share the store (runs/leases.py). unaccepted_since_s: since when this node
    has seen a prompt that is stored and not in the log, by its own steady clock: the clocks of nodes differ.
    """

    store: RunStore
    turns: TurnStore
    plugins: Plugins
    clock: Clock
    limits: RunLimits
    publish: Publish
    timeline: TimelineReader
    profiles: EngineProfiles
    engines: EngineCache
    tools: ToolRunner
    closing: bool = False
    token_of: Callable[[str], str | None] | None = None
    publish_fenced: PublishFenced | None = None
    publish_unasked: PublishUnasked | None = None
    unaccepted_since_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def publish_as_holder(self, conv_id: str) -> Publish:
        """Return what publishes only as long as this node holds the lease on the conversation, where there are leases."""
        token = self.token_of(conv_id) if self.token_of is not None else None
        publish = self.publish_fenced
        if token is None or publish is None:
            return self.publish
        return lambda conv_id, drafts: publish(conv_id, drafts, token)

    async def settle(
        self, run: Run, status: RunStatus, changes: Mapping[str, Any], publish: Publish | None = None
    ) -> Run | None:
        """End a run: durable status first, then everything open closed and its one terminal event.

        publish: None is enough for a run that never began; one that did is ended by who holds the lease, where there are
        leases, and by nobody else: what two nodes would close might be closed twice.

        Whoever was first decides the status; a run that has ended already gets its terminal event published again,
        which the log takes once. While the store is unavailable this tries on. Returns the ended run, None where the
        process went down first, or another node took the run over: then the next start, or that node, finishes the work.
        What cannot be written of an end is left out of it: the end itself is always written.
        """
        delay = END_RETRY_S
        changes = {**writable(changes), "status": status, "calls": ()}
        while True:
            try:
                ended = await self.store.update(
                    run.run_id, ACTIVE, changes, self.clock.wall_ms()
                ) or await self.store.get(run.run_id)
                if ended is None or not ended.ended:
                    return ended  # erased meanwhile
                await self._publish_end(ended, publish or self.publish)
                told = {"terminal_published": True}
                return await self.store.update(run.run_id, TERMINAL, told, self.clock.wall_ms()) or ended
            except RunEnded as exc:
                log.warning("the end of run %s is left to another node: %s", run.run_id, exc)
                return None
            except (*NOT_NOW, Unavailable) as exc:
                if self.closing:
                    log.warning("the end of run %s is left to the next start: %s", run.run_id, exc)
                    return None
                log.warning("the end of run %s cannot be written, trying again: %s", run.run_id, exc)
            except Exception:  # whatever it is: a run without an end would stand before all others for good
                if self.closing:
                    raise
                log.exception("the end of run %s cannot be written, trying again without its details", run.run_id)
                changes = {**changes, "error": plain_error(changes), "usage": None}
            await asyncio.sleep(delay)
            delay = min(delay * 2, END_RETRY_MAX_S)

    async def _publish_end(self, run: Run, publish: Publish) -> None:
        closers: list[Draft] = []
        if run.started_at_ms is not None and run.status != "finished":
            entities = await self.timeline.entities(run.conv_id)
            closers = closing_drafts(entities, run, max_text_bytes=self.limits.max_text_bytes)
        terminal = terminal_draft(run)
        try:
            await publish(run.conv_id, [*closers, terminal])
            return
        except (*NOT_NOW, Unavailable, RunEnded):
            raise
        except Exception as exc:
            # One of them is refused, by a plugin or for its form. The others must not be lost for that.
            log.warning("the end of run %s was refused as a whole: %s", run.run_id, exc)
        for draft in closers:
            await self._published_alone(run, draft, publish)
        if await self._published_alone(run, terminal, publish):
            return
        plain = plain_terminal_draft(run)
        if not await self._published_alone(run, plain, publish) and self.publish_unasked is not None:
            # Nothing in it comes from elsewhere, so no plugin has a say: without it clients would wait for ever.
            token = self.token_of(run.conv_id) if self.token_of is not None and publish != self.publish else None
            await self.publish_unasked(run.conv_id, [plain], token)

    async def _published_alone(self, run: Run, draft: Draft, publish: Publish) -> bool:
        try:
            await publish(run.conv_id, [draft])
        except (*NOT_NOW, Unavailable, RunEnded):
            raise
        except Exception as refusal:
            log.error("%s of run %s was refused: %s", draft.type, run.run_id, refusal)
            return False
        return True
