"""This node's account of itself: its numbers at each heartbeat, its connections and its lag when an operator asks."""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import socket
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from broker.clock import Clock
from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.delivery.registry import OpenSubscriptions
from broker.delivery.subscription import Subscription
from broker.errors import BrokerError, StoreError, quoted
from broker.eventlog.base import Backlog, Backlogs, EventLog
from broker.nodes.base import Answer, NodeNumbers, NodeRecord, Nodes, NodeState, Question, Switch
from broker.phase import Phase
from broker.runs.service import RunService
from broker.sequence import PER_MS
from broker.views.catalog import Catalog

logger = logging.getLogger(__name__)

CONVERSATIONS_LOOKED_AT = 2000
"""How many open conversations are compared with the log per question, those used last first."""
EVENTS_COUNTED = 100
"""Up to how many events a conversation's backlog is counted: beyond, it is known to be long."""
MEASURED_CONNECTIONS = 100
"""Of how many connections per answer it is found out by how much they are behind: each costs a look at the log."""
WORST = 5
STORE_TIMEOUT_S = 1.5
"""Less than whoever asks waits, so that a store that hangs is told of as that, and not as a node that does."""

_RANK = {"parked": 0, "behind": 1, "starting": 2}
"""What an operator looks for comes first; live connections last."""


class ThisNode:
    """The `NodeSelf` of a broker."""

    def __init__(
        self,
        nodes: Nodes,
        conversations: ConversationManager,
        registry: OpenSubscriptions,
        describe: Callable[[Subscription], dict[str, Any]],
        runs: RunService,
        log: EventLog,
        catalog: Catalog,
        clock: Clock,
        phase: Phase,
    ) -> None:
        """describe: returns what operators see of one connection."""
        self._nodes = nodes
        self._conversations = conversations
        self._registry = registry
        self._describe = describe
        self._runs = runs
        self._log = log
        self._catalog = catalog
        self._clock = clock
        self._phase = phase
        self._started_at_ms = clock.wall_ms()
        self._host = socket.gethostname()
        self._version = version("conversation-broker")

    @property
    def node(self) -> str:
        return self._nodes.node

    def record(self) -> NodeRecord:
        position, oldest = 0, 0
        for conversation in self._conversations.all():
            position = max(position, conversation.position)
            if conversation.inbox:
                first = conversation.inbox[0].envelopes[0].seq
                oldest = min(oldest or first, first)
        return NodeRecord(
            self.node,
            self._host,
            os.getpid(),
            self._version,
            self._started_at_ms,
            self._state,
            NodeNumbers(
                connections=len(self._registry),
                conversations=len(self._conversations),
                runs=self._runs.at_work,
                position=position,
                waiting_ms=max(0, self._clock.wall_ms() - oldest // PER_MS) if oldest else 0,
            ),
        )

    @property
    def _state(self) -> NodeState:
        if self._phase.draining:
            return "draining"
        return "ready" if self._phase.started else "starting"

    def apply(self, switches: Mapping[str, Switch]) -> None:
        for name, on in self._catalog.obey({name: switch.on for name, switch in switches.items()}):
            switch = switches.get(name)
            by = f"by {quoted(switch.by)}" if switch is not None else "as set at the start"
            logger.info("debug channel %s is %s now, %s", name, "on" if on else "off", by)

    # -- questions --------------------------------------------------------------------------------------------------

    async def answer(self, question: Question) -> Answer:
        try:
            if question.get("about") == "connections":
                return await self._connections(question)
            if question.get("about") == "lag":
                async with asyncio.timeout(STORE_TIMEOUT_S):
                    return await self._lag()
            return {"error": f"this node has version {self._version} and does not know what is asked"}
        except TimeoutError:
            return {"error": f"this node lives, but the store did not tell it its lag within {STORE_TIMEOUT_S} s"}
        except BrokerError as exc:
            return {"error": str(exc)}
        except Exception as exc:
            logger.exception("an operator's question failed")
            return {"error": f"the answer failed: {exc!r}; see the log of this node"}

    async def _connections(self, question: Question) -> Answer:
        """Return the connections that fit, at most `limit` of them, and how many fit."""
        wanted = {name: question[name] for name in ("conv_id", "status", "subject") if question.get(name) is not None}
        found = [one for one in self._registry.all() if _fits(one, wanted)]
        shown_ones = heapq.nsmallest(int(question["limit"]), found, key=_worst_first)
        rows = [
            {"node": self.node, **self._describe(one), "behindMs": None, "behindEvents": None} for one in shown_ones
        ]
        await self._measure([row for row in rows if row["behind"]][:MEASURED_CONNECTIONS])
        return {"total": len(found), "connections": rows}

    async def _measure(self, rows: list[dict[str, Any]]) -> None:
        """Say of connections by how much they are behind. With the store away that stays unknown."""
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                backlogs = await self._backlogs([(row["convId"], int(row["position"])) for row in rows])
        except (StoreError, TimeoutError):
            return
        for row, backlog in zip(rows, backlogs, strict=True):
            row["behindMs"] = _age_ms(backlog)
            row["behindEvents"] = backlog.count

    async def _lag(self) -> Answer:
        """Return this node as it is now, and how far it is behind the log, over all conversations that it has open."""
        candidates = [one for one in self._conversations.all() if one.opening is None]
        looked = heapq.nlargest(
            CONVERSATIONS_LOOKED_AT, candidates, key=lambda one: (bool(one.inbox), one.last_active_s)
        )
        considered = len(looked)
        if not isinstance(self._log, Backlogs):
            looked = [one for one in looked if one.inbox]  # nobody else writes: what is not dispatched is here
        backlogs = await self._backlogs([(one.conv_id, one.position) for one in looked])
        behind = [
            _behind(conversation, backlog)
            for conversation, backlog in zip(looked, backlogs, strict=True)
            if backlog.first_seq > conversation.position
        ]
        behind.sort(key=lambda one: (-one["ms"], one["convId"]))
        lag = {
            "ms": behind[0]["ms"] if behind else 0,
            "events": sum(one["events"] for one in behind),
            "conversationsBehind": len(behind),
            "conversationsOpen": len(candidates),
            "conversationsLookedAt": considered,
            "worst": behind[:WORST],
        }
        return {"record": self.record().to_json(), "lag": lag}

    async def _backlogs(self, positions: list[tuple[str, int]]) -> list[Backlog]:
        log = self._log
        if isinstance(log, Backlogs):
            return await log.backlogs(positions, most=EVENTS_COUNTED)
        found = []
        now_ms = self._clock.wall_ms()
        for conv_id, after in positions:
            page = await log.read(conv_id, after=after, limit=EVENTS_COUNTED)
            first = page.envelopes[0].seq if page.envelopes else 0
            last = page.envelopes[-1].seq if page.envelopes else page.through
            found.append(Backlog(last, first, len(page.envelopes), now_ms))
        return found


def _fits(subscription: Subscription, wanted: Mapping[str, Any]) -> bool:
    mine = {
        "conv_id": subscription.conv_id,
        "status": subscription.status,
        "subject": subscription.principal.subject,
    }
    return all(mine[name] == value for name, value in wanted.items())


def _worst_first(subscription: Subscription) -> tuple[int, int, str]:
    return _RANK.get(subscription.status, len(_RANK)), subscription.opened_at_ms, subscription.connection_id


def worst_first(row: Mapping[str, Any]) -> tuple[int, int, str]:
    """Order the connections of several nodes as each orders its own: those that are behind first, then the oldest."""
    return _RANK.get(row["status"], len(_RANK)), row["openedAtMs"], row["connectionId"]


def _age_ms(backlog: Backlog) -> int:
    """Return for how long the oldest envelope of a backlog has been waiting."""
    return max(0, backlog.now_ms - backlog.first_seq // PER_MS) if backlog.first_seq else 0


def _behind(conversation: Conversation, backlog: Backlog) -> dict[str, Any]:
    return {
        "convId": conversation.conv_id,
        "ms": _age_ms(backlog),
        "events": backlog.count,
        "eventsMore": backlog.count >= EVENTS_COUNTED,
        "position": str(conversation.position),
        "head": str(backlog.head_seq),
    }
