"""What ships for plugin tests: the broker in memory, the capturing connection, the envelope factory."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest

import broker.testing
from broker.envelope import Draft, Envelope
from broker.errors import PluginError, UnknownProfile
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.publisher import Publisher
from broker.testing import CapturingConnection, EnvelopeFactory, assert_hidden, memory_broker
from broker.timeline.handlers import TimelineHandler, new_entity
from transports.pool import ConnectionPool, Message


class Quiet:
    """A plugin with a profile that hides deltas, an emitter, and a memory of connections."""

    name = "quiet"

    def __init__(self) -> None:
        self.connections: list[str] = []

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("quiet")]

    @hookimpl
    def build_filter(self, profile: Profile) -> Callable[[Envelope], bool] | None:
        return (lambda envelope: not envelope.type.endswith(".delta")) if profile.name == "quiet" else None

    @hookimpl
    async def start_emitters(self, publisher: Publisher) -> None:
        await publisher.publish("log", {"message": "hello", "level": "info"})

    @hookimpl
    def on_connection_opened(self, connection: Any) -> None:
        self.connections.append(f"+{connection.connection_id}")

    @hookimpl
    def on_connection_closed(self, connection: Any) -> None:
        self.connections.append(f"-{connection.connection_id}")


async def test_a_plugin_is_tested_against_a_real_broker_in_memory():
    """Its filter decides for its profile only, its emitter publishes, its observers are told."""
    plugin = Quiet()
    async with memory_broker(plugin) as running:
        quiet = await running.connect("c1", profile="quiet")
        everything = await running.connect("c1")
        await running.publish("c1", "llm.delta", {"delta": "he", "runId": "r1"}, id="m1")
        seq = await running.publish("c1", "llm.final", {"text": "he", "runId": "r1"}, id="m1")
        frame = await quiet.wait_for("llm.final")
        assert frame["seq"] == str(seq)
        assert quiet.of_type("llm.delta") == []
        await everything.wait_for("llm.final")
        assert len(everything.of_type("llm.delta")) == 1
        await quiet.wait_for("log")
        await running.disconnect(quiet)
    assert plugin.connections[:3] == ["+connection-1", "+connection-2", "-connection-1"]


async def test_what_does_not_come_is_told_with_what_came():
    """A failing test says what happened instead."""
    async with memory_broker() as running:
        client = await running.connect("c1")
        await client.wait_for("ws.caught_up")
        with pytest.raises(AssertionError, match=r"1 x llm.final expected within 0.01 s; came: ws.hello, ws.caught_up"):
            await client.wait_for("llm.final", timeout_s=0.01)
        client.close(4404, "gone")
        with pytest.raises(AssertionError, match=r"closed with \(4404, 'gone'\)"):
            await client.wait_for("llm.final")


async def test_a_refused_subscription_leaves_no_connection():
    """The error is the broker's own."""
    async with memory_broker() as running:
        with pytest.raises(UnknownProfile):
            await running.connect("c1", profile="nope")
        assert len(running.pool) == 0


async def test_a_plugin_that_does_not_fit_is_told_before_the_broker_starts():
    """As at the start of the server."""

    class Misspelled:
        @hookimpl
        def biuld_filter(self, profile: Profile) -> None: ...

    with pytest.raises(PluginError, match="biuld_filter"):
        async with memory_broker(Misspelled()):
            pass


async def test_the_capturing_connection_fits_the_real_pool():
    """So transports' and plugins' tests share it."""
    pool = ConnectionPool()
    connection = CapturingConnection("k1")
    pool.add(connection)
    assert pool.send_to_one("k1", [Message(b'{"sem":true,"event":{"type":"ws.pong"}}')])
    assert connection.events == [{"type": "ws.pong"}]
    pool.close("k1", 1000, "done")
    assert connection.closed == (1000, "done")


def test_made_envelopes_have_rising_places():
    """Like those of a log: time-based, never a small counter."""
    make = EnvelopeFactory("c9")
    first, second = make(), make("llm.final", {"text": "x"}, id="m2")
    assert first.conv_id == "c9"
    assert first.seq < second.seq
    assert first.seq > 1_700_000_000_000 * 1_000_000
    assert second.data == {"text": "x"}


class PrivateNotes:
    """Entities of a plugin's own kind, and a filter that looks at something of the event which the entity does not have."""

    name = "private_notes"

    def __init__(self, *, keeps_level: bool) -> None:
        self.keeps_level = keeps_level

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        def fold(entities: Any, envelope: Envelope) -> Any:
            level = {"level": envelope.data["level"]} if self.keeps_level else {}
            return [new_entity(envelope, "note", text=envelope.data["text"], **level)]

        return [TimelineHandler("note.added", fold)]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return lambda envelope: envelope.data.get("level") != "private"


class OneProfile:
    """Hides prompts in one profile alone."""

    name = "one_profile"

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("support")]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return (lambda envelope: envelope.type != "user.message") if profile.name == "support" else None


NOTE = [Draft("note.added", {"text": "swordfish", "level": "private"}, "n1")]
PROMPT = [Draft("user.message", {"text": "swordfish"}, "u1")]


async def test_a_filter_that_holds_for_events_alone_is_refused() -> None:
    await assert_hidden(PrivateNotes(keeps_level=True), secret="swordfish", drafts=NOTE)
    with pytest.raises(AssertionError, match=r"'swordfish' is told by: live frames, .*hydration.*/api/timeline"):
        await assert_hidden(PrivateNotes(keeps_level=False), secret="swordfish", drafts=NOTE)
    with pytest.raises(AssertionError, match=r"'swordfish' is told by: title, search\."):
        await assert_hidden(OneProfile(), secret="swordfish", drafts=PROMPT, profile="support")


async def test_the_example_of_the_module_runs() -> None:
    """As it stands in the docstring of broker.testing."""
    source = textwrap.dedent((broker.testing.__doc__ or "").partition("\n\n")[2].partition("\n\nNothing here")[0])
    scope: dict[str, Any] = {"my_plugin": Quiet()}
    exec(source, scope)
    await scope["test_quiet_profile_hides_deltas"]()
