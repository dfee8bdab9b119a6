"""Events that no timeline could take, seen by operators: bounded, and counted beyond."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import httpx
from tests.support.core import until_async

from broker.envelope import Envelope
from broker.hookspecs import hookimpl
from broker.settings import Settings
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, new_entity
from broker.timeline.store import DEAD_LETTERS_KEPT
from transports.app import create_app


def ids_in_data(envelope: Envelope) -> tuple[str, ...]:
    return (envelope.data["about"],)


def count(entities: Mapping[str, Entity], envelope: Envelope) -> Iterable[Entity]:
    if "about" not in envelope.data or envelope.data.get("fail"):
        raise ValueError("this cannot be counted")
    known = entities.get(envelope.data["about"])
    if known is None:
        return [new_entity(envelope, "tally", id=envelope.data["about"], count=1)]
    return [known.changed(count=known.props["count"] + 1)]


class Tally:
    """A plugin that names its entities by what data says, and cannot fold everything."""

    name = "tally"

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [TimelineHandler("tally.added", count, ids_in_data)]


def client_of(app: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000")  # type: ignore[arg-type]


async def test_a_flood_of_dead_letters_is_bounded_and_counted(tmp_path: Path) -> None:
    settings = Settings(
        db=str(tmp_path / "broker.db"), plugins_dir=str(tmp_path / "none"), debug_channels=("debug.trace",)
    )
    app = create_app(settings, plugins=[Tally()])
    async with app.router.lifespan_context(app), client_of(app) as client:
        one = {"conv_id": "c1", "type": "tally.added", "data": {"about": "a", "fail": True}}
        for _ in range(3):
            (await client.post("/api/publish", json=[one] * DEAD_LETTERS_KEPT)).raise_for_status()

        async def forgotten() -> bool:
            answer = (await client.get("/api/debug/dead-letters?conv_id=c1&limit=500")).json()
            return bool(len(answer["deadLetters"]) == 500 and answer["forgotten"] == 2 * DEAD_LETTERS_KEPT)

        await until_async(forgotten)


async def test_an_entity_whose_id_has_a_nul_comes_back_from_the_file(tmp_path: Path) -> None:
    """Data may carry U+0000, and a handler may name an entity by it: stored, found again, folded on, no other in its place."""
    settings = Settings(db=str(tmp_path / "broker.db"), plugins_dir=str(tmp_path / "none"))

    async def add(client: httpx.AsyncClient, about: str) -> None:
        body = {"conv_id": "c1", "type": "tally.added", "data": {"about": about}}
        (await client.post("/api/publish", json=body)).raise_for_status()

    for _ in range(2):  # again after a restart, with more entities than memory keeps
        app = create_app(settings, plugins=[Tally()])
        async with app.router.lifespan_context(app), client_of(app) as client:
            for about in ("a\0b", "a", *(f"other{number}" for number in range(300))):
                await add(client, about)
    app = create_app(settings, plugins=[Tally()])
    async with app.router.lifespan_context(app), client_of(app) as client:
        found = (await client.get("/api/timeline?conv_id=c1&limit=1000")).json()["entities"]
        assert {one["id"]: one["props"]["count"] for one in found} == {
            "a\0b": 2,
            "a": 2,
            **{f"other{number}": 2 for number in range(300)},
        }
