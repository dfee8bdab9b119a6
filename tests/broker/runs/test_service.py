"""RunService: prompts, queue, actions, state, on the bench."""

from __future__ import annotations

from tests.support.run_bench import ALICE, Bench
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text


async def test_a_prompt_becomes_message_answer_and_one_end() -> None:
    plugin = EnginePlugin(ScriptedEngine(text("Hel", "lo")))
    async with Bench(plugin) as bench:
        sent = await bench.runs.send(ALICE, None, "hi")
        assert sent.status == "started"
        run = await bench.ended(sent.run_id)
        assert run.status == "finished"
        assert bench.types(sent.conv_id) == [
            "user.message",
            "run.started",
            "llm.start",
            "llm.delta",
            "llm.delta",
            "llm.final",
            "run.finished",
        ]
        answer = bench.entity(sent.conv_id, "message", role="assistant")
        assert str(answer.props["text"]) == "Hello"
        assert bench.entity(sent.conv_id, "message", role="user").position < answer.position
        bench.check_one_end_each()
