"""The library in a real broker: forks and imports obey the fold law, erasing leaves no byte, a crash leaves no half."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import CALLER, Core, database, read_messages, store_setting, until, until_async
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text

from broker.cli.verify import verify_conversation
from broker.conversations.conversation import Conversation
from broker.envelope import Draft, Envelope
from broker.errors import Conflict, InvalidInput, NotFound, PermissionDenied, StoreError
from broker.hookspecs import hookimpl
from broker.library.jsonl import BadLine
from broker.library.store import Found, LibraryEntry
from broker.runs.tools import Tool
from broker.security import Principal
from broker.sequence import EARLIEST_MS, PER_MS
from broker.testing import parts_of
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, new_entity


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


def agent(secret: str = "sunny", *, approval: bool = False) -> EnginePlugin:
    """An engine that thinks nothing, calls a tool once per prompt and reports what it said."""
    tool = Tool("weather", "", {"type": "object"}, lambda _given, _context: {"sky": secret}, requires_approval=approval)

    def answer(request: Any) -> list[Any]:
        if request.messages[-1].role == "tool":
            return text(f"It is {secret}, ", f"said {len(request.messages)} messages.")
        return (
            text("Let me look. ", reason="tool_calls")[:-1]
            + call("weather", {"city": secret})
            + text(reason="tool_calls")
        )

    return EnginePlugin(ScriptedEngine(answer=answer), tools=[tool])


async def ask(core: Core, conv_id: str, *prompts: str) -> None:
    for prompt in prompts:
        await core.parts.runs.send(CALLER, conv_id, prompt)
        await until(lambda: core.parts.runs.active == 0)


def content(entity: Entity) -> tuple[Any, ...]:
    return (entity.id, entity.kind, entity.to_wire()["props"], entity.created_at_ms)


async def until_said(core: Core, conv_id: str, said: str) -> None:
    async with asyncio.timeout(10):
        while not any(str(e.props.get("text")) == said for e in await core.parts.timeline.entities(conv_id)):
            await asyncio.sleep(0.002)


async def contents(core: Core, conv_id: str) -> list[tuple[Any, ...]]:
    return [content(entity) for entity in await core.parts.timeline.entities(conv_id)]


async def assert_fold_law(core: Core, conv_id: str) -> None:
    broker = core.broker
    await parts_of(broker).housekeeping.save(parts_of(broker).conversations.all(), everything=True)
    report = await verify_conversation(
        parts_of(broker).log, parts_of(broker).stores.timeline, parts_of(broker).catalog.handlers, conv_id
    )
    assert (report.differences, report.dead_letters) == ([], 0)


async def exported(core: Core, conv_id: str, **options: Any) -> bytes:
    lines = await core.parts.library.export(CALLER, conv_id, **options)
    return b"".join([line async for line in lines])


# -- fork -------------------------------------------------------------------------------------------------------------


async def test_a_fork_begins_as_a_copy_up_to_the_message(db: str) -> None:
    async with Core(db, plugins=[agent()]) as core:
        await ask(core, "source", "first question", "second question")
        source = [one for one in await contents(core, "source") if one[1] != "run"]
        answers = [one for one in source if one[1] == "message" and one[2]["role"] == "assistant"]
        until_here = answers[1][0]  # the end of the first answer
        fork = await core.parts.library.fork(CALLER, "source", until_here)
        new_id = fork.entry.conv_id
        copied = await contents(core, new_id)
        assert copied == source[: source.index(answers[1]) + 1]
        assert [one[1] for one in copied] == ["message", "message", "tool_call", "message"]
        assert fork.to_wire()["forkedFrom"] == {"convId": "source", "messageId": until_here}
        assert fork.to_wire()["title"] == "first question"
        await assert_fold_law(core, new_id)
        # It goes on by itself: the engine is told the copy, the original stays as it was.
        await ask(core, new_id, "another way")
        assert len([one for one in await contents(core, "source") if one[1] != "run"]) == len(source)
        said = [one[2]["text"] for one in await contents(core, new_id) if one[1] == "message"]
        assert said[-1] == "It is sunny, said 7 messages."


async def test_a_fork_refuses_what_it_cannot_copy(db: str) -> None:
    gate = Gate()
    engine = ScriptedEngine([*text("half an answer")[:1], gate, *text(" whole")])
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        await core.parts.runs.send(CALLER, "source", "hi")
        await gate.reached.wait()
        await until_said(core, "source", "half an answer")
        library = core.parts.library
        entities = {one[1]: one[0] for one in await contents(core, "source")}
        growing = (await core.parts.timeline.entities("source"))[-1]
        with pytest.raises(Conflict, match="still being written"):
            await library.fork(CALLER, "source", growing.id)
        for message_id in ("unknown", entities["run"]):
            with pytest.raises(NotFound):
                await library.fork(CALLER, "source", message_id)
        with pytest.raises(NotFound):
            await library.fork(CALLER, "nowhere", "m")
        with pytest.raises(Conflict, match="exists already"):
            await library.fork(CALLER, "source", (await core.parts.timeline.entities("source"))[0].id, new_id="source")
        gate.open()
        await until(lambda: core.parts.runs.active == 0)
        assert [seen.entry.conv_id for seen in (await library.find(CALLER)).conversations] == ["source"]


async def test_a_prompt_that_waited_is_copied_to_where_it_was_answered(db: str) -> None:
    gate = Gate()
    engine = ScriptedEngine([*text("one")[:1], gate, *text("!")], text("two"))
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        await core.parts.runs.send(CALLER, "source", "first")
        await gate.reached.wait()
        await core.parts.runs.send(CALLER, "source", "second")
        gate.open()
        await until(lambda: core.parts.runs.active == 0)
        last = (await core.parts.timeline.entities("source"))[-1]
        fork = await core.parts.library.fork(CALLER, "source", last.id, new_id="copy", title="Named")
        said = [str(e.props["text"]) for e in await core.parts.timeline.entities("copy") if e.kind == "message"]
        assert said == ["first", "one!", "second", "two"]
        assert fork.entry.title == "Named"
        await assert_fold_law(core, "copy")


async def test_every_builtin_entity_survives_a_fork(db: str) -> None:
    long = "ä" * 3000
    drafts = [
        Draft("user.message", {"text": "q", "attachments": [{"name": "a.txt"}]}, "u1"),
        Draft("agent.mode", {"mode": "plan", "n": 1}, "mode"),
        Draft("llm.thinking.start", {"role": "assistant", "runId": "r1"}, "t1"),
        Draft("llm.thinking.delta", {"delta": "hm"}, "t1"),
        Draft("llm.thinking.final", {"text": "hmm", "runId": "r1"}, "t1"),
        Draft("llm.start", {"role": "critic", "model": "m-1", "runId": "r1"}, "m1"),
        *(Draft("llm.delta", {"delta": long[at : at + 1000]}, "m1") for at in (0, 1000, 2000)),
        Draft("llm.final", {"finishReason": "stop", "usage": {"tokens": 3}, "partial": True}, "m1"),
        Draft("tool.start", {"name": "t", "input": {}, "runId": "r1"}, "c1"),
        Draft("tool.delta", {"patch": {"input": {"a": 1}, "progress": 0.5}}, "c1"),
        Draft("tool.approval_requested", {"name": "t", "input": {"a": 1}}, "c1"),
        Draft("tool.approved", {"by": "bob"}, "c1"),
        Draft("tool.result", {"result": None, "customKind": "table"}, "c1"),
        Draft("tool.done", {}, "c1"),
        Draft("tool.start", {"name": "t", "input": {}}, "c2"),
        Draft("tool.denied", {"by": "eve"}, "c2"),
        Draft("tool.result", {"result": {"error": "denied"}}, "c2"),
        Draft("tool.done", {"error": "denied by eve"}, "c2"),
        Draft("tool.start", {"name": "t", "input": {"b": 2}}, "c3"),
        Draft("tool.done", {"error": {"code": 7}}, "c3"),
        Draft("log", {"message": "note", "level": "warning", "fields": {"k": 1}}, "l1"),
        Draft("user.message", {"text": "last"}, "u2"),
    ]
    async with Core(db, max_envelope_bytes=4096) as core:
        await core.broker.publish("source", drafts)
        await core.parts.library.fork(CALLER, "source", "u2", new_id="copy")
        source, copy = await contents(core, "source"), await contents(core, "copy")
        assert copy == source
        await assert_fold_law(core, "copy")
        await core.parts.library.import_(CALLER, await exported(core, "source"), new_id="again")
        assert await contents(core, "again") == source


class Rating:
    """A plugin whose entities stand alone, or are about a message, which they change as well."""

    name = "rating"

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [
            TimelineHandler("note.added", self.note),
            TimelineHandler("rating.given", self.rate, keys=lambda envelope: (envelope.id, envelope.data["message"])),
        ]

    def note(self, entities: Mapping[str, Entity], envelope: Envelope) -> list[Entity]:
        known = entities.get(envelope.id)
        return [known.changed(**envelope.data) if known else new_entity(envelope, "note", **envelope.data)]

    def rate(self, entities: Mapping[str, Entity], envelope: Envelope) -> list[Entity]:
        stars, about = envelope.data["stars"], entities.get(envelope.data["message"])
        known = entities.get(envelope.id)
        rated = [known.changed(stars=stars) if known else new_entity(envelope, "rating", stars=stars)]
        return rated + ([about.changed(stars=stars)] if about else [])


async def test_entities_of_plugins_survive_a_fork(db: str) -> None:
    """Also those that are about a message, and what they changed of it, in their order; not those of what is left out."""
    drafts = [
        Draft("user.message", {"text": "q"}, "u1"),
        Draft("note.added", {"text": "a"}, "n1"),
        Draft("llm.final", {"text": "x"}, "m1"),
        Draft("rating.given", {"message": "m1", "stars": 3}, "r1"),
        Draft("rating.given", {"message": "nobody", "stars": 1}, "r2"),
        Draft("note.added", {"text": "b"}, "n1"),
        Draft("rating.given", {"message": "n1", "stars": 4}, "r3"),
        Draft("note.added", {"more": [1, {"x": 2}]}, "n1"),
        Draft("rating.given", {"message": "m1", "stars": 5}, "r1"),
        Draft("user.message", {"text": "last"}, "u2"),
    ]
    later = [
        Draft("llm.final", {"text": "y"}, "m2"),
        Draft("note.added", {"text": "later"}, "n2"),
        Draft("rating.given", {"message": "m2", "stars": 1}, "r1"),
    ]
    async with Core(db, plugins=[Rating()]) as core:
        await core.broker.publish("source", drafts)
        source = await contents(core, "source")
        await core.broker.publish("source", later)
        await core.parts.library.fork(CALLER, "source", "u2", new_id="copy")
        assert await contents(core, "copy") == source
        await assert_fold_law(core, "copy")


async def test_what_is_open_in_the_middle_is_closed_in_the_copy(db: str) -> None:
    drafts = [
        Draft("user.message", {"text": "q"}, "u1"),
        Draft("llm.delta", {"delta": "so far"}, "m1"),
        Draft("tool.start", {"name": "t", "input": {}}, "c1"),
        Draft("tool.delta", {"patch": {"inputTextDelta": '{"a'}}, "c1"),
        Draft("user.message", {"text": "hello?"}, "u2"),
    ]
    async with Core(db) as core:
        await core.broker.publish("source", drafts)
        await core.parts.library.fork(CALLER, "source", "u2", new_id="copy")
        by_id = {entity.id: entity for entity in await core.parts.timeline.entities("copy")}
        assert (str(by_id["m1"].props["text"]), by_id["m1"].props["partial"]) == ("so far", True)
        assert by_id["c1"].props["status"] == "error"
        assert not any(entity.growing for entity in by_id.values())
        await assert_fold_law(core, "copy")


# -- export, import ---------------------------------------------------------------------------------------------------


async def test_an_export_imports_as_the_same_conversation(db: str) -> None:
    async with Core(db, plugins=[agent(approval=True)]) as core:
        await core.parts.runs.send(CALLER, "source", "what ☂ weather?")
        await until(lambda: core.parts.runs.stats()["runs_active"])
        while not (await core.parts.runs.state("source"))["pendingApprovals"]:
            await asyncio.sleep(0.002)
        await core.parts.runs.approve_tools("source", None, "alice")
        await until(lambda: core.parts.runs.active == 0)
        await core.parts.library.change(CALLER, "source", {"title": "Weather", "metadata": {"pinned": True}})
        file = await exported(core, "source")
        info = await core.parts.library.import_(CALLER, file, new_id="copy")
        assert await contents(core, "copy") == await contents(core, "source")
        assert (info.entry.title, info.entry.metadata) == ("Weather", {"pinned": True})
        await assert_fold_law(core, "copy")
        again = await exported(core, "copy")
        strip = [[(k, v) for k, v in orjson.loads(line).items() if k not in ("seq", "convId", "exportedAtMs")] for line in
                 file.splitlines()]  # fmt: skip
        assert strip == [
            [(k, v) for k, v in orjson.loads(line).items() if k not in ("seq", "convId", "exportedAtMs")]
            for line in again.splitlines()
        ]


async def test_an_export_holds_what_retention_has_trimmed(db: str) -> None:
    async with Core(db, plugins=[agent()], retention_count=10, sweep_interval_s=3600.0) as core:
        await ask(core, "source", "one", "two", "three")
        await core.parts.housekeeping.sweep()
        assert (await core.parts.log.state("source")).trimmed_seq > 0
        file = await exported(core, "source")
        await core.parts.library.import_(CALLER, file, new_id="copy")
        assert [one[:3] for one in await contents(core, "copy")] == [one[:3] for one in await contents(core, "source")]


async def test_what_is_unfinished_in_a_file_ends_with_its_import(db: str) -> None:
    gate = Gate()
    async with Core(db, plugins=[EnginePlugin(ScriptedEngine([*text("so far")[:1], gate, *text("!")]))]) as core:
        await core.parts.runs.send(CALLER, "source", "hi")
        await gate.reached.wait()
        await until_said(core, "source", "so far")
        file = await exported(core, "source")
        await core.parts.library.import_(CALLER, file, new_id="copy")
        by_kind = {(e.kind, e.props.get("role")): e for e in await core.parts.timeline.entities("copy")}
        assert by_kind["run", None].props["status"] == "interrupted"
        answer = by_kind["message", "assistant"]
        assert (str(answer.props["text"]), answer.props["partial"], answer.growing) == ("so far", True, False)
        assert (await core.parts.runs.state("copy"))["status"] == "idle"
        gate.open()
        await until(lambda: core.parts.runs.active == 0)


def lines(*envelopes: dict[str, Any], **end: Any) -> bytes:
    header = {"format": "conversation-broker.conversation", "version": 1, "convId": "x"}
    last = {"end": True, "envelopes": len(envelopes), **end}
    return b"".join(orjson.dumps(one) + b"\n" for one in (header, *envelopes, last))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


GOOD = {"type": "user.message", "id": "u1", "channel": "sem", "timeMs": 1, "data": {"text": "hi"}}
LOG = {**GOOD, "type": "log", "data": {"message": "hi", "level": "info"}}


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        (b"", 1, "empty"),
        (b"{}\n", 1, "format is None"),
        (b'{"format":"conversation-broker.conversation","version":2}\n', 1, "version is 2"),
        (lines(GOOD)[:-3], 3, "no valid JSON"),
        (lines(GOOD).rsplit(b"\n", 2)[0], 2, "last line"),
        (lines(GOOD) + b"{}\n", 4, "after the last line"),
        (lines(GOOD, envelopes=2), 3, "1 were read"),
        (lines(GOOD, {**GOOD, "type": "Not A Type"}), 3, "event type"),
        (lines(GOOD, {**GOOD, "type": "ws.hello"}), 3, "broker's own"),
        (lines({**GOOD, "data": {"text": 5}}), 2, "text"),
        (lines({**GOOD, "data": []}), 2, "data is"),
        (lines({**GOOD, "data": {"text": "x" * 5000}}), 2, "limit is 4096"),
        (lines({**GOOD, "channel": "nope"}), 2, "'nope'"),
        (lines({**GOOD, "channel": "timeline"}), 2, "derived state"),
        (lines({**GOOD, "channel": None}), 2, "channel name"),
        (lines({**GOOD, "id": ""}), 2, "id ''"),
        (lines({**GOOD, "id": 7}), 2, "id is 7"),
        (lines({**GOOD, "timeMs": 10**15}), 2, "timeMs"),
        (lines({**GOOD, "timeMs": True}), 2, "timeMs"),
        (lines({**GOOD, "extra": 1}), 2, "'extra'"),
        (lines(GOOD, title=5), 3, "title is 5"),
        (lines(GOOD, metadata=[]), 3, "metadata is []"),
        (lines(GOOD, {**GOOD, "id": "u2"}, GOOD), 4, "id 'u1' is used twice"),
        (lines(LOG, GOOD), 3, "is used twice"),
        (
            lines(
                LOG,
                LOG,
            ),
            3,
            "twice",
        ),
        (lines(GOOD, *[{**GOOD, "id": "a", "type": "llm.final", "data": {"text": "x"}}] * 2), 4, "comes too late"),
        (lines(GOOD).replace(b'"id":"u1"', b'"id":"\xff"'), 2, "no valid JSON"),
    ],
)
async def test_a_bad_file_names_its_line_and_leaves_nothing(db: str, file: bytes, line: int, says: str) -> None:
    async with Core(db, max_envelope_bytes=4096) as core:
        with pytest.raises(BadLine, match=f"line {line}: .*") as caught:
            await core.parts.library.import_(CALLER, file, new_id="copy")
        assert caught.value.fields["line"] == line
        assert says in str(caught.value)
        assert not (await core.broker.head("copy")).exists
        assert await core.parts.stores.library.entries(["copy"]) == {}


@pytest.mark.parametrize("clean", ["clean", "", "sword fish"])
async def test_a_search_does_not_find_what_was_edited_out(db: str, clean: str) -> None:
    async with Core(db) as core:

        async def found(query: str) -> list[str]:
            page = await core.parts.library.find(CALLER, query=query)
            return [seen.entry.conv_id for seen in page.conversations]

        async def say(id: str, text: str) -> None:
            (seq,) = await core.broker.publish("c1", [Draft("user.message", {"text": text}, id)])
            conversation = await core.parts.conversations.open("c1")
            await until(lambda: conversation.position >= seq)
            await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)

        await say("u1", "swordfish and tuna")
        await say("u2", "tuna alone")
        assert await found("swordfish") == ["c1"]
        await say("u1", clean)
        assert await found("swordfish") == []
        assert await found("tuna") == ["c1"], "the other message has it"
        await say("u2", "swordfish")
        assert await found("swordfish") == ["c1"]
        assert await found("tuna") == []


async def test_an_import_needs_a_free_id_and_bounded_metadata(db: str) -> None:
    async with Core(db) as core:
        library = core.parts.library
        await library.import_(CALLER, lines(GOOD), new_id="copy")
        with pytest.raises(Conflict):
            await library.import_(CALLER, lines(GOOD), new_id="copy")
        with pytest.raises(InvalidInput, match="16384"):
            await library.import_(CALLER, lines(GOOD, metadata={"k": "x" * 20_000}), new_id="other")
        with pytest.raises(InvalidInput, match="100 levels"):
            await library.import_(CALLER, lines(GOOD, metadata={"a": nested(101)}), new_id="other")
        with pytest.raises(InvalidInput, match="no envelope"):
            await library.import_(CALLER, lines(), new_id="other")
        assert not (await core.broker.head("other")).exists


async def test_an_imported_conversation_stands_in_the_list_where_its_times_say(db: str) -> None:
    day_ms = 86_400_000
    old = [{**GOOD, "id": f"u{n}", "timeMs": 1_600_000_000_000 + n * day_ms} for n in range(300)]
    older = [{**GOOD, "id": "u1", "timeMs": 1_500_000_000_000}]
    undated = [{**GOOD, "id": "u1", "timeMs": 0}, {**GOOD, "id": "u2", "timeMs": 0}]
    async with Core(db) as core:
        await core.broker.publish("new", [Draft("user.message", {"text": "today"}, "u")])
        for conv_id, messages in (("older", older), ("old", old), ("undated", undated)):
            info = await core.parts.library.import_(CALLER, lines(*messages), new_id=conv_id)
            last_ms = max(int(str(messages[-1]["timeMs"])), EARLIEST_MS)
            assert info.to_wire()["updatedAtMs"] == last_ms
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        order = ["new", "old", "older", "undated"]
        for query in (None, "hi"):
            for limit in (1, 2, 50):
                seen: list[str] = []
                before: int | None = None
                while True:
                    page = await core.parts.library.find(CALLER, query=query, before=before, limit=limit)
                    seen += [info.entry.conv_id for info in page.conversations]
                    before = page.before
                    if before is None:
                        break
                assert seen == (order if query is None else order[1:]), (query, limit)
        # In itself it is as every other one: numbers grow, and what comes now is of today.
        seqs = [envelope.seq for envelope in (await core.parts.log.read("old", after=0)).envelopes]
        assert seqs == sorted(set(seqs))
        assert [seq // PER_MS for seq in seqs] == [one["timeMs"] for one in old]
        peer, _ = await core.connect("old", since=0, hydrate=True)
        now = await core.broker.publish("old", [Draft("user.message", {"text": "more"}, "now")])
        assert now[0] > core.parts.clock.wall_ms() * PER_MS - 60_000 * PER_MS
        await until(lambda: peer.client.last == now[0])
        assert not peer.client.gaps
        await assert_fold_law(core, "old")
        page = await core.parts.library.find(CALLER, limit=2)
        assert [info.entry.conv_id for info in page.conversations] == ["old", "new"]


async def test_a_fork_of_an_old_conversation_is_new(db: str) -> None:
    async with Core(db) as core:
        await core.parts.library.import_(CALLER, lines(GOOD), new_id="old")
        await core.broker.publish("today", [Draft("user.message", {"text": "today"}, "u")])
        await core.parts.library.fork(CALLER, "old", "u1", new_id="fork")
        page = await core.parts.library.find(CALLER)
        assert [info.entry.conv_id for info in page.conversations] == ["fork", "today", "old"]


async def test_what_a_log_says_of_one_id_again_is_imported_as_it_was(db: str) -> None:
    """An export has what was corrected, came too late or could not be folded; an import of it gives the same."""
    async with Core(db) as core:
        for id, type, data in (
            ("u1", "user.message", {"text": "first"}),
            ("u1", "user.message", {"text": "corrected"}),
            ("a", "llm.final", {"text": "x"}),
            ("a", "llm.delta", {"delta": "late"}),
            ("u1", "log", {"message": "no log", "level": "info"}),
        ):
            await core.broker.publish("c", [Draft(type, data, id)])
        await core.parts.library.import_(CALLER, await exported(core, "c"), new_id="copy")
        assert await contents(core, "copy") == await contents(core, "c")
        copied = (await core.parts.log.read("copy", after=0)).envelopes
        assert [envelope.type for envelope in copied].count("user.message") == 2


@pytest.mark.parametrize("reborn", [False, True])
async def test_an_export_whose_conversation_is_erased_midway_does_not_end_as_if_complete(db: str, reborn: bool) -> None:
    async with Core(db) as core:
        await core.broker.publish("c", [Draft("user.message", {"text": "x" * 2000}, f"u{n}") for n in range(600)])
        file = await core.parts.library.export(CALLER, "c")
        seen = [await anext(file) for _ in range(3)]
        await core.broker.erase("c")
        if reborn:
            await core.broker.publish("c", [Draft("user.message", {"text": "new"}, "new")])
        with pytest.raises(StoreError, match="erased while it was being read"):
            async for line in file:
                seen.append(line)
        assert not any(b'"end":true' in line or b'"new"' in line for line in seen)


class RefusesBad:
    """Refuses a draft half-way through a copy."""

    name = "refuses_bad"

    @hookimpl
    def check_draft(self, draft: Draft) -> Draft:
        from broker.errors import DraftRefused

        if draft.data.get("text") == "bad":
            raise DraftRefused("no")
        return draft


async def test_an_import_that_fails_half_way_leaves_nothing(db: str) -> None:
    many = [{**GOOD, "id": f"u{n}"} for n in range(500)]
    async with Core(db, plugins=[RefusesBad()]) as core:
        with pytest.raises(Exception, match="no"):
            await core.parts.library.import_(
                CALLER, lines(*many, {**GOOD, "id": "bad", "data": {"text": "bad"}}), new_id="copy"
            )
        assert not (await core.broker.head("copy")).exists
        assert (await core.parts.library.find(CALLER)).conversations == []


async def test_a_copy_that_a_crash_cut_is_erased_at_the_next_start(tmp_path: Path) -> None:
    db = database(tmp_path, "sqlite")
    async with Core(db) as core:
        # As `_fill` leaves it when the process dies between two batches.
        await core.parts.stores.library.create(LibraryEntry("half", 1, pending=True))
        await core.broker.publish("half", [Draft("user.message", {"text": "half"}, "u1")])
        assert (await core.parts.library.find(CALLER)).conversations == []
    async with Core(db) as core:
        await until_async(lambda: gone(core, "half"))


async def gone(core: Core, conv_id: str) -> bool:
    return not (await core.broker.head(conv_id)).exists


# -- list -------------------------------------------------------------------------------------------------------------


class Closed:
    """Keeps everybody but the operator out of private conversations."""

    name = "closed"

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None) -> bool | None:
        return False if conv_id and conv_id.startswith("private") and principal.subject != "operator" else None


async def test_a_list_shows_what_the_caller_may_read(db: str) -> None:
    async with Core(db, plugins=[Closed()]) as core:
        for n in range(30):
            conv_id = f"private{n}" if n % 3 else f"open{n}"
            await core.broker.publish(conv_id, [Draft("user.message", {"text": f"Number {n} needle"}, "u")])
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        for query in (None, "needle"):
            seen: list[str] = []
            before: int | None = None
            while True:
                page = await core.parts.library.find(CALLER, query=query, before=before, limit=4)
                seen += [info.entry.conv_id for info in page.conversations]
                before = page.before
                if before is None:
                    break
            assert sorted(seen) == sorted(f"open{n}" for n in range(0, 30, 3))
        everything = await core.parts.library.find(Principal("operator"), limit=100)
        assert len(everything.conversations) == 30
        for action in (
            core.parts.library.get(CALLER, "private1"),
            core.parts.library.change(CALLER, "private1", {"title": "x"}),
            core.parts.library.fork(CALLER, "private1", "u"),
            core.parts.library.fork(CALLER, "open0", "u", new_id="private99"),
            core.parts.library.export(CALLER, "private1"),
            core.parts.library.import_(CALLER, lines(GOOD), new_id="private98"),
        ):
            with pytest.raises(PermissionDenied):
                await action


async def test_a_page_has_as_many_as_asked_for(db: str) -> None:
    """Also where some of those that were looked at are not shown, and the next page goes on right behind."""
    async with Core(db, plugins=[Closed()]) as core:
        for n in range(40):
            conv_id = "private" if n == 35 else f"open{n}"
            await core.broker.publish(conv_id, [Draft("user.message", {"text": "needle"}, "u")])
            await asyncio.sleep(0.002)  # those of one millisecond share a seq, and so a page
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        for query in (None, "needle"):
            first = await core.parts.library.find(CALLER, query=query, limit=20)
            rest = await core.parts.library.find(CALLER, query=query, limit=20, before=first.before)
            names = [info.entry.conv_id for page in (first, rest) for info in page.conversations]
            assert len(first.conversations) == 20
            assert names == [f"open{n}" for n in reversed(range(40)) if n != 35]


async def test_emoji_and_signs_are_looked_for_and_not_ignored(db: str) -> None:
    async with Core(db) as core:
        await core.broker.publish("c1", [Draft("user.message", {"text": "party 🎉"}, "u")])
        await core.broker.publish("c2", [Draft("user.message", {"text": "no party!"}, "u")])
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        for query, expected in (("🎉", ["c1"]), ("party 🎉", ["c1"]), ("party", ["c1", "c2"]), ("!", []), ("🎈", [])):
            page = await core.parts.library.find(CALLER, query=query)
            assert sorted(info.entry.conv_id for info in page.conversations) == expected, query


async def test_a_conversation_without_messages_is_listed_too(db: str) -> None:
    async with Core(db) as core:
        await core.say("events-only", "x")
        await core.broker.publish("chat", [Draft("user.message", {"text": "hello"}, "u")])
        listed = (await core.parts.library.find(CALLER)).conversations
        assert {info.entry.conv_id: info.entry.shown_title for info in listed} == {"events-only": None, "chat": "hello"}


async def test_what_a_crash_kept_from_being_noted_is_found_after_the_restart(tmp_path: Path) -> None:
    db = database(tmp_path, "sqlite")
    async with Core(db, timeline_flush_interval_s=3600.0, upsert_interval_s=3600.0) as core:
        await core.broker.publish("c", [Draft("user.message", {"text": "unforgettable words"}, "u")])
        # As a crash: memory is lost before the timeline was saved.
        for conversation in core.parts.conversations.all():
            core.parts.conversations.forget(conversation)
        assert await core.parts.stores.library.entries(["c"]) == {}
    async with Core(db) as core:

        async def found() -> bool:
            page = await core.parts.library.find(CALLER, query="unforgettable")
            return [info.entry.shown_title for info in page.conversations] == ["unforgettable words"]

        await until_async(found)


async def test_a_start_opens_only_what_may_lack_in_the_library(tmp_path: Path) -> None:
    """Conversations whose timelines were saved whole were noted with them; a thousand of them would make a start slow."""
    db = database(tmp_path, "sqlite")
    opened: list[str] = []

    class Watching:
        @hookimpl
        def on_conversation_opened(self, conversation: Conversation) -> None:
            opened.append(conversation.conv_id)

    async with Core(db, timeline_flush_interval_s=3600.0, upsert_interval_s=3600.0) as core:
        await core.parts.library.stop()  # else the look after this start may find the conversation, and save it
        await core.broker.publish("cut-off", [Draft("user.message", {"text": "unforgettable"}, "u")])
        # As a crash: memory is lost before the timeline was saved.
        for conversation in core.parts.conversations.all():
            core.parts.conversations.forget(conversation)
        for number in range(5):  # newer ones, and therefore looked at before
            await core.broker.publish(f"c{number}", [Draft("note.said", {"text": "of no entity"})])
    async with Core(db, plugins=[Watching()]):
        await until(lambda: "cut-off" in opened)
        assert opened == ["cut-off"]


async def test_merge_patch(db: str) -> None:
    async with Core(db) as core:
        await core.broker.publish("c", [Draft("user.message", {"text": "hello"}, "u")])
        library = core.parts.library
        await library.change(CALLER, "c", {"metadata": {"a": 1, "b": {"c": 2, "d": [1]}}})
        info = await library.change(CALLER, "c", {"metadata": {"a": None, "b": {"d": {"e": 1}, "f": None}}})
        assert info.entry.metadata == {"b": {"c": 2, "d": {"e": 1}}}
        with pytest.raises(InvalidInput, match="metadata has"):
            await library.change(CALLER, "c", {"title": "new", "metadata": {"big": "x" * 17_000}})
        assert (await library.get(CALLER, "c")).to_wire()["title"] == "hello"
        for title in ("👨\u200d👩\u200d👧 هم\u200cچنین", "日本語\u3000題", "1\u202f000"):
            assert (await library.change(CALLER, "c", {"title": title})).to_wire()["title"] == title
        await library.change(CALLER, "c", {"title": None})
        for title in ("", "  ", "a\nb", "a\x1bb", "a\u202eb", "x" * 201):
            with pytest.raises(InvalidInput, match="title"):
                await library.change(CALLER, "c", {"title": title})
        with pytest.raises(NotFound):
            await library.change(CALLER, "unknown", {"title": "x"})
        with pytest.raises(NotFound):
            await library.get(CALLER, "unknown")


# -- erase ------------------------------------------------------------------------------------------------------------


MARK = "zqxjkvmarker"


def found_in_files(folder: Path) -> dict[str, int]:
    """Return where the mark is in the database's files, in any case (search terms are folded)."""
    return {p.name: n for p in folder.iterdir() if (n := p.read_bytes().lower().count(MARK.encode()))}


async def test_an_erased_conversation_leaves_no_byte_in_any_file(tmp_path: Path) -> None:
    """Prompts, titles, metadata, tool inputs and results, turns, keys, the queue: nothing is left, also not later."""
    gate = Gate()
    plugin = agent(MARK)
    assert isinstance(plugin.engine, ScriptedEngine)
    async with Core(database(tmp_path, "sqlite"), plugins=[plugin]) as core:
        broker = core.broker
        for n in range(30):
            await broker.publish(f"other{n}", [Draft("user.message", {"text": f"other words {n} " * 20}, "u")])
        erased = f"c-{MARK}"
        await parts_of(broker).runs.send(CALLER, erased, f"prompt {MARK}", idempotency_key=f"key-{MARK}")
        await until(lambda: parts_of(broker).runs.active == 0)
        await parts_of(broker).library.change(CALLER, erased, {"title": f"Title {MARK}", "metadata": {MARK: [MARK]}})
        answer = [e for e in await parts_of(broker).timeline.entities(erased) if e.kind == "message"][-1]
        await parts_of(broker).library.fork(CALLER, erased, answer.id, new_id="fork")
        await parts_of(broker).ingest.publish(
            erased, [Draft("llm.delta", {"delta": 7, "x": MARK}, "dead-letter")], checked=True
        )
        await broker.publish(erased, [Draft("llm.delta", {"delta": MARK}, "growing")])
        plugin.engine._answer = lambda request: [*text(MARK)[:1], gate]
        await parts_of(broker).runs.send(CALLER, erased, f"running {MARK}")
        await gate.reached.wait()
        await parts_of(broker).runs.send(CALLER, erased, f"queued {MARK}")
        peer, _ = await core.connect(erased)
        await parts_of(broker).housekeeping.tick()
        assert set(found_in_files(tmp_path)) >= {"broker.db-wal"}
        await broker.erase("fork")
        await broker.erase(erased)
        assert found_in_files(tmp_path) == {}
        # What was under way must not come back with the next save, sweep or late write.
        await parts_of(broker).housekeeping.tick()
        await parts_of(broker).housekeeping.sweep()
        await asyncio.sleep(0)
        assert found_in_files(tmp_path) == {}
        assert await parts_of(broker).timeline.entities(erased) == []
        assert peer.closed is not None
        listed = [info.entry.conv_id for info in (await parts_of(broker).library.find(CALLER, limit=200)).conversations]
        assert len(listed) == 30
        assert (await parts_of(broker).library.find(CALLER, query=MARK)).conversations == []
        assert parts_of(broker).runs.active == 0
    assert found_in_files(tmp_path) == {}


async def test_what_a_list_notes_late_does_not_come_back_after_an_erasure(db: str) -> None:
    async with Core(db) as core:
        broker = core.broker
        for turns in range(25):
            await broker.publish("c", [Draft("user.message", {"text": f"{MARK} {n}"}, f"u{n}") for n in range(150)])
            await parts_of(broker).housekeeping.save(parts_of(broker).conversations.all(), everything=True)
            await parts_of(broker).stores.library.erase("c")  # so that the list has something to note

            async def erase(turns: int = turns) -> None:
                for _ in range(turns):
                    await asyncio.sleep(0)
                await broker.erase("c")

            await asyncio.gather(parts_of(broker).library.find(CALLER), erase())
            assert await parts_of(broker).stores.library.entries(["c"]) == {}
            assert await parts_of(broker).stores.library.search([MARK], before_seq=None, limit=1) == Found([], None)


async def test_erasing_beside_writers_and_readers_never_shows_the_old_again(db: str) -> None:
    """Whoever publishes during an erasure begins a new conversation; nobody is left with the old one in memory."""
    async with Core(db) as core:
        broker = core.broker
        for round_number in range(10):
            await broker.publish("c", [Draft("user.message", {"text": f"old {n}"}, f"old{n}") for n in range(50)])

            async def publish(number: int = round_number) -> None:
                for n in range(5):
                    await broker.publish("c", [Draft("user.message", {"text": "new"}, f"new{number}-{n}")])

            async def read() -> None:
                for _ in range(5):
                    await parts_of(broker).timeline.entities("c")

            await asyncio.gather(broker.erase("c"), publish(), read(), broker.erase("c"))
            left = {entity.id for entity in await parts_of(broker).timeline.entities("c")}
            assert not any(one.startswith("old") for one in left)
            await parts_of(broker).housekeeping.tick()
            await assert_fold_law(core, "c")
            await broker.erase("c")


async def test_nobody_opens_a_conversation_while_it_is_erased(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the old entities, not yet deleted, would be in memory again."""
    async with Core(db) as core:
        broker = core.broker
        await broker.publish("c", [Draft("user.message", {"text": "old"}, "old")])
        await parts_of(broker).housekeeping.save(parts_of(broker).conversations.all(), everything=True)
        store = parts_of(broker).stores.timeline
        erase, reached, go = store.erase, asyncio.Event(), asyncio.Event()

        async def slow(conv_id: str) -> None:
            reached.set()
            await go.wait()
            await erase(conv_id)

        monkeypatch.setattr(store, "erase", slow)
        erasing = asyncio.create_task(broker.erase("c"))
        await reached.wait()
        reading = asyncio.create_task(parts_of(broker).timeline.entities("c"))
        publishing = asyncio.create_task(broker.publish("c", [Draft("user.message", {"text": "new"}, "new")]))
        done, _ = await asyncio.wait({reading, publishing}, timeout=0.2)
        assert not done
        go.set()
        await asyncio.gather(erasing, publishing)
        assert {entity.id for entity in await reading} <= {"new"}
        assert [entity.id for entity in await parts_of(broker).timeline.entities("c")] == ["new"]


async def test_a_long_poll_under_way_shows_nothing_of_what_was_erased(db: str) -> None:
    async with Core(db) as core:
        broker = core.broker
        (head,) = await broker.publish("c", [Draft("user.message", {"text": MARK}, "u")])
        poll = asyncio.create_task(
            read_messages(
                broker, CALLER, "c", since=head, epoch=None, profile="default", channels=None, limit=10, wait_s=20
            )
        )
        await until(lambda: parts_of(broker).conversations.all()[0].waiters)
        await broker.erase("c")
        page = await poll
        assert not any(MARK.encode() in frame for frame in page.frames)
