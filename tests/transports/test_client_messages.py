"""What clients may say, and what happens to those who say something else."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import Core, until
from tests.support.wire import Client, Peer

from broker.delivery.subscription import Subscription
from transports.client_messages import BURST_MESSAGES, EARLY_MESSAGES_MAX, STRIKES_MAX, ClientMessages


class Speaker:
    """A client with its reader of messages. closed: how the server closed it."""

    def __init__(self, core: Core, peer: Peer, subscription: Subscription) -> None:
        self.peer = peer
        self.closed: list[tuple[int, str]] = []
        self.subscription = subscription
        self.messages = ClientMessages(
            core.broker.doors.following, lambda code, reason: self.closed.append((code, reason))
        )

    def say(self, message: Any) -> None:
        self.messages.take(message if isinstance(message, str | bytes) else orjson.dumps(message).decode())

    @property
    def client(self) -> Client:
        return self.peer.client

    @property
    def errors(self) -> list[dict[str, Any]]:
        return self.client.controls("ws.error")


@pytest.fixture
async def core() -> AsyncIterator[Core]:
    async with Core(":memory:") as core:
        yield core


@pytest.fixture
async def speaker(core: Core) -> Speaker:
    await core.say("c1", "before")
    peer, subscription = await core.connect("c1", since=0)
    await until(lambda: subscription.status == "live")
    speaker = Speaker(core, peer, subscription)
    speaker.messages.opened(subscription)
    return speaker


@pytest.mark.parametrize("data", [None, 1, "text", {"deep": [1, 2, {"x": None}]}, False, ""])
async def test_a_ping_comes_back_with_its_data(speaker: Speaker, data: Any) -> None:
    speaker.say({"type": "ws.ping", "data": data})
    pong = speaker.client.controls("ws.pong")[-1]
    assert pong.get("data") == data
    assert pong["convId"] == "c1"


async def test_the_bare_word_is_a_ping_too(speaker: Speaker) -> None:
    speaker.say("ping")
    assert len(speaker.client.controls("ws.pong")) == 1
    assert speaker.errors == []


@pytest.mark.parametrize("channels", ["sem,control", ["sem", "control"], "-timeline", None])
async def test_the_view_is_changed_in_place(speaker: Speaker, channels: Any) -> None:
    speaker.say({"type": "ws.profile", "profile": "default", "channels": channels})
    await until(lambda: len(speaker.client.controls("ws.caught_up")) == 2)
    changed = speaker.client.controls("ws.profile")[0]
    assert changed["channels"] == (["control", "sem"] if channels else ["control", "sem", "timeline"])


REFUSED = [
    ("", "not JSON"),
    ("pong", "not JSON"),
    ("PING", "not JSON"),
    ("[]", "not a JSON object"),
    ("null", "not a JSON object"),
    ('"ping"', "not a JSON object"),
    ("{}", "not known"),
    ('{"type": 5}', "not known"),
    ('{"type": "ws.hello"}', "'ws.hello'"),
    ('{"type": ["ws.ping"]}', "not known"),
    (b"ping", "binary"),
    (b"\xff\xfe", "binary"),
    ('{"type": "ws.ping", "data": "\\ud800"}', "not JSON"),
    ('{"type": "ws.ping", "data": NaN}', "not JSON"),
    ('{"type": "ws.ping", "data": 123456789012345678901}', "the integer 123456789012345678901 is beyond 64 bit"),
    ('{"type": "ws.ping", "data": ' + "[" * 5000 + "]" * 5000 + "}", "not JSON"),
    ('{"type": "ws.profile", "profile": 5}', "5"),
    ('{"type": "ws.profile", "profile": null}', "None"),
    ('{"type": "ws.profile", "channels": 5}', "5"),
    ('{"type": "ws.profile", "channels": ["sem", 5]}', "channels"),
    ('{"type": "ws.profile", "since": 5}', "decimal string"),
    ('{"type": "ws.profile", "since": "five"}', "five"),
    ('{"type": "ws.profile", "sinse": "5"}', "sinse"),
    ('{"type": "ws.profile", "profile": "nope"}', "'nope'"),
    ('{"type": "ws.profile", "channels": "+nope"}', "'nope'"),
]


@pytest.mark.parametrize(("message", "words"), REFUSED)
async def test_anything_else_is_refused_by_name_and_the_connection_stays(
    core: Core, speaker: Speaker, message: str | bytes, words: str
) -> None:
    speaker.say(message)
    await until(lambda: speaker.errors)
    assert words in speaker.errors[0]["message"]
    assert speaker.errors[0]["code"]
    assert len(speaker.errors[0]["message"]) < 1000
    assert speaker.closed == []
    assert speaker.subscription.profile == "default"
    seq = await core.say("c1", "still here")
    assert speaker.client.seqs()[-1] == seq


async def test_repetition_closes(speaker: Speaker) -> None:
    for _ in range(STRIKES_MAX):
        assert speaker.closed == []
        speaker.say("nonsense")
    assert [code for code, _ in speaker.closed] == [1008]
    assert len(speaker.errors) == STRIKES_MAX


async def test_a_flood_is_refused_then_closed(speaker: Speaker) -> None:
    for _ in range(int(BURST_MESSAGES) + 50):
        if speaker.closed:
            break
        speaker.say("ping")
    assert [code for code, _ in speaker.closed] == [1008]
    assert {error["code"] for error in speaker.errors} == {"rate-limited"}
    assert len(speaker.client.controls("ws.pong")) <= BURST_MESSAGES + 1


async def test_what_is_said_before_hello_is_taken_afterwards(core: Core) -> None:
    """Clients that reconnect by themselves flush their queue first. A bounded part of it is kept."""
    peer, subscription = await core.connect("c1")
    speaker = Speaker(core, peer, subscription)
    for n in range(EARLY_MESSAGES_MAX + 10):
        speaker.say({"type": "ws.ping", "data": n})
    assert peer.client.controls("ws.pong") == []
    speaker.messages.opened(subscription)
    assert [pong["data"] for pong in peer.client.controls("ws.pong")] == list(range(EARLY_MESSAGES_MAX))


async def test_a_client_that_does_not_read_gets_no_pongs_piled_up(core: Core) -> None:
    peer, subscription = await core.connect("c1", buffer_bytes=500)
    speaker = Speaker(core, peer, subscription)
    speaker.messages.opened(subscription)
    peer.stall()
    for _ in range(int(BURST_MESSAGES)):
        speaker.say({"type": "ws.ping", "data": "x" * 300})
    assert peer.buffered_bytes < 2000


async def test_changes_that_follow_each_other_quickly_take_effect_in_their_order(core: Core) -> None:
    """Each is done before the next begins: no event twice, none missing, the last one said is the view that stays."""
    expected = []
    for n in range(300):
        expected.append(await core.say("c1", f"{n} " + "x" * 200))
    peer, subscription = await core.connect("c1", client=Client(since=0), since=0, buffer_bytes=1000)
    speaker = Speaker(core, peer, subscription)
    speaker.messages.opened(subscription)
    for _ in range(6):
        speaker.say({"type": "ws.profile", "profile": "debug"})
        speaker.say({"type": "ws.profile", "profile": "timeline", "since": "0"})
        speaker.say({"type": "ws.profile", "profile": "default"})
        await asyncio.sleep(0)
    speaker.say({"type": "ws.profile", "profile": "default", "channels": "sem", "since": "0"})
    await until(lambda: len(peer.client.controls("ws.profile")) == 19 and subscription.status == "live")
    profiles = [changed["profile"] for changed in peer.client.controls("ws.profile")]
    assert profiles == [*["debug", "timeline", "default"] * 6, "default"]
    assert subscription.view.channel_names == ["sem"]
    seqs = [seq for seq in peer.client.seqs() if seq in set(expected)]
    assert sorted(seqs) == expected
    assert not peer.client.gaps
    tasks = [task for task in asyncio.all_tasks() if "_run_recovery" in repr(task.get_coro())]
    assert tasks == []


async def test_a_connection_that_goes_while_its_view_changes_leaves_nothing(core: Core) -> None:
    for n in range(200):
        await core.say("c1", f"{n} " + "x" * 200)
    for _ in range(20):
        peer, subscription = await core.connect("c1", client=Client(since=0), since=0, buffer_bytes=1000)
        speaker = Speaker(core, peer, subscription)
        speaker.messages.opened(subscription)
        speaker.say({"type": "ws.profile", "profile": "debug", "since": "0"})
        await asyncio.sleep(0)
        await core.disconnect(peer)
        for _ in range(5):
            await asyncio.sleep(0)
        assert subscription.status == "closed"
    conversation = core.parts.conversations.get("c1")
    assert conversation is not None
    await until(lambda: not [task for task in asyncio.all_tasks() if "_run_recovery" in repr(task.get_coro())])
    assert (conversation.subscriptions, len(core.parts.registry), len(core.pool)) == (0, 0, 0)
    assert conversation.audiences == {}
    assert not conversation.in_use


async def test_every_published_case_of_json_is_survived(shared_dir: Path, core: Core) -> None:
    """318 texts that break parsers: each is answered, none disturbs the next or anybody else."""
    cases = json.loads((shared_dir / "hostile-inputs" / "json-parsing.json").read_text())["cases"]
    other, _ = await core.connect("c1")
    for case in cases:
        raw = base64.b64decode(case["base64"]) if "base64" in case else case["repeat"].encode() * case["count"]
        try:
            message: str | bytes = raw.decode()
        except UnicodeDecodeError:
            message = raw  # a server refuses such text frames before; as a binary one it gets here
        peer, subscription = await core.connect("c1")
        speaker = Speaker(core, peer, subscription)
        speaker.messages.opened(subscription)
        speaker.say(message)
        assert len(speaker.errors) == 1, case
        speaker.say("ping")
        assert len(peer.client.controls("ws.pong")) == 1
        await core.disconnect(peer)
    seq = await core.say("c1", "after it all")
    assert other.client.seqs() == [seq]
    assert len(cases) == 318
