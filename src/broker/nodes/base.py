"""The seam between a node and the others: a registry, questions with answers, and the switches that all of them obey.

A node is one process that serves clients; each worker of `--workers N` is one. `SingleNode` is the seam's shape for a
process that is alone, `RedisNodes` for many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

NodeState = Literal["starting", "ready", "draining"]

Question = Mapping[str, Any]
Answer = dict[str, Any]
"""Questions and answers are JSON objects: they travel between processes, which may be of different versions while a
rolling restart is under way. What a node does not know it answers with `{"error": …}`."""


@dataclass(frozen=True, slots=True)
class NodeNumbers:
    """What a node counts at each heartbeat.

    connections: open subscriptions. conversations: open in memory. runs: those this node works on or holds while they
    await approval. position: newest seq that the node has dispatched, in any conversation. waiting_ms: age of the oldest
    envelope that reached the node and is not dispatched yet, 0 where there is none.
    """

    connections: int = 0
    conversations: int = 0
    runs: int = 0
    position: int = 0
    waiting_ms: int = 0


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node as it showed itself last. started_at_ms: Unix ms, by the node's own clock. silent_ms: since its heartbeat.

    silent: it missed so many heartbeats that it counts as stopped, dead or cut off, and is not asked.
    """

    node: str
    host: str
    pid: int
    version: str
    started_at_ms: int
    state: NodeState
    numbers: NodeNumbers = field(default_factory=NodeNumbers)
    silent_ms: int = 0
    silent: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes: all but how long it has been silent, which whoever reads it knows."""
        value = asdict(self)
        del value["silent_ms"], value["silent"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, silent_ms: int, silent: bool) -> NodeRecord:
        """Return the record of a JSON object. Raises KeyError, TypeError where it is none."""
        known = {name: value[name] for name in ("node", "host", "pid", "version", "started_at_ms", "state")}
        numbers = {name: int(value["numbers"].get(name, 0)) for name in NodeNumbers.__dataclass_fields__}
        return cls(**known, numbers=NodeNumbers(**numbers), silent_ms=silent_ms, silent=silent)


@dataclass(frozen=True, slots=True)
class Switch:
    """A debug channel as an operator switched it. since_ms: Unix ms. by: subject of the operator."""

    on: bool
    since_ms: int
    by: str


class NodeSelf(Protocol):
    """What a registry wants of the process that it shows."""

    def record(self) -> NodeRecord:
        """Return this node as it is now. Called once per heartbeat: must not cost more than counting."""
        ...

    async def answer(self, question: Question) -> Answer:
        """Answer what another node's operator asks. Never raises: a failure is an answer with `error`."""
        ...

    def apply(self, switches: Mapping[str, Switch]) -> None:
        """Obey these switches, and for every channel that is not among them the setting."""
        ...


class Nodes(Protocol):
    """The nodes that share a store, as one of them sees them. All methods but `close` may raise StoreError."""

    node: str

    async def open(self, myself: NodeSelf) -> None:
        """Show this node to the others, obey the switches from here on, answer questions. Safe to repeat."""
        ...

    async def changed(self) -> None:
        """Show this node's new state without waiting for the next heartbeat. A store that is away is no error."""
        ...

    async def close(self) -> None:
        """Take this node off the list. A store that is away is no error: the entry expires."""
        ...

    async def list(self) -> list[NodeRecord]:
        """Return the nodes that live, and those that fell silent lately, the oldest first."""
        ...

    async def ask(self, nodes: Sequence[str], question: Question) -> dict[str, Answer]:
        """Ask other nodes; return the answers by node of those that gave one within `patience_s`."""
        ...

    @property
    def patience_s(self) -> float:
        """How long `ask` waits for the slowest node, in seconds."""
        ...

    async def switches(self) -> dict[str, Switch]:
        """Return what operators switched, by channel. Also after a restart of every process."""
        ...

    async def switch(self, channel: str, switch: Switch | None) -> None:
        """Keep a switch, None to withdraw it, and have all nodes obey. This one does when the call returns."""
        ...
