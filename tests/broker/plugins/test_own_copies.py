"""Plugins that change what they are handed: nobody else sees it, live, caught up, folded or stored, to the byte."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from broker.channels import EventType
from broker.clock import ManualClock
from broker.envelope import Draft, Envelope
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.plugins.access import Access
from broker.profiles import Profile
from broker.runs.engine import EnginePlan, EngineProfile, Finish, ToolCallEnd, ToolCallStart
from broker.runs.plan import ResolvedRequest, RunRequest
from broker.runs.state import Run
from broker.runs.tools import Tool
from broker.runs.turns import Turn
from broker.security import SYSTEM, Principal
from broker.settings import Settings
from broker.testing import MemoryBroker, memory_broker
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, new_entity

SECRET = {"public": False, "tags": ["a", {"deep": [1, 2]}], "text": "card 4111", "n": 1.5}


def vandalise(value: Any) -> None:
    """Change everything in `value` that can be changed, to its depths."""
    if isinstance(value, dict):
        for item in list(value.values()):
            vandalise(item)
        value.clear()
        value["vandal"] = "was here"
    elif isinstance(value, list):
        for item in value:
            vandalise(item)
        value[:] = ["vandal"]


def spoil(envelope: Envelope) -> None:
    vandalise(envelope.data)
    envelope.seq, envelope.type, envelope.id, envelope.channel = 7, "vandal.was", "here", "control"
    envelope.data_json = b'{"vandal":1}'


class Honest:
    """What the others are: a fold, a filter and a merge that read what they are given."""

    name = "honest"

    @hookimpl
    def register_event_types(self) -> list[EventType]:
        return [EventType("note.added", "sem"), EventType("other.said", "sem")]

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("public", channels=("sem",)), Profile("other", channels=("sem", "timeline"))]

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [TimelineHandler("note.added", self.fold)]

    def fold(self, entities: Mapping[str, Entity], envelope: Envelope) -> list[Entity]:
        known = entities.get(envelope.id)
        if known is not None:
            return [known.changed(**envelope.data)]
        return [new_entity(envelope, "note", **envelope.data)]

    @hookimpl(trylast=True)
    def build_filter(self, profile: Profile) -> Any:
        if profile.name == "public":
            return lambda envelope: envelope.type != "note.added" or envelope.data.get("public", True)
        return None


class Vandal:
    """Changes in place whatever it is handed, in the hooks named."""

    name = "vandal"

    def __init__(self, *hooks: str) -> None:
        self.hooks = hooks
        self.calls = 0

    def _did(self, hook: str) -> bool:
        self.calls += hook in self.hooks
        return hook in self.hooks

    @hookimpl(tryfirst=True)
    def build_filter(self, profile: Profile) -> Any:
        def passes(envelope: Envelope) -> bool:
            if self._did("filter"):
                spoil(envelope)
            return True

        return passes

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        if profile.name != "default":
            return None

        def shape(envelope: Envelope) -> Envelope:
            if self._did("transform"):
                vandalise(envelope.data)
            return envelope

        return shape

    @hookimpl
    def check_draft(self, draft: Draft) -> None:
        if self._did("draft"):
            vandalise(draft.data)
            draft.type, draft.id, draft.channel = "vandal.was", "here", "control"

    @hookimpl
    async def on_published(self, envelopes: list[Envelope]) -> None:
        if self._did("published"):
            for envelope in envelopes:
                spoil(envelope)
            envelopes.clear()

    @hookimpl
    def register_event_types(self) -> list[EventType]:
        return [EventType("text.more", "sem", merge=self.merge)]

    def merge(self, first: Any, second: Any) -> Any:
        joined = {"text": first["text"] + second["text"]}
        if self._did("merge"):
            first["text"] += second["text"]
            second["text"] += "vandal"
        return joined

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [TimelineHandler("other.said", self.fold, keys=self.keys)]

    def keys(self, envelope: Envelope) -> tuple[str, ...]:
        if self._did("keys"):
            spoil(envelope)
        return ("note-1", "other-1")

    def fold(self, entities: Mapping[str, Entity], envelope: Envelope) -> list[Entity]:
        if self._did("fold"):
            spoil(envelope)
            for entity in entities.values():
                vandalise(entity.props)
            if isinstance(entities, dict):
                entities.clear()
        return []


async def told(running: MemoryBroker) -> list[Any]:
    """Publish a little of everything; return every byte that two innocent views get of it, at once and later."""
    live = [await running.connect("c1", profile=profile) for profile in ("public", "other")]
    await running.publish("c1", "note.added", SECRET, id="note-1")
    for text in ("a", "b", "c"):
        await running.publish("c1", "text.more", {"text": text}, id="text-1")
    await running.publish("c1", "other.said", {"nested": {"list": [1]}}, id="other-1")
    await running.publish("c1", "note.added", {"more": [True]}, id="note-1")
    await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    later: list[Any] = []
    for _ in range(2):
        for profile in ("public", "other"):
            client = await running.connect("c1", profile=profile, since=0)
            await client.wait_for("ws.caught_up")
            later.append([text for text in client.texts if b'"ws.' not in text])
    stored = await running.parts.log.read("c1", after=0)
    view = running.parts.views.compile(SYSTEM, "other", None)
    for _ in range(2):  # what two connections get that fell behind
        later.append([(one.id, one.seq, one.data_json) for one in view.show_merged(stored.envelopes)])
    return [
        *[[text for text in client.texts if b'"ws.' not in text] for client in live],
        *later,
        [entity.to_wire() for entity in await running.parts.timeline.entities("c1")],
        [(one.type, one.id, one.channel, one.seq, one.data_json) for one in stored.envelopes],
    ]


@pytest.mark.parametrize("hook", ["filter", "transform", "draft", "published", "merge", "keys", "fold"])
async def test_nobody_else_sees_what_a_plugin_changes_in_place(hook: str) -> None:
    """The same events with and without the vandal: byte for byte the same, live and later, folded and stored."""
    innocent, vandal = Vandal(), Vandal(hook)
    async with memory_broker(Honest(), innocent, clock=ManualClock()) as running:
        expected = await told(running)
        assert b"4111" not in b"".join(expected[0])
        assert b"4111" in b"".join(expected[1])
    async with memory_broker(Honest(), vandal, clock=ManualClock()) as running:
        if hook == "transform":  # its own view has somebody in it
            await running.connect("c1")
        assert await told(running) == expected
    assert vandal.calls
    assert not innocent.calls


@pytest.mark.parametrize("how", ["in place", "in place, then a copy", "after the copy", "nested"])
async def test_a_transform_that_masks_in_place_masks(how: str) -> None:
    """Whichever way the data were changed, what is sent is what `data` says at the end."""

    class Mask:
        name = "mask"

        @hookimpl
        def build_transform(self, profile: Profile) -> Any:
            return self.mask if profile.name == "default" else None

        def mask(self, envelope: Envelope) -> Envelope:
            if envelope.type != "note.added":
                return envelope
            if how == "nested":
                envelope.data["tags"][1]["deep"] = "***"
                return envelope
            if how == "after the copy":
                shaped = envelope.with_data(envelope.data)
                shaped.data["text"] = "***"
                return shaped
            envelope.data["text"] = "***"
            return envelope if how == "in place" else envelope.with_data(envelope.data)

    async with memory_broker(Mask()) as running:
        client, other = await running.connect("c1"), await running.connect("c1", profile="debug")
        await running.publish("c1", "note.added", SECRET, id="note-1")
        masked, plain = await client.wait_for("note.added"), await other.wait_for("note.added")
    expected = orjson.loads(orjson.dumps(SECRET))
    assert plain["data"] == expected
    if how == "nested":
        expected["tags"][1]["deep"] = "***"
    else:
        expected["text"] = "***"
    assert masked["data"] == expected


async def test_a_transform_that_changes_nothing_costs_no_second_frame() -> None:
    """Looking at the data is no change: the frame is the one that the other views get."""

    class Looking:
        name = "looking"

        @hookimpl
        def build_transform(self, profile: Profile) -> Any:
            return lambda envelope: envelope if len(envelope.data) < 99 else envelope.with_data({})

    host = PluginHost()
    host.add(Looking())
    ((name, made),) = host.call_collect("build_transform", profile=Profile("default"))
    given = Envelope("c1", "a.b", "n", "sem", b'{ "big": 12345678901234567890123, "x": [1.0] }', 1, 5)
    assert host.guard(name, "build_transform", made)(given) is given


async def test_a_producers_own_data_stay_its_own() -> None:
    class Enriching:
        name = "enriching"

        @hookimpl
        def check_draft(self, draft: Draft) -> Draft:
            vandalise(draft.data["tags"])
            draft.data["by"] = "plugin"  # type: ignore[index]
            return draft

    mine = orjson.loads(orjson.dumps(SECRET))
    draft = Draft("note.added", mine, "note-1")
    async with memory_broker(Honest(), Enriching()) as running:
        client = await running.connect("c1", profile="other")
        await running.broker.publish("c1", [draft])
        shown = await client.wait_for("note.added")
    assert mine == SECRET
    assert draft == Draft("note.added", SECRET, "note-1")
    assert (shown["data"]["by"], shown["data"]["tags"]) == ("plugin", ["vandal"])


async def test_a_fold_that_keeps_what_it_returned_does_not_change_the_timeline_later() -> None:
    class Keeping:
        name = "keeping"
        kept: list[Any] = []

        @hookimpl
        def register_timeline_handlers(self) -> list[TimelineHandler]:
            return [TimelineHandler("note.added", self.fold)]

        def fold(self, entities: Mapping[str, Entity], envelope: Envelope) -> list[Entity]:
            self.kept.append(envelope.data["text"])
            return [new_entity(envelope, "note", said=self.kept)]

    async with memory_broker(Keeping()) as running:
        await running.publish("c1", "note.added", {"text": "a"}, id="n1")
        await running.publish("c1", "note.added", {"text": "b"}, id="n2")
        first, second = [entity.props["said"] for entity in await running.parts.timeline.entities("c1")]
    assert (first, second) == (["a"], ["a", "b"])


def vandal_host(hook: str, awaited: bool = False) -> tuple[PluginHost, list[Any]]:
    """Return a host with two plugins that keep and then ruin every argument of a hook."""
    seen: list[Any] = []

    def ruin(**given: Any) -> None:
        for value in given.values():
            seen.append(orjson.loads(orjson.dumps(value, default=lambda odd: sorted(odd))))
            for name in getattr(value, "__dataclass_fields__", ()):
                vandalise(getattr(value, name))
            vandalise(value)

    host = PluginHost()
    names = {
        "authorize": "principal, channels",
        "resolve_request": "request",
        "build_engine": "plan",
        "on_turn_phase": "turn",
        "on_run_finished": "run",
    }[hook]
    for name in ("one", "two"):
        made: dict[str, Any] = {"ruin": ruin}
        arguments = ", ".join(f"{each}={each}" for each in names.split(", "))
        exec(f"def {hook}(self, {names}): ruin({arguments})", made)
        host.add(type(name, (), {"name": name, hook: hookimpl(made[hook])})())
    return host, seen


RUN = Run("r1", "c1", "hi", "m1", "parrot", {"a": [1]}, "k", "s", 1, 1, error={"code": "x"}, usage={"n": {"m": 1}})


@pytest.mark.parametrize(
    ("hook", "given"),
    [
        (
            "resolve_request",
            {"request": RunRequest(Principal("ann", claims={"c": ["x"]}), "c1", "hi", None, {"a": [1]})},
        ),
        ("build_engine", {"plan": EnginePlan("c1", "p", "e", {"a": [1]}, {"b": {"c": 1}}, "sig")}),
        ("on_turn_phase", {"turn": Turn("t", "c1", "s", "r1", "final", 1, {"usage": {"n": [1]}}), "phase": "final"}),
        ("on_run_finished", {"run": RUN}),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
async def test_records_that_hooks_are_handed_are_copies_too(hook: str, given: dict[str, Any]) -> None:
    host, seen = vandal_host(hook)
    before = repr(given)
    await host.acall_collect(hook, **given)
    assert repr(given) == before
    assert seen[0] == seen[1]
    assert "vandal" not in repr(seen)


async def test_an_authorizer_cannot_change_who_somebody_is() -> None:
    host, seen = vandal_host("authorize")
    ann, channels = Principal("ann", claims={"conversations": ["c1"]}), ["sem", "timeline"]
    await Access(Settings(), host).authorize(ann, "read", "c1", channels)
    assert (ann.claims, channels) == ({"conversations": ["c1"]}, ["sem", "timeline"])
    assert seen[:2] == seen[2:]


class ToolCaller:
    """An engine that calls a tool once, and the tool, which ruins its input."""

    name = "tool_caller"

    def __init__(self) -> None:
        self.told: list[Any] = []

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return [EngineProfile("caller", engine="caller", tools=("ruin",))]

    @hookimpl
    def register_tools(self) -> list[Tool]:
        return [Tool("ruin", "ruins", {"type": "object"}, self.ruin)]

    def ruin(self, input: Any, context: Any) -> str:
        vandalise(input)
        return "done"

    @hookimpl
    def resolve_request(self, request: RunRequest) -> ResolvedRequest:
        return ResolvedRequest(request.conv_id or "c1", "caller")

    @hookimpl
    def build_engine(self, plan: EnginePlan) -> Any:
        return self

    async def stream(self, request: Any) -> Any:
        self.told.append([orjson.loads(orjson.dumps(one.input)) for m in request.messages for one in m.tool_calls])
        schemas = [spec.parameters for spec in request.tools]
        assert schemas == [{"type": "object"}]
        for message in request.messages:  # an engine that does with all of it what it likes
            for each in message.tool_calls:
                vandalise(each.input)
        vandalise(schemas[0])
        if request.step == 0:
            yield ToolCallStart("k", "call-1", "ruin")
            yield ToolCallEnd("k", {"nested": {"list": [1]}})
        yield Finish("stop")

    async def aclose(self) -> None: ...


async def test_a_tool_that_ruins_its_input_ruins_its_own() -> None:
    """The engine is told the call as the model made it, in the next step and in the next run, whatever it did to it."""
    plugin = ToolCaller()
    async with memory_broker(plugin) as running:
        client = await running.connect("c1")
        for count in (1, 2):
            await running.parts.runs.send(Principal("ann"), "c1", "hi")
            await client.wait_for("run.finished", count=count)
    made = {"nested": {"list": [1]}}
    assert plugin.told == [[], [made], [made], [made, made]]


class Approving(ToolCaller):
    """A plugin whose engine and whose own code go on changing what they handed over, while a person decides."""

    name = "approving"

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []
        self.broker: Any = None
        self.handed: dict[str, Any] = {"nested": {"list": [1]}}

    @hookimpl
    def on_startup(self, broker: Any) -> None:
        self.broker = broker

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return [EngineProfile("caller", engine="caller", tools=("ruin",), overridable={"mark": {}})]

    @hookimpl
    def register_tools(self) -> list[Tool]:
        return [Tool("ruin", "ruins", {"type": "object"}, self.ruin, requires_approval=True)]

    @hookimpl
    def resolve_request(self, request: RunRequest) -> Any:
        return None

    def ruin(self, input: Any, context: Any) -> str:
        self.given.append(orjson.loads(orjson.dumps(input)))
        return "done"

    async def stream(self, request: Any) -> Any:
        if request.step == 0:
            yield ToolCallStart("k", "call-1", "ruin")
            yield ToolCallEnd("k", self.handed)
            vandalise(self.handed)
        yield Finish("stop")


async def test_what_a_person_approves_is_what_the_tool_gets() -> None:
    """Whatever the engine does with the input afterwards, and a plugin with the state that it was shown."""
    plugin = Approving()
    async with memory_broker(plugin) as running:
        client = await running.connect("c1")
        overrides = {"mark": {"deep": [1]}}
        await plugin.broker.send(SYSTEM, "c1", "hi", overrides=overrides)
        vandalise(overrides)
        await client.wait_for("tool.approval_requested")
        shown = await plugin.broker.state(SYSTEM, "c1")
        before = orjson.dumps(shown)
        assert shown["pendingApprovals"][0]["input"] == {"nested": {"list": [1]}}
        vandalise(shown)
        assert orjson.dumps(await plugin.broker.state(SYSTEM, "c1")) == before
        await running.parts.runs.approve_tools("c1", None, "ann")
        await client.wait_for("run.finished")
        (run,) = await running.parts.stores.runs.runs("c1", limit=None)
    assert plugin.given == [{"nested": {"list": [1]}}]
    assert run.overrides == {"mark": {"deep": [1]}}
