"""Plays an engine through the steps of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.engine_answers import Answer, play

from broker.runs.engine import ChatMessage, Engine, EngineRequest


def request(*prompts: str, step: int = 0) -> EngineRequest:
    """Return the request of a conversation with these prompts, the last one being answered."""
    messages: list[ChatMessage] = []
    for prompt in prompts:
        messages += [ChatMessage("user", prompt), ChatMessage("assistant", "…")]
    return EngineRequest("c1", "r1", messages[:-1], step=step)


async def play_loop(engine: Engine, *prompts: str) -> Sequence[Answer]:
    """Return the answers of all steps, asking on as long as tools are called."""
    answers = [await play(engine, request(*prompts))]
    while answers[-1].calls and answers[-1].error is None:
        answers.append(await play(engine, request(*prompts, step=len(answers))))
    return answers
