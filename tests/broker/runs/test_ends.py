"""One end for each run, whatever stands in the way of writing it: foreign text, size, a plugin that refuses (I13)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import CALLER, Core, store_setting, until, until_async
from tests.support.run_bench import TERMINAL
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.envelope import Draft
from broker.errors import DraftRefused, EngineError
from broker.exact_json import MAX_INTEGER
from broker.hookspecs import hookimpl
from broker.runs.ending import MAX_ERROR_BYTES, writable
from broker.runs.engine import TextDelta, Usage


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


async def ended(core: Core, run_id: str) -> Any:
    async def settled() -> bool:
        run = await core.parts.stores.runs.get(run_id)
        return run is not None and run.settled

    await until_async(settled)
    return await core.parts.stores.runs.get(run_id)


async def ends(core: Core, conv_id: str) -> list[tuple[str, Mapping[str, Any]]]:
    page = await core.parts.log.read(conv_id, after=0, limit=10_000, max_bytes=1 << 26)
    return [(envelope.type, envelope.data) for envelope in page.envelopes if envelope.type in TERMINAL]


class Rude(EngineError):
    """What an engine's author may make of an error."""

    def __init__(self, **fields: Any) -> None:
        super().__init__("x")
        for name, value in fields.items():
            setattr(self, name, value)


FAILURES = {
    "half a pair": EngineError("half \ud83d"),
    "long status": EngineError("x", status="s" * 3_000_000),  # type: ignore[arg-type]
    "deep status": EngineError("x", status=nested(3000)),
    "wide status": EngineError("x", status=2**80),
    "no message": Rude(message=None),
    "message is bytes": Rude(message=b"\xff"),
    "kind is an object": Rude(kind=object()),
    "kind is long": Rude(kind="k" * 3_000_000),
    "code": Rude(code="\ud83d" * 1000),
    "code is a number": Rude(code=2**90),
    "an exception that is long": RuntimeError("x" * 3_000_000),
    "an exception with half a pair": RuntimeError("\ud83d"),
}


async def test_a_run_whose_error_cannot_be_written_ends_and_the_next_one_begins(db: str) -> None:
    failures = iter(FAILURES.values())
    engine = ScriptedEngine(answer=lambda _request: [next(failures, None) or TextDelta("last"), *text("")])
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        for number, name in enumerate([*FAILURES, "good"], 1):
            sent = await core.parts.runs.send(CALLER, "c", name)
            run = await ended(core, sent.run_id)
            assert run.status == ("finished" if name == "good" else "failed"), name
            found = await ends(core, "c")
            assert len(found) == number, name
            assert found[-1][1]["runId"] == sent.run_id
            orjson.dumps([run.error, found[-1][1]])
            assert (await core.parts.runs.state("c"))["status"] == ("idle" if name == "good" else "failed"), name


@pytest.mark.parametrize("refused", [TERMINAL, {"run.failed"}, {"llm.final", "run.failed", "run.finished"}])
async def test_an_end_that_a_plugin_refuses_is_told_in_plain_words(db: str, refused: set[str]) -> None:
    class Refusing:
        @hookimpl
        def check_draft(self, draft: Draft) -> None:
            if draft.type in refused:
                raise DraftRefused(f"no {draft.type} here")

    gate = Gate()
    engine = ScriptedEngine([TextDelta("half"), EngineError("my secret")], [TextDelta("x"), gate, *text("y")])
    async with Core(db, plugins=[EnginePlugin(engine), Refusing()]) as core:
        peer, _ = await core.connect("c")
        first = await core.parts.runs.send(CALLER, "c", "one")
        await ended(core, first.run_id)
        second = await core.parts.runs.send(CALLER, "c", "two")
        await gate.reached.wait()
        await core.parts.runs.cancel("c")
        gate.open()
        await ended(core, second.run_id)
        assert [(type, data["runId"]) for type, data in await ends(core, "c")] == [
            ("run.failed", first.run_id),
            ("run.cancelled", second.run_id),
        ]
        assert "secret" not in str((await ends(core, "c"))[0])
        await until(lambda: {"run.failed", "run.cancelled"} <= {event["type"] for event in peer.client.events})
        runs = [e for e in await core.parts.timeline.entities("c") if e.kind == "run"]
        assert [run.props["status"] for run in runs] == ["failed", "cancelled"]


async def test_a_recovery_that_a_plugin_refuses_does_not_keep_the_server_from_starting(tmp_path: Path) -> None:
    db = str(tmp_path / "broker.db")
    refuse = False

    class Refusing:
        @hookimpl
        def check_draft(self, draft: Draft) -> None:
            if refuse and draft.type.startswith(("run.", "tool.")):
                raise DraftRefused("nothing here")

    gate = Gate()
    plugins = [EnginePlugin(ScriptedEngine([TextDelta("x"), gate])), Refusing()]
    async with Core(db, plugins=plugins) as core:
        sent = await core.parts.runs.send(CALLER, "c", "one")
        await gate.reached.wait()
        store = core.parts.stores.runs
        refuse = True
        gate.open()
    async with Core(db, plugins=[EnginePlugin(), Refusing()]) as core:
        store = core.parts.stores.runs
        run = await store.get(sent.run_id)
        assert run is not None
        assert run.settled
        assert len(await ends(core, "c")) == 1


async def test_usage_that_grows_over_the_steps_ends_the_run_all_the_same(db: str) -> None:
    reports: list[Any] = [
        {"total": MAX_INTEGER},
        {f"key {n}": "x" * 1000 for n in range(900)},
        [1],
        None,
        "many",
        {"total": 1},
    ]

    def answer(request: Any) -> list[Any]:
        return [Usage(reports[int(request.messages[-1].content)]), *text("hi")]

    async with Core(db, plugins=[EnginePlugin(ScriptedEngine(answer=answer))]) as core:
        for number in range(len(reports)):
            sent = await core.parts.runs.send(CALLER, "c", str(number))
            assert (await ended(core, sent.run_id)).status == "finished"
        assert len(await ends(core, "c")) == len(reports)
        messages = [e for e in await core.parts.timeline.entities("c") if e.props.get("role") == "assistant"]
        assert not any(message.props.get("streaming") for message in messages)


@pytest.mark.parametrize(
    "error",
    [
        "text",
        {"code": 5, "message": None},
        {"code": "x" * 1000, "message": "\ud83d" * 100_000},
        {"a": object()},
        {"code": "c", "message": "m", "more": "x" * MAX_ERROR_BYTES},
    ],
)
def test_changes_that_cannot_be_written_are_reduced_to_what_can(error: Any) -> None:
    changes = writable({"error": error, "usage": {"n": 2**70, "m": 1, "deep": nested(2000)}, "step": 3})
    assert changes["step"] == 3
    assert len(orjson.dumps(changes)) < MAX_ERROR_BYTES + 2000
    assert changes["usage"]["m"] == 1
