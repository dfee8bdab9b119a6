"""The wall clock of the running server is stepped under it (libfaketime): order and resuming hold. I2."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tests.faults.load import Ledger, Publisher
from tests.faults.test_killed_server import converged
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually, read_log

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libfaketime is preloaded, which is for Linux")


def library() -> str:
    """Where pip put libfaketime's library. The module itself is not imported: it would start this process again."""
    spec = importlib.util.find_spec("libfaketime")
    assert spec is not None, "libfaketime is missing: pip install -e .[dev]"
    assert spec.origin is not None
    return str(next(Path(spec.origin).parent.rglob("libfaketime.so.1")))


class Clock:
    """The wall clock of a server process; its monotonic clock and its sleeps go on as they are."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "faketime"
        self.set("+0")
        self.variables = {
            "LD_PRELOAD": library(),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, step: str) -> None:
        """step: seconds with their sign, or an instant at which the clock stands."""
        # Renamed into place: the server must never read half of it.
        half = self._file.with_suffix(".new")
        half.write_text(step + "\n")
        half.rename(self._file)


async def server_time_s(http: httpx.AsyncClient, broker: BrokerProcess) -> float:
    answer = await http.get(f"{broker.url}api/timeline", params={"conv_id": "nobody"})
    return float(answer.json()["serverTimeMs"]) / 1000


@pytest.mark.parametrize("fast_path", ["1", "0"], ids=["fast path", "plain ASGI"])
async def test_order_and_resume_hold_whatever_the_clock_does(
    start_broker: Callable[..., BrokerProcess], tmp_path: Path, fast_path: str
) -> None:
    """An hour back, a day ahead, standing still, back to the truth; with a crash, under load all the time."""
    clock = Clock(tmp_path)
    broker = start_broker(BROKER_FAST_PATH=fast_path, **clock.variables)
    ledger = Ledger()
    publishers = [Publisher(broker, ledger, "c1", keyed=True, seed=seed) for seed in (1, 2)]
    followers = [Follower(broker, "c1"), Follower(broker, "c1", since=None)]
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, followers[0], followers[1]:
        await eventually(lambda: all(follower.live for follower in followers))
        for publisher in publishers:
            publisher.start()

        async def some_more() -> None:
            wanted = ledger.count() + 20
            await eventually(lambda: ledger.count() >= wanted, "publishing did not go on")

        standing = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + 7200))
        for step, offset_s in (("-3600", -3600), ("+86400", 86_400), (standing, None), ("+0", 0)):
            await some_more()
            clock.set(step)
            if offset_s is None:
                assert await server_time_s(http, broker) == await server_time_s(http, broker)
            else:
                assert abs(await server_time_s(http, broker) - time.time() - offset_s) < 60
            await some_more()
            for follower in followers:
                follower.drop()
            await some_more()
            if step.startswith("-"):  # the step that could make numbers repeat
                broker.restart(kill=True)
        await some_more()
        for publisher in publishers:
            await publisher.finish()
        events = await read_log(http, broker.url, "c1")
        ledger.check("c1", events)  # also that who published later has the higher seq
        await converged(http, broker, followers[:1], "c1")
        await eventually(lambda: followers[1].client.last >= int(events[-1]["seq"]))
        assert not followers[1].client.gaps
        assert not any(follower.client.duplicates for follower in followers)
        hellos = [hello for follower in followers for hello in follower.client.controls("ws.hello")[1:]]
        assert len(hellos) >= 8  # four drops and a crash of two clients, some of which may meet
        assert all(hello["recovered"] for hello in hellos)
