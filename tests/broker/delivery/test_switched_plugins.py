"""Switching a plugin changes what live connections see, from that moment on, whatever they are doing (I4, I14)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, store_setting, subscribe, until
from tests.support.wire import Client, Peer

from broker.channels import Channel
from broker.delivery.subscription import SubscribeRequest
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.security import Principal


class Hides:
    """Hides what is secret, in every profile."""

    name = "hides"

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return lambda envelope: b"secret" not in envelope.data_json


class Channels:
    name = "channels"

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [
            Channel("presence", default=True),
            Channel("staff", default=True, permission="staff"),
            Channel("extra"),
        ]


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def core(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Core]:
    async with Core(store_setting(request, tmp_path), plugins=[Hides(), Channels()]) as core:
        yield core


async def user(core: Core, text: str, id: str) -> int:
    return await core.broker.publisher("c1").publish("user.message", {"text": text}, id=id)


def texts(peer: Peer) -> list[str]:
    return [event["data"]["text"] for event in peer.client.events]


async def live(core: Core, *peers: Peer) -> None:
    """Wait until everybody is live."""
    await until(lambda: all(one.status == "live" for one in core.parts.registry.all()))


async def test_live_connections_see_what_the_switched_plugin_makes_of_it(core: Core) -> None:
    before, _ = await core.connect("c1", hydrate=True)
    await user(core, "open 1", "u1")
    await user(core, "secret 1", "u2")
    assert (texts(before), set(before.client.entities)) == (["open 1"], {"u1"})
    core.parts.plugins.disable("hides")
    meanwhile, _ = await core.connect("c1", hydrate=True)
    await live(core)
    await user(core, "secret 2", "u3")
    assert texts(before) == ["open 1", "secret 2"]
    assert set(before.client.entities) == set(meanwhile.client.entities) == {"u1", "u2", "u3"}
    assert before.client.controls("ws.profile")[-1]["stateAnew"] is True
    core.parts.plugins.enable("hides")
    await live(core)
    await user(core, "secret 3", "u4")
    await user(core, "open 2", "u5")
    for peer in (before, meanwhile):
        assert texts(peer)[-2:] == ["secret 2", "open 2"]
        assert set(peer.client.entities) == {"u1", "u5"}, "hidden from now on: the state was sent anew"
        assert not peer.client.gaps
        assert peer.client.duplicates == 0


async def test_nothing_hidden_is_sent_any_more_to_who_catches_up(core: Core) -> None:
    """It was behind when the plugin was switched on: what was already read for it goes through the view as it is now."""
    core.parts.plugins.disable("hides")
    for n in range(60):
        await user(core, f"open {n} " + "x" * 3000, f"u{n}")
    last = await user(core, "secret", "s1")
    peer = Peer(core.pool, Client(since=0), buffer_bytes=2000)
    peer.stall()
    await subscribe(core.broker, peer.id, SubscribeRequest("c1", since=0), CALLER)
    await until(lambda: not peer.writable)
    core.parts.plugins.enable("hides")
    peer.read()
    await live(core)
    assert len(peer.client.events) == 60
    assert "secret" not in str(peer.client.entities) + str(peer.client.events)
    assert peer.client.last >= last
    assert not peer.client.gaps


class Guards:
    """Lets nobody read `closed`, and nobody see what was said in the channel `extra`."""

    name = "guards"

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None, channels: list[str]) -> bool:
        return action != "read" or (conv_id != "closed" and "extra" not in channels)


async def test_who_may_read_is_asked_again(tmp_path: Path) -> None:
    async with Core(":memory:", plugins=[Channels(), Guards()]) as core:
        core.parts.plugins.disable("guards")
        barred, _ = await core.connect("closed")
        peer, _ = await core.connect("c1", hydrate=True)
        await core.broker.publisher("c1").publish("user.message", {"text": "aside"}, id="u1", channel="extra")
        await user(core, "open", "u2")
        assert set(peer.client.entities) == {"u1", "u2"}
        core.parts.plugins.enable("guards")
        await until(lambda: barred.closed is not None)
        assert barred.closed == (4403, "not permitted any more")
        await until(lambda: set(peer.client.entities) == {"u2"})
        await live(core)
        await core.broker.publisher("c1").publish("user.message", {"text": "aside"}, id="u3", channel="extra")
        await user(core, "open", "u4")
        assert (set(peer.client.entities), texts(peer)) == ({"u2", "u4"}, ["open", "open"])
        core.parts.plugins.disable("guards")
        await until(lambda: set(peer.client.entities) == {"u1", "u2", "u3", "u4"})


async def test_a_view_that_was_made_before_the_switch_is_not_used_after_it(core: Core) -> None:
    core.parts.plugins.disable("hides")
    following = core.broker.doors.following
    admitted = await following.admit(CALLER, SubscribeRequest("c1"))
    core.parts.plugins.enable("hides")
    peer = Peer(core.pool, Client())
    await following.subscribe(peer.id, admitted)
    await user(core, "secret", "u1")
    await user(core, "open", "u2")
    assert texts(peer) == ["open"]


async def test_a_switch_that_changes_nothing_for_a_view_tells_it_nothing(core: Core) -> None:
    peer, _ = await core.connect("c1")
    core.parts.plugins.disable("channels")
    core.parts.plugins.enable("channels")
    await user(core, "secret", "u1")
    await user(core, "open", "u2")
    assert texts(peer) == ["open"]
    assert peer.client.controls("ws.profile") == []


async def test_default_channels_are_part_of_the_default_profile(core: Core) -> None:
    """Of those who may see them; every other profile has what it names."""
    staff = Principal("staff", frozenset({"staff"}))
    for principal, profile, expected in (
        (CALLER, "default", ["control", "presence", "sem", "timeline"]),
        (staff, "default", ["control", "presence", "sem", "staff", "timeline"]),
        (staff, "timeline", ["timeline"]),
    ):
        peer = Peer(core.pool, Client())
        await subscribe(core.broker, peer.id, SubscribeRequest("c1", profile=profile), principal)
        assert peer.client.controls("ws.hello")[0]["channels"] == expected
        await core.broker.publisher("c1").publish("presence.joined", {"text": "here"}, channel="presence")
        assert texts(peer) == (["here"] if profile == "default" else [])
    offered = {one["name"]: one["channels"] for one in core.broker.doors.offers.profiles(CALLER)}
    assert offered["default"] == ["control", "presence", "sem", "timeline"]
