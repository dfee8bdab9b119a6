"""Publishing load for fault tests: over HTTP, every acknowledgement remembered, every answer checked."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from tests.support.follower import Server

RETRY_S = 0.02


@dataclass
class Ledger:
    """What was published: acknowledged number -> seq per conversation, and numbers whose fate the publisher never learned.

    refused: answers other than 200, by status. repeated: requests sent again with their idempotency key.
    """

    acknowledged: dict[str, dict[int, int]] = field(default_factory=dict)
    unknown: dict[str, set[int]] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    repeated: int = 0

    def count(self) -> int:
        return sum(map(len, self.acknowledged.values()))

    def check(self, conv_id: str, events: list[dict[str, Any]]) -> None:
        """Each acknowledged envelope is in `events` once, under the seq that was told; the others at most once."""
        stored: dict[int, int] = {}
        for event in events:
            number = event["data"].get("n")
            if number is not None:
                assert number not in stored, f"number {number} is stored twice"
                stored[number] = int(event["seq"])
        told = self.acknowledged.get(conv_id, {})
        lost = {number: seq for number, seq in told.items() if stored.get(number) != seq}
        assert not lost, f"{len(lost)} acknowledged envelopes are lost or moved: {list(lost.items())[:5]}"
        strange = stored.keys() - told.keys() - self.unknown.get(conv_id, set())
        assert not strange, f"{len(strange)} envelopes were stored although the answer was no: {sorted(strange)[:5]}"
        # Envelopes are listed by seq, and a publisher numbers upwards: order in one is order in the other.
        seqs = list(stored.values())
        assert seqs == sorted(seqs)


class Publisher:
    """One producer: answers of a few deltas, notes and logs, in small batches; goes on whatever happens to the server.

    keyed: with an idempotency key, repeated until acknowledged; else a request whose answer got lost is not repeated.
    """

    def __init__(self, broker: Server, ledger: Ledger, conv_id: str, *, keyed: bool, seed: int) -> None:
        self._broker = broker
        self._ledger = ledger
        self._conv_id = conv_id
        self._keyed = keyed
        self._rng = random.Random(seed)
        self._name = f"{conv_id}-{seed}"
        self._numbers = itertools.count(seed * 1_000_000_000)
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def finish(self) -> None:
        """Finish the answer at hand, then stop. The server has to be there."""
        self._stopping = True
        assert self._task is not None
        await self._task

    async def _run(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            for answer in itertools.count():
                if self._stopping:
                    return
                drafts = list(self._answer(f"{self._name}-{answer}"))
                while drafts:
                    size = self._rng.choice([1, 2, 5])
                    batch, drafts = drafts[:size], drafts[size:]
                    # The last of an answer has to arrive, so that what is compared in the end is final.
                    await self._publish(http, batch, keyed=self._keyed or not drafts)

    def _answer(self, id: str) -> Iterator[dict[str, Any]]:
        yield {"type": "user.message", "id": f"{id}-q", "data": {"text": f"question {id}"}}
        yield {"type": "llm.start", "id": id, "data": {"role": "assistant"}}
        for _ in range(self._rng.randrange(3, 12)):
            yield {"type": "llm.delta", "id": id, "data": {"delta": self._rng.randbytes(8).hex()}}
            if self._rng.random() < 0.2:
                yield {"type": "log", "data": {"message": "thinking", "level": "info"}}
        yield {"type": "llm.final", "id": id, "data": {"text": f"answer {id} " * self._rng.randrange(1, 20)}}

    async def _publish(self, http: httpx.AsyncClient, drafts: list[dict[str, Any]], *, keyed: bool) -> None:
        numbers = []
        for draft in drafts:
            number = next(self._numbers)
            numbers.append(number)
            draft["conv_id"] = self._conv_id
            draft["data"]["n"] = number
        headers = {"idempotency-key": f"{self._name}-{numbers[0]}"} if keyed else {}
        while True:
            try:
                answer = await http.post(f"{self._broker.url}api/publish", json=drafts, headers=headers)
            except httpx.TransportError:
                self._ledger.unknown.setdefault(self._conv_id, set()).update(numbers)
            else:
                if answer.status_code == 200:
                    seqs = map(int, answer.json()["seqs"])
                    self._ledger.acknowledged.setdefault(self._conv_id, {}).update(zip(numbers, seqs, strict=True))
                    self._ledger.unknown.get(self._conv_id, set()).difference_update(numbers)
                    return
                self._note(answer)
            if not keyed:
                await asyncio.sleep(RETRY_S)
                return
            self._ledger.repeated += 1
            await asyncio.sleep(RETRY_S)

    def _note(self, answer: httpx.Response) -> None:
        status = answer.status_code
        self._ledger.refused[status] = self._ledger.refused.get(status, 0) + 1
        if len(self._ledger.problems) < 100:
            # A plain text is no problem of the broker's, and that is what should be seen then.
            is_json = "json" in answer.headers.get("content-type", "")
            self._ledger.problems.append(answer.json() if is_json else {"status": status, "text": answer.text})
