"""A subscription that cannot be opened leaves nothing behind, whatever it was that raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from broker.api import SubscribeRequest
from broker.security import SYSTEM
from broker.testing import CapturingConnection, memory_broker


class Broken(CapturingConnection):
    """A connection whose wire raises at once."""

    @property
    def write(self) -> Callable[[Any], None]:
        raise TypeError("a frame that cannot be framed")


@pytest.mark.parametrize("request_", [{}, {"since": 0}, {"hydrate": True}, {"since": 5, "epoch": "another"}], ids=str)
async def test_a_subscription_whose_opening_raises_is_forgotten(request_: dict[str, Any]) -> None:
    """Also what it held open: an idle conversation could not be evicted any more."""
    async with memory_broker() as running:
        await running.publish("c1", "a.b", {})
        connection = Broken("odd")
        running.pool.add(connection)
        following = running.broker.doors.following
        admitted = await following.admit(SYSTEM, SubscribeRequest("c1", **request_))
        with pytest.raises(TypeError, match="cannot be framed"):
            await following.subscribe(connection.id, admitted)
        assert running.parts.registry.all() == []
        conversation = running.parts.conversations.get("c1")
        assert conversation is not None
        assert (conversation.subscriptions, conversation.audiences) == (0, {})
        running.pool.remove(connection.id)
        again = await running.connect("c1", connection_id="odd")  # the id is free
        assert again.of_type("ws.hello")
