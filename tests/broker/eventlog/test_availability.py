"""When an outage is told: not a blip, once per connection, also to those who come or catch up later; no stream of notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import Core, database, until
from tests.support.wire import Client, Peer

from broker.errors import StoreUnavailable
from broker.eventlog import availability
from broker.eventlog.availability import Availability


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same order of events, in a twentieth of the time."""
    for name in ("TELL_AFTER_S", "PROBE_S", "CALM_S"):
        monkeypatch.setattr(availability, name, getattr(availability, name) / 20)


class Store:
    """What the watch asks."""

    def __init__(self) -> None:
        self.well = False
        self.asked = self._looked_at = 0
        self.told: list[str | None] = []
        self.watch = Availability(self, self.told.append)

    async def ping(self) -> None:
        self.asked += 1
        if not self.well:
            raise StoreUnavailable("no space left")

    @property
    def asked_since(self) -> int:
        """How often it was asked since this was last looked at."""
        asked, self._looked_at = self.asked - self._looked_at, self.asked
        return asked

    def refuse(self) -> None:
        self.watch.suspect(StoreUnavailable("too large for what is left"))


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    one = Store()
    yield one
    await one.watch.close()


def idle(watch: Availability) -> bool:
    return watch._task is None


async def test_a_blip_is_not_told_and_nothing_goes_on_running(store: Store) -> None:
    store.refuse()
    await until(lambda: store.asked == 1)
    store.well = True
    await until(lambda: idle(store.watch))
    assert store.told == []
    asked = store.asked
    await asyncio.sleep(availability.PROBE_S * 3)
    assert store.asked == asked


async def test_an_outage_and_its_end_are_told_once(store: Store) -> None:
    store.refuse()
    await until(lambda: store.told == ["no space left"])
    for _ in range(5):
        store.refuse()
        await asyncio.sleep(availability.PROBE_S / 2)
    assert store.told == ["no space left"]
    waiting = asyncio.create_task(store.watch.until_back())
    await asyncio.sleep(0)
    assert not waiting.done()
    store.well = True
    await until(lambda: store.told == ["no space left", None])
    await waiting
    await until(lambda: idle(store.watch))


async def test_many_refusals_are_one_suspicion(store: Store) -> None:
    for _ in range(100):
        store.refuse()
    await until(lambda: store.asked > 0)
    assert store.asked == 1


async def test_a_question_that_is_refused_is_no_further_trouble(store: Store) -> None:
    """A store that reports all it refuses reports the question as well: an outage must not last longer for that."""
    ping = store.ping

    async def reported() -> None:
        try:
            await ping()
        except StoreUnavailable as exc:
            store.watch.suspect(exc)
            raise

    store.ping = reported  # type: ignore[method-assign]
    store.refuse()
    await until(lambda: len(store.told) == 1)
    store.well = True
    assert store.asked_since
    await until(lambda: len(store.told) == 2)
    assert store.asked_since <= availability.CALM_S / availability.PROBE_S  # each half a second, fewer if it is slow


async def test_nothing_is_watched_after_the_end(store: Store) -> None:
    await store.watch.close()
    store.refuse()
    assert idle(store.watch)


async def test_refused_appends_count_where_the_small_probe_still_fits(store: Store) -> None:
    """A nearly full disk: what publishers meet is the truth."""
    store.well = True

    async def publish() -> None:
        while True:
            store.refuse()
            await asyncio.sleep(availability.PROBE_S / 2)

    publishing = asyncio.create_task(publish())
    await until(lambda: store.told == ["too large for what is left"])
    publishing.cancel()
    await until(lambda: store.told[1:] == [None])


async def test_outages_that_follow_each_other_are_over_later_and_later(store: Store) -> None:
    loop = asyncio.get_running_loop()
    lasted = []
    for n in range(1, 5):
        store.well = False
        store.refuse()
        await until(lambda n: len(store.told) == 2 * n - 1, n)
        began = loop.time()
        store.well = True
        await until(lambda n: len(store.told) == 2 * n, n)
        lasted.append(loop.time() - began)
        await until(lambda: idle(store.watch))
    # Lower bounds only: the machine may be slow, never fast. The watch counts from the last trouble, a probe earlier.
    for n, seconds in enumerate(lasted):
        assert seconds >= availability.CALM_S * 2**n - availability.PROBE_S


async def test_only_those_who_want_to_be_refused_are(store: Store) -> None:
    impatient = Availability(store, store.told.append, refuses=True)
    impatient.suspect(StoreUnavailable("first"))
    impatient.admit()
    await until(lambda: impatient.away is not None)
    with pytest.raises(StoreUnavailable, match=r"away for \d+ s \(no space left\): nothing was written; try again"):
        impatient.admit()
    await impatient.close()
    store.refuse()
    await until(lambda: store.watch.away is not None)
    store.watch.admit()


# -- with a broker ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def broken(core: Core) -> AsyncIterator[None]:
    """The broker's log refuses to be written to while the block runs."""

    async def refuse(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("no space left")

    log: Any = core.parts.log
    append, ping, log.append, log.ping = log.append, log.ping, refuse, refuse
    with pytest.raises(StoreUnavailable):
        await core.say("c1", "refused")
    await until(lambda: core.parts.availability.away is not None)
    try:
        yield
    finally:
        log.append, log.ping = append, ping
        await until(lambda: core.parts.availability.away is None)


def notices(peer: Peer) -> list[str]:
    return [notice["code"] for notice in peer.client.controls("ws.notice")]


async def test_each_connection_is_told_once_whatever_state_it_is_in(tmp_path: Path) -> None:
    async with Core(database(tmp_path, "sqlite")) as core:
        live, _ = await core.connect("c1")
        elsewhere, _ = await core.connect("c2", profile="debug")
        deaf, _ = await core.connect("c1", channels="sem")
        slow, subscription = await core.connect("c1", buffer_bytes=200)
        slow.stall()
        for n in range(30):
            await core.say("c1", str(n))
        assert subscription.status == "parked"
        async with broken(core):
            assert notices(live) == notices(elsewhere) == ["store-away"]
            late, _ = await core.connect("c1")
            assert notices(late) == ["store-away"]
            kinds = [event["type"] for event in late.client.control]
            assert kinds[0] == "ws.hello"
            assert kinds[-2:] == ["ws.caught_up", "ws.notice"]
            slow.read()
            await until(lambda: notices(slow) == ["store-away"])
            changed, its = await core.connect("c1", channels="sem")
            assert notices(changed) == []
            await core.broker.doors.following.change_view(its, profile="default", channels=None, since=None)
            await until(lambda: notices(changed) == ["store-away"])
        told = [live, elsewhere, late, slow, changed]
        await until(lambda: all(notices(peer) == ["store-away", "store-back"] for peer in told))
        after, _ = await core.connect("c1")
        seq = await core.say("c1", "after")
        await until(lambda: all(peer.client.last == seq for peer in (live, late, slow, changed, deaf, after)))
        assert notices(deaf) == notices(after) == []
        assert not any(peer.client.gaps for peer in told)


async def test_one_that_slept_through_the_whole_outage_is_told_nothing(tmp_path: Path) -> None:
    async with Core(database(tmp_path, "sqlite")) as core:
        slow, subscription = await core.connect("c1", buffer_bytes=200)
        slow.stall()
        for n in range(30):
            await core.say("c1", str(n))
        assert subscription.status == "parked"
        async with broken(core):
            pass
        slow.read()
        await until(lambda: subscription.status == "live")
        assert notices(slow) == []
        client = Client(since=slow.client.last)
        again, _ = await core.connect("c1", client=client, since=client.last)
        assert notices(again) == []


async def test_a_notice_is_encoded_once_for_all(tmp_path: Path) -> None:
    """The very same bytes, whatever the conversation and the view."""
    async with Core(database(tmp_path, "sqlite")) as core:
        peers = [
            (await core.connect(f"c{n}", profile=profile))[0] for n in range(3) for profile in ("default", "debug")
        ]
        seen: list[int] = []
        for peer in peers:
            take = peer.client.take

            def note(text: Any, take: Any = take) -> None:
                if b"ws.notice" in text:
                    seen.append(id(text))
                take(text)

            peer.client.take = note  # type: ignore[method-assign]
        async with broken(core):
            assert len(seen) == len(peers)
            assert len(set(seen)) == 1
