"""What clients should have, told from what they asked for and what they were told: the model of the delivery machines.

The model knows the order of what was published, what each profile shows, and the rules of docs/reference/protocol.md. It
follows a client's own control frames (`ws.hello`, `ws.profile`, `ws.reset`, `ws.dropped`), so that it needs to know
neither when the server did something nor how far a connection was at that moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.support.wire import Client

from broker.envelope import Draft

CONV = "c1"
DRAFTS: dict[str, Callable[[int, str], Draft]] = {
    "note": lambda n, pad: Draft("note.said", {"text": f"note {n}{pad}"}),
    "delta": lambda n, pad: Draft("llm.delta", {"delta": f"d{n}{pad} ", "runId": "r"}, id=f"m{n % 2}"),
    "final": lambda n, pad: Draft("llm.final", {"text": f"final {n}{pad}", "runId": "r"}, id=f"m{n % 2}"),
    "thinking": lambda n, pad: Draft("llm.thinking.delta", {"delta": f"t{n}{pad} ", "runId": "r"}, id=f"t{n % 2}"),
    "user": lambda n, pad: Draft("user.message", {"text": f"question {n}{pad}"}, id=f"u{n}"),
    "trace": lambda n, pad: Draft("trace.step", {"n": n, "pad": pad}, channel="debug.trace"),
}
KINDS = sorted(DRAFTS)
MERGED = ("llm.delta", "llm.thinking.delta")
_TEXT_TYPES = ("llm.start", "llm.delta", "llm.final")
VISIBLE: dict[str, Callable[[str, str], bool]] = {
    "default": lambda channel, type: channel == "sem",
    "text": lambda channel, type: type in _TEXT_TYPES,
    "debug": lambda channel, type: True,
    "timeline": lambda channel, type: False,
    # registered by the plugin of the policy machine
    "lossy": lambda channel, type: True,
    "strict": lambda channel, type: channel == "sem",
}
"""What a profile shows, by (channel, type) of an event."""
WITHOUT_STATE = ("text",)
PROFILES = ("debug", "default", "text", "timeline")


@dataclass(frozen=True)
class Published:
    """One event as the log has it."""

    seq: int
    type: str
    channel: str
    id: str | None
    text: str

    @classmethod
    def of(cls, seq: int, draft: Draft) -> Published:
        return cls(seq, draft.type, draft.channel or "sem", draft.id, str(draft.data.get("delta", "")))

    def visible(self, profile: str) -> bool:
        return VISIBLE[profile](self.channel, self.type)


class Turn(NamedTuple):
    """Something that changed a client's course. last: its position before."""

    kind: str
    last: int
    data: dict[str, Any]


class WatchedClient(Client):
    """A client that keeps the rule and remembers where its course changed."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: deque[Turn] = deque()
        self.at_hello = False

    def ask(self, since: int | None) -> None:
        """Take note that it connects with `since`; without, its position is what `ws.hello` says."""
        self.at_hello = since is None

    def turn(self, kind: str, data: dict[str, Any] | None = None) -> None:
        self.turns.append(Turn(kind, self.last, data or {}))

    def _take_control(self, kind: str, data: dict[str, Any]) -> None:
        if kind in ("ws.hello", "ws.profile", "ws.reset", "ws.dropped", "ws.caught_up"):
            self.turn(kind, data)
        super()._take_control(kind, data)
        if kind == "ws.hello" and self.at_hello:
            self.last = int(data["from"])


class Asked(NamedTuple):
    """What a client connects with.

    head: the newest seq at that moment. since, hydrate: as on the wire. epoch: it names the life of the log, too.
    by_stream: it is an event stream's own resumption, by the last id if there was one: `since` is what it must mean.
    """

    head: int
    since: int | None = None
    hydrate: bool = False
    epoch: bool = False
    by_stream: bool = False


class Shown(NamedTuple):
    """after < seq <= through: a stretch that a connection was shown through `profile`."""

    profile: str
    after: int
    through: int


class Follower:
    """A client in the model.

    has: what it got before its present view began. after: the present view shows what comes after this position.
    asked: what it connects with; gone once `ws.hello` has answered. changes: views that it
    asked for and that `ws.profile` has not confirmed yet, as (profile, replay). whole_state: its entities are complete.
    """

    def __init__(self, profile: str) -> None:
        self.client = WatchedClient()
        self.profile = profile
        self.has: list[Published] = []
        self.after = 0
        self.viewing = False
        self.whole_state = False
        self.asked: Asked | None = None
        self.changes: deque[tuple[str, bool]] = deque()
        self.caught_up = 0
        self.must_reset = False
        self.resets = 0
        self.dropped = 0
        self._earlier: list[Shown] = []

    def describe(self, published: Sequence[Published]) -> str:
        """Return in one line where it stands, for the report of a failure."""
        due = [one.seq for one in (*self.has, *self._present(published)) if one.type not in MERGED]
        taken = [int(event["seq"]) for event in self.client.events if event["type"] not in MERGED]
        return (
            f"profile {self.profile}, last {self.client.last}, after {self.after}, viewing {self.viewing}, "
            f"asked {self.asked}, changes {list(self.changes)}, caught_up {self.caught_up}, "
            f"missing {[seq for seq in due if seq not in taken]}, too much {[seq for seq in taken if seq not in due]}, "
            f"questions missing {self._questions_missing(published)}"
        )

    # -- what the machine tells ------------------------------------------------------------------------------------

    def asks(self, asked: Asked) -> None:
        """It connects."""
        self.client.ask(asked.since)
        self.asked = asked

    def polls(self) -> None:
        """It asks for what comes after its position, and there is no hello."""
        self.client.turn("poll")

    def leaves(self) -> None:
        """Its connection is gone; it resumes from what it took."""
        self.client.turn("gone")

    # -- what it should have ---------------------------------------------------------------------------------------

    def _shows(self, one: Published) -> bool:
        return (
            one.seq > self.after
            and one.visible(self.profile)
            and not any(
                earlier.after < one.seq <= earlier.through and one.visible(earlier.profile) for earlier in self._earlier
            )
        )

    def _present(self, published: Iterable[Published], through: int | None = None) -> list[Published]:
        if not self.viewing:
            return []
        return [one for one in published if (through is None or one.seq <= through) and self._shows(one)]

    def complete(self, published: Sequence[Published]) -> bool:
        """Whether nothing is under way to it any more. Call `absorb` before."""
        if not self.viewing or self.changes or self.asked is not None or not self.caught_up:
            return False
        newest = next((one for one in reversed(published) if self._shows(one)), None)
        return (newest is None or self.client.last >= newest.seq) and not self._questions_missing(published)

    def _questions_missing(self, published: Iterable[Published]) -> list[str]:
        """Ids of users' messages, final from the start, that its entities lack or have in another version."""
        if not self.whole_state or self.profile in WITHOUT_STATE:
            return []
        entities = self.client.entities
        return [
            one.id
            for one in published
            if one.type == "user.message"
            and one.id is not None
            and (one.id not in entities or entities[one.id]["version"] != str(one.seq))
        ]

    def check(self, published: Sequence[Published], *, reading: bool) -> None:
        """Fail unless it has exactly what it should; one that does not read has the beginning of that."""
        client = self.client
        assert not client.gaps
        assert client.duplicates == 0
        due = [*self.has, *self._present(published, None if reading else client.last)]
        taken = [int(event["seq"]) for event in client.events if event["type"] not in MERGED]
        assert taken == [one.seq for one in due if one.type not in MERGED]
        for type, id in {(one.type, one.id) for one in due if one.type in MERGED}:
            text = "".join(one.text for one in due if (one.type, one.id) == (type, id))
            got = "".join(
                event["data"]["delta"] for event in client.events if (event["type"], event["id"]) == (type, id)
            )
            assert got == text
        assert {event["id"] for event in client.events if event["type"] in MERGED} <= {one.id for one in due}
        if reading:
            assert not self._questions_missing(published)
            assert not self.must_reset, "not recovered, and no reset says why"
            assert self.caught_up == 1, "ws.caught_up comes exactly once after each hello and each change of view"

    # -- what it was told ------------------------------------------------------------------------------------------

    def absorb(self, published: Sequence[Published], trimmed: int = 0) -> None:
        """Follow the client's course. published: everything, so call it when no publisher is at work.

        trimmed: how far retention has got: only what it removed may be missing.
        """
        while self.client.turns:
            turn = self.client.turns.popleft()
            match turn.kind:
                case "ws.hello":
                    self._on_hello(turn, trimmed)
                case "poll":
                    self._begin(turn.last)
                    self.caught_up = 1
                case "poll of everything":
                    self.after = int(turn.data["oldestSeq"])
                    assert self.after <= trimmed
                case "gone":
                    self.has += self._present(published, turn.last)
                    if not self.caught_up:
                        self.whole_state = False  # broken off before it was complete
                    self.viewing, self.asked = False, None
                    self.changes.clear()
                case "ws.profile":
                    self._on_profile(turn, published, trimmed)
                case "ws.reset":
                    self._on_reset(turn, published, trimmed)
                case "ws.dropped":
                    self._on_dropped(turn, published)
                case "ws.caught_up":
                    self.caught_up += 1

    def _begin(self, after: int) -> None:
        self.after, self.viewing, self.caught_up = after, True, 0
        self._earlier.clear()  # the server remembers what a connection was shown, not what a client was

    def _pass_over(self, last: int, begins: int, published: Sequence[Published]) -> None:
        """The same view goes on, but not where it was: what lies between was not shown."""
        self.has += self._present(published, last)
        self._earlier.append(Shown(self.profile, self.after, last))
        self.after = begins

    def _on_hello(self, turn: Turn, trimmed: int) -> None:
        assert self.asked is not None
        asked, self.asked = self.asked, None
        begins = int(turn.data["from"])
        if asked.since is None:
            assert begins >= asked.head
        elif turn.data["recovered"]:
            everything = asked.since == 0 and not asked.epoch and begins <= trimmed
            assert begins == asked.since or everything, "it says recovered, and starts elsewhere"
        self._begin(begins)  # where it is not recovered, a reset follows and says why
        self.must_reset = asked.since is not None and not turn.data["recovered"]
        self.whole_state = self.whole_state or asked.hydrate or asked.since == 0

    def _on_profile(self, turn: Turn, published: Sequence[Published], trimmed: int) -> None:
        profile, replay = self.changes.popleft()
        begins = int(turn.data["from"])
        assert turn.data["profile"] == profile
        self.has += self._present(published, turn.last)
        if replay:
            assert begins <= trimmed
        else:
            assert begins >= turn.last
            assert not [one for one in self._present(published, begins) if one.seq > turn.last]
        earlier = [*self._earlier, Shown(self.profile, self.after, turn.last)]
        if self.profile in WITHOUT_STATE and profile not in WITHOUT_STATE:
            self.whole_state = True  # a view that had no state before gets all of it
        elif profile in WITHOUT_STATE:
            self.whole_state = False
        self.profile = profile
        self._begin(begins)
        self._earlier = earlier

    def _on_reset(self, turn: Turn, published: Sequence[Published], trimmed: int) -> None:
        assert turn.data["reason"] == "expired"
        assert turn.last < trimmed, "reset, although nothing that it lacks was removed"
        begins = int(turn.data["from"])
        self._pass_over(turn.last, begins, published)
        if self.profile in WITHOUT_STATE:
            assert begins <= trimmed, "a view without state gets every event there still is"
        else:
            self.whole_state = True
        self.must_reset = False
        self.resets += 1

    def _on_dropped(self, turn: Turn, published: Sequence[Published]) -> None:
        through, count = int(turn.data["seq"]), turn.data["count"]
        skipped = [one for one in self._present(published, through) if one.seq > turn.last]
        assert count == len(skipped) > 0
        assert self.profile == "lossy"
        self._pass_over(turn.last, through, published)
        self.dropped += count
