"""Plugins are switched while clients follow: who is connected sees from then on what whoever connects now would (I4, I14)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import Core, store_setting, until
from tests.support.wire import Client, Peer

from broker.api import SubscribeRequest
from broker.delivery import view_change
from broker.envelope import Envelope
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.security import SYSTEM


class Hiding:
    """Hides what is secret from the profile `default`, or cannot tell what is."""

    name = "hiding"

    def __init__(self) -> None:
        self.broken = False

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        if self.broken:
            raise RuntimeError("broken")
        return (lambda envelope: b"secret" not in envelope.data_json) if profile.name == "default" else None


class Watching:
    """Has no say in what is shown."""

    name = "watching"

    @hookimpl
    def on_published(self, envelopes: list[Envelope]) -> None:
        """Look on."""


@pytest.fixture
def hiding() -> Hiding:
    return Hiding()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def core(request: pytest.FixtureRequest, tmp_path: Path, hiding: Hiding) -> AsyncIterator[Core]:
    async with Core(store_setting(request, tmp_path), plugins=[hiding, Watching()]) as core:
        yield core


def switch(core: Core, name: str, *, on: bool) -> None:
    (core.parts.plugins.enable if on else core.parts.plugins.disable)(name)


def texts(peer: Peer) -> list[str]:
    return [event["data"]["text"] for event in peer.client.events]


def logs(peer: Peer) -> set[str]:
    return {entity["props"]["message"] for entity in peer.client.entities.values() if entity["kind"] == "log"}


async def seen(core: Core, peer: Peer, text: str) -> list[str]:
    """Say something that nobody hides, and return all that the peer has been shown when that has come."""
    await core.say("c1", text)
    await until(lambda peer: text in texts(peer), peer)
    assert (peer.client.gaps, peer.client.duplicates) == ([], 0)
    return texts(peer)


async def test_a_filter_that_is_switched_on_hides_from_those_who_are_connected(core: Core) -> None:
    switch(core, "hiding", on=False)
    peer, _ = await core.connect("c1", since=0)
    await core.say("c1", "secret 1")
    assert await seen(core, peer, "open 1") == ["secret 1", "open 1"]
    switch(core, "hiding", on=True)
    await core.say("c1", "secret 2")
    assert await seen(core, peer, "open 2") == ["secret 1", "open 1", "open 2"]


async def test_a_filter_that_is_switched_off_hides_nothing_any_more(core: Core) -> None:
    peer, _ = await core.connect("c1", since=0)
    await core.say("c1", "secret 1")
    assert await seen(core, peer, "open 1") == ["open 1"]
    switch(core, "hiding", on=False)
    await core.say("c1", "secret 2")
    assert await seen(core, peer, "open 2") == ["open 1", "secret 2", "open 2"]


async def test_the_state_is_that_of_the_view_as_it_is_now(core: Core) -> None:
    publisher = core.broker.publisher("c1")
    peer, _ = await core.connect("c1", since=0)
    for message in ("a secret", "nothing much"):
        await publisher.publish("log", {"message": message, "level": "info"})
    await until(lambda peer: logs(peer) == {"nothing much"}, peer)
    switch(core, "hiding", on=False)
    await until(lambda peer: logs(peer) == {"a secret", "nothing much"}, peer)
    switch(core, "hiding", on=True)
    await until(lambda peer: logs(peer) == {"nothing much"}, peer)


async def test_who_is_behind_is_not_sent_either_what_is_hidden_now(core: Core) -> None:
    """One that stopped reading while it was live, and one that comes back to a long past and has not taken its first page."""
    switch(core, "hiding", on=False)
    parked, subscription = await core.connect("c1", since=0)
    parked.stall()
    for n in range(80):
        await core.say("c1", f"secret {n} {'x' * 2000}")
    await until(lambda one: one.status == "parked", subscription)
    back, later = await core.connect("c1", buffer_bytes=500)
    back.stall()
    await core.broker.doors.following.change_view(later, profile="default", channels="sem,control", since=0)
    await until(lambda peer: not peer.writable, back)
    assert later.status == "behind"
    switch(core, "hiding", on=True)
    for peer in (parked, back):
        peer.read()
    for peer in (parked, back):
        assert len(await seen(core, peer, "open")) < 80


async def test_who_was_let_in_before_and_follows_after(core: Core) -> None:
    switch(core, "hiding", on=False)
    following = core.broker.doors.following
    admitted = await following.admit(SYSTEM, SubscribeRequest("c1"))
    switch(core, "hiding", on=True)
    peer = Peer(core.pool, Client())
    await following.subscribe(peer.id, admitted)
    await core.say("c1", "secret")
    assert await seen(core, peer, "open") == ["open"]


@pytest.mark.parametrize("on", [True, False])
async def test_a_poll_that_waits_is_answered_as_the_view_is_now(core: Core, on: bool) -> None:
    switch(core, "hiding", on=not on)
    await core.say("c1", "secret 0")
    since = await core.say("c1", "open 0")
    poll = asyncio.ensure_future(
        core.broker.doors.reading.messages(
            SYSTEM, SubscribeRequest("c1", channels="sem", since=since), limit=10, wait_s=10
        )
    )
    conversation = core.parts.conversations.get("c1")
    await until(lambda: conversation is not None and conversation.waiters)
    switch(core, "hiding", on=on)
    await core.say("c1", "secret 1")
    await core.say("c1", "open 1")
    shown = [orjson.loads(frame)["event"] for frame in (await poll).frames]
    assert [event["data"]["text"] for event in shown if "prev" in event][:1] == (["open 1"] if on else ["secret 1"])


async def test_a_plugin_that_has_no_say_in_a_view_leaves_it_alone(core: Core) -> None:
    peer, _ = await core.connect("c1", since=0)
    before = list(peer.client.control)
    switch(core, "watching", on=False)
    switch(core, "watching", on=True)
    assert await seen(core, peer, "open") == ["open"]
    assert peer.client.control == before


async def test_a_filter_that_could_not_be_made_is_made_anew_for_those_who_are_connected(
    core: Core, hiding: Hiding
) -> None:
    hiding.broken = True
    switch(core, "hiding", on=False)
    switch(core, "hiding", on=True)
    peer, _ = await core.connect("c1", since=0)
    await core.say("c1", "withheld")
    hiding.broken = False
    switch(core, "watching", on=False)  # another change of plugins has every view compiled again
    await core.say("c1", "secret")
    assert await seen(core, peer, "open") == ["open"]


async def test_who_has_had_too_many_views_comes_back(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection was shown through which view is remembered up to a bound: beyond, it is sent back."""
    monkeypatch.setattr(view_change, "STRETCHES_MAX", 2)
    peer, _ = await core.connect("c1", since=0)
    for on in (False, True, False):
        assert peer.closed is None
        await seen(core, peer, f"open {on} {len(texts(peer))}")
        switch(core, "hiding", on=on)
    await until(lambda peer: peer.closed, peer)
    assert peer.closed == (1012, "plugins were switched")
    assert peer.client.controls("ws.bye")[-1]["reconnect"] is True
