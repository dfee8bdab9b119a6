"""A client of the public HTTP API: prompts, waits for runs over long polls, hydrates page by page."""

from __future__ import annotations

import time
from typing import Any

import httpx

DEADLINE_S = 60.0
TERMINAL = frozenset({"run.finished", "run.failed", "run.cancelled", "run.interrupted"})


class HttpClient:
    """One user's client. Not for several threads. Use as a context manager."""

    def __init__(self, url: str) -> None:
        """url: the server's base."""
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=DEADLINE_S)

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def move(self, url: str) -> None:
        """Talk to another server from now on."""
        self.http.base_url = httpx.URL(url)

    def get(self, path: str, **query: Any) -> Any:
        """Return the JSON answer of a GET that has to succeed."""
        answer = self.http.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any, *, key: str | None = None) -> Any:
        """Return the JSON answer of a POST that has to succeed."""
        answer = self.http.post(path, json=body, headers={"idempotency-key": key} if key else {})
        assert answer.status_code in (200, 201, 202), answer.text
        return answer.json()

    def chat(self, conv_id: str, prompt: str, *, profile: str | None = None, key: str | None = None) -> Any:
        """Send a prompt and return the answer to it."""
        return self.post(f"/chat/{profile}" if profile else "/chat", {"prompt": prompt, "conv_id": conv_id}, key=key)

    def events(self, conv_id: str, *, since: str = "0") -> list[dict[str, Any]]:
        """Return all event frames of the conversation after `since`."""
        found: list[dict[str, Any]] = []
        more = True
        while more:
            page = self.get("/api/messages", conv_id=conv_id, channels="sem", since=since)
            frames = [frame["event"] for frame in page["frames"]]
            found += [event for event in frames if "prev" in event]
            since = frames[-1].get("seq") or frames[-1]["data"]["seq"] if frames else since
            more = page["more"]
        return found

    def until_ended(self, conv_id: str, run_id: str) -> str:
        """Follow the conversation until the run's terminal event; return its type."""
        since = "0"
        ends = time.monotonic() + DEADLINE_S
        while time.monotonic() < ends:
            page = self.get("/api/messages", conv_id=conv_id, channels="sem", since=since, wait=5, limit=1000)
            for frame in page["frames"]:
                event = frame["event"]
                since = event.get("seq") or event["data"]["seq"]
                if event["type"] in TERMINAL and event["data"]["runId"] == run_id:
                    return str(event["type"])
        raise AssertionError(f"run {run_id} did not end within {DEADLINE_S:.0f} s")

    def until_state(self, conv_id: str, what: str, condition: Any) -> Any:
        """Poll the state until `condition(state)` is true, and return the state."""
        ends = time.monotonic() + DEADLINE_S
        while time.monotonic() < ends:
            answer = self.http.get(f"/api/conversations/{conv_id}/state")
            if answer.status_code == 200 and condition(answer.json()):
                return answer.json()
            time.sleep(0.02)
        raise AssertionError(f"the state never was: {what}")

    def timeline(self, conv_id: str, *, page: int = 1000) -> list[dict[str, Any]]:
        """Hydrate: return all entities by position, asked for in pages."""
        found: list[dict[str, Any]] = []
        while True:
            after = found[-1]["position"] if found else "0"
            answer = self.get("/api/timeline", conv_id=conv_id, after_position=after, limit=page)
            found += answer["entities"]
            if not answer["more"]:
                return found
