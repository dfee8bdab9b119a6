"""A client for programs and terminals: follows a conversation over WebSocket, sends and publishes over HTTP.

    async with BrokerClient("http://127.0.0.1:8000/") as client:
        async for event in client.follow("c1", profile="default", since=0):
            print(event["type"], event["data"])

To stop before the end, close the generator (`async with aclosing(client.follow(…)) as events`), as with any other.

It keeps the client's rule (docs/reference/protocol.md): every event frame once, in order; a gap or a lost connection
leads to a new connection that resumes after the last event taken. It knows nothing of the server's inside and can be
copied into another project together with `errors.py`.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import httpx
import orjson
import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from broker.errors import BrokerError, InvalidInput, quoted

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 15.0
_DONE = 1000
_NEVER_AGAIN = frozenset({1002, 1007, 1008, 4002, 4007, 4008, 4401, 4403, 4404})
"""Close codes after which a new connection would only meet the same again: as docs/reference/protocol.md has them. 4002,
4007, 4008: servers that send no 1002, 1007, 1008."""


class RequestRefused(BrokerError):
    """The server answered, and the answer is no. status: HTTP status or WebSocket close code; problem: its document."""

    code = "refused"

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        text = str(problem.get("detail") or problem.get("title") or "no reason given")
        super().__init__(f"the server refused ({status}): {text}", status=status)
        self.status = status
        self.problem = problem


class Unreachable(BrokerError):
    """No answer: nobody listens there, or the network is down."""

    code = "unreachable"


@dataclass(slots=True)
class Cursor:
    """Where a client stands, and the client's rule. Pure: no I/O in here.

    last: seq of the last event taken (or told decided by `ws.through`, or skipped by `ws.dropped`), None before the first
    position is known. versions: newest version taken per timeline entity. incomplete: the whole state was announced and is
    not all there yet; a connection that breaks now has to ask for it again.
    """

    last: int | None = None
    epoch: str | None = None
    versions: dict[str, int] = field(default_factory=dict)
    incomplete: bool = False

    def judge(self, event: Mapping[str, Any]) -> Literal["take", "drop", "gap"]:
        """Decide about one frame's event, and move on if it is taken."""
        kind, data = event.get("type"), event.get("data") or {}
        if kind == "ws.hello":
            return self._hello(data)
        if kind == "ws.reset":
            self.epoch = data.get("epoch", self.epoch)
            self.last = int(data["from"]) if "from" in data else None
            self.versions.clear()
            self.incomplete = True
        elif kind == "ws.profile" and "from" in data:
            self.last = int(data["from"])
            if data.get("stateAnew"):
                self.versions.clear()
                self.incomplete = True
        elif kind == "ws.caught_up":
            self.incomplete = False
        elif kind in ("ws.through", "ws.dropped") and "seq" in data:
            self.last = max(self.last or 0, int(data["seq"]))
        elif kind == "timeline.upsert":
            return self._upsert(data)
        elif "prev" in event:
            return self._event(int(event["seq"]), int(event["prev"]))
        return "take"

    def _hello(self, data: Mapping[str, Any]) -> Literal["take"]:
        self.epoch = data.get("epoch", self.epoch)
        if self.last is None and "from" in data:
            self.last = int(data["from"])
        return "take"

    def _upsert(self, data: Mapping[str, Any]) -> Literal["take", "drop"]:
        entity_id, version = data["entity"]["id"], int(data["version"])
        if version <= self.versions.get(entity_id, 0):
            return "drop"
        self.versions[entity_id] = version
        return "take"

    def _event(self, seq: int, prev: int) -> Literal["take", "drop", "gap"]:
        if self.last is not None and seq <= self.last:
            return "drop"
        if self.last is not None and prev > self.last:
            return "gap"
        self.last = seq
        return "take"


class BrokerClient:
    """Talks to one server. url: its base, prefix included. token: bearer token, None for none."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidInput(f"url {quoted(url)} is not usable: give one such as http://127.0.0.1:8000/")
        self._base = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + "/", "", ""))
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> BrokerClient:
        # trust_env off: a proxy meant for the internet must not see what goes to this server.
        self._http = httpx.AsyncClient(headers=self._headers, timeout=self._timeout_s, trust_env=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.aclose()

    # -- HTTP -----------------------------------------------------------------------------------------------------

    async def send(
        self,
        prompt: str,
        *,
        conv_id: str | None = None,
        engine_profile: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Send a prompt; return the server's answer (`conv_id`, `run_id`, `status`, …).

        idempotency_key: None makes one, so that the retry after a lost answer cannot ask twice. Raises RequestRefused,
        Unreachable.
        """
        body: dict[str, Any] = {"prompt": prompt, "overrides": dict(overrides or {})}
        if conv_id is not None:
            body["conv_id"] = conv_id
        path = "chat" if engine_profile is None else f"chat/{quote(engine_profile, safe='')}"
        return await self._post(path, body, idempotency_key)

    async def publish(
        self,
        conv_id: str,
        type: str,
        data: Mapping[str, Any],
        *,
        id: str | None = None,
        channel: str | None = None,
        idempotency_key: str | None = None,
    ) -> int:
        """Publish one envelope; return its seq once it is durable. Raises RequestRefused, Unreachable."""
        body = {"conv_id": conv_id, "type": type, "data": dict(data), "id": id, "channel": channel}
        body = {key: value for key, value in body.items() if value is not None}
        answer = await self._post("api/publish", body, idempotency_key)
        return int(answer["seqs"][0])

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        """Return the JSON answer of `GET path`. Raises RequestRefused, Unreachable."""
        return await self._request("GET", path, query=query)

    async def switch_channel(self, channel: str, on: bool | None) -> dict[str, Any]:
        """Switch a debug channel on all nodes; None: as the settings say. Raises RequestRefused, Unreachable."""
        path = f"api/debug/channels/{quote(channel, safe='')}"
        if on is None:
            return await self._request("DELETE", path)
        headers = {"content-type": "application/json"}
        return await self._request("POST", path, content=orjson.dumps({"enabled": on}), headers=headers)

    async def release_plugin(self, name: str) -> dict[str, Any]:
        """Take a plugin's hooks out of quarantine on the node that answers. Raises BrokerError."""
        return await self._post(f"api/debug/plugins/{quote(name, safe='')}/release", {}, None)

    async def switch_plugin(self, name: str, on: bool) -> dict[str, Any]:
        """Switch a plugin on or off on the node that answers, until that ends. Raises BrokerError."""
        return await self._post(f"api/debug/plugins/{quote(name, safe='')}", {"enabled": on}, None)

    async def _post(self, path: str, body: Mapping[str, Any], key: str | None) -> dict[str, Any]:
        headers = {"idempotency-key": key or uuid.uuid4().hex, "content-type": "application/json"}
        content = orjson.dumps(body)
        try:
            return await self._request("POST", path, content=content, headers=headers)
        except Unreachable:
            # The request may have arrived: with the same key a second try is safe.
            await asyncio.sleep(FIRST_DELAY_S)
            return await self._request("POST", path, content=content, headers=headers)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        if self._http is None:
            raise InvalidInput("BrokerClient is not open: use it as `async with BrokerClient(url) as client:`")
        try:
            response = await self._http.request(
                method, self._base + path, params=dict(query or {}), content=content, headers=dict(headers or {})
            )
        except httpx.TransportError as exc:
            raise Unreachable(
                f"{self._base} cannot be reached ({exc or type(exc).__name__}): is the server running?"
            ) from exc
        if response.is_success:
            answer: dict[str, Any] = orjson.loads(response.content)
            return answer
        raise RequestRefused(response.status_code, _problem(response.content))

    # -- WebSocket ------------------------------------------------------------------------------------------------

    async def follow(
        self,
        conv_id: str,
        *,
        profile: str = "default",
        channels: str | None = None,
        since: int | None = None,
        epoch: str | None = None,
        hydrate: bool = False,
        control: bool = False,
        reconnect: bool = True,
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield the conversation's events, each once and in order, for as long as the caller listens.

        since: seq after which to begin; None: live only, 0: everything retained. epoch: of the log that `since` belongs to,
        from `ws.hello` or the timeline: one that has become another since then is recognised; None: it is not known.
        control: yield `ws.…` frames, too. reconnect: False ends after the first connection that breaks. It ends as well
        when the server says that it is done (1000). Raises RequestRefused when the server will not
        have this client, Unreachable when the first connection fails.
        """
        frames = self.frames(
            conv_id,
            profile=profile,
            channels=channels,
            since=since,
            epoch=epoch,
            hydrate=hydrate,
            control=control,
            reconnect=reconnect,
        )
        async with aclosing(frames):
            async for text in frames:
                event: dict[str, Any] = orjson.loads(text)["event"]
                yield event

    async def frames(
        self,
        conv_id: str,
        *,
        profile: str = "default",
        channels: str | None = None,
        since: int | None = None,
        epoch: str | None = None,
        hydrate: bool = False,
        control: bool = False,
        reconnect: bool = True,
    ) -> AsyncGenerator[str]:
        """As `follow`, but yield the frames as the server wrote them."""
        cursor = Cursor(last=since, epoch=epoch, incomplete=hydrate)
        query = {"conv_id": conv_id, "profile": profile}
        if channels is not None:
            query["channels"] = channels
        delays = Backoff()
        connected_once = False
        while True:
            try:
                async with self._connect(query, cursor) as socket:
                    connected_once = True
                    async with aclosing(self._taken(socket, cursor, delays)) as taken:
                        async for event, text in taken:
                            if control or not event["type"].startswith("ws."):
                                yield text
            except InvalidStatus as exc:
                status = exc.response.status_code
                if status < 500 and status != 429:
                    raise RequestRefused(status, _problem(exc.response.body or b"")) from exc
                if not (connected_once and reconnect):
                    raise Unreachable(f"{self._base} answered {status}: try again later") from exc
            except (OSError, InvalidHandshake, TimeoutError) as exc:
                if not connected_once:
                    raise Unreachable(f"{self._base} cannot be reached ({exc}): is the server running?") from exc
            if not reconnect or delays.done:
                return
            await asyncio.sleep(delays.next_s())

    def _connect(self, query: Mapping[str, str], cursor: Cursor) -> connect:
        asked = dict(query)
        if cursor.last is not None:
            asked["since"] = str(cursor.last)
            if cursor.epoch is not None:
                asked["epoch"] = cursor.epoch
        if cursor.incomplete:
            asked["hydrate"] = "1"
        url = "ws" + self._base.removeprefix("http") + "ws?" + urlencode(asked)
        return connect(
            url,
            subprotocols=[websockets.Subprotocol("conversation.v1")],
            additional_headers=self._headers,
            max_size=None,
            proxy=None,
            open_timeout=self._timeout_s,
        )

    async def _taken(
        self, socket: ClientConnection, cursor: Cursor, delays: Backoff
    ) -> AsyncGenerator[tuple[dict[str, Any], str]]:
        """Yield as (event, text) what the client's rule takes, until the connection ends or a gap shows."""
        try:
            async for message in socket:
                text = message if isinstance(message, str) else message.decode()
                event = orjson.loads(text)["event"]
                verdict = cursor.judge(event)
                if verdict == "gap":
                    return
                delays.note(event)
                if verdict == "take":
                    yield event, text
        except ConnectionClosed:
            pass
        delays.done = socket.close_code == _DONE and not delays.stop
        if delays.stop or socket.close_code in _NEVER_AGAIN:
            raise RequestRefused(socket.close_code or 0, {"detail": socket.close_reason or delays.reason})


class Backoff:
    """How long to wait before the next connection: doubling, spread at random, or what the server said."""

    def __init__(self) -> None:
        self._failures = 0
        self._told_s: float | None = None
        self.stop = False
        self.done = False
        self.reason = ""

    def note(self, event: Mapping[str, Any]) -> None:
        """Take in what an event says about coming back."""
        if event["type"] == "ws.bye":
            data = event.get("data", {})
            self.stop = not data.get("reconnect", True)
            self.reason = str(data.get("reason", ""))
            self._told_s = float(data.get("retryAfterMs", 0)) / 1000
        elif event["type"] == "ws.caught_up":
            self._failures = 0

    def next_s(self) -> float:
        """Return the seconds to wait now."""
        told, self._told_s = self._told_s, None
        if told is not None:
            return told
        self._failures += 1
        longest = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures - 1, 16))
        # Half fixed, half random: many clients of one server must not come back as one.
        return longest * (0.5 + random.random() / 2)


def _problem(body: bytes | bytearray) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = {"detail": body[:200].decode("utf-8", "replace")}
    return document if isinstance(document, dict) else {}
