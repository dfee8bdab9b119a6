"""Views: which envelopes a profile shows, how, and that one encoding serves everybody who looks through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from tests.support.core import Core, until
from tests.support.wire import Client

from broker.channels import Channel, EventType
from broker.envelope import Envelope
from broker.errors import InvalidInput, PermissionDenied, UnknownChannel, UnknownProfile
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.profiles import Profile
from broker.security import Principal
from broker.testing import EnvelopeFactory
from broker.timeline.entity import Entity
from broker.views.catalog import Catalog
from broker.views.compiler import ViewCompiler
from broker.views.frames import event_frame, state_frame
from broker.views.upsert import Upsert
from broker.views.view import MERGED_BYTES_MAX, View

NOBODY = Principal("nobody")
OPERATOR = Principal("operator", frozenset({"debug"}))


class Shaping:
    """A plugin with a profile, a channel, and whatever filter, transform or merge a test wants."""

    name = "shaping"

    def __init__(
        self,
        *,
        keep: Callable[[Envelope], Any] | None = None,
        shape: Callable[[Envelope], Any] | None = None,
        merge: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.keep, self.shape, self.merge = keep, shape, merge

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [
            Profile("shaped", channels=("sem", "timeline"), options=(("level", "1"),)),
            Profile("guarded", channels=("sem",), permission="audit"),
            Profile("some", channels=("sem", "control"), event_types=("llm.*", "log")),
        ]

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [Channel("metrics"), Channel("private", permission="secret")]

    @hookimpl
    def register_event_types(self) -> list[EventType]:
        return [EventType("metric.count", "metrics", merge=self.merge)]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return self.keep if profile.name == "shaped" else None

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        return self.shape if profile.name == "shaped" else None


def compiler(*plugins: object) -> ViewCompiler:
    host = PluginHost()
    for plugin in plugins or (Shaping(),):
        host.add(plugin)
    return ViewCompiler(Catalog(host), host)


def shaped(**made: Any) -> View:
    return compiler(Shaping(**made)).compile(NOBODY, "shaped", None)


# -- what a view consists of ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["control", "sem", "timeline"]),
        ("", ["control", "sem", "timeline"]),
        ("sem", ["sem"]),
        ("sem, metrics", ["metrics", "sem"]),
        ("+metrics", ["control", "metrics", "sem", "timeline"]),
        ("-timeline", ["control", "sem"]),
        ("-timeline,+metrics,-control", ["metrics", "sem"]),
        (" metrics", ["control", "metrics", "sem", "timeline"]),  # a "+" that a query string turned into a blank
        ("-sem,-timeline,-control", []),
        ("-metrics", ["control", "sem", "timeline"]),
    ],
)
def test_channels_replace_or_change_the_profiles_own(given: str | None, expected: list[str]) -> None:
    assert compiler().compile(NOBODY, "default", given).channel_names == expected


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("nope", UnknownChannel, "'nope'"),
        ("+nope", UnknownChannel, "'nope'"),
        ("-nope", UnknownChannel, "'nope'"),
        ("sem,", UnknownChannel, "''"),
        ("--sem", UnknownChannel, "'-sem'"),
        ("++sem", UnknownChannel, r"'\+sem'"),
        ("-+sem", UnknownChannel, r"'\+sem'"),
        ("SEM", UnknownChannel, "'SEM'"),
        ("sem,+metrics", InvalidInput, "mixes"),
        ("*", UnknownChannel, "'\\*'"),
        ("private", PermissionDenied, "'secret'"),
        ("+debug.trace", PermissionDenied, "'debug'"),
    ],
)
def test_what_is_not_there_or_not_allowed_is_refused_by_name(given: str, error: type[Exception], words: str) -> None:
    """Never silently narrowed, nor silently ignored."""
    with pytest.raises(error, match=words):
        compiler().compile(NOBODY, "default", given)


def test_a_profile_may_ask_for_a_permission() -> None:
    with pytest.raises(PermissionDenied, match=r"'guarded'.*'audit'"):
        compiler().compile(OPERATOR, "guarded", None)
    assert compiler().compile(Principal("auditor", frozenset({"audit"})), "guarded", None).channel_names == ["sem"]
    with pytest.raises(UnknownProfile, match="'nope'"):
        compiler().compile(OPERATOR, "nope", None)


def test_everything_is_what_the_caller_may_see() -> None:
    views = compiler()
    assert "debug.trace" not in views.compile(NOBODY, "debug", None).channel_names
    assert "debug.trace" in views.compile(OPERATOR, "debug", None).channel_names
    assert "private" not in views.compile(OPERATOR, "debug", None).channel_names


def test_the_same_choice_is_the_same_view() -> None:
    """However it was written; another choice, another profile or another set of plugins is another one."""
    views = compiler()
    one = views.compile(NOBODY, "default", "sem,control")
    assert views.compile(OPERATOR, "default", "-timeline") is one
    assert views.compile(NOBODY, "default", "sem").key != one.key
    assert views.compile(NOBODY, "some", "sem,control").key != one.key
    assert compiler().compile(NOBODY, "default", "control,sem").key == one.key, "a restart does not change it"
    plain, filtered = shaped(), shaped(keep=lambda envelope: True)
    assert plain.key != filtered.key


# -- what it shows ----------------------------------------------------------------------------------------------------


def test_event_types_are_exact_or_prefixes() -> None:
    view, envelope = compiler().compile(NOBODY, "some", None), EnvelopeFactory()
    assert view.admits(envelope("llm.delta"))
    assert view.admits(envelope("llm.thinking.delta"))
    assert view.admits(envelope("log"))
    assert not view.admits(envelope("log.more"))
    assert not view.admits(envelope("llmx.delta"))
    assert not view.admits(envelope("llm"))
    assert not view.admits(envelope("llm.delta", channel="metrics"))


def test_any_number_of_types_from_outside_costs_bounded_memory() -> None:
    view, envelope = compiler().compile(NOBODY, "some", None), EnvelopeFactory()
    for n in range(10_000):
        assert not view.admits(envelope(f"x.t{n}"))
    assert len(view._types) < 5000
    assert view.admits(envelope("llm.delta"))


class Broken(Exception):
    pass


def fail(*_: object) -> Any:
    raise Broken("broken")


async def later(envelope: Envelope) -> bool:
    return True


@pytest.mark.parametrize(
    "keep", [fail, later, lambda: True, "not callable", lambda e: None, lambda e: later(e), lambda e: e.data["missing"]]
)
def test_a_filter_that_fails_withholds(keep: Any) -> None:
    """It raises, is asynchronous, takes other arguments, is no function, says nothing: all of it fails closed (I9)."""
    view, envelope = shaped(keep=keep), EnvelopeFactory()
    assert view.show(envelope()) is None
    assert view.show_merged([envelope(), envelope()]) == []
    assert view.show_state(Upsert("c1", ENTITY)) is None


ENTITY = Entity("m", "message", 1, 2, 30, 20, {"text": "secret"}, sources=frozenset({("sem", "llm.final")}))


def another_place(envelope: Envelope) -> Envelope:
    return Envelope("c1", envelope.type, envelope.id, envelope.channel, envelope.data_json, 0, envelope.seq + 1)


def moved_in_place(envelope: Envelope) -> Envelope:
    envelope.seq += 1
    return envelope


def moved_before_it_failed(envelope: Envelope) -> Envelope:
    envelope.seq += 1
    raise Broken("broken")


def unwritable(envelope: Envelope) -> Envelope:
    return envelope.with_data({"x": float})


@pytest.mark.parametrize(
    "shape",
    [fail, another_place, moved_in_place, moved_before_it_failed, lambda e: None, lambda e: {}, later, unwritable],
)
def test_a_transform_that_fails_or_tampers_withholds(shape: Any) -> None:
    """The original may hold what was to be redacted, and no plugin may change a place in the order (I1)."""
    view, envelope = shaped(shape=shape), EnvelopeFactory()
    original = envelope()
    seq = original.seq
    assert view.show(original) is None
    assert original.seq == seq, "the others still get it under its own number"
    assert view.show_merged([envelope(), envelope("log")]) == []
    assert view.show_state(Upsert("c1", ENTITY)) is None


def test_a_transform_redacts_events_and_state_alike() -> None:
    def mask(envelope: Envelope) -> Envelope:
        return envelope.with_data(orjson.loads(orjson.dumps(envelope.data).replace(b"secret", b"***")))

    view, envelope = shaped(shape=mask), EnvelopeFactory()
    original = envelope("log", {"message": "a secret"})
    shown = view.show(original)
    assert shown is not None
    assert (shown.data, shown.seq, original.data) == ({"message": "a ***"}, original.seq, {"message": "a secret"})
    state = view.show_state(Upsert("c1", ENTITY))
    assert state is not None
    assert b"secret" not in state_frame(state)


def test_a_view_without_state_shows_none() -> None:
    assert compiler().compile(NOBODY, "text", None).show_state(Upsert("c1", ENTITY)) is None


# -- merging for those who are behind ---------------------------------------------------------------------------------


def deltas(envelope: EnvelopeFactory, *pieces: str, id: str = "m", **extra: Any) -> list[Envelope]:
    return [envelope("llm.delta", {"delta": piece, **extra}, id=id) for piece in pieces]


def test_neighbours_of_one_message_are_joined_under_the_later_seq() -> None:
    view, envelope = compiler().compile(NOBODY, "default", None), EnvelopeFactory()
    log = deltas(envelope, "a", "b", "c")
    assert [(one.data, one.seq) for one in view.show_merged(log)] == [({"delta": "abc"}, log[-1].seq)]
    assert [one.data["delta"] for one in log] == ["a", "b", "c"], "the log's own envelopes stay as they are"


def test_what_is_different_stays_apart() -> None:
    view, envelope = compiler().compile(NOBODY, "default", None), EnvelopeFactory()
    log = [
        *deltas(envelope, "a"),
        *deltas(envelope, "b", id="other"),
        *deltas(envelope, "c"),
        envelope("log", {"message": "x"}),
        *deltas(envelope, "d", runId="r1"),
        *deltas(envelope, "e", runId="r2"),
        envelope("llm.thinking.delta", {"delta": "f"}, id="m"),
    ]
    assert view.show_merged(log) == log


def test_what_the_view_hides_does_not_keep_neighbours_apart() -> None:
    view, envelope = compiler().compile(NOBODY, "text", None), EnvelopeFactory()
    log = [*deltas(envelope, "a"), envelope("log", {"message": "hidden"}), *deltas(envelope, "b")]
    assert [one.data["delta"] for one in view.show_merged(log)] == ["ab"]


def test_joined_frames_have_a_size_limit_and_nothing_is_lost() -> None:
    view, envelope = compiler().compile(NOBODY, "default", None), EnvelopeFactory()
    log = deltas(envelope, *(str(n % 10) * 700 for n in range(100)))
    shown = view.show_merged(log)
    assert "".join(one.data["delta"] for one in shown) == "".join(one.data["delta"] for one in log)
    assert len(shown) < 10
    assert max(len(one.data_json) for one in shown) <= MERGED_BYTES_MAX


@pytest.mark.parametrize("merge", [fail, lambda a, b: None, lambda a, b: {"x": float}, lambda a, b: 5])
def test_a_merge_that_fails_sends_unmerged(merge: Any) -> None:
    """A plugin's bad merge function must not keep a slow client from catching up."""
    view = compiler(Shaping(merge=merge)).compile(NOBODY, "default", "+metrics")
    envelope = EnvelopeFactory()
    log = [envelope("metric.count", {"n": n}, channel="metrics") for n in range(3)]
    assert [one.data for one in view.show_merged(log)] == [{"n": 0}, {"n": 1}, {"n": 2}]


# -- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ['quo"te', "back\\slash", "日本", "a b", "</script>"])
def test_frames_are_json_whatever_the_id(id: str) -> None:
    envelope = EnvelopeFactory()("log", {"message": "\u2028 \x00 ü"}, id=id)
    event = orjson.loads(event_frame(envelope, 7))["event"]
    assert event == {
        "type": "log",
        "id": id,
        "seq": str(envelope.seq),
        "prev": "7",
        "channel": "sem",
        "data": {"message": "\u2028 \x00 ü"},
    }
    state = orjson.loads(state_frame(Upsert("c1", Entity(id, "log", 1, 2, 30, 20, {}))))["event"]
    assert (state["id"], state["seq"], state["data"]["version"]) == (id, "30", "30")
    assert "prev" not in state


def test_a_stream_id_is_shown_where_there_is_one() -> None:
    envelope = EnvelopeFactory()("log")
    envelope.stream_id = "1763690000123-4"
    assert orjson.loads(event_frame(envelope, 0))["event"]["stream_id"] == "1763690000123-4"


class Keeping(Client):
    """Keeps the very objects that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[bytes] = []

    def take(self, text: str | bytes) -> None:
        assert isinstance(text, bytes)
        self.given.append(text)
        super().take(text)


async def test_one_encoding_serves_everybody_with_the_same_view() -> None:
    """Work grows with views, not with connections."""
    calls: list[Envelope] = []

    def count(envelope: Envelope) -> Envelope:
        calls.append(envelope)
        return envelope.with_data({**envelope.data, "seen": True})

    async with Core(":memory:", plugins=[Shaping(shape=count)]) as core:
        same = [(await core.connect("c1", client=Keeping(), profile="shaped"))[0].client for _ in range(20)]
        other = (await core.connect("c1", client=Keeping()))[0].client
        calls.clear()
        built = core.parts.dispatcher.frames_built
        await core.say("c1", "once")
        await until(lambda: all(len(client.events) == 1 for client in [*same, other]))
        assert len([envelope for envelope in calls if envelope.type == "note.said"]) == 1
        assert core.parts.dispatcher.frames_built - built == 2, "one per view"
        frames = [client.given[-1] for client in same if isinstance(client, Keeping)]
        assert all(frame is frames[0] for frame in frames)
        assert frames[0] != other.given[-1]  # type: ignore[attr-defined]


async def test_an_audience_that_left_costs_no_encoding() -> None:
    async with Core(":memory:") as core:
        peer, _ = await core.connect("c1")
        await core.say("c1", "seen")
        await core.disconnect(peer)
        built = core.parts.dispatcher.frames_built
        await core.say("c1", "unseen")
        assert core.parts.dispatcher.frames_built == built
