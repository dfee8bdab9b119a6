"""Read streamed answers in the chat-completions format: bytes in, engine events out, no I/O.

    decoder = EventStreamDecoder(max_event_bytes=1_000_000)
    reader = AnswerReader(model)
    for piece in pieces:                       # as they arrive
        for sent in decoder.feed(piece):
            for event in reader.take_event(sent):
                ...                            # an EngineEvent
    for event in reader.end():                 # what was held back until the end is known to be a good one
        ...

Errors are `EngineError`: of kind `stream` where the provider reports one, `cut` where the stream ends too early.
"""

from broker.runs.chat_completions.answer import AnswerReader
from broker.runs.chat_completions.errors import as_it_is, error_in, http_error, retry_after, stream_error
from broker.runs.chat_completions.event_stream import EventStreamDecoder, EventTooLarge, StreamEvent
from broker.runs.chat_completions.json_texts import DONE, json_texts

__all__ = [
    "DONE",
    "AnswerReader",
    "EventStreamDecoder",
    "EventTooLarge",
    "StreamEvent",
    "as_it_is",
    "error_in",
    "http_error",
    "json_texts",
    "retry_after",
    "stream_error",
]
