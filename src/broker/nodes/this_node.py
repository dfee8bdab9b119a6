"""What a node says of itself: its numbers at each heartbeat, its connections and its lag when an operator asks."""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import socket
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from broker.conversations import Conversation
from broker.errors import BrokerError, shown
from broker.eventlog.base import Backlog, Backlogs
from broker.nodes.base import Answer, NodeNumbers, NodeRecord, NodeState, Question, Switch
from broker.sequence import PER_MS
from broker.subscription import Subscription

if TYPE_CHECKING:
    from broker.broker import ConversationWSBroker

logger = logging.getLogger(__name__)

CONVERSATIONS_LOOKED_AT = 2000
"""How many open conversations are compared with the log per question, those used last first."""
EVENTS_COUNTED = 100
"""Up to how many events a conversation's backlog is counted: beyond, it is known to be long."""
WORST = 5
LAG_TIMEOUT_S = 1.5
"""Less than whoever asks waits, so that a store that hangs is told of as that, and not as a node that does."""

_RANK = {"parked": 0, "behind": 1, "starting": 2}
"""What an operator looks for comes first; live connections last."""


class ThisNode:
    """The `NodeSelf` of a broker."""

    def __init__(self, broker: ConversationWSBroker) -> None:
        self._broker = broker
        self._started_at_ms = broker.clock.wall_ms()
        self._host = socket.gethostname()
        self._version = version("conversation-broker")

    @property
    def node(self) -> str:
        return self._broker.stores.nodes.node

    def record(self) -> NodeRecord:
        broker = self._broker
        position, oldest = 0, 0
        for conversation in broker.conversations.all():
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
                connections=len(broker.subscriptions),
                conversations=len(broker.conversations),
                runs=broker.runs.at_work,
                position=position,
                waiting_ms=max(0, broker.clock.wall_ms() - oldest // PER_MS) if oldest else 0,
            ),
        )

    @property
    def _state(self) -> NodeState:
        if self._broker.draining:
            return "draining"
        return "ready" if self._broker.started else "starting"

    def apply(self, switches: Mapping[str, Switch]) -> None:
        catalog, settings = self._broker.catalog, self._broker.settings
        for name, channel in catalog.channels.items():
            if not channel.switchable:
                continue
            switch = switches.get(name)
            wanted = switch.on if switch is not None else name in settings.debug_channels
            if wanted != catalog.is_on(channel):
                catalog.switch(name, on=wanted)
                by = f"by {shown(switch.by)}" if switch is not None else "as set at the start"
                logger.info("debug channel %s is %s now, %s", name, "on" if wanted else "off", by)

    # -- questions --------------------------------------------------------------------------------------------------

    async def answer(self, question: Question) -> Answer:
        try:
            if question.get("about") == "connections":
                return self._connections(question)
            if question.get("about") == "lag":
                async with asyncio.timeout(LAG_TIMEOUT_S):
                    return await self._lag()
            return {"error": f"this node has version {self._version} and does not know what is asked"}
        except TimeoutError:
            return {"error": f"this node lives, but the store did not tell it its lag within {LAG_TIMEOUT_S} s"}
        except BrokerError as exc:
            return {"error": str(exc)}
        except Exception as exc:
            logger.exception("an operator's question failed")
            return {"error": f"the answer failed: {exc!r}; see the log of this node"}

    def _connections(self, question: Question) -> Answer:
        """Return the connections that fit, at most `limit` of them, and how many fit."""
        wanted = {name: question[name] for name in ("conv_id", "status", "subject") if question.get(name) is not None}
        found = [one for one in self._broker.subscriptions.all() if _fits(one, wanted)]
        shown_ones = heapq.nsmallest(int(question["limit"]), found, key=_worst_first)
        rows = [{"node": self.node, **self._broker.subscriptions.describe(one)} for one in shown_ones]
        return {"total": len(found), "connections": rows}

    async def _lag(self) -> Answer:
        """Return how far this node is behind the log, over all conversations that it has open."""
        candidates = [one for one in self._broker.conversations.all() if one.opened is None]
        looked = heapq.nlargest(
            CONVERSATIONS_LOOKED_AT, candidates, key=lambda one: (bool(one.inbox), one.last_active_s)
        )
        behind = [
            _behind(conversation, backlog)
            for conversation, backlog in zip(looked, await self._backlogs(looked), strict=True)
            if backlog.first_seq > conversation.position
        ]
        behind.sort(key=lambda one: (-one["ms"], one["convId"]))
        return {
            "ms": behind[0]["ms"] if behind else 0,
            "events": sum(one["events"] for one in behind),
            "conversationsBehind": len(behind),
            "conversationsLookedAt": len(looked),
            "worst": behind[:WORST],
        }

    async def _backlogs(self, conversations: list[Conversation]) -> list[Backlog]:
        log = self._broker.log
        if isinstance(log, Backlogs):
            return await log.backlogs([(one.conv_id, one.position) for one in conversations], most=EVENTS_COUNTED)
        # Nobody else writes: what is not dispatched is here.
        now_ms = self._broker.clock.wall_ms()
        return [_waiting(one, now_ms) for one in conversations]


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


def _waiting(conversation: Conversation, now_ms: int) -> Backlog:
    seqs = [envelope.seq for batch in conversation.inbox for envelope in batch.envelopes]
    seqs = [seq for seq in seqs if seq > conversation.position]
    if not seqs:
        return Backlog(conversation.position, 0, 0, now_ms)
    return Backlog(seqs[-1], seqs[0], min(len(seqs), EVENTS_COUNTED), now_ms)


def _behind(conversation: Conversation, backlog: Backlog) -> dict[str, Any]:
    return {
        "convId": conversation.conv_id,
        "ms": max(0, backlog.now_ms - backlog.first_seq // PER_MS),
        "events": backlog.count,
        "eventsMore": backlog.count >= EVENTS_COUNTED,
        "position": str(conversation.position),
        "head": str(backlog.head_seq),
    }
