"""The delivery machine over real sockets: WebSockets on the fast path and through plain ASGI, event streams, long polls.

One broker is served by several uvicorns, so that clients of every kind follow the same conversation and may come back as
another kind. Actions happen while others publish. After every step each client that reads has exactly what its profile
let it see, and each that does not read has the beginning of that; a second machine adds retention (a resume is complete
or says that it is not), a third the policies for slow clients.

BROKER_PROPERTY_EXAMPLES sets the number of examples per machine (a long form: 100).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.property.delivery_model import CONV, DRAFTS, KINDS, PROFILES, WITHOUT_STATE, Asked, Follower, Published
from tests.support.core import until
from tests.support.redis_server import lasting_server, redis_executable
from tests.support.socket_clients import EventStreamPeer, LinesPeer, Peer, PollPeer, SocketServer, WebSocketPeer

from broker.cli.verify import verify_conversation
from broker.clock import ManualClock
from broker.delivery import recovery
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.testing import parts_of

FOLLOWERS_MAX = 5
STEP_S = 10.0
PADDING = (0, 0, 40, 400, 1500)
"""Bytes added to a text: some stalls are to overflow at once, and some only later."""
PONG_S = 0.2
CLOCK_STEPS_S = (0.0, 0.0, 0.001, -0.001, -3600.0, 60.0)
POLL_LIMITS = (3, 8, 200)

ways = st.sampled_from(["fast", "fast", "asgi", "sse", "poll", "lines"])
hows = st.sampled_from(["live", "everything", "hydrate"])
meanwhile = st.lists(st.sampled_from(KINDS), max_size=4)
padding = st.sampled_from(PADDING)
picked = st.integers(0, FOLLOWERS_MAX - 1)


class SocketFollower(Follower):
    """A follower with its connection, if it has one.

    stream: what its event stream was asked for, if that was its last connection; last_event_id: what that gave it.
    """

    def __init__(self, profile: str) -> None:
        super().__init__(profile)
        self.peer: Peer | None = None
        self.stream: Asked | None = None
        self.last_event_id: str | None = None

    @property
    def reading(self) -> bool:
        return self.peer is not None and not self.peer.stalled

    @property
    def connection_id(self) -> str:
        """What the server calls its newest connection, as far as it has heard of it."""
        return str(self.client.controls("ws.hello")[-1]["connectionId"])

    def gone(self) -> None:
        """Its connection is over."""
        if isinstance(self.peer, EventStreamPeer):
            self.last_event_id = self.peer.last_event_id
        else:
            self.stream = self.last_event_id = None
        self.peer = None
        self.leaves()


class SocketMachine(RuleBasedStateMachine):
    """Every store and both event loops: subclasses say which."""

    store = "memory"
    uvloop = False
    profiles: Sequence[str] = PROFILES
    plugins: Sequence[object] = ()
    extra: dict[str, object] = {}
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.loop = new_loop(self.uvloop)
        self.loop_errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.loop_errors.append(context))
        self.folder = tempfile.mkdtemp()
        self.clock = ManualClock()
        self.published: list[Published] = []
        self.followers: list[SocketFollower] = []
        self.count = 0
        self.trimmed = 0
        self.server: SocketServer | None = None
        if self.store == "redis":
            with lasting_server().client() as client:
                client.flushall()
        # Small, so that a catch-up has many places at which it can be interrupted.
        self.patches = [
            mock.patch.object(recovery, "CHUNK_BYTES", 600),
            mock.patch.object(recovery, "STATE_PAGE_ENTITIES", 3),
        ]
        for patch in self.patches:
            patch.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        with self.explained():
            result = self.loop.run_until_complete(asyncio.wait_for(work, 60))
            assert not self.loop_errors
            return result

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of every follower where it stands when something fails."""
        try:
            yield
        except AssertionError as error:
            error.add_note(f"head {self.head}, trimmed {self.trimmed}")
            for follower in self.followers:
                way = "away" if follower.peer is None else type(follower.peer).__name__
                reading = "reading" if follower.reading else "not reading"
                error.add_note(f"{way}, {reading}: {follower.describe(self.published)}")
            raise

    @initialize(firsts=st.lists(st.tuples(ways, hows, picked), min_size=2, max_size=3))
    def start(self, firsts: list[tuple[str, str, int]]) -> None:
        self.run(self._start())
        for way, how, number in firsts:
            self.during((), 0, self._come(way, how, self.profiles[number % len(self.profiles)]))

    async def _start(self) -> None:
        if self.store == "redis":
            db = lasting_server().url
        else:
            db = ":memory:" if self.store == "memory" else str(Path(self.folder) / "broker.db")
        limits = {"replay_page_events": 3, "through_events": 4, "retention_count": 0, "retention_age_s": 0.0}
        # Timers never fire by themselves: the machine ticks and sweeps.
        timers = {"upsert_interval_s": 3600.0, "timeline_flush_interval_s": 3600.0, "sweep_interval_s": 3600.0}
        self.server = SocketServer(db, clock=self.clock, plugins=self.plugins, **{**timers, **limits, **self.extra})
        await self.server.start()

    @property
    def head(self) -> int:
        return self.published[-1].seq if self.published else 0

    def some(self, number: int, followers: list[SocketFollower]) -> SocketFollower:
        return followers[number % len(followers)]

    def during(self, kinds: Sequence[str], pad: int, *actions: Coroutine[Any, Any, None]) -> None:
        """Do `actions` while events of `kinds` are published one by one."""

        async def publish() -> None:
            for kind in kinds:
                await self._publish([kind], pad)

        async def everything() -> None:
            await asyncio.gather(publish(), *actions)

        self.run(everything())
        self.published.sort(key=lambda one: one.seq)

    async def _publish(self, kinds: Sequence[str], pad: int) -> None:
        drafts = []
        for kind in kinds:
            self.count += 1
            drafts.append(DRAFTS[kind](self.count, "x" * pad))
        assert self.server is not None
        seqs = await self.server.broker.publish(CONV, drafts)
        self.published += [Published.of(seq, draft) for seq, draft in zip(seqs, drafts, strict=True)]

    # -- what happens ----------------------------------------------------------------------------------------------

    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=8), pad=padding, together=st.booleans())
    def publish(self, kinds: list[str], pad: int, together: bool) -> None:
        batches = [kinds] if together else [[kind] for kind in kinds]
        self.during((), 0, *(self._publish(batch, pad) for batch in batches))

    def publish_much(self, pad: int, kind: str) -> None:
        self.during((), 0, *(self._publish([kind], pad) for _ in range(30)))

    @precondition(lambda self: len(self.followers) < FOLLOWERS_MAX)
    @rule(way=ways, number=picked, how=hows, kinds=meanwhile, pad=padding)
    def connect(self, way: str, number: int, how: str, kinds: list[str], pad: int) -> None:
        self.during(kinds, pad, self._come(way, how, self.profiles[number % len(self.profiles)]))

    def _come(self, way: str, how: str, profile: str) -> Coroutine[Any, Any, None]:
        follower = SocketFollower(profile)
        self.followers.append(follower)
        if way == "poll":
            how = "everything"
        asked = Asked(self.head, since=0 if how == "everything" else None, hydrate=how == "hydrate")
        return self._attach(follower, way, asked)

    async def _attach(self, follower: SocketFollower, way: str, asked: Asked) -> None:
        assert self.server is not None
        client = follower.client
        query = {"conv_id": CONV, "profile": follower.profile}
        if asked.since is not None and not asked.by_stream:
            query["since"] = str(asked.since)
        if asked.epoch:
            assert client.epoch is not None
            query["epoch"] = client.epoch
        if asked.hydrate:
            query["hydrate"] = "1"
        if way == "poll":
            follower.polls()
            follower.whole_state = follower.whole_state or client.last == 0
            follower.peer = PollPeer(client, follower.profile, POLL_LIMITS[self.count % len(POLL_LIMITS)])
            follower.peer.on_first_page = lambda page: client.turn("poll of everything", page)
        elif way == "sse":
            follower.asks(asked)
            follower.stream = follower.stream if asked.by_stream else asked
            follower.peer = EventStreamPeer(client, follower.last_event_id if asked.by_stream else None)
        elif way == "lines":
            follower.asks(asked)
            follower.peer = LinesPeer(client)
        else:
            follower.asks(asked)
            follower.peer = WebSocketPeer(client, way)
        self.seen[f"connected {way}"] += 1
        await follower.peer.connect(self.server, query)

    @property
    def connected(self) -> list[SocketFollower]:
        return [one for one in self.followers if one.peer is not None]

    @property
    def away(self) -> list[SocketFollower]:
        return [one for one in self.followers if one.peer is None]

    @property
    def able_to_stall(self) -> list[SocketFollower]:
        return [one for one in self.connected if not isinstance(one.peer, PollPeer)]

    @property
    def stalled(self) -> list[SocketFollower]:
        return [one for one in self.connected if not one.reading]

    @property
    def talking(self) -> list[SocketFollower]:
        return [one for one in self.connected if isinstance(one.peer, WebSocketPeer)]

    @precondition(lambda self: self.connected)
    @rule(number=picked, politely=st.booleans(), kinds=meanwhile, pad=padding)
    def drop(self, number: int, politely: bool, kinds: list[str], pad: int) -> None:
        self.during(kinds, pad, self._drop(self.some(number, self.connected), politely))

    async def _drop(self, follower: SocketFollower, politely: bool) -> None:
        assert follower.peer is not None
        if politely:
            follower.peer.leave()
        else:
            follower.peer.drop()
        follower.gone()

    @precondition(lambda self: self.away)
    @rule(number=picked, data=st.data(), way=ways, kinds=meanwhile, pad=padding)
    def resume(self, number: int, data: Any, way: str, kinds: list[str], pad: int) -> None:
        """Come back, perhaps as another kind of client, perhaps with another profile, with or without its state."""
        follower = self.some(number, self.away)
        other = data.draw(st.sampled_from([follower.profile, follower.profile, *self.profiles]))
        if follower.profile in WITHOUT_STATE and other not in WITHOUT_STATE:
            follower.whole_state = False  # it has not followed the state and asks for what is new only
        follower.profile = other
        hydrate = data.draw(st.sampled_from([False, False, True]))
        self.during(kinds, pad, self._come_back(follower, way, hydrate))

    def _as_a_browser_does(self, follower: SocketFollower, first: Asked) -> Asked:
        """The first URL again, and the last id, if there was one."""
        if follower.last_event_id is not None:
            return Asked(self.head, since=int(follower.last_event_id), by_stream=True)
        if first.since is not None or first.hydrate:
            return Asked(self.head, since=first.since, hydrate=first.hydrate)
        return Asked(self.head, since=follower.client.last, by_stream=True)  # it was there: nothing may be lost

    def _come_back(self, follower: SocketFollower, way: str, hydrate: bool) -> Coroutine[Any, Any, None]:
        client = follower.client
        asked = Asked(self.head, since=client.last, hydrate=hydrate and way != "poll", epoch=client.epoch is not None)
        if client.epoch is None and client.at_hello:
            asked = Asked(self.head)  # its first connection ended before the hello: it has no position yet
            way = "sse" if way == "poll" else way
        elif way == "sse" and follower.stream is not None:
            asked = self._as_a_browser_does(follower, follower.stream)
        return self._attach(follower, way, asked)

    @precondition(lambda self: any(one.reading for one in self.able_to_stall))
    @rule(
        number=picked,
        kind=st.sampled_from(KINDS),
        pad=st.sampled_from([1, 200]),
        flood=st.sampled_from([False, True, True]),
    )
    def stall(self, number: int, kind: str, pad: int, flood: bool) -> None:
        """Stop reading; with `flood` more is published than the buffers hold."""
        follower = self.some(number, [one for one in self.able_to_stall if one.reading])
        assert follower.peer is not None
        follower.peer.stall()
        if flood:
            self.publish_much(pad, kind)

    @precondition(lambda self: self.stalled)
    @rule(number=picked, kinds=meanwhile, pad=padding)
    def sip(self, number: int, kinds: list[str], pad: int) -> None:
        """Take a few bytes and stop again."""
        peer = self.some(number, self.stalled).peer
        assert peer is not None
        self.during(kinds, pad, self._call(peer.sip))

    @precondition(lambda self: self.stalled)
    @rule(number=picked, kinds=meanwhile, pad=padding)
    def read_on(self, number: int, kinds: list[str], pad: int) -> None:
        peer = self.some(number, self.stalled).peer
        assert peer is not None
        self.during(kinds, pad, self._call(peer.read))

    async def _call(self, action: Any) -> None:
        action()

    @precondition(lambda self: self.talking)
    @rule(number=picked, data=st.data(), replay=st.booleans(), kinds=meanwhile, pad=padding)
    def change_view(self, number: int, data: Any, replay: bool, kinds: list[str], pad: int) -> None:
        """In place, also of a client that does not read."""
        follower = self.some(number, self.talking)
        profile = data.draw(st.sampled_from(self.profiles))
        self.during(kinds, pad, self._call(lambda: self._change_view(follower, profile, replay)))

    def _change_view(self, follower: SocketFollower, profile: str, replay: bool) -> None:
        assert isinstance(follower.peer, WebSocketPeer)
        message: dict[str, Any] = {"type": "ws.profile", "profile": profile}
        if replay:
            message["since"] = "0"
        follower.changes.append((profile, replay))
        follower.peer.say(message)
        self.seen["view changed"] += 1

    @rule(what=st.sampled_from(["tick", "ping", "sweep", "cut", "restart"]), seconds=st.sampled_from(CLOCK_STEPS_S))
    def time_passes(self, what: str, seconds: float) -> None:
        self.clock.step_wall(seconds)
        self.run(
            {
                "tick": self._tick,
                "ping": self._ping,
                "sweep": self._sweep,
                "cut": self._cut_stalled,
                "restart": self._restart,
            }[what]()
        )

    async def _tick(self) -> None:
        assert self.server is not None
        self.clock.advance(0.3)
        await parts_of(self.server.broker).housekeeping.tick()

    async def _ping(self) -> None:
        """Who reads knows by the pong that it has everything, also what it was not shown."""
        await asyncio.gather(*(self._ping_one(one) for one in self.talking))

    async def _ping_one(self, follower: SocketFollower) -> None:
        assert isinstance(follower.peer, WebSocketPeer)
        client = follower.client
        before = len(client.controls("ws.pong"))
        follower.peer.say("ping")
        if not follower.reading:
            return
        again = time.monotonic() + PONG_S
        while len(client.controls("ws.pong")) == before:
            await asyncio.sleep(0.001)
            if time.monotonic() > again:  # a connection whose buffer is full at this moment gets no pong
                again = time.monotonic() + 10 * PONG_S
                self.seen["pinged again"] += 1
                follower.peer.say("ping")
        assert client.last == self.head

    async def _sweep(self) -> None:
        """After a while: who reads is told its position, what nobody uses is evicted, and nothing else is (I11)."""
        assert self.server is not None
        broker = self.server.broker
        if not self.connected:
            await until(lambda: not len(parts_of(broker).registry) and not self._held())
        self.clock.advance(10_000)
        await parts_of(broker).housekeeping.sweep()
        if self.able_to_stall:
            assert parts_of(broker).conversations.get(CONV) is not None
        elif not self.connected:  # who polls is not there between two requests
            deadline = time.monotonic() + STEP_S
            while parts_of(broker).conversations.get(CONV) is not None:  # the library may be reading it
                assert time.monotonic() < deadline, "nobody uses it, and it is not evicted"
                await asyncio.sleep(0.002)
                self.clock.advance(10_000)
                await parts_of(broker).housekeeping.sweep()
            self.seen["evicted"] += 1
        told = [one.client for one in self.able_to_stall if one.reading]
        await until(lambda: all(client.last == self.head for client in told))

    def _held(self) -> bool:
        assert self.server is not None
        conversation = parts_of(self.server.broker).conversations.get(CONV)
        return conversation is not None and conversation.in_use

    async def _cut_stalled(self) -> None:
        """The write timeout: sockets that take nothing are dropped."""
        assert self.server is not None
        server = self.server
        await until(lambda: server.pool.stats().paused <= len(self.stalled))  # who reads may have a full buffer, too
        before = len(parts_of(server.broker).registry)
        cut = server.pool.sweep(time.monotonic() + server.pool.write_timeout_s + 60)
        await until(lambda: len(parts_of(server.broker).registry) <= before - cut)
        there = {subscription.connection_id for subscription in parts_of(server.broker).registry.all()}
        gone = [one for one in self.stalled if one.asked is None and one.connection_id not in there]
        left = [one.peer for one in self.connected if one not in gone]
        # uvicorn's own classes close such a socket only once it is read; on the fast path it is cut.
        fast = sum(isinstance(peer, WebSocketPeer) and peer.way == "fast" for peer in left)
        await until(lambda: server.connections("fast") <= fast)
        for follower in gone:
            self.seen["cut for not reading"] += 1
            await self._drop(follower, politely=False)

    async def _restart(self) -> None:
        """Everybody comes back at once, as a crowd does."""
        assert self.server is not None
        if self.store == "memory":
            return
        there = self.connected
        reading = [one.peer for one in self.talking if one.reading]
        self._note_parked()
        await self.server.stop([one.peer for one in there if one.peer is not None])
        assert all(peer.closed == 1012 for peer in reading if peer is not None)
        for follower in there:
            follower.gone()
            follower.absorb(self.published, self.trimmed)
        self.seen["restarted"] += 1
        await self._start()
        await asyncio.gather(*(self._come_back(one, "sse" if one.stream else "fast", False) for one in there))

    # -- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def everyone_who_reads_has_everything(self) -> None:
        if self.server is None:
            return
        self.run(self._settle())
        with self.explained():
            for follower in self.followers:
                follower.check(self.published, reading=follower.reading)
        self.seen["steps"] += 1

    async def _settle(self) -> None:
        assert self.server is not None
        self.trimmed = (await self.server.broker.head(CONV)).trimmed_seq
        deadline = time.monotonic() + STEP_S
        while not self._settled() and time.monotonic() < deadline:
            await asyncio.sleep(0.001)

    def _settled(self) -> bool:
        settled = True
        for follower in self.followers:
            follower.absorb(self.published, self.trimmed)
            if isinstance(follower.peer, PollPeer):
                follower.peer.check()
            if follower.peer is not None and follower.peer.closed is not None:
                self.on_closed(follower, follower.peer.closed)
                follower.absorb(self.published, self.trimmed)
            if follower.reading and not follower.complete(self.published):
                settled = False
        return settled

    def on_closed(self, follower: SocketFollower, code: int) -> None:
        raise AssertionError(f"the server closed a connection that did nothing wrong, with {code}")

    # -- the end ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if self.server is not None:
                self.run(self._finish())
        finally:
            try:
                if self.server is not None:
                    self.run(self.server.stop([one.peer for one in self.connected if one.peer is not None]))
            finally:
                for patch in self.patches:
                    patch.stop()
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
                self.loop.close()
                shutil.rmtree(self.folder)

    async def _finish(self) -> None:
        """Everybody reads, everything ends: states equal the timeline, and the timeline equals its fold."""
        assert self.server is not None
        broker = self.server.broker
        self._note_parked()
        for follower in self.stalled:
            assert follower.peer is not None
            follower.peer.read()
        for number in range(2):
            self.count = number
            await self._publish(["final"], 0)
        await self._settle()
        self.clock.advance(10)
        for _ in range(3):
            await parts_of(broker).housekeeping.tick()
        await self._ping()  # whatever was sent too much has come before the pong
        await self._settle()
        state = {entity.id: entity.to_wire() for entity in await parts_of(broker).timeline.entities(CONV)}
        finished = {id for id in state if not id.startswith("t")}
        for follower in self.followers:
            follower.check(self.published, reading=follower.reading)
            if follower.reading and follower.whole_state and follower.profile not in WITHOUT_STATE:
                await until(lambda one: all(one.client.entities.get(id) == state[id] for id in finished), follower)
        report = await verify_conversation(
            parts_of(broker).log, parts_of(broker).stores.timeline, parts_of(broker).catalog.handlers, CONV
        )
        assert not report.differences
        self.seen["examples"] += 1
        self.seen["deliveries"] += sum(len(one.client.events) for one in self.followers)
        self.seen["resets"] += sum(one.resets for one in self.followers)
        self.seen["dropped events"] += sum(one.dropped for one in self.followers)

    def _note_parked(self) -> None:
        assert self.server is not None
        self.seen["parked"] += parts_of(self.server.broker).subscriptions.parked_total


class Policies:
    """A plugin with profiles for every policy."""

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [
            Profile("lossy", channels=("*",), slow="drop_oldest"),
            Profile("strict", channels=("sem", "timeline"), slow="disconnect"),
        ]


class RetentionMachine(SocketMachine):
    """The log keeps little: what is no longer there is said, not hidden."""

    profiles = (*PROFILES, "lossy")
    plugins = (Policies(),)
    extra = {"retention_count": 12, "replay_page_bytes": 1024}

    @rule()
    def retain(self) -> None:
        assert self.server is not None
        self.run(parts_of(self.server.broker).housekeeping.trim(CONV))


class PolicyMachine(SocketMachine):
    """Profiles that skip, and profiles that disconnect, between those that catch up."""

    profiles = ("lossy", "lossy", "strict", "default")
    plugins = (Policies(),)
    extra = {"replay_page_bytes": 1024}

    def on_closed(self, follower: SocketFollower, code: int) -> None:
        """A strict one may be closed for being slow; nobody else."""
        assert follower.profile == "strict" or any(profile == "strict" for profile, _ in follower.changes)
        assert code == 1008 or not isinstance(follower.peer, WebSocketPeer)
        self.seen["disconnected"] += 1
        assert follower.peer is not None
        follower.peer.drop()  # it may have stopped reading before the end of the stream
        follower.gone()


def new_loop(uvloop: bool) -> asyncio.AbstractEventLoop:
    if uvloop:
        try:
            import uvloop as faster
        except ImportError:  # not made for this platform
            return asyncio.new_event_loop()
        return faster.new_event_loop()
    return asyncio.new_event_loop()


EXAMPLES = os.environ.get("BROKER_PROPERTY_EXAMPLES")
# No shrinking: every failing step waits for its deadline, and timing is not the same twice.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


VARIANTS = [
    pytest.param(SocketMachine, "memory", False, id="all-memory-asyncio"),
    pytest.param(SocketMachine, "sqlite", True, id="all-sqlite-uvloop"),
    pytest.param(RetentionMachine, "sqlite", False, id="retention-sqlite-asyncio"),
    pytest.param(RetentionMachine, "memory", True, id="retention-memory-uvloop"),
    pytest.param(PolicyMachine, "memory", False, id="policies-memory-asyncio"),
    pytest.param(PolicyMachine, "sqlite", True, id="policies-sqlite-uvloop"),
]
if redis_executable() is not None or os.environ.get("CI"):
    VARIANTS.append(pytest.param(SocketMachine, "redis", False, id="all-redis-asyncio"))


@pytest.mark.timeout(0 if EXAMPLES else 300)
@pytest.mark.parametrize(("machine", "store", "uvloop"), VARIANTS)
def test_every_reader_has_what_it_may_see(machine: type[SocketMachine], store: str, uvloop: bool) -> None:
    seen: Counter[str] = Counter()
    variant = type(machine.__name__, (machine,), {"store": store, "uvloop": uvloop, "seen": seen})
    options = settings(
        max_examples=int(EXAMPLES or 5),
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        phases=PHASES,
    )
    run_state_machine_as_test(variant, settings=options)
    print(", ".join(f"{what} {number}" for what, number in sorted(seen.items())))
