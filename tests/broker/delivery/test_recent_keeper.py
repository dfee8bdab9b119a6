"""Clients that come back share the work: what it costs grows with conversations and views, not with clients.

Counted in reads of the store and frames built, which are the same on every machine; and what must stay right beside it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import Core, store_setting, until
from tests.support.wire import Client

from broker.conversations.recent import BYTES_MAX, ENVELOPE_BYTES
from broker.delivery.recent_keeper import IDLE_S, LIFE_S, LOADS_MAX, RecentKeeper
from broker.eventlog.base import LogState
from broker.hookspecs import hookimpl
from broker.profiles import Profile

QUIET: dict[str, Any] = {"upsert_interval_s": 3600.0, "sweep_interval_s": 3600.0}


class SetClock:
    """A clock whose monotonic time moves only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.wall_time_ms = 1_760_000_000_000

    def wall_ms(self) -> int:
        self.wall_time_ms += 1
        return self.wall_time_ms

    def monotonic_s(self) -> float:
        return self.now_s


class Views:
    """A plugin with profiles of which each hides another part."""

    @hookimpl
    def register_profiles(self) -> Sequence[Profile]:
        return [Profile(f"view{n}", "for counting", channels=("sem", "control")) for n in range(8)]

    @hookimpl
    def build_filter(self, profile: Profile) -> Callable[[Any], bool] | None:
        if not profile.name.startswith("view"):
            return None
        hidden = profile.name[-1]
        return lambda envelope: not envelope.data["text"].endswith(hidden)


class Counts:
    """Counts the calls that reach the stores of a broker."""

    def __init__(self, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        for store, names in (
            (core.parts.log, ("state", "read", "contains")),
            (core.parts.stores.timeline, ("page", "get")),
        ):
            for name in names:
                monkeypatch.setattr(store, name, self._counted(f"{store.name}.{name}", getattr(store, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            assert self.total < 1000, "it reads for ever"  # with the memory store no time-out would end that
            return await function(*args, **kwargs)

        return counted

    @property
    def total(self) -> int:
        return self.calls.total()


@pytest.fixture
async def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def core(request: pytest.FixtureRequest, tmp_path: Path, clock: SetClock) -> AsyncIterator[Core]:
    async with Core(store_setting(request, tmp_path), plugins=[Views()], clock=clock, **QUIET) as core:
        yield core


async def published(core: Core, count: int = 20, conv_id: str = "c1") -> list[int]:
    return [await core.say(conv_id, f"event {n}") for n in range(count)]


async def come_back(core: Core, since: Sequence[int], *, conv_id: str = "c1", **request: Any) -> list[Client]:
    """Have one client per position of `since` connect at the same time; return them once all are live."""
    epoch = (await core.broker.head(conv_id)).epoch
    clients = [Client(since=position) for position in since]

    async def one(client: Client) -> None:
        await core.connect(conv_id, client=client, since=client.last, epoch=epoch, **request)
        await until(lambda: client.controls("ws.caught_up"))

    await asyncio.gather(*map(one, clients))
    return clients


async def cost(core: Core, monkeypatch: pytest.MonkeyPatch, clients: int, profiles: Sequence[str]) -> tuple[int, int]:
    """Return reads of the stores and frames built for so many clients that come back, spread over profiles."""
    seqs = await published(core)
    epoch = (await core.broker.head("c1")).epoch
    built = core.parts.recent.kept.frames_built
    counts = Counts(core, monkeypatch)
    peers = await asyncio.gather(
        *(core.connect("c1", profile=profiles[n % len(profiles)], since=seqs[5], epoch=epoch) for n in range(clients))
    )
    for peer, subscription in peers:
        assert subscription.status == "live"
        assert len(peer.client.events) >= 12
        assert not peer.client.gaps
        assert peer.client.last == seqs[-1]
    return counts.total, core.parts.recent.kept.frames_built - built


async def test_reads_and_frames_do_not_grow_with_clients(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, frames = await cost(core, monkeypatch, 200, ["default"])
    assert reads <= 3  # the page, whether the position is known, the epoch
    assert frames == 14


async def test_frames_grow_with_views(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, frames = await cost(core, monkeypatch, 200, [f"view{n}" for n in range(4)])
    assert reads <= 3
    assert frames <= 4 * 14


async def test_nobody_who_missed_nothing_has_a_store_read(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    seqs = await published(core)
    epoch = (await core.broker.head("c1")).epoch
    counts = Counts(core, monkeypatch)
    for _ in range(20):
        peer, subscription = await core.connect("c1", since=seqs[-1], epoch=epoch)
        assert subscription.status == "live"
        assert peer.client.controls("ws.hello")[0]["recovered"] is True
    assert counts.total == 0


async def test_every_position_gets_exactly_what_it_lacks(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those who stand before the ones that came first, and after a hidden event."""
    seqs = await published(core, 40)
    counts = Counts(core, monkeypatch)
    for profile in ("default", "view3"):
        for start in (30, 12, 20, 39, 0, 5):
            (client,) = await come_back(core, [seqs[start]], profile=profile)
            wanted = [
                seq for n, seq in enumerate(seqs) if n > start and (profile == "default" or not str(n).endswith("3"))
            ]
            assert client.seqs() == wanted
            assert not client.gaps
            assert not client.duplicates
            assert client.last == seqs[-1]
    assert counts.calls[f"{core.parts.log.name}.read"] <= 4  # 30, 12, 0: each reads what those before did not


async def test_what_is_published_meanwhile_is_added_without_reading(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqs = await published(core)
    first = (await come_back(core, [seqs[3]]))[0]
    counts = Counts(core, monkeypatch)
    for round_number in range(5):
        seqs += [await core.say("c1", f"more {round_number}")]
        (client,) = await come_back(core, [seqs[10]])
        assert client.seqs() == seqs[11:]
        assert not client.gaps
    assert first.seqs() == seqs[4:]
    assert counts.calls[f"{core.parts.log.name}.read"] == 0


async def test_a_position_that_is_none_resets_although_its_neighbours_are_at_hand(core: Core) -> None:
    seqs = await published(core)
    await come_back(core, [seqs[2]])
    # Redis counts up by one within a millisecond.
    nothing = next(seq + 1 for seq in seqs[7:-1] if seq + 1 not in seqs)
    (client,) = await come_back(core, [nothing])
    assert client.controls("ws.reset")[0]["reason"] == "epoch"
    (client,) = await come_back(core, [seqs[-1] + 10**9])
    assert client.controls("ws.reset")[0]["reason"] == "ahead"


async def test_a_position_of_another_life_resets_although_it_is_at_hand(core: Core) -> None:
    """The seq exists, but what the client knows belongs to a log that is gone."""
    seqs = await published(core)
    await come_back(core, [seqs[2]])
    client = Client(since=seqs[7])
    await core.connect("c1", client=client, since=seqs[7], epoch="another")
    await until(lambda: client.controls("ws.caught_up"))
    assert client.controls("ws.reset")[0]["reason"] == "epoch"


async def test_a_log_that_another_process_reset_is_not_kept(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read then may be of either life: the client is told by the log itself."""
    seqs = await published(core)
    epoch = (await core.broker.head("c1")).epoch
    state = core.parts.log.state

    async def of_another_life(conv_id: str) -> LogState:
        return replace(await state(conv_id), epoch="another")

    monkeypatch.setattr(core.parts.log, "state", of_another_life)
    client = Client(since=seqs[4])
    await core.connect("c1", client=client, since=seqs[4], epoch=epoch)
    await until(lambda: client.controls("ws.caught_up"))
    assert client.controls("ws.reset")[0]["reason"] == "epoch"


async def test_who_has_nothing_yet_is_answered_from_memory_as_well(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    seqs = await published(core)
    await come_back(core, [0])
    counts = Counts(core, monkeypatch)
    for client in await come_back(core, [0] * 10):
        assert client.seqs() == seqs
    assert counts.calls[f"{core.parts.log.name}.read"] == 0
    assert counts.calls[f"{core.parts.log.name}.contains"] == 0


async def test_retention_takes_what_is_kept_as_well(tmp_path: Path) -> None:
    async with Core(str(tmp_path / "broker.db"), retention_count=10, **QUIET) as core:
        seqs = await published(core, 60)
        await come_back(core, [seqs[4]])
        assert len(core.parts.recent) == 1
        assert await core.parts.housekeeping.trim("c1") == 50
        assert len(core.parts.recent) == 0
        (client,) = await come_back(core, [seqs[4]])
        assert client.controls("ws.reset")[0]["reason"] == "expired"


async def test_what_retention_has_reached_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients come back that have been away for too long, each from another position."""
    async with Core(str(tmp_path / "broker.db"), retention_count=10, **QUIET) as core:
        seqs = await published(core, 60)
        await core.parts.housekeeping.trim("c1")
        conversation = await core.parts.conversations.open("c1")
        counts = Counts(core, monkeypatch)
        for since in seqs[:40:5]:
            assert await core.parts.recent.resumed(conversation, since, None) is None
        assert counts.calls["sqlite.read"] == 1
        assert await core.parts.recent.resumed(conversation, seqs[55], None) is not None


async def test_erasing_takes_what_is_kept_as_well(core: Core) -> None:
    seqs = await published(core)
    await come_back(core, [seqs[4]])
    conversation = core.parts.conversations.get("c1")
    assert conversation is not None
    assert conversation.recent is not None
    kept = conversation.recent
    await core.broker.erase("c1")
    assert kept.page(0, seqs[-1], 1000).envelopes == []
    client = Client(since=seqs[4])
    await core.connect("c1", client=client, since=seqs[4])
    assert client.events == []
    assert client.controls("ws.reset")


async def test_an_erased_conversation_is_not_read_back_by_who_was_reading(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of the log that ends after the erase leaves nothing behind."""
    seqs = await published(core)
    reading, go_on = asyncio.Event(), asyncio.Event()
    read = core.parts.log.read

    async def slow(*args: Any, **kwargs: Any) -> Any:
        page = await read(*args, **kwargs)
        reading.set()
        await go_on.wait()
        return page

    monkeypatch.setattr(core.parts.log, "read", slow)
    client = Client(since=seqs[4])
    coming = asyncio.create_task(core.connect("c1", client=client, since=seqs[4]))
    await reading.wait()
    erasing = asyncio.create_task(core.broker.erase("c1"))
    await until(lambda: core.parts.conversations.get("c1") is None)
    go_on.set()
    await asyncio.gather(coming, erasing, return_exceptions=True)
    assert client.events == []
    core.parts.recent.sweep()
    assert core.parts.recent.kept.size_bytes == 0


async def test_nothing_is_kept_for_a_conversation_that_has_left_memory(core: Core) -> None:
    await published(core)
    conversation = await core.parts.conversations.open("c1")
    core.parts.conversations.forget(conversation, "erased")
    assert await core.parts.recent.resumed(conversation, 0, None) is None
    assert len(core.parts.recent) == core.parts.recent.kept.size_bytes == 0


async def test_who_waits_for_another_ones_reading_goes_on_when_that_one_leaves(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqs = await published(core)
    reading, go_on = asyncio.Event(), asyncio.Event()
    read = core.parts.log.read

    async def slow(*args: Any, **kwargs: Any) -> Any:
        reading.set()
        await go_on.wait()
        return await read(*args, **kwargs)

    monkeypatch.setattr(core.parts.log, "read", slow)
    first = asyncio.create_task(core.connect("c1", since=seqs[4]))
    await reading.wait()
    second = asyncio.create_task(core.connect("c1", since=seqs[4]))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    go_on.set()
    peer, subscription = await second
    assert subscription.status == "live"
    assert peer.client.seqs() == seqs[5:]


async def test_who_is_far_behind_pages_through_the_log(tmp_path: Path) -> None:
    async with Core(str(tmp_path / "broker.db"), replay_page_events=16, **QUIET) as core:
        seqs = await published(core, 100)
        for client in await come_back(core, [seqs[3], seqs[90], seqs[3], seqs[50]]):
            assert client.seqs() == [seq for seq in seqs if seq > int(client.controls("ws.hello")[0]["from"])]
            assert not client.gaps


async def test_more_than_a_write_takes_is_sent_at_the_clients_pace(core: Core) -> None:
    """The first chunk fills the buffer; the rest waits until it has drained, and the switch to live with it."""
    seqs = [await core.say("c1", "x" * 20_000 + str(n)) for n in range(12)]
    client = Client(since=seqs[0])
    coming = core.connect("c1", client=client, since=seqs[0])
    peer, subscription = await coming
    peer.stall()
    await until(lambda: len(peer.buffered) or subscription.status == "live")
    peer.read()
    await until(lambda: subscription.status == "live")
    assert client.seqs() == seqs[1:]
    assert peer.max_buffered_bytes < 100_000


async def test_entities_that_only_the_store_has_are_read_once(
    tmp_path: Path, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation with more entities than memory holds: the newest ones are fetched for all who come back."""
    db = str(tmp_path / "broker.db")
    async with Core(db, clock=clock) as core:
        for n in range(300):
            await core.say("c1", f"message {n}", type="user.message")
        clock.wall_time_ms += 60_000
        seqs = [await core.say("c1", f"last {n}", type="user.message") for n in range(3)]
    async with Core(db, clock=clock) as core:
        await core.parts.conversations.open("c1")
        since = seqs[0]
        counts = Counts(core, monkeypatch)
        clients = await come_back(core, [since] * 50)
        newest = {event["id"] for event in clients[0].events}
        for client in clients:
            assert newest <= client.entities.keys()
            assert client.seqs() == seqs[1:]
        assert counts.calls["sqlite.page"] <= 2  # one is the library's, which looks at what a former process left


async def test_what_is_kept_goes_when_nobody_comes_any_more(core: Core, clock: SetClock) -> None:
    seqs = await published(core)
    await come_back(core, [seqs[4]])
    keeper = core.parts.recent
    assert keeper.kept.size_bytes > 0
    clock.now_s += IDLE_S - 1
    keeper.sweep()
    assert len(keeper) == 1
    clock.now_s += 1
    keeper.sweep()
    assert (len(keeper), keeper.kept.size_bytes) == (0, 0)


async def test_what_is_kept_is_read_again_after_a_while_however_many_come(
    core: Core, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqs = await published(core)
    counts = Counts(core, monkeypatch)
    for _ in range(int(LIFE_S / 3) + 1):
        await come_back(core, [seqs[4]])
        core.parts.recent.sweep()
        clock.now_s += 3.0
    assert counts.calls[f"{core.parts.log.name}.read"] == 2


async def test_what_is_kept_is_bounded_for_one_and_for_all(core: Core) -> None:
    keeper = core.parts.recent
    conversations = [f"c{n}" for n in range(12)]
    sinces = {}
    for conv_id in conversations:
        seqs = [await core.say(conv_id, "y" * 20_000) for _ in range(6)]
        sinces[conv_id] = seqs[0]
    few = keeper_of(core, 400_000)
    for conv_id in conversations:
        conversation = await core.parts.conversations.open(conv_id)
        assert await few.resumed(conversation, sinces[conv_id], None) is not None
        assert few.kept.size_bytes <= 400_000 + 150_000  # the newest one is never given up
    assert 1 < len(few) < len(conversations)
    for conv_id in conversations:
        few.drop(await core.parts.conversations.open(conv_id))
    assert few.kept.size_bytes == 0

    await come_back(core, [sinces["c0"]], conv_id="c0")
    for _ in range(2 * BYTES_MAX // 20_000):
        await core.say("c0", "z" * 20_000)
        assert keeper.kept.size_bytes <= BYTES_MAX + 50_000


def keeper_of(core: Core, total_bytes_max: int) -> RecentKeeper:
    return RecentKeeper(
        core.parts.log,
        core.parts.conversations,
        core.parts.timeline,
        core.parts.clock,
        page_events=512,
        page_bytes=262_144,
        total_bytes_max=total_bytes_max,
    )


async def test_those_whom_clients_came_back_to_last_stay(core: Core, clock: SetClock) -> None:
    """Not those that were first read last."""
    few = keeper_of(core, 400_000)
    conversations = []
    for n in range(3):
        seqs = [await core.say(f"c{n}", "y" * 20_000) for _ in range(8)]
        conversations.append((await core.parts.conversations.open(f"c{n}"), seqs[0]))
    first, second, third = conversations
    for one in (first, second, first, third, third):  # what goes over the bound shows at the next coming
        clock.now_s += 0.1
        assert await few.resumed(*one, None) is not None
    assert [few.at(*one) is not None for one in conversations] == [True, False, True]


async def test_the_one_in_use_stays_however_large(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    few = keeper_of(core, 1)
    seqs = await published(core)
    conversation = await core.parts.conversations.open("c1")
    counts = Counts(core, monkeypatch)
    for _ in range(3):
        assert await few.resumed(conversation, seqs[4], None) is not None
    assert counts.calls[f"{core.parts.log.name}.read"] == 1


LARGE: dict[str, Any] = {"max_envelope_bytes": 2 * BYTES_MAX, "replay_page_bytes": 32 * BYTES_MAX}


async def resume_while_counting(
    core: Core, monkeypatch: pytest.MonkeyPatch, seqs: Sequence[int], *, reads_max: int
) -> None:
    """Have three clients come back to seqs[0]: they get everything, for so many reads of the log at most."""
    counts = Counts(core, monkeypatch)
    for client in await come_back(core, [seqs[0]] * 3):
        assert client.controls("ws.hello")[0]["recovered"] is True
        assert client.seqs() == seqs[1:]
        assert not client.gaps
    assert counts.calls[f"{core.parts.log.name}.read"] <= reads_max
    assert core.parts.recent.kept.size_bytes <= 2 * BYTES_MAX  # beside the events the frames of one view


@pytest.mark.parametrize("db", ["memory", "sqlite", "redis"], indirect=True)
async def test_an_event_larger_than_what_is_kept_is_read_from_the_log(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per client, and not for ever, for clients that never get their hello."""
    async with Core(db, **QUIET, **LARGE) as core:
        seqs = [await core.say("c1", text) for text in ("small", "x" * (BYTES_MAX + 1000), "small again")]
        await resume_while_counting(core, monkeypatch, seqs, reads_max=4)


@pytest.mark.parametrize("db", ["memory", "sqlite", "redis"], indirect=True)
@pytest.mark.parametrize("size", [100_000, 10])
async def test_pages_larger_than_what_is_kept_are_read_from_the_log(
    db: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their bytes, or because there are so many."""
    async with Core(db, replay_page_events=100_000, **QUIET, **LARGE) as core:
        publish = core.broker.publisher("c1").publish
        count = 30 if size > 10 else BYTES_MAX // ENVELOPE_BYTES
        drafts = [publish("note.said", {"text": "x" * size}) for _ in range(count)]
        seqs = sorted(await asyncio.gather(*drafts))
        await resume_while_counting(core, monkeypatch, seqs, reads_max=4)


@pytest.mark.parametrize("db", ["memory", "sqlite", "redis"], indirect=True)
async def test_a_publisher_that_fills_what_is_kept_faster_than_it_is_read_holds_nobody(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Core(db, **QUIET, **LARGE) as core:
        seqs = await published(core)
        conversation = await core.parts.conversations.open("c1")
        read, reads = core.parts.log.read, 0

        async def outrun(*args: Any, **kwargs: Any) -> Any:
            nonlocal reads
            reads += 1
            assert reads < 20, "it reads for ever"
            page = await read(*args, **kwargs)
            for _ in range(2):
                await core.say("c1", "y" * (BYTES_MAX // 2 + 1))
            return page

        monkeypatch.setattr(core.parts.log, "read", outrun)
        assert await core.parts.recent.resumed(conversation, seqs[0], None) is None
        assert reads == LOADS_MAX


async def test_conversations_that_take_the_room_from_each_other_hold_nobody(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = keeper_of(core, 1)
    resumes = [(conv_id, (await published(core, conv_id=conv_id))[4]) for conv_id in ("c1", "c2", "c3")]
    conversations = [(await core.parts.conversations.open(conv_id), since) for conv_id, since in resumes]
    read, reads = core.parts.log.read, 0

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += 1
        page = await read(*args, **kwargs)
        for conversation, _ in conversations:  # others come back meanwhile
            if conversation.conv_id != args[0] and reads < 50:
                few.drop(conversation)
        return page

    monkeypatch.setattr(core.parts.log, "read", counted)
    await asyncio.gather(*(few.resumed(conversation, since, None) for conversation, since in conversations))
    assert reads <= LOADS_MAX * len(conversations)


async def test_state_that_does_not_stay_in_memory_is_asked_for_so_often_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = str(tmp_path / "broker.db")
    async with Core(db, **QUIET) as core:
        seqs = [await core.say("c1", f"message {n}", type="user.message") for n in range(300)]
    async with Core(db, **QUIET) as core:
        conversation = await core.parts.conversations.open("c1")
        page_of, reads = core.parts.timeline.page_of, 0

        async def dropped_meanwhile(*args: Any, **kwargs: Any) -> Any:
            nonlocal reads
            if kwargs.get("since_version"):  # else it is the library, which looks at what a former process left
                reads += 1
                assert reads < 20, "it reads for ever"
                core.parts.recent.drop(conversation)
            return await page_of(*args, **kwargs)

        monkeypatch.setattr(core.parts.timeline, "page_of", dropped_meanwhile)
        await core.parts.recent.state_at_hand(conversation, seqs[100])
        assert reads == LOADS_MAX
