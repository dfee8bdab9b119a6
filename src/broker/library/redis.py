"""The library in Redis: every node finds and shows the same. See `redis_scripts.py` and `redis_index.py` for what is kept.

Everything is written by scripts that may be repeated. Where one operation touches two slots, the index is written first
when something is added and last when something is removed: what a crash leaves is found too much, which the entry
corrects, and never too little.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from broker.errors import BrokerError, StoreUnavailable
from broker.library import redis_index
from broker.library.redis_index import Search, add_commands, drop_commands, title_command
from broker.library.redis_scripts import (
    ABANDONED,
    CHANGE,
    COPIES,
    CREATE,
    FIELDS,
    FORGET_ORIGIN,
    HOLD,
    NOTE,
    SCRIPTS,
    entry_keys,
    forks_key,
)
from broker.library.store import Change, ForkedFrom, Found, LibraryEntry, Message
from broker.library.terms import terms_of
from broker.redis.connection import RedisConnection
from broker.redis.script import Command
from broker.sequence import stream_id_from_seq

logger = logging.getLogger(__name__)

HOLD_S = 30.0
"""How long a copy counts as being worked on after its node was last heard of."""
_LANE = "library"  # a connection of its own: appends do not wait for the replies to what is indexed
_ATTEMPTS = 100
_ABANDONED_MAX = 100


@dataclass(slots=True)
class _Noted:
    """What one call notes of one conversation."""

    created_at_ms: int
    seq: int = 0
    terms: dict[str, None] = field(default_factory=dict)
    titled: Message | None = None

    def add(self, message: Message) -> None:
        self.seq = max(self.seq, message.seq)
        self.terms.update(dict.fromkeys(message.terms))
        best = self.titled
        if message.title and (best is None or (message.position, -message.seq) <= (best.position, -best.seq)):
            self.titled = message


class RedisLibraryStore:
    """A LibraryStore over a `RedisConnection`, which its owner closes."""

    name = "redis"

    def __init__(self, connection: RedisConnection, *, hold_s: float = HOLD_S) -> None:
        """hold_s: how long a node that says nothing keeps the copies that it is making."""
        self._connection = connection
        self._hold_s = hold_s
        self._making: set[str] = set()
        self._holding: asyncio.Task[None] | None = None
        connection.register(*SCRIPTS, *redis_index.SCRIPTS)

    async def open(self) -> None:
        """Nothing to open: the connection opens itself."""

    async def close(self) -> None:
        """Stop saying that copies are worked on."""
        if self._holding is not None:
            self._holding.cancel()
            await asyncio.gather(self._holding, return_exceptions=True)
            self._holding = None

    # -- messages -----------------------------------------------------------------------------------------------------

    async def note(
        self,
        conversations: Mapping[str, int],
        messages: Sequence[Message],
        *,
        epochs: Mapping[str, str] | None = None,
        dropped: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        noted = {conv_id: _Noted(created_at_ms) for conv_id, created_at_ms in conversations.items()}
        for message in messages:
            noted.setdefault(message.conv_id, _Noted(message.created_at_ms)).add(message)
        if not noted:
            return
        await self._index(noted)
        commands = [_note_command(conv_id, one, (epochs or {}).get(conv_id, "")) for conv_id, one in noted.items()]
        replies = await self._connection.all(commands, lane=_LANE)
        drops: list[Command] = []
        for conv_id, reply in zip(noted, replies, strict=True):
            if reply == 1 and dropped and conv_id in dropped:
                drops += drop_commands(conv_id, dropped[conv_id])
        if drops:
            await self._connection.all(drops, lane=_LANE)
        refused = [conv_id for conv_id, reply in zip(noted, replies, strict=True) if reply == 0]
        if refused:
            known = await self.entries(refused)
            for conv_id in refused:
                if conv_id not in known:
                    await self._unindex(conv_id)
        reborn = {conv_id: noted[conv_id] for conv_id, reply in zip(noted, replies, strict=True) if reply == 2}
        for conv_id in reborn:
            await self._unindex(conv_id)
        await self._index(reborn)

    async def _index(self, noted: Mapping[str, _Noted]) -> None:
        commands: list[Command] = []
        for conv_id, one in noted.items():
            commands += add_commands(conv_id, one.seq, one.terms)
        await self._connection.all(commands, lane=_LANE)

    async def _unindex(self, conv_id: str) -> None:
        await redis_index.remove(self._connection, conv_id, lane=_LANE)

    # -- entries ------------------------------------------------------------------------------------------------------

    async def entries(self, conv_ids: Sequence[str]) -> dict[str, LibraryEntry]:
        return {conv_id: entry for conv_id, (entry, _) in (await self._read(conv_ids)).items()}

    async def _read(self, conv_ids: Sequence[str]) -> dict[str, tuple[LibraryEntry, bytes]]:
        """Return the entries that exist, each with its revision. One of an earlier life of its log does not exist."""
        commands: list[Command] = []
        for conv_id in conv_ids:
            entry, log = entry_keys(conv_id)
            commands += (("HMGET", entry, *FIELDS), ("HGET", log, "epoch"))
        replies = await self._connection.all(commands)
        found = {}
        for conv_id, values, epoch in zip(conv_ids, replies[::2], replies[1::2], strict=True):
            fields = dict(zip(FIELDS, values, strict=True))
            if fields["created"] is not None and fields["epoch"] in (None, epoch):
                found[conv_id] = (_entry(conv_id, fields), fields["revision"])
        return found

    async def create(self, entry: LibraryEntry) -> bool:
        held = entry.pending and entry.conv_id not in self._making
        if held:
            await self._hold(entry.conv_id)
        made = False
        try:
            made = await self._create(entry)
        finally:
            if held and not made:
                # Not let go in Redis: another node may be making it. A hint that leads nowhere goes by itself.
                self._making.discard(entry.conv_id)
        return made

    async def _create(self, entry: LibraryEntry) -> bool:
        if entry.forked_from is not None:  # before the entry: whoever erases the original finds its forks
            await self._connection.one(("SADD", forks_key(entry.forked_from.conv_id), entry.conv_id), lane=_LANE)
        values = [value for pair in _fields(entry).items() if pair[1] != "" for value in pair]
        command = CREATE.command(entry_keys(entry.conv_id), (secrets.token_hex(8), *values))
        made = await self._connection.one(command, lane=_LANE)
        if not made:
            return False
        if made == 2:
            await self._unindex(entry.conv_id)
        await self._connection.all(
            [
                *add_commands(entry.conv_id, entry.updated_seq, ()),
                title_command(entry.conv_id, terms_of(entry.title or "")),
            ],
            lane=_LANE,
        )
        return True

    async def change(self, conv_id: str, change: Change) -> LibraryEntry | None:
        for _ in range(_ATTEMPTS):
            known = (await self._read([conv_id])).get(conv_id)
            if known is None:
                return None
            old, revision = known
            new = change(old)
            before, after = _fields(old), _fields(new)
            values = [value for name in after if after[name] != before[name] for value in (name, after[name])]
            if not values:
                return new
            titled = new.title != old.title
            if titled:
                terms = [*terms_of(old.title or ""), *terms_of(new.title or "")]
                await self._connection.one(title_command(conv_id, list(dict.fromkeys(terms))), lane=_LANE)
            command = CHANGE.command(entry_keys(conv_id)[:1], (revision, secrets.token_hex(8), *values))
            if not await self._connection.one(command, lane=_LANE):
                continue
            if titled:
                await self._index_title(conv_id)
            if old.pending and not new.pending:
                await self._let_go(conv_id)
            return new
        raise StoreUnavailable(
            f"the entry of conversation {conv_id!r} changed {_ATTEMPTS} times while it was being changed: try again",
            conv_id=conv_id,
        )

    async def _index_title(self, conv_id: str) -> None:
        """Make the index say what the entry says, also if others change the title or erase it right now."""
        indexed: object = self
        for _ in range(_ATTEMPTS):
            entry = (await self.entries([conv_id])).get(conv_id)
            if entry is None:
                await self._unindex(conv_id)
                return
            if entry.title == indexed:
                return
            indexed = entry.title
            await self._connection.one(title_command(conv_id, terms_of(entry.title or "")), lane=_LANE)

    async def erase(self, conv_id: str) -> None:
        entry, _ = entry_keys(conv_id)
        forks = forks_key(conv_id)
        origin, fork_ids = await self._connection.all([("HGET", entry, "origin"), ("SMEMBERS", forks)])
        commands: list[Command] = [
            FORGET_ORIGIN.command(entry_keys(fork.decode())[:1], (conv_id, secrets.token_hex(8))) for fork in fork_ids
        ]
        if origin is not None:
            commands.append(("SREM", forks_key(origin.decode()), conv_id))
        await self._connection.all([*commands, ("DEL", entry)], lane=_LANE)
        await self._unindex(conv_id)
        # Last: until here a repetition finds what is left to do.
        await self._connection.one(("DEL", forks), lane=_LANE)
        await self._let_go(conv_id)

    # -- finding ------------------------------------------------------------------------------------------------------

    async def search(self, terms: Sequence[str], *, before_seq: int | None, limit: int) -> Found:
        return await Search(self._connection, terms, before_seq, limit).page(self._shown)

    async def _shown(self, conv_ids: Sequence[str]) -> set[str]:
        return {conv_id for conv_id, entry in (await self.entries(conv_ids)).items() if not entry.pending}

    async def newest_seq(self) -> int:
        return await redis_index.newest_seq(self._connection)

    # -- copies that are being made -----------------------------------------------------------------------------------

    async def abandoned(self) -> list[str]:
        conv_ids = [
            conv_id.decode() for conv_id in await self._connection.one(ABANDONED.command((COPIES,), (_ABANDONED_MAX,)))
        ]
        entries = await self.entries(conv_ids)
        half = [conv_id for conv_id in conv_ids if conv_id in entries and entries[conv_id].pending]
        settled = [conv_id for conv_id in conv_ids if conv_id not in half]
        if settled:
            await self._connection.one(("ZREM", COPIES, *settled), lane=_LANE)
        return half

    async def _hold(self, conv_id: str) -> None:
        """Say that this node works on a copy, now and until it is done."""
        await self._connection.one(self._hold_command([conv_id], prolong=False), lane=_LANE)
        self._making.add(conv_id)
        if self._holding is None or self._holding.done():
            self._holding = asyncio.get_running_loop().create_task(self._keep_holding())

    async def _keep_holding(self) -> None:
        while self._making:
            await asyncio.sleep(self._hold_s / 3)
            try:
                if self._making:
                    await self._connection.one(self._hold_command(sorted(self._making), prolong=True), lane=_LANE)
            except BrokerError as exc:
                logger.warning("copies that are being made could not be prolonged, trying on: %s", exc)

    def _hold_command(self, conv_ids: Sequence[str], *, prolong: bool) -> Command:
        return HOLD.command((COPIES,), (int(self._hold_s * 1000), int(prolong), *conv_ids))

    async def _let_go(self, conv_id: str) -> None:
        self._making.discard(conv_id)
        await self._connection.one(("ZREM", COPIES, conv_id), lane=_LANE)


def _note_command(conv_id: str, noted: _Noted, epoch: str) -> Command:
    titled = noted.titled
    title = (titled.title or "", _digits(titled.position), _digits(titled.seq)) if titled else ("", "", "")
    arguments = (epoch, stream_id_from_seq(noted.seq), noted.created_at_ms, _digits(noted.seq), *title)
    return NOTE.command(entry_keys(conv_id), (*arguments, secrets.token_hex(8)))


_digits = redis_index.digits


def _fields(entry: LibraryEntry) -> dict[str, str]:
    """Return an entry as fields; '' stands for None."""
    fork = entry.forked_from
    return {
        "created": str(entry.created_at_ms),
        "title": entry.title or "",
        "auto": entry.auto_title or "",
        "metadata": orjson.dumps(dict(entry.metadata)).decode() if entry.metadata else "",
        "seq": _digits(entry.updated_seq),
        "origin": fork.conv_id if fork else "",
        "origin-message": fork.message_id if fork else "",
        "pending": "1" if entry.pending else "",
    }


def _entry(conv_id: str, fields: Mapping[str, Any]) -> LibraryEntry:
    def text(name: str) -> str | None:
        value = fields[name]
        return value.decode() if value is not None else None

    origin, message_id = text("origin"), text("origin-message")
    return LibraryEntry(
        conv_id,
        int(fields["created"]),
        text("title"),
        text("auto"),
        orjson.loads(fields["metadata"] or b"{}"),
        int(fields["seq"] or 0),
        ForkedFrom(origin, message_id) if origin is not None and message_id is not None else None,
        pending=fields["pending"] is not None,
    )
