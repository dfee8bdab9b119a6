"""docs/reference/protocol.md names every frame that the server can send, with the fields that it has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.core import Core, until

from broker.event_types import BUILTIN_EVENT_TYPES, EventData, OpenData, UpsertedEntity
from broker.hookspecs import hookimpl
from broker.profiles import Profile

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reference/protocol.md").read_text(encoding="utf-8")


def table(heading: str) -> Iterator[tuple[list[str], str]]:
    """Yield the rows of the first table below a heading: the names in the first cell, the rest as it is."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            first, _, rest = line.strip("| ").partition(" | ")
            yield re.findall(r"`([a-z_.]+)`", first), rest


CONTROLS = {name: rest for names, rest in table("Frames") for name in names}
TYPES = {name: rest for names, rest in table("Event types") for name in names}


def fields(rest: str) -> set[str]:
    """Return the fields that a row names first, each with its `?`."""
    found = re.match(r"`([A-Za-z?, ]+)`", rest)
    assert found is not None, rest
    return set(found[1].split(", "))


def sent_by_the_code() -> set[str]:
    """Return the names of control frames in calls that make one."""
    names = set()
    for path in (ROOT / "src/broker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("control_message", "control_frame"):
                name = node.args[0]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    names.add(name.value)
                else:  # control_message hands its own argument on
                    assert path.name == "frames.py", f"{path}:{node.lineno} makes a control frame of a computed name"
    return names


def published_by_the_code() -> set[str]:
    """Return the types in drafts that are written out in the code."""
    names = set()
    for path in (ROOT / "src/broker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Draft" and node.args:
                name = node.args[0]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    names.add(name.value)
    return names


def test_the_control_frames_are_those_of_the_code() -> None:
    assert set(CONTROLS) == sent_by_the_code()


def test_the_event_types_are_those_of_the_code() -> None:
    declared = {declared.name: declared.model for declared in BUILTIN_EVENT_TYPES}
    assert set(TYPES) == set(declared)
    assert published_by_the_code() <= set(TYPES)
    for name, model in declared.items():
        assert model is not None
        if model is not OpenData:
            assert fields(TYPES[name]) == marked(model), name
    assert f"`{', '.join(name for name in marked_in_order(UpsertedEntity))}`" in TYPES["timeline.upsert"]


def marked_in_order(model: type[Any]) -> list[str]:
    assert issubclass(model, EventData)
    return [f"{field.alias or name}{'' if field.is_required() else '?'}" for name, field in model.model_fields.items()]


def marked(model: type[Any]) -> set[str]:
    return set(marked_in_order(model))


class Lossy:
    """A profile that drops, and one that shows little."""

    name = "lossy"

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("lossy", channels=("sem",), slow="drop_oldest"), Profile("little", event_types=("log",))]


async def test_control_frames_have_the_fields_of_the_page(tmp_path: Path) -> None:
    """Each is provoked; what a real connection gets has no field that the page does not name, and lacks none."""
    seen: dict[str, set[frozenset[str]]] = {}

    def note(peer: Any) -> None:
        for event in peer.client.control:
            seen.setdefault(event["type"], set()).add(frozenset(event.get("data") or {}))

    core = Core(str(tmp_path / "broker.db"), plugins=[Lossy()], replay_page_bytes=1024)
    async with core:
        first = await core.say("c1", "x")
        following = core.broker.doors.following
        peer, subscription = await core.connect("c1", profile="little", hydrate=True)
        await core.say("c1", "hidden")
        following.ping(subscription, None)
        following.ping(subscription, {"a": 1})
        following.refuse(subscription, "a-code", "a message")
        await following.change_view(subscription, profile="default", channels=None, since=None)
        await until(lambda: subscription.status == "live")
        core.parts.notices.change("gone")
        slow, lossy = await core.connect("c1", profile="lossy", buffer_bytes=1000)
        slow.stall()
        for _ in range(60):
            await core.say("c1", "x" * 100)
        slow.read()
        await until(lambda: lossy.status == "live")
        await core.parts.log.trim("c1", through=(await core.broker.head("c1")).head_seq - 1)
        late, _ = await core.connect("c1", since=first)
        await until(lambda: late.client.controls("ws.caught_up"))
        core.parts.notices.announce_drain()
        for one in (peer, slow, late):
            note(one)
    assert set(seen) == set(CONTROLS)
    for name, shapes in seen.items():
        named = fields(CONTROLS[name])
        for shape in shapes:
            assert shape <= {field.rstrip("?") for field in named}, name
            assert shape >= {field for field in named if not field.endswith("?")}, name
