"""A provider by script: a real HTTP server whose answers a test decides, request by request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import orjson

STREAM = "text/event-stream"
JSON = "application/json"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What a request gets. body: bytes, or pieces of them sent as they are made; the connection closes at the end."""

    body: bytes | Iterable[bytes] = b""
    status: int = 200
    content_type: str = STREAM


def frame(text: str) -> bytes:
    """Return one event; text: its data as it stands in JSON, half a surrogate pair included."""
    return b"data: " + text.encode("utf-8", "surrogatepass") + b"\n\n"


def delta(*, finish: str | None = None, usage: Any = None, **fields: Any) -> bytes:
    """Return one well-formed chunk."""
    return frame(
        orjson.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}], "usage": usage}).decode()
    )


def answer(text: str) -> Reply:
    return Reply(delta(content=text) + delta(finish="stop") + DONE)


def calling(*calls: tuple[str, str, str], **more: Any) -> Reply:
    """Return an answer that calls tools: (id, name, arguments as text). more: fields of each call besides."""
    fragments = [
        {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}
        for index, (call_id, name, arguments) in enumerate(calls)
    ]
    return Reply(delta(tool_calls=fragments) + delta(finish="tool_calls") + DONE)


@dataclass
class ModelServer:
    """Answers each chat-completions request with the next of `replies`; the last one is repeated. A context manager.

    check: asked about each request first; what it returns goes out instead. requests: bodies, oldest first. stalled: opened
    at the end, so that no reply outlives the test.
    """

    replies: list[Reply]
    check: Callable[[Any], Reply | None] = lambda _: None
    requests: list[Any] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def messages(self, index: int = -1) -> list[dict[str, Any]]:
        """Return the messages of a request."""
        found: list[dict[str, Any]] = self.requests[index]["messages"]
        return found

    def _reply(self, path: str, body: Any) -> Reply:
        if path != "/v1/chat/completions":
            return Reply(b"<html>A nice website</html>", 200, "text/html")
        number = len(self.requests)
        self.requests.append(body)
        return self.check(body) or self.replies[min(number, len(self.replies) - 1)]

    def __enter__(self) -> Self:
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
                reply = model._reply(self.path, body)
                self.send_response(reply.status)
                self.send_header("content-type", reply.content_type)
                self.end_headers()
                for piece in (reply.body,) if isinstance(reply.body, bytes) else reply.body:
                    self.wfile.write(piece)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:
                    pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stalled.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
