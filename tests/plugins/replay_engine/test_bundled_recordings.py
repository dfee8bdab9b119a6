"""The recordings that ship with the plugin: each plays to its end and says what its source says."""

from __future__ import annotations

import re
import unicodedata

import jsonschema
import orjson
import pytest
from plugins.replay_engine.engine import ReplayEngine
from plugins.replay_engine.make_recordings import DEMOS, Demo, encoded, source, tokens
from plugins.replay_engine.recordings import Library
from plugins.replay_engine.settings import TOOLS, ReplayConfig
from tests.plugins.replay_engine.playing import play_loop, request
from tests.support.engine_answers import play

from broker.runs.tools import ToolContext
from plugins import basic_tools
from plugins.replay_engine import BUNDLED

BY_NAME = {demo.name: demo for demo in DEMOS}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library.load(BUNDLED)


def engine(library: Library, recording: str | None = None) -> ReplayEngine:
    return ReplayEngine(library, ReplayConfig(recording=recording, speed=0))


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
async def test_every_recording_plays_to_its_end(library: Library, demo: Demo):
    """Text, reasoning, tool calls, finish, usage and error are those of its source."""
    answer = await play(engine(library, demo.name), request("whatever"))
    assert answer.text.get(0, "") == source(demo.text)
    assert answer.reasoning.get(0, "") == source(demo.reasoning)
    assert [[call.id, call.name, call.input] for call in answer.calls.values()] == [
        [call.id, call.name, orjson.loads("".join(call.fragments)) if demo.error is None else None]
        for call in demo.calls
    ]
    if demo.error is None:
        assert answer.error is None
        assert answer.finish == {0: demo.finish}
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] > 0
    else:
        assert answer.error is not None
        assert answer.error.kind == "stream"
        assert demo.error["message"] in str(answer.error)
        assert answer.finish == {}


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_files_are_what_the_script_writes(demo: Demo):
    """Nobody edits a recording by hand: `python -m plugins.replay_engine.make_recordings` writes them."""
    assert (BUNDLED / f"{demo.name}.json").read_bytes() == encoded(demo)


def test_the_folder_holds_nothing_else():
    """A renamed demo leaves no file behind, and every text is used."""
    assert {path.name for path in BUNDLED.iterdir()} == {f"{demo.name}.json" for demo in DEMOS}
    used = {name for demo in DEMOS for name in (demo.text, demo.reasoning) if name}
    assert {path.name for path in (BUNDLED.parent / "demos").iterdir()} == used


def test_what_was_asked_for_is_there():
    """Reasoning, parallel tools, a search, non-ASCII, a long answer, an error, a limit, fallbacks."""
    assert BY_NAME["03-gap-free"].reasoning
    assert [call.name for call in BY_NAME["04a-parallel-tools"].calls] == ["calculator", "clock"]
    assert [call.name for call in BY_NAME["05a-document"].calls] == ["search_document"]
    assert {call.name for demo in DEMOS for call in demo.calls} == set(TOOLS)
    assert 500 <= len(tokens(source("07-long-story.md"))) <= 700
    assert BY_NAME["09-limit"].finish == "length"
    assert sum(demo.fallback for demo in DEMOS) > 1


async def test_tool_loop_goes_on_where_the_tools_left_it(library: Library):
    """The step says which recording of the loop is played; after the last one the run just ends."""
    first, second = await play_loop(engine(library), "What is 47 × 1234, and what time is it in Tokyo?")
    assert [call.name for call in first.calls.values()] == ["calculator", "clock"]
    assert first.finish == {0: "tool_calls"}
    assert "57,998" in second.text[0]
    beyond = await play(engine(library, "04"), request("x", step=2))
    assert beyond.text == {}
    assert beyond.finish == {0: "stop"}


def test_calls_fit_the_bundled_tools(library: Library):
    """Their inputs pass the tools' schemas, and the search finds what the answer quotes."""
    tools = {tool.name: tool for tool in basic_tools.register_tools()}
    for call in (call for demo in DEMOS for call in demo.calls):
        value = orjson.loads("".join(call.fragments))
        jsonschema.validate(value, tools[call.name].parameters)
        result = tools[call.name].call(value, ToolContext("c1", "r1", call.id))
        if call.name == "calculator":
            assert "57998" in str(result)
        if call.name == "search_document":
            (quote,) = re.findall(r"^> (.+)$", source("05b-document.md"), re.MULTILINE)
            assert quote in str(result)


def test_every_prompt_that_the_welcome_suggests_finds_its_own_recording(library: Library):
    """What the list names is played, each item something else, none a fallback."""
    suggested = re.findall(r"^- \*(.+?)\*", source("01-welcome.md"), re.MULTILINE)
    chosen = [library.choose(prompt, 0)[0] for prompt in suggested]
    assert len(suggested) == 9
    assert len({each.name for each in chosen}) == 9
    assert not any(each.fallback for each in chosen)


@pytest.mark.parametrize("demo", [demo for demo in DEMOS if not demo.fallback], ids=lambda demo: demo.name)
def test_every_demo_is_chosen_by_its_own_prompt(library: Library, demo: Demo):
    """The prompt in a recording's request leads to its loop."""
    assert demo.name in [each.name for each in library.choose(demo.prompt, 3)]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("hello", "01-welcome"),
        ("Hi there!", "01-welcome"),
        ("so, what can you do?", "01-welcome"),
        ("say hello in Japanese", "06-languages"),
        ("こんにちは、元気ですか", "06-languages"),
        ("what's 3*4?", "04a-parallel-tools"),
        ("what time is it?", "04a-parallel-tools"),
        ("please find the passage on limits in the document", "05a-document"),
        ("why is there no gap after a reconnect? think hard", "03-gap-free"),
        ("a long story please", "07-long-story"),
        ("let it fail", "08-error"),
        ("10-prof", "10-profile"),
    ],
)
def test_prompts_of_real_people(library: Library, prompt: str, name: str):
    """Keywords choose; where several recordings fit, the one with more of them."""
    assert library.choose(prompt, 0)[0].name == name


def test_anything_else_gets_a_fallback_each_time_another(library: Library):
    """The same prompt at the same place always gets the same answer; asked again, the next one."""
    chosen = [library.choose("Qqq?", turn)[0] for turn in range(4)]
    assert all(each.fallback for each in chosen)
    assert chosen[0] != chosen[1]
    assert chosen[:2] == chosen[2:]


def test_non_ascii_text_comes_in_torn_pieces():
    """An emoji family and a letter with a combining mark are spread over several deltas."""
    text = source("06-languages.md")
    pieces = tokens(text)
    assert "".join(pieces) == text
    assert any(unicodedata.combining(piece[0]) for piece in pieces)
    assert "\u200d" in pieces
    assert any("\u0600" <= char <= "\u06ff" for char in text)
    assert any("\u3040" <= char <= "\u30ff" for char in text)


def test_timing_has_the_shape_of_real_streams(library: Library):
    """A first token after 0.2 to 0.6 s, steady gaps around 34 ms, no gap over 0.75 s, one per event."""
    for recording in library.recordings.values():
        gaps = recording.timing_ms
        assert len(gaps) == recording.body.count(b"data: ")
        first = next(gap for gap in gaps if gap)
        assert 200 <= first <= 600
        assert max(gaps) <= 750
    steady = sorted(library.recordings["07-long-story"].timing_ms)
    assert 30 <= steady[len(steady) // 2] <= 38
