"""kill -9 of a server under load, over and over: nothing acknowledged is lost, nothing appears twice, clients converge.

BROKER_FAULT_ROUNDS=300 runs the long form.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterable

import httpx
import pytest
from tests.faults.load import Ledger, Publisher
from tests.support.broker_process import BrokerProcess, broker_command, clean_environment
from tests.support.follower import Follower, eventually, read_log, timeline, told

ROUNDS = int(os.environ.get("BROKER_FAULT_ROUNDS", "14"))
SEED = int(os.environ.get("BROKER_FAULT_SEED", "1"))
CONVERSATIONS = ("kill-a", "kill-b")
ACKNOWLEDGED_BEFORE_KILL = (1, 3, 10, 30, 60, 150)
RESTART_S = 3  # what a round may take beside the load, on a busy machine

pytestmark = pytest.mark.timeout(120 + ROUNDS * RESTART_S)


def verify(broker: BrokerProcess) -> str:
    """Run `broker timeline verify` on the file of a stopped server and return what it says. It has to agree."""
    done = subprocess.run(
        [*broker_command(), "timeline", "verify", "--db", str(broker.folder / "broker.db")],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def converged(http: httpx.AsyncClient, broker: BrokerProcess, followers: Iterable[Follower], conv_id: str) -> int:
    """Every follower of a conversation has exactly what the log and the timeline have; return the number of events."""
    events = await read_log(http, broker.url, conv_id)
    entities = await timeline(http, broker.url, conv_id)
    for follower in followers:
        client = follower.client
        # Waits for the slowest frame; what is compared is complete then.
        await eventually(
            lambda client: client.last >= int(events[-1]["seq"]) and client.entities == entities,
            f"{conv_id}: a client did not converge",
            client,
        )
        assert told(client.events) == told(events)
        assert not client.gaps
        assert client.duplicates == 0
    return len(events)


@pytest.mark.parametrize("fast_path", ["1", "0"], ids=["fast path", "plain ASGI"])
async def test_kill_9_at_any_moment_loses_nothing(
    start_broker: Callable[..., BrokerProcess], fast_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the publishers repeat what was not answered with the same idempotency key, the others do not."""
    rng = random.Random(SEED)
    broker = start_broker(BROKER_FAST_PATH=fast_path, BROKER_TIMELINE_FLUSH_INTERVAL_S="0.05")
    ledger = Ledger()
    publishers = [
        Publisher(broker, ledger, conv_id, keyed=bool(seed % 2), seed=seed)
        for seed, conv_id in enumerate(CONVERSATIONS * 2, start=1)
    ]
    followers = [Follower(broker, conv_id) for conv_id in CONVERSATIONS * 2]
    rounds = max(ROUNDS // 2, 1)
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        for publisher in publishers:
            publisher.start()
        for follower in followers:
            await follower.__aenter__()
        highest = 0
        for _ in range(rounds):
            wanted = ledger.count() + rng.choice(ACKNOWLEDGED_BEFORE_KILL)
            await eventually(lambda wanted: ledger.count() >= wanted, "publishing did not go on", wanted)
            broker.kill()
            before = max(seq for seqs in ledger.acknowledged.values() for seq in seqs.values())
            assert before >= highest
            highest = before
            broker.start()
        for publisher in publishers:
            await publisher.finish()
        counted = 0
        for conv_id in CONVERSATIONS:
            ledger.check(conv_id, await read_log(http, broker.url, conv_id))
            mine = [follower for follower, name in zip(followers, CONVERSATIONS * 2, strict=True) if name == conv_id]
            counted += await converged(http, broker, mine, conv_id)
        hellos = [hello for follower in followers for hello in follower.client.controls("ws.hello")]
        assert all(hello["recovered"] for hello in hellos)
        assert len({hello["epoch"] for hello in hellos}) == 1
        assert not any(follower.client.controls("ws.reset") for follower in followers)
        for follower in followers:
            await follower.stop()
    broker.stop()
    verdict = verify(broker).splitlines()[-1]
    with capsys.disabled():
        print(
            f"\n  {rounds} kills, {ledger.count()} envelopes acknowledged, {counted} stored, {ledger.repeated} requests "
            f"repeated, {sum(map(len, ledger.unknown.values()))} never answered, "
            f"{sum(follower.connections for follower in followers)} connections of {len(followers)} clients; {verdict}"
        )
    assert ledger.count() >= rounds
