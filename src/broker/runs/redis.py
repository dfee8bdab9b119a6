"""Runs in Redis: any node reads and changes them; a run that is worked on is leased to the node that does."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import orjson

from broker.envelope import topic
from broker.errors import BrokerError, ConversationShut, StoreUnavailable
from broker.eventlog.redis_keys import log_keys
from broker.redis.connection import RedisConnection
from broker.runs.leases import Unattended
from broker.runs.memory import MemoryRunStore
from broker.runs.redis_keys import DANGLING_S, KeyTaken, RedisKeys, key_name
from broker.runs.redis_leases import LEASE_S, RedisLeases
from broker.runs.redis_scripts import COMMIT, LOAD, SAVE_OPAQUE, STORE_SCRIPTS, UNSETTLED, run_keys, runs_of
from broker.runs.state import Run, RunStatus, Verdict
from broker.runs.store import Admitted, ConversationState, KeyRecord, Prepared, answer_of

T = TypeVar("T")

_ATTEMPTS = 300
_SHUT_WAIT_S = 5.0
"""How long a change waits for another node to have erased the conversation."""
_SHUT_POLL_S = 0.05
_CONVERSATIONS_OF_RUNS = 10_000
_LOADED_AT_ONCE = 200


class _Model(MemoryRunStore):
    """One conversation's open runs, loaded: operations change it, the difference is written."""

    def __init__(self, conv_id: str, reply: list[Any]) -> None:
        super().__init__()
        revision, state, newest, *runs = reply
        self.conv_id = conv_id
        self.revision: bytes = revision
        by_id: dict[str, Run] = {}
        for run in runs_of([newest, *runs]):
            by_id.setdefault(run.run_id, run)
        # The newest is known for its number; it stands last.
        if newest:
            last = next(iter(by_id))
            by_id[last] = by_id.pop(last)
        self._runs = by_id
        self._by_conv = {conv_id: list(by_id)}
        if state:
            self._conversations[conv_id] = ConversationState(**orjson.loads(state))
        self._before = (dict(by_id), self._conversations.get(conv_id))

    def changes(self) -> tuple[list[Run], list[str], ConversationState | None]:
        """Return changed runs, ids of removed ones, and the conversation's state if it changed."""
        runs, state = self._before
        now = self._conversations.get(self.conv_id)
        changed = [run for id, run in self._runs.items() if runs.get(id) is not run]
        return changed, [id for id in runs if id not in self._runs], now if now != state else None


class RedisRunStore(RedisLeases):
    """A RunStore over a `RedisConnection`, which its owner closes. Also a `Leases`."""

    name = "redis"

    def __init__(
        self, connection: RedisConnection, *, lease_s: float = LEASE_S, dangling_s: float = DANGLING_S
    ) -> None:
        """lease_s: how long a node that says nothing keeps its runs. dangling_s: see redis_keys.py."""
        super().__init__(connection, lease_s=lease_s)
        connection.register(*STORE_SCRIPTS)
        self._keys = RedisKeys(connection, dangling_s=dangling_s)
        self._conv_of: dict[str, str] = {}
        self._saves = 0
        self._saves_skipped = 0

    async def open(self) -> None:
        """Nothing to open: the connection opens itself."""

    # -- changes ----------------------------------------------------------------------------------------------------

    async def _load(self, conv_id: str, *run_ids: str) -> _Model:
        return _Model(conv_id, await self._connection.one(LOAD.command(run_keys(conv_id), run_ids)))

    async def _change(
        self,
        conv_id: str,
        operation: Callable[[_Model], Awaitable[T]],
        *run_ids: str,
        lease: Callable[[T], bool] = lambda result: False,
        before: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        """Load, compute, write if nobody was faster, else again. before: done ahead of each try to write.

        lease: asked of the result, whether this node takes the lease on the conversation's active run with the change.
        """
        name, loop = topic(conv_id), asyncio.get_running_loop()
        until_s = loop.time() + _SHUT_WAIT_S
        for _ in range(_ATTEMPTS):
            model = await self._load(conv_id, *run_ids)
            result = await operation(model)
            saves = model.stats()
            changed, removed, state = model.changes()
            if not changed and not removed and state is None:
                self._saves_skipped += saves["saves_skipped"]
                return result
            if before is not None:
                await before(result)
            keys = (
                *run_keys(conv_id), f"{name}:run-change:{secrets.token_hex(8)}", f"{name}:run-keys", log_keys(conv_id)[1],
            )  # fmt: skip
            arguments: list[bytes | str | int] = [
                model.revision, orjson.dumps(asdict(state)) if state else "",
                self.lease_ms if lease(result) else "", self._connection.node, len(changed),
            ]  # fmt: skip
            for run in changed:
                arguments += (run.run_id, int(run.settled), orjson.dumps(run.to_json()))
            arguments += removed
            if any(not run.ended for run in changed):
                await self._connection.one(("SADD", UNSETTLED, conv_id), lane="append")
            token = await self._connection.one(COMMIT.command(keys, arguments), lane="append")
            if token is not None and token.startswith(b"!"):
                shut = ConversationShut.of(conv_id, token[1:].decode())
                if not shut.passing or loop.time() > until_s:
                    raise shut
                await asyncio.sleep(_SHUT_POLL_S)
                continue
            if token is not None:
                if token:
                    self.hold(conv_id, token.decode())
                self._saves += saves["saves"]
                self._saves_skipped += saves["saves_skipped"]
                return result
        raise StoreUnavailable(f"the runs of {conv_id} are being changed from too many sides: try again")

    async def prepare(self, run: Run, *, record: KeyRecord | None, max_queued: int) -> Prepared:
        name = key_name(record.scope, record.key) if record is not None else ""
        if record is not None and (known := await self._keys.record(name)):
            return Prepared(None, record=known)
        mine: list[KeyRecord] = []

        async def operation(model: _Model) -> Prepared:
            prepared = await model.prepare(run, record=None, max_queued=max_queued)
            if record is None or prepared.run is None:
                return prepared
            answer = answer_of(prepared.run, prepared.status, prepared.queue_position)
            return replace(prepared, record=replace(record, conv_id=run.conv_id, answer=answer))

        async def before(prepared: Prepared) -> None:
            await self._connection.one(("SET", f"run:{run.run_id}", run.conv_id), lane="append")
            if prepared.record is not None:
                await self._keys.put(name, prepared.record, run, first=not mine)
                mine[:] = [prepared.record]

        try:
            return await self._change(run.conv_id, operation, before=before)
        except KeyTaken as taken:
            return Prepared(None, record=taken.record)
        except StoreUnavailable:
            # Redis may have stored the run and gone away before it said so. The key then still leads to it: dropped, a
            # repetition would be answered a second time.
            if mine:
                await self._keys.settle(name)
            raise
        except BrokerError:
            if mine:
                await self._keys.drop({name: run.conv_id})
            raise

    async def discard(self, run_id: str) -> bool:
        conv_id = await self._conversation_of(run_id)
        if conv_id is None:
            return False
        key = await self._connection.one(("HGET", f"{topic(conv_id)}:run-keys", run_id))
        discarded = await self._change(conv_id, lambda model: model.discard(run_id), run_id)
        if discarded and key is not None:
            await self._keys.drop({key.decode(): conv_id})
        return discarded

    async def admit(self, run_id: str, now_ms: int) -> Admitted:
        conv_id = await self._conversation_of(run_id)
        if conv_id is None:
            return Admitted(None, None)
        return await self._change(
            conv_id, lambda model: model.admit(run_id, now_ms), run_id, lease=lambda done: done.claimed is not None
        )

    async def claim(self, conv_id: str, now_ms: int) -> Run | None:
        return await self._change(
            conv_id, lambda model: model.claim(conv_id, now_ms), lease=lambda claimed: claimed is not None
        )

    async def update(
        self, run_id: str, expect: frozenset[RunStatus], changes: Mapping[str, Any], now_ms: int
    ) -> Run | None:
        return await self._on_run(run_id, lambda model: model.update(run_id, expect, changes, now_ms), None)

    async def decide(self, run_id: str, verdict: Verdict, now_ms: int) -> tuple[Run | None, dict[str, str]]:
        return await self._on_run(run_id, lambda model: model.decide(run_id, verdict, now_ms), (None, {}))

    async def give_up_calls(self, run_id: str, call_ids: frozenset[str], now_ms: int) -> Run | None:
        return await self._on_run(run_id, lambda model: model.give_up_calls(run_id, call_ids, now_ms), None)

    async def move_to_front(self, run_id: str, now_ms: int) -> Run | None:
        return await self._on_run(run_id, lambda model: model.move_to_front(run_id, now_ms), None)

    async def _on_run(self, run_id: str, operation: Callable[[_Model], Awaitable[T]], nobody: T) -> T:
        conv_id = await self._conversation_of(run_id)
        return await self._change(conv_id, operation, run_id) if conv_id is not None else nobody

    # -- reading ----------------------------------------------------------------------------------------------------

    async def _conversation_of(self, run_id: str) -> str | None:
        known = self._conv_of.get(run_id)
        if known is None:
            found = await self._connection.one(("GET", f"run:{run_id}"))
            if found is None:
                return None
            known = found.decode()
            if len(self._conv_of) >= _CONVERSATIONS_OF_RUNS:
                self._conv_of.clear()
            self._conv_of[run_id] = known
        return known

    async def get(self, run_id: str) -> Run | None:
        conv_id = await self._conversation_of(run_id)
        if conv_id is None:
            return None
        found = runs_of([await self._connection.one(("HGET", run_keys(conv_id)[0], run_id))])
        return found[0] if found else None

    async def active(self, conv_id: str) -> Run | None:
        return await (await self._load(conv_id)).active(conv_id)

    async def queued(self, conv_id: str) -> list[Run]:
        return await (await self._load(conv_id)).queued(conv_id)

    async def runs(self, conv_id: str, *, limit: int | None) -> list[Run]:
        runs, order, *_ = run_keys(conv_id)
        ids = await self._connection.one(("ZREVRANGE", order, 0, -1 if limit is None else limit - 1))
        if not ids:
            return []
        return runs_of(await self._connection.one(("HMGET", runs, *ids)))

    async def unsettled(self) -> list[Run]:
        return await self._unsettled_in(await self._open())

    async def unattended(self) -> Unattended:
        names = await self._open()
        free = await self._unattended(names)
        return Unattended(frozenset(names), frozenset(free), await self._unsettled_in(free))

    async def _open(self) -> list[str]:
        """Return the conversations that are on the list of those with open runs."""
        return sorted(name.decode() for name in await self._connection.one(("SMEMBERS", UNSETTLED)))

    async def _unsettled_in(self, names: Sequence[str]) -> list[Run]:
        found: list[Run] = []
        for at in range(0, len(names), _LOADED_AT_ONCE):
            some = names[at : at + _LOADED_AT_ONCE]
            replies = await self._connection.all([LOAD.command(run_keys(conv_id)) for conv_id in some])
            for conv_id, reply in zip(some, replies, strict=True):
                found += await _Model(conv_id, reply).unsettled() or await self._take_off_list(conv_id)
        return found

    async def _take_off_list(self, conv_id: str) -> list[Run]:
        # Taken off the list, then looked at again: somebody may have put it there for a new run in between.
        await self._connection.one(("SREM", UNSETTLED, conv_id), lane="append")
        open_runs = await (await self._load(conv_id)).unsettled()
        if open_runs:
            await self._connection.one(("SADD", UNSETTLED, conv_id), lane="append")
        return open_runs

    # -- idempotency keys -------------------------------------------------------------------------------------------

    async def key(self, scope: str, key: str) -> KeyRecord | None:
        return await self._keys.record(key_name(scope, key))

    async def prune_keys(self, before_ms: int) -> int:
        return await self._keys.prune(before_ms)

    # -- the conversation -------------------------------------------------------------------------------------------

    async def conversation(self, conv_id: str) -> ConversationState | None:
        value = await self._connection.one(("HGET", run_keys(conv_id)[3], "state"))
        return ConversationState(**orjson.loads(value)) if value else None

    async def save_conversation(self, state: ConversationState, *, of_run: str | None = None) -> None:
        asked = () if of_run is None else (of_run,)
        await self._change(state.conv_id, lambda model: model.save_conversation(state, of_run=of_run), *asked)

    async def save_opaque(
        self, conv_id: str, message_id: str, data: Sequence[Mapping[str, Any]], *, of_run: str | None = None
    ) -> None:
        keys = (run_keys(conv_id)[0], f"{topic(conv_id)}:run-opaque")
        command = SAVE_OPAQUE.command(keys, (of_run or "", message_id, orjson.dumps(list(data))))
        await self._connection.one(command, lane="append")

    async def opaque(self, conv_id: str) -> dict[str, list[Mapping[str, Any]]]:
        found = await self._connection.one(("HGETALL", f"{topic(conv_id)}:run-opaque"))
        return {id.decode(): orjson.loads(value) for id, value in zip(found[::2], found[1::2], strict=True)}

    async def erase(self, conv_id: str) -> None:
        name = topic(conv_id)
        run_ids = await self._connection.one(("HKEYS", run_keys(conv_id)[0]))
        key_names = await self._connection.one(("HVALS", f"{name}:run-keys"))
        await self._keys.drop({key.decode(): conv_id for key in key_names})
        commands: list[Any] = [("DEL", f"run:{id.decode()}") for id in run_ids]
        commands += [("SREM", UNSETTLED, conv_id)]
        commands += [("DEL", *run_keys(conv_id), f"{name}:run-keys", f"{name}:run-opaque")]
        await self._connection.all(commands, lane="append")
        for id in run_ids:
            self._conv_of.pop(id.decode(), None)
        self.forget(conv_id)

    def stats(self) -> dict[str, int]:
        return {"saves": self._saves, "saves_skipped": self._saves_skipped}
