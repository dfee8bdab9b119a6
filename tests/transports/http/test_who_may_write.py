"""Writing from outside: who may not create makes no conversation, and who may not see a channel does not write to it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.doors import CONV, House, house

from broker.channels import Channel
from broker.hookspecs import hookimpl
from broker.security import Principal

FILE = """{"format": "conversation-broker.conversation", "version": 1, "convId": "x", "exportedAtMs": 1}
{"type": "log", "id": "l1", "channel": "%s", "timeMs": 1, "data": {"message": "hi", "level": "info"}}
{"end": true, "envelopes": 1, "title": null, "metadata": {}}
"""


class Rules:
    """Debug channels without a permission, one that takes one, and a caller who may do all but create."""

    name = "rules"

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [
            Channel("debug.open", description="no permission named"),
            Channel("debug.switched", switchable=True),
            Channel("debug.own", permission="owner"),
            Channel("vault", permission="vault"),
            Channel("side"),
        ]

    @hookimpl
    def authorize(self, principal: Principal, action: str, channels: list[str]) -> bool | None:
        if principal.subject == "limited" and "side" in channels:
            return False
        return not (principal.subject == "writer" and action == "create")


async def publish(there: House, caller: str, *, channel: str | None = None, conv_id: str = CONV) -> int:
    item: dict[str, Any] = {"conv_id": conv_id, "type": "log", "data": {"message": "hi", "level": "info"}}
    if channel is not None:
        item["channel"] = channel
    return (await there.post("/api/publish", caller, json=item)).status_code


async def import_(there: House, caller: str, channel: str, conv_id: str) -> int:
    headers = {"authorization": f"Bearer {caller}", "content-type": "application/jsonl"}
    path = f"/api/conversations/import?conv_id={conv_id}"
    return (await there.http.post(path, headers=headers, content=(FILE % channel).encode())).status_code


async def test_publishing_makes_no_conversation_for_who_may_not_create() -> None:
    async with house(Rules()) as there:
        assert await publish(there, "writer") == 403
        assert not (await there.parts.log.state(CONV)).exists
        assert await publish(there, "guest") == 200
        assert await publish(there, "writer") == 200, "into one that exists"


@pytest.mark.parametrize(
    ("channel", "permission"),
    [("debug.open", "debug"), ("debug.switched", "debug"), ("debug.own", "owner"), ("vault", "vault")],
)
async def test_a_channel_is_written_to_by_those_who_may_see_it(channel: str, permission: str) -> None:
    """Of debug channels that name no permission, these are operators."""
    async with house(Rules(), debug_channels=("debug.switched",)) as there:
        assert await publish(there, "guest") == 200
        assert await publish(there, "guest", channel=channel) == 403
        assert await import_(there, "guest", channel, "i1") == 400, "the line is named"
        assert not (await there.parts.log.state("i1")).exists
        assert await publish(there, f"keeper+{permission}", channel=channel) == 200
        assert await import_(there, f"keeper+{permission}", channel, "i2") == 201
        for path in ("/api/messages", "/sse"):
            answer = await there.get(path, "guest", params={"conv_id": CONV, "channels": channel})
            assert answer.status_code == 403
        listed = (await there.get("/api/channels", "guest")).json()["channels"]
        assert channel not in [one["name"] for one in listed]


async def test_authorize_is_asked_about_the_channels_that_are_written_to() -> None:
    async with house(Rules()) as there:
        assert await publish(there, "limited") == 200
        assert await publish(there, "limited", channel="side") == 403
        assert await import_(there, "limited", "side", "i1") == 403
        assert await publish(there, "guest", channel="side") == 200
