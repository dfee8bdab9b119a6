"""The engine: plays a recorded stream through the decoder that reads real providers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from broker.errors import EngineError
from broker.runs.chat_completions import DONE, AnswerReader, EventStreamDecoder, StreamEvent, http_error
from broker.runs.engine import EngineEvent, EngineRequest, Finish, ReasoningDelta, TextDelta, ToolCallDelta

from .pacing import Pacing
from .recordings import Library, Recording
from .settings import ReplayConfig

Sleep = Callable[[float], Awaitable[None]]


class ReplayEngine:
    """Answers from recordings. Holds no state: any number of runs may play at once.

    sleep: how to wait; the default is cancelled at once together with its task.
    """

    def __init__(self, library: Library, config: ReplayConfig, sleep: Sleep = asyncio.sleep) -> None:
        """Raises EngineError(kind="config") for a recording that there is not."""
        self._library = library
        self._speed = config.speed
        self._sleep = sleep
        self._always = library.named(config.recording) if config.recording is not None else None

    async def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        """Yield the events of the recording that answers `request`. Raises EngineError where the recording has one.

        A tool loop plays the next recording of its sequence in each step; where there is none left, an answer without
        text ends the run: what the model said next was not recorded.
        """
        sequence = self._always or self._chosen(request)
        if request.step >= len(sequence):
            yield Finish("stop")
            return
        recording = sequence[request.step]
        pacing = Pacing(recording.name, recording.timing_ms, self._speed)
        if recording.status != 200:
            await self._sleep(pacing.gap_s(0, 0))
            raise http_error(recording.status, recording.headers, recording.body)
        reader = AnswerReader(recording.model, choices=recording.choices)
        async with aclosing(self._play(recording, reader, pacing)) as events:
            async for event in events:
                yield event
        for event in reader.end():
            yield event

    async def aclose(self) -> None:
        """Nothing to release."""

    def _chosen(self, request: EngineRequest) -> list[Recording]:
        prompts = [message.content for message in request.messages if message.role == "user"]
        return self._library.choose(prompts[-1] if prompts else "", max(0, len(prompts) - 1))

    async def _play(
        self, recording: Recording, reader: AnswerReader, pacing: Pacing
    ) -> AsyncGenerator[EngineEvent, None]:
        decoder = EventStreamDecoder(len(recording.body) + 1)
        whole = recording.headers.get("content-type", "").startswith("application/json")
        if whole:  # a provider that does not stream
            events = iter([StreamEvent("message", recording.body.decode("utf-8", "replace"), "")])
        else:
            events = decoder.feed(recording.body)
        for index, sent in enumerate(events):
            answer, error = _taken(reader, sent)
            # Events that show nothing (a role, a token count) come in the same packet as their neighbours.
            if answer or error or index < len(recording.timing_ms):
                await self._sleep(pacing.gap_s(index, sum(map(_characters, answer))))
            for event in answer:
                yield event
            if error is not None:
                raise error
        # A few servers end with [DONE] and no blank line, which by the standard is no event.
        if whole or decoder.unfinished_data().strip() == DONE:
            reader.done = True


def _taken(reader: AnswerReader, sent: StreamEvent) -> tuple[list[EngineEvent], EngineError | None]:
    """Return what one event of the stream adds, and the error that it ends with."""
    answer: list[EngineEvent] = []
    try:
        answer.extend(reader.take_event(sent))
    except EngineError as error:
        return answer, error
    return answer, None


def _characters(event: EngineEvent) -> int:
    match event:
        case TextDelta(text) | ReasoningDelta(text):
            return len(text)
        case ToolCallDelta(_, arguments):
            return len(arguments)
    return 0
