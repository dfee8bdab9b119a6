"""Proof that the stored timeline equals the fold of the log (I15): `broker timeline verify`."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiosqlite

from broker.assembly.stores import choose_stores
from broker.clock import SystemClock
from broker.envelope import Envelope
from broker.errors import InvalidInput, NotFound
from broker.eventlog.base import EventLog
from broker.plugins import PluginHost
from broker.settings import Settings, of_commands
from broker.sqlite.file import check_ours, store_error, uri_of
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler
from broker.timeline.projector import ConversationTimeline
from broker.timeline.store import TimelineStore, stored_page
from broker.views.catalog import Catalog

MAX_DIFFERENCES = 20


@dataclass(slots=True)
class ConversationReport:
    """What verifying one conversation found.

    verified: entities that equal their fold. older: entities created before the oldest retained envelope, which cannot
    be folded again. dead_letters: envelopes that could not be folded. differences: what does not match, in words.
    """

    conv_id: str
    envelopes: int = 0
    verified: int = 0
    older: int = 0
    dead_letters: int = 0
    differences: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the report as one line."""
        verdict = "ok" if not self.differences else "DIFFERS: " + "; ".join(self.differences[:MAX_DIFFERENCES])
        return (
            f"{self.conv_id}: {self.envelopes} envelopes, {self.verified} entities verified, "
            f"{self.older} older than the retained log, {self.dead_letters} dead letters: {verdict}"
        )


@dataclass(slots=True)
class Report:
    """What verifying a store found."""

    conversations: list[ConversationReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every timeline equals the fold of its log."""
        return not any(conversation.differences for conversation in self.conversations)

    def lines(self) -> list[str]:
        """Return one line per conversation and a sum."""
        wrong = sum(bool(conversation.differences) for conversation in self.conversations)
        return [
            *(conversation.line() for conversation in self.conversations),
            f"{len(self.conversations)} conversations verified, {wrong} differ",
        ]


async def verify_conversation(
    log: EventLog, store: TimelineStore, handlers: Mapping[str, TimelineHandler], conv_id: str
) -> ConversationReport:
    """Fold the retained log of a conversation and compare each stored entity with the fold at its own version.

    Works beside a running broker: an entity that is stored at an older version (a growing answer) is compared there.
    """
    report = ConversationReport(conv_id)
    state = await log.state(conv_id)
    cursor = await store.cursor(conv_id)
    stored = await _all_entities(store, conv_id)
    timeline = ConversationTimeline(conv_id, handlers)
    timeline.begin(state.trimmed_seq)
    timeline.complete = True
    verified: set[str] = set()
    beheaded: set[str] = set()  # what is retained gives them another place, but they were created before
    position = state.trimmed_seq
    while True:
        page = await log.read(conv_id, after=position)
        for envelope in page.envelopes:
            handler = handlers.get(envelope.type)
            if handler is None:
                continue
            if handler.moves:
                beheaded |= _beheaded(timeline, handler, envelope)
            timeline.fold([envelope])
            for entity in timeline.changed_by(handler, envelope):
                if entity.id not in beheaded:
                    _compare(report, stored, entity, verified)
        report.envelopes += len(page.envelopes)
        position = page.through
        if not page.more:
            break
    report.verified = len(verified)
    report.dead_letters = timeline.dead_letters
    folded = timeline.live()
    for id, entity in stored.items():
        if entity.position <= state.trimmed_seq or id in beheaded:
            report.older += 1
        elif id not in folded:
            report.differences.append(f"{id} is stored but no envelope makes it")
        elif id not in verified:
            report.differences.append(f"{id} is stored at version {entity.version}, which no envelope gives it")
    for id, entity in folded.items():
        if id in stored and (id in beheaded or stored[id].position <= state.trimmed_seq):
            continue  # its beginning is gone: what is retained of it (a late delta) folds to something else
        if id not in stored and entity.version <= cursor:
            report.differences.append(f"{id} is missing (the fold has it at version {entity.version})")
        elif id in stored and stored[id].version < entity.version <= cursor:
            report.differences.append(f"{id} is stored at {stored[id].version}, the fold has {entity.version}")
    return report


def _beheaded(timeline: ConversationTimeline, handler: TimelineHandler, envelope: Envelope) -> set[str]:
    """Return the ids of the entities that an envelope moves although what created one of them is not retained."""
    try:
        keys = handler.keys(envelope)
    except Exception:  # the fold meets the same, and counts it
        return set()
    live = timeline.live()
    return set(keys) if len(keys) > 1 and any(id not in live for id in keys[1:]) else set()


def _compare(report: ConversationReport, stored: Mapping[str, Entity], folded: Entity, verified: set[str]) -> None:
    known = stored.get(folded.id)
    if known is None or known.version != folded.version or known.position != folded.position:
        return
    if known.to_wire() == folded.to_wire():
        verified.add(folded.id)
    else:
        report.differences.append(f"{folded.id} at version {folded.version} differs from its fold")
        verified.add(folded.id)


async def _all_entities(store: TimelineStore, conv_id: str) -> dict[str, Entity]:
    found: dict[str, Entity] = {}
    after: int | None = 0
    while after is not None:
        page, after = await stored_page(store, conv_id, after_position=after)
        found.update({entity.id: entity for entity in page})
    return found


async def verify_store(settings: Settings, conv_id: str | None = None) -> Report:
    """Verify one conversation of the settings' Redis or SQLite file, or all. Both may be in use.

    Of a file a consistent copy is read. Raises InvalidInput for `:memory:`, NotFound for an unknown conversation or a
    missing file, ForeignDatabase, NewerDatabase, StoreUnavailable.
    """
    if settings.redis_url is not None:
        return await _verify(settings, conv_id)
    if settings.db == ":memory:":
        raise InvalidInput("db=':memory:' keeps nothing that could be verified: name the database file with --db")
    if not await asyncio.to_thread(Path(settings.db).exists):
        raise NotFound(f"database file {settings.db!r} does not exist: name it with --db")
    check_ours(settings.db)
    with tempfile.TemporaryDirectory() as folder:
        copy = str(Path(folder) / "copy.db")
        await _copy(settings.db, copy)
        return await _verify(settings.model_copy(update={"db": copy}), conv_id)


async def _copy(source: str, target: str) -> None:
    try:
        async with aiosqlite.connect(uri_of(source, "ro"), uri=True) as original, aiosqlite.connect(target) as copied:
            await original.backup(copied)
    except sqlite3.Error as exc:
        raise store_error(exc, source) from exc


async def _verify(settings: Settings, conv_id: str | None) -> Report:
    plugins = PluginHost.load(of_commands(settings))
    catalog = Catalog(plugins)
    stores = choose_stores(settings, plugins, SystemClock())
    report = Report()
    try:
        await stores.open_all()
        await stores.log.open(lambda batches: None)
        for name in await _names(stores.log, conv_id):
            report.conversations.append(await verify_conversation(stores.log, stores.timeline, catalog.handlers, name))
    finally:
        await stores.close()
        plugins.close()
    return report


async def _names(log: EventLog, conv_id: str | None) -> list[str]:
    if conv_id is not None:
        if not (await log.state(conv_id)).exists:
            raise NotFound(f"conversation {conv_id!r} is not in this store", conv_id=conv_id)
        return [conv_id]
    names: list[str] = []
    before: int | None = None
    while page := await log.conversations(before_seq=before, limit=1000):
        names.extend(name for name, _ in page)
        before = page[-1][1]
    return sorted(names)
