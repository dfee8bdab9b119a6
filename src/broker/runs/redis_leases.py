"""Leases on conversations in Redis: which node works where, and what it tells the others (see runs/leases.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from broker.redis.announcements import Wakeups
from broker.redis.connection import RedisConnection
from broker.runs.leases import Renewed, TakenOver
from broker.runs.redis_scripts import FORGET_LEFT, LEASE_SCRIPTS, RELEASE, RENEW, TAKE_OVER, run_keys, runs_of

LEASE_S = 10.0
POKES = "broker:pokes"
LEFT = "broker:left"
"""A channel, and a hash of what was announced there: conversation -> token under which its node had worked."""
_LEFT_AT_ONCE = 1000
_RENEWED_AT_ONCE = 128  # a fraction of a millisecond
_ASKED_AT_ONCE = 500


class RedisLeases:
    """The leases of one node over a `RedisConnection`, which its owner closes."""

    def __init__(self, connection: RedisConnection, *, lease_s: float = LEASE_S) -> None:
        """lease_s: how long a node that says nothing keeps its runs."""
        self._connection = connection
        connection.register(*LEASE_SCRIPTS)
        self.lease_s = lease_s
        self._tokens: dict[str, str] = {}
        self._revisions: dict[str, bytes] = {}
        self._hints: Wakeups | None = None

    @property
    def lease_ms(self) -> int:
        """How long a lease holds without being prolonged, ms."""
        return int(self.lease_s * 1000)

    async def close(self) -> None:
        """Stop listening."""
        if self._hints is not None:
            await self._hints.close()
            self._hints = None

    def token(self, conv_id: str) -> str | None:
        """Return the token under which this node works in a conversation: what fences its appends."""
        return self._tokens.get(conv_id)

    def hold(self, conv_id: str, token: str) -> None:
        """Note that this node got the lease on a conversation."""
        self._tokens[conv_id] = token

    def forget(self, conv_id: str) -> None:
        self._tokens.pop(conv_id, None)
        self._revisions.pop(conv_id, None)

    def held(self) -> list[str]:
        return list(self._tokens)

    # -- hints ------------------------------------------------------------------------------------------------------

    def listen(
        self, on_poke: Callable[[str], None], on_left: Callable[[], None], on_listening: Callable[[], None]
    ) -> None:
        """As in Leases. What is told on any node is a hint: it may be lost."""
        if self._hints is not None:
            return

        def hear(channel: str, payload: str) -> None:
            if channel == POKES:
                on_poke(payload)
            else:
                on_left()

        self._hints = Wakeups(self._connection, on_message=hear, on_listening=lambda _: on_listening())
        for channel in (POKES, LEFT):
            self._hints.listen(channel, True)
        self._hints.start()

    async def poke(self, conv_id: str) -> None:
        await self._connection.publish(POKES, conv_id)

    # -- having and giving ------------------------------------------------------------------------------------------

    async def renew(self, conv_ids: Sequence[str]) -> Renewed:
        """Prolong this node's leases. Raises StoreError."""
        held = [(conv_id, self._tokens[conv_id]) for conv_id in conv_ids if conv_id in self._tokens]
        # Many to a script: of thousands that await a person each would else cost a call of its own, several times per lease.
        at_once = 1 if self._connection.is_cluster else _RENEWED_AT_ONCE
        commands = []
        for start in range(0, len(held), at_once):
            part = held[start : start + at_once]
            keys = [key for conv_id, _ in part for key in run_keys(conv_id)[3:]]
            commands.append(RENEW.command(keys, (self.lease_ms, *(token for _, token in part))))
        replies = [revision for reply in await self._connection.all(commands) for revision in reply]
        renewed = Renewed([], [])
        for (conv_id, token), revision in zip(held, replies, strict=True):
            if self._tokens.get(conv_id) != token:
                continue  # given back or taken anew meanwhile: the reply is about another lease
            if revision is None:
                renewed.lost.append(conv_id)
            elif self._revisions.get(conv_id) != revision:
                self._revisions[conv_id] = revision
                renewed.changed.append(conv_id)
        return renewed

    async def take_over(self, conv_id: str) -> TakenOver | None:
        """Take the lease on a conversation that nobody works in. Raises StoreError."""
        command = TAKE_OVER.command(run_keys(conv_id), (self._connection.node, self.lease_ms))
        reply = await self._connection.one(command, lane="append")
        if not reply:
            return None if reply is None else TakenOver([], given_back=True)
        token, holder, *runs = reply
        self.hold(conv_id, token.decode())
        return TakenOver(runs_of(runs), given_back=not holder)

    async def _unattended(self, conv_ids: Sequence[str]) -> list[str]:
        """Return those of the conversations of which nobody has the lease. Raises StoreError."""
        keys = [run_keys(conv_id)[4] for conv_id in conv_ids]
        if self._connection.is_cluster:
            held = await self._connection.all([("EXISTS", key) for key in keys])
        else:
            parts = [("MGET", *keys[at : at + _ASKED_AT_ONCE]) for at in range(0, len(keys), _ASKED_AT_ONCE)]
            held = [token for reply in await self._connection.all(parts) for token in reply]
        return [conv_id for conv_id, token in zip(conv_ids, held, strict=True) if not token]

    async def holders(self, conv_ids: Sequence[str]) -> dict[str, str]:
        """Return the node that works in each conversation. Raises StoreError."""
        tokens = await self._connection.all([("GET", run_keys(conv_id)[4]) for conv_id in conv_ids])
        found = {conv_id: token.decode() for conv_id, token in zip(conv_ids, tokens, strict=True) if token}
        return {conv_id: token.partition(":")[2] for conv_id, token in found.items()}

    async def leave(self, conv_ids: Sequence[str]) -> None:
        """Give leases back and tell the other nodes. Raises StoreError: then this node may still have them.

        What is left is written down before it is given back and told after: a node that missed the announcement finds
        it, and a node that looks in between leaves it on the list.
        """
        tokens = {conv_id: self._tokens[conv_id] for conv_id in conv_ids if conv_id in self._tokens}
        if not tokens:
            return
        pairs = list(tokens.items())
        for start in range(0, len(pairs), _LEFT_AT_ONCE):
            listed = [part for pair in pairs[start : start + _LEFT_AT_ONCE] for part in pair]
            await self._connection.one(("HSET", LEFT, *listed), lane="append")
        await self._connection.all(
            [RELEASE.command(run_keys(conv_id), (token,)) for conv_id, token in tokens.items()], lane="append"
        )
        for conv_id in tokens:
            self.forget(conv_id)
        await self._connection.publish(LEFT, self._connection.node)

    async def left(self) -> Mapping[str, str]:
        """Return the conversations that were left and are not known to be anybody's yet, each with its old token."""
        found = await self._connection.one(("HGETALL", LEFT))
        return {conv_id.decode(): token.decode() for conv_id, token in zip(found[::2], found[1::2], strict=True)}

    async def settled_left(self, conv_id: str, token: str) -> None:
        """Take a conversation off the list, unless the lease is still the one that is about to be given back."""
        lease = await self._connection.one(("GET", run_keys(conv_id)[4]))
        if lease is None or lease.decode() != token:
            await self._connection.one(FORGET_LEFT.command((LEFT,), (conv_id, token)), lane="append")
