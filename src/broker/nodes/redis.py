"""Many nodes on one Redis: each shows itself by a heartbeat, and finds in its answer what it is asked and has to obey.

A heartbeat is one script call per second, however many connections the node has. Whoever asks puts the question into
the inboxes of the nodes and publishes a hint; a node that hears it makes its next heartbeat at once. So nothing depends
on a hint: one that is lost costs at most one interval.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from broker.errors import BrokerError, Unavailable
from broker.nodes.base import Answer, NodeRecord, NodeSelf, Question, Switch
from broker.nodes.redis_scripts import (
    ABOUT,
    BEAT,
    BEATS,
    CHANNELS,
    HINTS,
    LEAVE,
    LIST,
    PUT,
    SCRIPTS,
    answers,
    inbox,
)
from broker.redis.announcements import Wakeups
from broker.redis.connection import RedisConnection
from broker.tasks import Tasks

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SILENT_BEATS = 3
SILENT_LEAST_S = 3.0
"""A node is silent after this many heartbeats, and not sooner than this: a busy machine may hold one up for a second."""
FORGET_BEATS = 60
"""A silent node stays on the list for so many heartbeats: long enough for somebody to read what has gone."""
PATIENCE_S = 2.0
"""How long a question waits for answers; with rare heartbeats one of those and a second, so that a lost hint costs none."""
QUESTION_TTL_MS = 10_000
POLL_S = 0.01
POLL_MAX_S = 0.1
REDIS_PATIENCE_S = 2.0
"""How long a Redis that is away is tried here: an operator wants to be told, and a heartbeat comes again anyway."""
LEAVE_S = 0.5


class RedisNodes:
    """A `Nodes` over a `RedisConnection`, which its owner closes."""

    def __init__(
        self, connection: RedisConnection, *, heartbeat_s: float = HEARTBEAT_S, patience_s: float | None = None
    ) -> None:
        """heartbeat_s: between two signs of life. patience_s: how long nodes have to answer, None: as the above says."""
        self.node = connection.node
        self.patience_s = max(PATIENCE_S, heartbeat_s + 1.0) if patience_s is None else patience_s
        self._connection = connection
        connection.register(*SCRIPTS)
        self._heartbeat_s = heartbeat_s
        self._silent_ms = int(max(SILENT_BEATS * heartbeat_s, SILENT_LEAST_S) * 1000)
        self._forget_ms = max(int(FORGET_BEATS * heartbeat_s * 1000), 2 * self._silent_ms)
        self._myself: NodeSelf | None = None
        self._obeyed: dict[str, Switch] | None = None
        self._hurry = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None
        self._answering = Tasks()
        self._hints: Wakeups | None = None
        self._lock = asyncio.Lock()
        self._away = False
        self.beats = 0
        self.listened = 0
        """How often this node began to hear hints: once, and again after each lost connection."""

    # -- life -------------------------------------------------------------------------------------------------------

    async def open(self, myself: NodeSelf) -> None:
        if self._myself is None:
            self._myself = myself
            try:
                await self._beat()  # the switches hold before the node serves anybody
            except BaseException:
                self._myself = None
                raise
        if self._beating is None:
            self._hints = Wakeups(self._connection, on_message=self._on_hint, on_listening=self._on_listening)
            self._hints.listen(HINTS, True)
            self._hints.start()
            self._beating = asyncio.get_running_loop().create_task(self._keep_beating())

    def _on_hint(self, channel: str, sender: str) -> None:
        if sender != self.node:
            self._hurry.set()

    def _on_listening(self, channel: str) -> None:
        self.listened += 1
        self._hurry.set()  # what was hinted at before is not heard any more

    async def changed(self) -> None:
        if self._beating is not None:
            await self._try_beat()

    async def close(self) -> None:
        tasks = [task for task in (self._beating, *self._answering) if task is not None]
        self._beating = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._hints is not None:
            await self._hints.close()
            self._hints = None
        if self._myself is None:
            return
        self._myself = None
        try:
            leave = LEAVE.command((BEATS, ABOUT, inbox(self.node)), (self.node,))
            await self._connection.execute([leave], patience_s=LEAVE_S)
        except BrokerError as exc:
            logger.warning("this node stays on the list of nodes until its entry expires: %s", exc)

    # -- heartbeat --------------------------------------------------------------------------------------------------

    async def _keep_beating(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):  # not wait_for: that one can lose a cancellation
                    await self._hurry.wait()
            except TimeoutError:
                pass
            self._hurry.clear()
            await self._try_beat()

    async def _try_beat(self) -> None:
        try:
            await self._beat()
        except BrokerError as exc:
            if not self._away:
                self._away = True
                logger.warning("this node cannot show itself to the others at present: %s", exc)
        except Exception:
            logger.exception("the heartbeat of this node failed; it goes on at the next turn")

    async def _beat(self) -> None:
        if self._myself is None:
            return
        async with self._lock:  # else an older answer could undo what a newer one switched
            record = orjson.dumps(self._myself.record().to_json())
            keys = (BEATS, ABOUT, inbox(self.node), CHANNELS)
            questions, found = await self._one(BEAT.command(keys, (self.node, record, self._forget_ms)))
            self.beats += 1
            if self._away:
                self._away = False
                logger.warning("this node shows itself to the others again")
            switches = _switches(found)
            if switches != self._obeyed and self._myself is not None:
                self._obeyed = switches
                self._myself.apply(switches)
        for text in questions:
            self._answering.spawn(self._answer(text))

    async def _one(self, command: Any) -> Any:
        (reply,) = await self._connection.execute([command], patience_s=REDIS_PATIENCE_S)
        return self._connection.checked(reply)

    # -- questions --------------------------------------------------------------------------------------------------

    async def _answer(self, text: bytes) -> None:
        if self._myself is None:
            return
        try:
            asked = orjson.loads(text)
            answer = await self._myself.answer(asked["question"])
            reply = orjson.dumps({"node": self.node, "answer": answer})
            await self._one(PUT.command((answers(asked["id"]),), (reply, QUESTION_TTL_MS)))
        except BrokerError as exc:
            logger.warning("another node's question cannot be answered: %s", exc)
        except Exception:
            logger.exception("another node's question cannot be answered")

    async def ask(self, nodes: Sequence[str], question: Question) -> dict[str, Answer]:
        if not nodes:
            return {}
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.patience_s
        id = secrets.token_hex(8)
        text = orjson.dumps({"id": id, "question": question})
        await self._one(PUT.command([inbox(node) for node in nodes], (text, QUESTION_TTL_MS)))
        await self._hint()
        found: dict[str, Answer] = {}
        seen, delay_s = 0, POLL_S
        while found.keys() != set(nodes) and loop.time() < deadline_s:
            await asyncio.sleep(min(delay_s, max(0.0, deadline_s - loop.time())))
            delay_s = min(delay_s * 1.5, POLL_MAX_S)
            replies = await self._one(("LRANGE", answers(id), seen, -1))
            seen += len(replies)
            for reply in map(orjson.loads, replies):
                found[reply["node"]] = reply["answer"]
        return found

    async def _hint(self) -> None:
        try:
            await self._one((self._connection.announce, HINTS, self.node))
        except BrokerError as exc:  # the next heartbeats find it
            logger.debug("a hint to the other nodes was not published: %s", exc)

    # -- the list ---------------------------------------------------------------------------------------------------

    async def list(self) -> list[NodeRecord]:
        if self._myself is None:
            raise Unavailable("this node is not open: start the broker first")
        reply = await self._one(LIST.command((BEATS, ABOUT), (self._forget_ms,)))
        found = [self._myself.record()]  # its own numbers are known better than by the last heartbeat
        for node, silent_ms, about in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
            if node.decode() != self.node:
                found.append(self._record(node.decode(), silent_ms, about))
        return sorted(found, key=lambda record: (record.started_at_ms, record.node))

    def _record(self, node: str, silent_ms: int, about: bytes) -> NodeRecord:
        silent = silent_ms > self._silent_ms
        try:
            return NodeRecord.from_json(orjson.loads(about), silent_ms=silent_ms, silent=silent)
        except (KeyError, TypeError, ValueError):  # of another version: on the list all the same
            return NodeRecord(node, "?", 0, "?", 0, "ready", silent_ms=silent_ms, silent=silent)

    # -- switches ---------------------------------------------------------------------------------------------------

    async def switches(self) -> dict[str, Switch]:
        return _switches(await self._one(("HGETALL", CHANNELS)))

    async def switch(self, channel: str, switch: Switch | None) -> None:
        if switch is None:
            await self._one(("HDEL", CHANNELS, channel))
        else:
            await self._one(("HSET", CHANNELS, channel, orjson.dumps(asdict(switch))))
        await self._beat()
        await self._hint()


def _switches(pairs: Sequence[bytes]) -> dict[str, Switch]:
    """Return the switches of a HGETALL reply."""
    found: dict[str, Switch] = {}
    for name, text in zip(pairs[::2], pairs[1::2], strict=True):
        value: Mapping[str, Any] = orjson.loads(text)
        found[name.decode()] = Switch(bool(value["on"]), int(value["since_ms"]), str(value["by"]))
    return found
