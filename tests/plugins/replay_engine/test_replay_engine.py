"""The engine and its plugin: pace, choice, errors, settings, folders of somebody's own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins.replay_engine.engine import ReplayEngine
from plugins.replay_engine.pacing import FIRST_GAP_S, MAX_GAP_S, MEDIAN_GAP_S, Pacing
from plugins.replay_engine.recordings import Library
from plugins.replay_engine.settings import ReplayConfig, ReplaySettings
from tests.plugins.replay_engine.playing import play_loop, request
from tests.support.engine_answers import Answer, play

import plugins.replay_engine as plugin
from broker.errors import EngineError, PluginError
from broker.runs.engine import EnginePlan


def body(*deltas: dict[str, Any], finish: str | None = "stop", done: bool = True) -> str:
    """Return a stream with these deltas."""
    choices: list[list[dict[str, Any]]] = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
    if finish:
        choices.append([{"index": 0, "delta": {}, "finish_reason": finish}])
    frames = [json.dumps({"choices": choice}) for choice in choices] + (["[DONE]"] if done else [])
    return "".join(f"data: {frame}\n\n" for frame in frames)


class Folder:
    """A folder that is being filled with recordings."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, text: str, *, status: int = 200, **fields: Any) -> None:
        """Add a recording with this body."""
        headers = {"content-type": "text/event-stream" if status == 200 else "application/json"}
        file = {"response": {"status": status, "headers": headers, "body": text}, **fields}
        (self.path / f"{name}.json").write_text(json.dumps(file), encoding="utf-8")

    def engine(self, recording: str | None = None, **more: Any) -> ReplayEngine:
        """Return an engine on it that plays at once, or as `more` says."""
        config = ReplayConfig(recording=recording, speed=more.pop("speed", 0.0))
        return ReplayEngine(Library.load(self.path), config, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


class Sleeps:
    """Stands in for waiting: notes how long, and how much of the answer was there by then."""

    def __init__(self) -> None:
        self.gaps: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.gaps.append(seconds)


# -- pace --------------------------------------------------------------------------------------------


async def test_recorded_gaps_are_kept_in_order(folder: Folder):
    """A gap per event, before it; speed 2 halves them."""
    text = body({"content": "a"}, {"content": "b"}, {"content": "c"})
    folder.add("01-x", text, timing=[250, 40, 90.5, 10, 0])
    sleeps = Sleeps()
    await play(folder.engine(speed=1.0, sleep=sleeps), request("x"))
    assert sleeps.gaps == [0.25, 0.04, 0.0905, 0.01, 0.0]
    faster = Sleeps()
    await play(folder.engine(speed=2.0, sleep=faster), request("x"))
    assert faster.gaps == [gap / 2 for gap in sleeps.gaps]


async def test_speed_0_waits_for_nothing(folder: Folder):
    """It still lets others run between two events."""
    folder.add("01-x", body({"content": "a"}, {"content": "b"}), timing=[250, 40, 90])
    sleeps = Sleeps()
    await play(folder.engine(speed=0.0, sleep=sleeps), request("x"))
    assert set(sleeps.gaps) == {0.0}
    assert len(sleeps.gaps) >= 2


async def test_each_piece_comes_after_its_gap(folder: Folder):
    """Nothing is read ahead: the first piece is out before the second gap begins."""
    folder.add("01-x", body({"content": "a"}, {"content": "b"}), timing=[100, 100])
    seen: list[str] = []

    async def sleep(seconds: float) -> None:
        seen.append("gap")

    answer = Answer()
    async for event in folder.engine(speed=1.0, sleep=sleep).stream(request("x")):
        answer.take(event)
        seen.append(type(event).__name__)
    assert seen[:4] == ["gap", "TextDelta", "gap", "TextDelta"]


async def test_without_timing_gaps_are_drawn_the_same_each_time(folder: Folder):
    """Only events that show something take time; the first takes longest."""
    folder.add("01-x", body({"role": "assistant", "content": ""}, *[{"content": "word "}] * 50))
    played = []
    for _ in range(2):
        sleeps = Sleeps()
        await play(folder.engine(speed=1.0, sleep=sleeps), request("x"))
        played.append(sleeps.gaps)
    assert played[0] == played[1]
    assert len(played[0]) == 50
    assert FIRST_GAP_S[0] <= played[0][0] <= FIRST_GAP_S[1]


def test_drawn_gaps_have_the_documented_shape():
    """Median and bounds are those of the docstring; a large piece takes as long as its tokens."""
    pacing = Pacing("seed", (), 1.0)
    first, *gaps = [pacing.gap_s(index, 4) for index in range(2001)]
    gaps.sort()
    assert FIRST_GAP_S[0] <= first <= FIRST_GAP_S[1]
    assert gaps[1000] == pytest.approx(MEDIAN_GAP_S, rel=0.05)
    assert gaps[100] > 0.75 * MEDIAN_GAP_S
    assert 3 * MEDIAN_GAP_S < gaps[-1] <= MAX_GAP_S
    assert pacing.gap_s(3000, 48) > 5 * MEDIAN_GAP_S
    assert pacing.gap_s(3001, 10_000) == MAX_GAP_S


async def test_cancelling_ends_a_gap_at_once(folder: Folder):
    """A stop does not wait for the recording's next event."""
    folder.add("01-x", body({"content": "a"}, {"content": "b"}), timing=[0, 3_600_000])
    heard = asyncio.Event()

    async def listen() -> None:
        async for _ in folder.engine(speed=1.0).stream(request("x")):
            heard.set()

    task = asyncio.create_task(listen())
    await asyncio.wait_for(heard.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


# -- errors ------------------------------------------------------------------------------------------


async def test_refused_request_is_an_http_error(folder: Folder):
    """A recorded status other than 200 is raised with its status and the provider's words."""
    folder.add("err-01", '{"error": {"message": "no such model", "code": 404}}', status=404)
    answer = await play(folder.engine(), request("x"))
    assert answer.events == []
    assert answer.error is not None
    assert (answer.error.kind, answer.error.status) == ("http", 404)
    assert "no such model" in str(answer.error)


async def test_error_in_the_stream_keeps_what_came_before(folder: Folder):
    """The text is out, then the error is raised."""
    text = body({"content": "half"}, finish=None, done=False) + 'data: {"error": {"message": "broken"}}\n\n'
    folder.add("01-x", text)
    answer = await play(folder.engine(), request("x"))
    assert answer.text == {0: "half"}
    assert answer.error is not None
    assert (answer.error.kind, str(answer.error)) == ("stream", "broken")


async def test_recording_without_an_end_is_cut(folder: Folder):
    """As with a real provider: neither finish nor [DONE] means that the answer is not whole."""
    folder.add("01-x", body({"content": "half"}, finish=None, done=False))
    answer = await play(folder.engine(), request("x"))
    assert answer.text == {0: "half"}
    assert answer.error is not None
    assert answer.error.kind == "cut"


async def test_unstreamed_completion_is_played(folder: Folder):
    """A provider that answered with one JSON object."""
    completion = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "whole"}}]}
    file = {
        "response": {
            "status": 200,
            "headers": {"Content-Type": "application/json"},
            "body": json.dumps(completion, indent=1),
        }
    }
    (folder.path / "01-x.json").write_text(json.dumps(file))
    answer = await play(folder.engine(), request("x"))
    assert (answer.text, answer.finish, answer.error) == ({0: "whole"}, {0: None}, None)


# -- choice and folders ------------------------------------------------------------------------------


async def test_recording_override_names_one(folder: Folder):
    """A loop's member starts there; a loop's common name starts at its beginning."""
    for name in ("chat-06a-loop", "chat-06b-loop", "chat-06c-loop", "chat-07-other", "chat-03-gpt4o-x"):
        folder.add(name, body({"content": name}))
    for asked, step, expected in [
        ("chat-06b-loop", 0, "chat-06b-loop"),
        ("chat-06b-loop", 1, "chat-06c-loop"),
        ("chat-06", 0, "chat-06a-loop"),
        ("chat-03-gpt4o-x", 0, "chat-03-gpt4o-x"),
        ("chat-07-other", 0, "chat-07-other"),
    ]:
        answer = await play(folder.engine(asked), request("x", step=step))
        assert answer.text == {0: expected}
    with pytest.raises(EngineError, match="there is no recording 'chat-08'; there are: chat-03-gpt4o-x,") as refused:
        folder.engine("chat-08")
    assert refused.value.kind == "config"


async def test_folder_without_matches_answers_what_it_was_asked(folder: Folder):
    """The very prompt of a recording, its name, or else all of them in turn."""
    for number, prompt in enumerate(["What is up?", "Tell a joke"], start=1):
        messages = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": prompt}]
        folder.add(f"0{number}-x", body({"content": prompt}), request={"messages": messages})
    engine = folder.engine()
    assert (await play(engine, request("tell a joke "))).text == {0: "Tell a joke"}
    assert (await play(engine, request("01-x"))).text == {0: "What is up?"}
    turns = [(await play(engine, request(*["again"] * count))).text[0] for count in (1, 2, 3)]
    assert turns[0] != turns[1]
    assert turns[0] == turns[2]


def test_what_is_no_recording_is_skipped_and_said(folder: Folder, caplog: pytest.LogCaptureFixture):
    """Other APIs in one line, each broken file with its fault; the rest is there."""
    folder.add("01-good", body({"content": "a"}))
    folder.add("02-other", "event: message_start\n\n", api="anthropic.messages")
    folder.add("03-other", "event: message_start\n\n", api="anthropic.messages")
    (folder.path / "04-broken.json").write_text("{")
    (folder.path / "05-list.json").write_text("[]")
    (folder.path / "06-nobody.json").write_text('{"response": {"status": 200}}')
    folder.add("07-timing", body(), timing=["soon"])
    folder.add("08-match", body(), match=["("])
    (folder.path / "notes.txt").write_text("not JSON, not looked at")
    with caplog.at_level(logging.INFO):
        library = Library.load(folder.path)
    assert list(library.recordings) == ["01-good"]
    for text in (
        "2 of 'anthropic.messages'",
        "04-broken.json is skipped: it is not JSON",
        "05-list.json is skipped: it is not a JSON object",
        "06-nobody.json is skipped: response.body is None",
        "07-timing.json is skipped: timing holds 'soon'",
        "08-match.json is skipped: match holds '('",
    ):
        assert text in caplog.text


@pytest.mark.parametrize("missing", [True, False])
def test_useless_folder_is_refused_with_the_remedy(tmp_path: Path, missing: bool):
    """No folder, or nothing to play in it: a start-up error that names variable and value."""
    path = tmp_path / "nothing" if missing else tmp_path
    with pytest.raises(PluginError, match="BROKER_PLUGIN_REPLAY_ENGINE_DIR") as refused:
        Library.load(path)
    assert str(path)[:60] in str(refused.value)


# -- the plugin --------------------------------------------------------------------------------------


@pytest.fixture
def configured() -> Iterator[None]:
    yield
    plugin.configure(ReplaySettings())


def plan(engine: str = "replay_engine", **config: Any) -> EnginePlan:
    return EnginePlan("c1", "replay", engine, {}, config, "sig")


@pytest.mark.usefixtures("configured")
async def test_plugin_plays_the_folder_that_the_settings_name(folder: Folder):
    """Its profile carries the speed, and tells nothing of the folder's content to an engine of another name."""
    folder.add("01-x", body({"content": "mine"}))
    plugin.configure(ReplaySettings(dir=str(folder.path), speed=0))
    (profile,) = plugin.register_engine_profiles()
    assert (profile.name, profile.engine, profile.priority) == ("replay", "replay_engine", 0)
    assert profile.config == {"speed": 0}
    assert set(profile.tools) == {"calculator", "clock", "search_document"}
    assert set(profile.overridable) == {"recording", "speed"}
    engine = plugin.build_engine(plan(**profile.config))
    assert engine is not None
    assert (await play(engine, request("x"))).text == {0: "mine"}
    await engine.aclose()
    assert plugin.build_engine(plan("openai_engine")) is None


@pytest.mark.usefixtures("configured")
def test_useless_folder_leaves_the_settings_as_they_were(tmp_path: Path):
    """A failed `configure` changes nothing."""
    plugin.configure(ReplaySettings(speed=3))
    with pytest.raises(PluginError):
        plugin.configure(ReplaySettings(dir=str(tmp_path), speed=5))
    (profile,) = plugin.register_engine_profiles()
    assert profile.config == {"speed": 3}


@pytest.mark.parametrize("config", [{"speed": -1}, {"speed": float("inf")}, {"speed": "fast"}, {"folder": "/"}])
def test_unusable_config_is_an_engine_error(config: dict[str, Any]):
    """It names the profile and the field."""
    with pytest.raises(EngineError, match=f"'replay' has an unusable config: {next(iter(config))}") as refused:
        plugin.build_engine(plan(**config))
    assert refused.value.kind == "config"


# -- real recordings ---------------------------------------------------------------------------------


def expected_calls(choice: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [
        (call["id"] or "", call["name"], json.loads(call["arguments"] or "{}") or {}) for call in choice["tool_calls"]
    ]


async def test_real_recordings_play_like_their_reference(shared_dir: Path):
    """Each answer of a real provider gives the text, reasoning, calls, finish, usage or error on record."""
    folder = shared_dir / "llm-recordings"
    library = Library.load(folder)
    names = sorted(path.stem for path in folder.glob("chat-*.json"))
    assert len(names) >= 20
    for name in names:
        reference = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["reference"]
        answer = await play(ReplayEngine(library, ReplayConfig(recording=name, speed=0)), request("x"))
        assert (answer.error is not None) == (reference["error"] is not None), name
        for choice in reference["choices"]:
            index = choice["index"]
            text, reasoning = answer.text.get(index, ""), answer.reasoning.get(index, "")
            if "<think>" in choice["text"]:
                # The reference leaves the tags in the text; the decoder takes what they enclose for reasoning.
                assert f"<think>{reasoning}</think>{text}" == choice["text"], name
            else:
                assert (text, reasoning) == (choice["text"], choice["reasoning"]), name
            if answer.error is None:
                assert answer.finish[index] == choice["finish_reason"], name
                calls = [
                    (call.id, call.name, call.input)
                    for key, call in answer.calls.items()
                    if key.startswith(f"{index}:")
                ]
                assert calls == expected_calls(choice), name
        if reference["usage"]:
            assert answer.usage is not None, name
            assert reference["usage"].items() <= answer.usage.items(), name


async def test_real_tool_loops_play_step_by_step(shared_dir: Path):
    """06a, 06b, 06c answer the three requests of one loop; then the recording is over."""
    library = Library.load(shared_dir / "llm-recordings")
    engine = ReplayEngine(library, ReplayConfig(recording="chat-06", speed=0))
    answers = await play_loop(engine, "go")
    assert [len(answer.calls) for answer in answers] == [2, 1, 1, 0]
    assert answers[-1].finish == {0: "stop"}


async def test_real_refusals_are_http_errors(shared_dir: Path):
    """Each `err-*` file is raised with its status."""
    folder = shared_dir / "llm-recordings"
    library = Library.load(folder)
    for path in sorted(folder.glob("err-*.json")):
        status = json.loads(path.read_text(encoding="utf-8"))["response"]["status"]
        answer = await play(ReplayEngine(library, ReplayConfig(recording=path.stem, speed=0)), request("x"))
        assert answer.error is not None, path.stem
        assert (answer.error.kind, answer.error.status) == ("http", status), path.stem
