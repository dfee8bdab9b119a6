"""`authorize` that allows a caller some channels only: titles, search and the state of runs are asked about these, too."""

from __future__ import annotations

from typing import Any

from tests.support.doors import CONV, House, house, told
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.channels import Channel
from broker.hookspecs import hookimpl
from broker.security import Principal

PIN = "swordfish"


class OnlySome:
    """`outsider` may read the conversation, but nothing of what was said; `sayer` all but the channel `side`."""

    name = "only_some"

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [Channel("side", default=True)]

    @hookimpl
    def authorize(self, principal: Principal, action: str, channels: list[str]) -> bool | None:
        self.asked.append((action, tuple(channels)))
        if action != "read":
            return True
        if principal.subject == "outsider":
            return "sem" not in channels
        return not (principal.subject == "sayer" and "side" in channels)


async def get_state(there: House, caller: str) -> Any:
    return await there.get(f"/api/conversations/{CONV}/state", caller)


async def test_who_is_refused_what_was_said_gets_no_title_no_find_and_no_state() -> None:
    gate = Gate()
    engine = ScriptedEngine(answer=lambda request: [gate, *text("answer")])
    async with house(OnlySome(), EnginePlugin(engine)) as there:
        for prompt in (f"{PIN} first", f"{PIN} waits"):
            sent = await there.post("/chat", "guest", json={"conv_id": CONV, "prompt": prompt})
            assert sent.status_code in (200, 202)
        await there.saved()
        said = await there.walk("outsider", words=[PIN])
        assert told(said, PIN) == []
        assert f'"convId":"{CONV}","title":null' in said["list"]
        assert (await get_state(there, "outsider")).status_code == 403
        # An action answers with the state: as much of it as the caller may read.
        answer = await there.post(f"/api/conversations/{CONV}/actions/approve_tools", "outsider", json={})
        assert answer.status_code == 200
        assert (answer.json()["state"]["queue"], answer.json()["state"]["runs"]) == ([], [])
        sent = await there.post(
            f"/api/conversations/{CONV}/actions/send_message", "outsider", json={"prompt": "me too"}
        )
        assert sent.status_code == 202
        assert PIN not in sent.text
        assert (await get_state(there, "guest")).json()["queue"][0]["prompt"] == f"{PIN} waits"
        assert told(await there.walk("guest", words=[PIN]), PIN)
        gate.open()


async def test_who_is_refused_one_channel_sees_the_rest() -> None:
    """The title may come from any channel that everybody sees: who is refused one of these is told none."""
    async with house(OnlySome()) as there:
        await there.publish("user.message", {"text": "hello all"}, id="u1")
        await there.publish("user.message", {"text": f"{PIN} aside"}, id="u2", channel="side")
        await there.saved()
        said = await there.walk("sayer", words=[PIN, "hello"])
        assert told(said, PIN) == []
        page = (await there.get(f"/api/timeline?conv_id={CONV}&profile=timeline", "sayer")).json()
        assert [entity["id"] for entity in page["entities"]] == ["u1"]
        assert (await get_state(there, "sayer")).status_code == 200


async def test_authorize_is_asked_once_where_nothing_is_refused() -> None:
    rules = OnlySome()
    async with house(rules) as there:
        await there.publish("user.message", {"text": "hello"}, id="u1")
        await there.saved()
        for path, channels in {
            "/api/conversations": ("sem", "side"),
            f"/api/conversations/{CONV}": ("sem", "side"),
            f"/api/timeline?conv_id={CONV}": ("control", "sem", "side", "timeline"),
        }.items():
            rules.asked.clear()
            assert (await there.get(path, "guest")).status_code == 200
            assert [channels for action, channels in rules.asked if action == "read"] == [channels]
