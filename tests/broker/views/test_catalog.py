"""The catalog: what exists by name, whoever declared it, and what happens when two declare the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from broker.channels import Channel, EventType
from broker.envelope import Envelope
from broker.errors import InvalidDraft, InvalidInput, PluginError, UnknownChannel, UnknownProfile
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.profiles import Profile
from broker.testing import EnvelopeFactory
from broker.timeline.entity import Entity
from broker.timeline.handlers import LateEnvelope, TimelineHandler
from broker.views.catalog import Catalog


class Declaring:
    """A plugin that declares what a test gives it."""

    def __init__(self, name: str = "declaring", **declared: Any) -> None:
        self.name = name
        self.declared = declared
        self.asked: list[str] = []

    @hookimpl
    def register_channels(self) -> Any:
        return self.declared.get("channels")

    @hookimpl
    def register_event_types(self) -> Any:
        return self.declared.get("event_types")

    @hookimpl
    def register_profiles(self) -> Any:
        return self.declared.get("profiles")

    @hookimpl
    def register_timeline_handlers(self) -> Any:
        return self.declared.get("handlers")

    @hookimpl
    def classify(self, event_type: str) -> str | None:
        self.asked.append(event_type)
        classes: dict[str, str] = self.declared.get("classify", {})
        return classes.get(event_type)


def catalog(*plugins: object, **options: Any) -> Catalog:
    host = PluginHost()
    for plugin in plugins:
        host.add(plugin)
    return Catalog(host, **options)


def test_what_ships_is_there() -> None:
    built_in = catalog()
    assert set(built_in.profiles) == {"default", "timeline", "text", "debug"}
    assert set(built_in.channels) == {"sem", "timeline", "control", "debug.turn_snapshot", "debug.trace"}
    assert {name for name, channel in built_in.channels.items() if channel.kind == "state"} == {"timeline"}
    assert {name for name, channel in built_in.channels.items() if channel.permission == "debug"} == {
        "debug.turn_snapshot",
        "debug.trace",
    }
    assert set(built_in.handlers) <= set(built_in.event_types), "whatever is folded is declared"


def test_what_a_plugin_declares_is_there_too() -> None:
    plugin = Declaring(
        channels=[Channel("metrics")],
        event_types=[EventType("metric.count", "metrics")],
        profiles=[Profile("numbers", channels=("metrics",))],
    )
    found = catalog(plugin)
    assert found.channel("metrics").kind == "event"
    assert found.profile("numbers").channels == ("metrics",)
    assert found.channel_of("metric.count") == "metrics"


@pytest.mark.parametrize(
    ("declared", "name"),
    [
        ({"channels": [Channel("sem")]}, "sem"),
        ({"event_types": [EventType("llm.delta", "sem")]}, "llm.delta"),
        ({"profiles": [Profile("default")]}, "default"),
        ({"handlers": [TimelineHandler("llm.delta", lambda entities, envelope: ())]}, "llm.delta"),
    ],
)
def test_nothing_built_in_can_be_replaced_by_accident(declared: dict[str, Any], name: str) -> None:
    with pytest.raises(PluginError, match=rf"'declaring'.*{name!r} is already registered by 'built-in'"):
        catalog(Declaring(**declared))


def test_two_plugins_with_one_name_are_both_named() -> None:
    one, two = (Declaring(name, channels=[Channel("metrics")]) for name in ("first", "second"))
    with pytest.raises(PluginError) as told:
        catalog(one, two)
    assert "'first'" in str(told.value)
    assert "'second'" in str(told.value)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"event_types": [EventType("metric.count", "metrics")]}, "'metric.count'.*'metrics'.*known channels"),
        ({"profiles": [Profile("numbers", channels=("metrics",))]}, "'numbers'.*'metrics'.*known channels"),
    ],
)
def test_a_channel_that_nobody_registers_is_found_at_the_start(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(PluginError, match=words):
        catalog(Declaring(**declared))


@pytest.mark.parametrize("declared", [{"channels": [Channel("Bad Name")]}, {"event_types": [EventType('a"b', "sem")]}])
def test_illegal_names_are_refused(declared: dict[str, Any]) -> None:
    with pytest.raises((InvalidDraft, PluginError), match="not usable"):
        catalog(Declaring(**declared))


def test_unknown_names_list_those_that_exist() -> None:
    with pytest.raises(UnknownChannel, match="'nope'.*sem"):
        catalog().channel("nope")
    with pytest.raises(UnknownProfile, match="'nope'.*default"):
        catalog().profile("nope")


# -- channels of event types ------------------------------------------------------------------------------------------


def test_classify_is_asked_once_per_type_and_not_for_declared_ones() -> None:
    plugin = Declaring(channels=[Channel("metrics")], classify={"metric.count": "metrics"})
    found = catalog(plugin)
    assert [found.channel_of("metric.count") for _ in range(5)] == ["metrics"] * 5
    assert found.channel_of("something.else") == "sem"
    assert found.channel_of("llm.delta") == "sem"
    assert plugin.asked == ["metric.count", "something.else"]


def test_classifying_into_a_channel_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(PluginError, match="plugin 'declaring', hook classify: .*'nowhere'"):
        catalog(Declaring(classify={"a.b": "nowhere"})).channel_of("a.b")


def test_types_from_outside_cost_bounded_memory() -> None:
    plugin = Declaring()
    found = catalog(plugin)
    for n in range(10_000):
        found.channel_of(f"x.t{n}")
    assert len(found._channel_by_type) < 5000
    assert found.channel_of("x.t1") == "sem"


# -- switches ---------------------------------------------------------------------------------------------------------


def test_debug_channels_are_off_until_they_are_switched_on() -> None:
    found = catalog(debug_channels_on=["debug.trace"])
    assert found.is_on(found.channel("debug.trace"))
    assert not found.is_on(found.channel("debug.turn_snapshot"))
    assert found.is_on(found.channel("sem"))
    found.switch("debug.trace", on=False)
    found.switch("debug.trace", on=False)
    assert not found.is_on(found.channel("debug.trace"))


@pytest.mark.parametrize(("name", "error"), [("sem", InvalidInput), ("debug.nope", UnknownChannel)])
def test_only_debug_channels_have_a_switch(name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        catalog().switch(name, on=False)
    with pytest.raises(error, match=name):
        catalog(debug_channels_on=[name])


# -- a plugin's functions are counted under its name ------------------------------------------------------------------


def test_a_handler_that_raises_is_counted_for_its_plugin() -> None:
    def fold(entities: Mapping[str, Entity], envelope: Envelope) -> Iterable[Entity]:
        if envelope.data.get("late"):
            raise LateEnvelope("too late")
        raise RuntimeError("broken")

    host = PluginHost()
    host.add(Declaring(handlers=[TimelineHandler("metric.count", fold)]))
    handler = Catalog(host).handlers["metric.count"]
    envelope = EnvelopeFactory()
    with pytest.raises(RuntimeError):
        handler.fold({}, envelope("metric.count"))
    with pytest.raises(LateEnvelope):
        handler.fold({}, envelope("metric.count", {"late": True}))
    (described,) = [one for one in host.describe() if one["name"] == "declaring"]
    assert described["errors"] == 1, "too late is an answer, not an error"
