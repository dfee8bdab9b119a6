"""Changes of view in place: each event once whatever views there were, and state as the present view shows it (I4, I14)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core import Core, store_setting, until
from tests.support.wire import Peer

from broker.delivery import view_change
from broker.delivery.subscription import Subscription
from broker.delivery.viewed import Viewed
from broker.envelope import Envelope
from broker.errors import LimitExceeded
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.testing import EnvelopeFactory, memory_broker


class Looks:
    """Profiles that hide, mask, or drop what the others show."""

    name = "looks"

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        shown = ("sem", "timeline", "control")
        return [
            Profile("hiding", channels=shown),
            Profile("masking", channels=shown),
            Profile("failing", channels=shown),
            Profile("users", channels=shown, event_types=("user.message",)),
        ]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return (lambda envelope: b"secret" not in envelope.data_json) if profile.name == "hiding" else None

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        def mask(envelope: Envelope) -> Envelope:
            return envelope.with_data(orjson.loads(envelope.data_json.replace(b"secret", b"***")))

        def fail(envelope: Envelope) -> Envelope:
            if b"secret" in envelope.data_json:
                raise ValueError("cannot mask this")
            return envelope

        return {"masking": mask, "failing": fail}.get(profile.name)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def core(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Core]:
    async with Core(store_setting(request, tmp_path), plugins=[Looks()]) as core:
        yield core


async def change(
    core: Core,
    peer: Peer,
    subscription: Subscription,
    profile: str,
    *,
    channels: str | None = None,
    since: int | None = None,
) -> dict[str, Any]:
    """Change the view and wait until it has caught up; return what `ws.profile` said."""
    before = len(peer.client.controls("ws.caught_up"))
    await core.broker.doors.following.change_view(subscription, profile=profile, channels=channels, since=since)
    await until(lambda: len(peer.client.controls("ws.caught_up")) > before)
    return peer.client.controls("ws.profile")[-1]


def texts(peer: Peer) -> list[str]:
    return [event["data"]["text"] for event in peer.client.events]


@pytest.mark.parametrize("old", ["hiding", "failing"])
async def test_what_the_old_view_hid_and_the_new_one_masks_comes(core: Core, old: str) -> None:
    """The old view is asked about the event itself, not about what the new one makes of it."""
    peer, subscription = await core.connect("c1", profile=old, since=0)
    await core.say("c1", "open")
    await core.say("c1", "a secret")
    assert texts(peer) == ["open"]
    await change(core, peer, subscription, "masking", since=0)
    assert texts(peer) == ["open", "a ***"]
    await change(core, peer, subscription, "default", since=0)
    assert texts(peer) == ["open", "a ***"], "it has had it"


@pytest.mark.parametrize(
    ("old", "had", "new", "gets"),
    [
        ("hiding", {"u1": "open"}, "default", {"u1": "open", "u2": "a secret", "log": None}),
        (
            "masking",
            {"u1": "open", "u2": "a ***", "log": None},
            "default",
            {"u1": "open", "u2": "a secret", "log": None},
        ),
        ("default", {"u1": "open", "u2": "a secret", "log": None}, "hiding", {"u1": "open"}),
        ("default", {"u1": "open", "u2": "a secret", "log": None}, "users", {"u1": "open", "u2": "a secret"}),
        ("users", {"u1": "open", "u2": "a secret"}, "masking", {"u1": "open", "u2": "a ***", "log": None}),
    ],
)
async def test_state_looks_as_the_new_view_shows_it(
    core: Core, old: str, had: dict[str, str], new: str, gets: dict[str, str]
) -> None:
    await core.broker.publisher("c1").publish("user.message", {"text": "open"}, id="u1")
    await core.broker.publisher("c1").publish("user.message", {"text": "a secret"}, id="u2")
    await core.broker.publisher("c1").publish("log", {"message": "a secret", "level": "info"}, id="log")

    def entities(peer: Peer) -> dict[str, Any]:
        return {id: entity["props"].get("text") for id, entity in peer.client.entities.items()}

    peer, subscription = await core.connect("c1", profile=old, hydrate=True)
    await until(lambda: peer.client.controls("ws.caught_up"))
    assert entities(peer) == had
    assert (await change(core, peer, subscription, new))["stateAnew"]
    assert entities(peer) == gets
    assert "stateAnew" not in await change(core, peer, subscription, "text"), "no state, nothing to forget"
    assert "stateAnew" not in await change(core, peer, subscription, new)
    assert entities(peer) == gets
    assert (await change(core, peer, subscription, old))["stateAnew"]
    assert entities(peer) == had


async def test_state_that_looks_the_same_is_not_sent_again(core: Core) -> None:
    await core.broker.publisher("c1").publish("user.message", {"text": "open"}, id="u1")
    peer, subscription = await core.connect("c1", hydrate=True)
    await until(lambda: peer.client.controls("ws.caught_up"))
    before = list(peer.client.entities)
    peer.client.entities.clear()
    assert "stateAnew" not in await change(core, peer, subscription, "debug")
    assert "stateAnew" not in await change(core, peer, subscription, "timeline")
    assert (before, peer.client.entities) == (["u1"], {})


async def test_any_number_of_changes_shows_each_event_once(core: Core) -> None:
    """120 changes with an event between any two; it was 32 that were remembered."""
    peer, subscription = await core.connect("c1", channels="sem", since=0)
    views = [("default", "sem"), ("debug", None), ("timeline", None), ("hiding", None), ("text", None)]
    seqs = []
    for n in range(120):
        seqs.append(await core.say("c1", f"{n}"))
        profile, channels = views[n % len(views)]
        await change(core, peer, subscription, profile, channels=channels)
    await change(core, peer, subscription, "default", since=0)
    assert len(peer.client.seqs()) == len(set(peer.client.seqs()))
    assert sorted(peer.client.seqs()) == seqs
    assert peer.client.duplicates == 0


async def test_changes_without_events_between_cost_no_memory() -> None:
    async with memory_broker(Looks()) as running:
        connection = await running.connect("c1", since=0)
        assert connection.subscription is not None
        following = running.broker.doors.following
        for n in range(300):
            if n % 100 == 0:
                await running.publish("c1", "note.said", {"text": str(n)})
            profile = "debug" if n % 2 else "default"
            await following.change_view(connection.subscription, profile=profile, channels=None, since=None)
            await connection.wait_for("ws.caught_up", count=n + 2)
        assert connection.subscription.viewed is not None
        assert len(connection.subscription.viewed) <= 3


async def test_beyond_what_can_be_remembered_a_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is forgotten, so nothing comes twice: the client is told to connect again, and its view stays."""
    monkeypatch.setattr(view_change, "STRETCHES_MAX", 4)
    async with memory_broker(Looks()) as running:
        connection = await running.connect("c1", since=0)
        subscription = connection.subscription
        assert subscription is not None
        following = running.broker.doors.following
        with pytest.raises(LimitExceeded, match="connect again"):
            for n in range(6):
                await running.publish("c1", "note.said", {"text": str(n)})
                profile = "debug" if n % 2 else "default"
                await following.change_view(subscription, profile=profile, channels=None, since=None)
                await connection.wait_for("ws.caught_up", count=n + 2)
        last = await running.publish("c1", "note.said", {"text": "last"})
        assert int((await connection.wait_for("note.said", count=n + 2))["seq"]) == last


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_stretches_are_remembered_exactly(shown: list[tuple[int, int, int]]) -> None:
    class Some:
        """A view that shows every third event."""

        def __init__(self, rest: int) -> None:
            self.key = str(rest)
            self.rest = rest

        def show(self, envelope: Envelope) -> Envelope | None:
            return envelope if envelope.seq % 3 == self.rest else None

    views: list[Any] = [Some(rest) for rest in range(3)]
    viewed, make = Viewed(), EnvelopeFactory()
    for number, after, through in shown:
        viewed.add(views[number], after, through)
    log = []
    for seq in range(1, 31):
        envelope = make("log")
        envelope.seq = seq
        log.append(envelope)
    seen = {seq for number, after, through in shown for seq in range(after + 1, through + 1) if seq % 3 == number}
    assert [one.seq for one in viewed.not_shown(log)] == [seq for seq in range(1, 31) if seq not in seen]
    assert len(viewed) <= len(shown)
