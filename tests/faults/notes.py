"""Notes published into conversation `c1` of a node, and what its clients were told about the store meanwhile."""

from __future__ import annotations

import httpx
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower


async def publish(http: httpx.AsyncClient, node: BrokerProcess, text: str) -> httpx.Response:
    """Publish one note; return the answer, whatever it is."""
    body = {"conv_id": "c1", "type": "note.said", "data": {"text": text}}
    return await http.post(f"{node.url}api/publish", json=body)


async def published(http: httpx.AsyncClient, node: BrokerProcess, text: str) -> int:
    """Publish one note, which has to be taken; return its seq."""
    answer = await publish(http, node, text)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["seqs"][0])


def notices(follower: Follower) -> list[str]:
    """Return the codes of the notices that a client got, in order."""
    return [notice["code"] for notice in follower.client.controls("ws.notice")]
