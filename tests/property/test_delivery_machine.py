"""Publishers, clients, drops, resumes, stalls, evictions and restarts in any order, against a model of who saw what.

After every step each client that reads has exactly what its profile let it see since where it started: nothing lost,
nothing twice, nothing out of order, no false gap (I1, I3, I4, I6, I11, I12), hidden and masked what its profile hides and
masks, whatever profiles it had before (I14), and its state equals the timeline's as that profile shows it (I5).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.core import Core, until
from tests.support.redis_server import lasting_server, redis_executable
from tests.support.wire import Client, Peer

from broker.cli.verify import verify_conversation
from broker.clock import ManualClock
from broker.delivery.subscription import Subscription
from broker.envelope import Draft, Envelope
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.testing import parts_of

CONV = "c1"
SECRET, MASK = "secret", "***"


def secret(n: int) -> str:
    return SECRET if n % 3 == 0 else ""


DRAFTS = {
    "note": lambda n: Draft("note.said", {"text": f"note {n}{secret(n)}"}),
    "delta": lambda n: Draft("llm.delta", {"delta": f"d{n}{secret(n)} ", "runId": "r"}, id=f"m{n % 2}"),
    "thinking": lambda n: Draft("llm.thinking.delta", {"delta": f"t{n} ", "runId": "r"}, id=f"t{n % 2}"),
    "user": lambda n: Draft("user.message", {"text": f"question {n}{secret(n)}"}, id=f"u{n}"),
    "trace": lambda n: Draft("trace.step", {"n": n}, channel="debug.trace"),
}
VISIBLE = {
    "default": lambda event: event["channel"] == "sem",
    "text": lambda event: event["type"] in ("llm.start", "llm.delta", "llm.final"),
    "debug": lambda event: True,
    "timeline": lambda event: False,
    "hiding": lambda event: event["channel"] == "sem" and SECRET not in str(event["data"]),
    "masking": lambda event: event["channel"] == "sem",
}
PROFILES = sorted(VISIBLE)
LOOKS = {"default": "plain", "debug": "plain", "timeline": "plain", "hiding": "hiding", "masking": "masking"}
"""How a profile shows entities; one that is not here shows none."""


class Looks:
    """The profiles that hide and mask."""

    name = "looks"

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile(name, channels=("sem", "timeline", "control")) for name in ("hiding", "masking")]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return (lambda envelope: SECRET.encode() not in envelope.data_json) if profile.name == "hiding" else None

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        def mask(envelope: Envelope) -> Envelope:
            return envelope.with_data(orjson.loads(envelope.data_json.replace(SECRET.encode(), MASK.encode())))

        return mask if profile.name == "masking" else None


@dataclass
class Published:
    seq: int
    type: str
    channel: str
    id: str | None
    data: dict[str, Any]

    def visible(self, profile: str) -> bool:
        return bool(VISIBLE[profile]({"channel": self.channel, "type": self.type, "data": self.data}))

    def seen(self, profile: str) -> Published:
        """Return it as `profile`, which shows it, does."""
        if profile != "masking":
            return self
        masked = {
            key: value.replace(SECRET, MASK) if isinstance(value, str) else value for key, value in self.data.items()
        }
        return replace(self, data=masked)


@dataclass
class Follower:
    """A client in the model: what it should have by now."""

    client: Client
    profile: str
    expected: list[Published] = field(default_factory=list)
    position: int = 0
    peer: Peer | None = None
    subscription: Subscription | None = None
    whole_state: bool = False
    look: str | None = None
    viewed_after: int = 0
    history: list[tuple[str, int, int]] = field(default_factory=list)

    def was_shown(self, one: Published) -> bool:
        return any(after < one.seq <= through and one.visible(profile) for profile, after, through in self.history)

    @property
    def reading(self) -> bool:
        return self.peer is not None and not self.peer.stalled


class DeliveryMachine(RuleBasedStateMachine):
    store = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.mkdtemp()
        self.clock = ManualClock()
        self.published: list[Published] = []
        self.followers: list[Follower] = []
        self.count = 0
        self.started: Core | None = None

    @property
    def core(self) -> Core:
        assert self.started is not None
        return self.started

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def start(self) -> None:
        # Timers never fire by themselves: the machine ticks.
        self.started = Core(
            self.database(),
            plugins=[Looks()],
            clock=self.clock,
            upsert_interval_s=3600.0,
            timeline_flush_interval_s=3600.0,
            sweep_interval_s=3600.0,
            replay_page_events=3,
            through_events=4,
        )
        self.run(self.core.broker.start())

    def database(self) -> str:
        return ":memory:" if self.store == "memory" else str(Path(self.folder) / "broker.db")

    # -- what happens ----------------------------------------------------------------------------------------------

    @rule(kinds=st.lists(st.sampled_from(sorted(DRAFTS)), min_size=1, max_size=6), together=st.booleans())
    def publish(self, kinds: list[str], together: bool) -> None:
        drafts = []
        for kind in kinds:
            self.count += 1
            drafts.append(DRAFTS[kind](self.count))
        if together:
            seqs = self.run(self.core.broker.publish(CONV, drafts))
        else:

            async def at_once() -> list[int]:
                one_by_one = [self.core.broker.publish(CONV, [draft]) for draft in drafts]
                return [seqs[0] for seqs in await asyncio.gather(*one_by_one)]

            seqs = self.run(at_once())
        new = [
            Published(seq, draft.type, draft.channel or "sem", draft.id, dict(draft.data))
            for seq, draft in zip(seqs, drafts, strict=True)
        ]
        assert all(seq > (self.published[-1].seq if self.published else 0) for seq in seqs)
        self.published.extend(sorted(new, key=lambda one: one.seq))

    @rule(seconds=st.sampled_from([-3600.0, -0.001, 0.0, 0.001, 60.0]))
    def step_clock(self, seconds: float) -> None:
        self.clock.step_wall(seconds)

    @rule(profile=st.sampled_from(PROFILES), how=st.sampled_from(["live", "everything", "hydrate"]))
    def connect(self, profile: str, how: str) -> None:
        if len(self.followers) >= 6:
            return
        follower = Follower(Client(since=0 if how == "everything" else None), profile)
        follower.position = 0 if how == "everything" else (self.published[-1].seq if self.published else 0)
        follower.whole_state = how != "live"
        follower.look = LOOKS.get(profile)
        self.followers.append(follower)
        asked: dict[str, dict[str, Any]] = {"live": {}, "everything": {"since": 0}, "hydrate": {"hydrate": True}}
        self._attach(follower, asked[how])

    def _attach(self, follower: Follower, asked: dict[str, Any]) -> None:
        follower.history.clear()  # the server remembers what a connection was shown, not what a client was
        follower.viewed_after = asked.get("since", self.published[-1].seq if self.published else 0)
        follower.peer, follower.subscription = self.run(
            self.core.connect(CONV, client=follower.client, profile=follower.profile, buffer_bytes=200, **asked)
        )

    @precondition(lambda self: any(follower.peer for follower in self.followers))
    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        follower = data.draw(st.sampled_from([one for one in self.followers if one.peer]))
        self.run(self.core.disconnect(follower.peer))
        # What waited in the peer's buffer is gone with the connection; the client resumes from what it took.
        follower.peer = follower.subscription = None

    @precondition(lambda self: any(not follower.peer for follower in self.followers))
    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        follower = data.draw(st.sampled_from([one for one in self.followers if not one.peer]))
        hellos = len(follower.client.controls("ws.hello"))
        self._attach(follower, {"since": follower.client.last, "epoch": follower.client.epoch})
        assert follower.client.controls("ws.hello")[hellos]["recovered"] is True

    @precondition(lambda self: any(follower.reading for follower in self.followers))
    @rule(data=st.data())
    def stall(self, data: Any) -> None:
        data.draw(st.sampled_from([one for one in self.followers if one.reading])).peer.stall()

    @precondition(lambda self: any(one.peer and one.peer.stalled for one in self.followers))
    @rule(data=st.data())
    def read_on(self, data: Any) -> None:
        follower = data.draw(st.sampled_from([one for one in self.followers if one.peer and one.peer.stalled]))
        self.run(self._call(follower.peer.read))

    async def _call(self, action: Any) -> None:
        action()

    @precondition(lambda self: any(follower.reading for follower in self.followers))
    @rule(data=st.data(), profile=st.sampled_from(PROFILES), replay=st.booleans())
    def change_view(self, data: Any, profile: str, replay: bool) -> None:
        follower = data.draw(st.sampled_from([one for one in self.followers if one.reading]))
        self.run(self._settle())
        since = 0 if replay else None
        old = follower.profile
        now = self.published[-1].seq if self.published else 0
        self._expect(follower)
        self.run(
            self.core.broker.doors.following.change_view(
                follower.subscription, profile=profile, channels=None, since=since
            )
        )
        follower.history.append((old, follower.viewed_after, now))
        follower.viewed_after = 0 if replay else now
        if replay:
            follower.expected.extend(
                one.seen(profile)
                for one in self.published
                if one.seq <= now and one.visible(profile) and not follower.was_shown(one)
            )
        self._change_look(follower, old, profile)
        follower.profile = profile
        follower.position = now

    def _change_look(self, follower: Follower, old: str, profile: str) -> None:
        look = LOOKS.get(profile)
        anew = look is not None and follower.look not in (None, look)
        assert follower.client.controls("ws.profile")[-1].get("stateAnew", False) is anew
        if look is None:
            follower.whole_state = False
            return
        if anew or old not in LOOKS:
            follower.whole_state = True
        follower.look = look

    @rule()
    def tick(self) -> None:
        self.clock.advance(0.3)
        self.run(self.core.parts.housekeeping.tick())

    @rule()
    def ping(self) -> None:
        for follower in self.followers:
            if follower.reading:
                self.run(self._call(lambda one=follower: self.core.broker.doors.following.ping(one.subscription, None)))

    @precondition(lambda self: not any(follower.peer for follower in self.followers))
    @rule()
    def evict(self) -> None:
        self.clock.advance(10_000)
        self.run(self._evicted())

    async def _evicted(self) -> None:
        deadline = self.loop.time() + 5
        conversations = self.core.parts.conversations
        await conversations.sweep()
        while conversations.get(CONV) is not None:  # the library may be reading it after a start
            assert self.loop.time() < deadline, "an idle conversation was not evicted"
            await asyncio.sleep(0.002)
            self.clock.advance(10_000)
            await conversations.sweep()

    @precondition(lambda self: self.store != "memory")
    @rule()
    def restart(self) -> None:
        self.run(self.core.broker.stop(drain_s=0))
        for follower in self.followers:
            follower.peer = follower.subscription = None
        self.start()

    # -- what must hold --------------------------------------------------------------------------------------------

    def _expect(self, follower: Follower) -> None:
        """Move the model's idea of a follower up to the newest envelope."""
        follower.expected.extend(
            one.seen(follower.profile)
            for one in self.published
            if one.seq > follower.position and one.visible(follower.profile)
        )
        if self.published:
            follower.position = max(follower.position, self.published[-1].seq)

    async def _settle(self) -> None:
        await until(
            lambda: all(
                one.subscription and one.subscription.status == "live" for one in self.followers if one.reading
            ),
            timeout_s=5,
        )

    @invariant()
    def everyone_who_reads_has_everything(self) -> None:
        if self.started is None:
            return
        self.run(self._settle())
        for follower in self.followers:
            client = follower.client
            assert not client.gaps
            assert client.duplicates == 0
            if follower.reading:
                self._expect(follower)
                self._same(follower)

    def _same(self, follower: Follower) -> None:
        client, expected = follower.client, follower.expected
        plain = [(one.seq, one.data) for one in expected if not one.type.endswith(".delta")]
        assert [(int(e["seq"]), e["data"]) for e in client.events if not e["type"].endswith(".delta")] == plain
        if follower.look in ("hiding", "masking"):
            assert SECRET not in str(client.entities)
        for kind, key in {(one.type, one.id) for one in expected if one.type.endswith(".delta")}:
            text = "".join(one.data["delta"] for one in expected if (one.type, one.id) == (kind, key))
            got = "".join(e["data"]["delta"] for e in client.events if (e["type"], e["id"]) == (kind, key))
            assert got == text, follower.profile

    def teardown(self) -> None:
        try:
            if self.started is not None:
                self.run(self._finish())
                self.run(self.core.broker.stop(drain_s=0))
        finally:
            self.loop.close()
            shutil.rmtree(self.folder)

    async def _finish(self) -> None:
        """Everything ends: final states are shown at once, equal the timeline, and the timeline equals its fold."""
        for follower in self.followers:
            if follower.peer and follower.peer.stalled:
                follower.peer.read()
        await self._settle()
        ids = {str(one.id) for one in self.published if one.type == "llm.delta"}
        for id in sorted(ids):
            await self.core.broker.publisher(CONV).publish("llm.final", {"runId": "r", "text": f"done {id}"}, id=id)
        self.clock.advance(10)
        for _ in range(3):
            await self.core.parts.housekeeping.tick()
        broker = self.core.broker
        state = {entity.id: entity.to_wire() for entity in await parts_of(broker).timeline.entities(CONV)}
        for follower in self.followers:
            if follower.peer and follower.profile in LOOKS and follower.whole_state:
                finished = {id: entity for id, entity in state.items() if not id.startswith("t")}
                if follower.look == "hiding":
                    hidden = {id for id, entity in finished.items() if SECRET in str(entity)}
                    assert not hidden & follower.client.entities.keys()
                    finished = {id: entity for id, entity in finished.items() if id not in hidden}
                elif follower.look == "masking":
                    finished = orjson.loads(orjson.dumps(finished).replace(SECRET.encode(), MASK.encode()))
                assert {id: follower.client.entities.get(id) for id in finished} == finished
        report = await verify_conversation(
            parts_of(broker).log, parts_of(broker).stores.timeline, parts_of(broker).catalog.handlers, CONV
        )
        assert not report.differences


class SqliteDeliveryMachine(DeliveryMachine):
    store = "sqlite"


class RedisDeliveryMachine(DeliveryMachine):
    store = "redis"

    def __init__(self) -> None:
        super().__init__()
        with lasting_server().client() as client:
            client.flushall()

    def database(self) -> str:
        return lasting_server().url


COMMON = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestMemory = pytest.mark.timeout(300)(DeliveryMachine.TestCase)
TestMemory.settings = COMMON
TestSqlite = pytest.mark.timeout(300)(SqliteDeliveryMachine.TestCase)
TestSqlite.settings = settings(COMMON, max_examples=25)
if redis_executable() is not None or os.environ.get("CI"):
    TestRedis = pytest.mark.timeout(300)(RedisDeliveryMachine.TestCase)
    TestRedis.settings = settings(COMMON, max_examples=12)
