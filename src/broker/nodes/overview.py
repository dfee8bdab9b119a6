"""The operators' view of all nodes, put together by the node that is asked: nodes, connections, runs, debug channels.

An answer never waits for a node longer than `Nodes.patience_s`, and a node that gave no answer is named in it with the
reason. With the store away the asked node still tells what it knows itself, and says that this is not everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.clock import Clock
from broker.errors import InvalidInput, NotFound, StoreError, quoted
from broker.nodes.base import Answer, NodeRecord, Nodes, Question, Switch
from broker.nodes.this_node import ThisNode, worst_first
from broker.runs.service import RunService
from broker.runs.state import STATUSES, Run
from broker.views.catalog import Catalog

CONNECTION_STATUSES = ("starting", "behind", "live", "parked")


@dataclass(slots=True)
class _Gathered:
    """nodes: those that were wanted. answers: by node. missing: nodes that gave none, and why. problem: with the list."""

    nodes: list[NodeRecord]
    answers: dict[str, Answer] = field(default_factory=dict)
    missing: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None

    def about(self) -> dict[str, Any]:
        """Return how complete the answer is, in the form that every answer has."""
        told: dict[str, Any] = {
            "complete": not self.missing and self.problem is None,
            "notAnswering": self.missing,
        }
        if self.problem is not None:
            told["problem"] = self.problem
        return told


class Overview:
    """The operators' view of a broker and of the nodes that share its store. Whoever asks is authorised already."""

    def __init__(self, nodes: Nodes, this_node: ThisNode, runs: RunService, catalog: Catalog, clock: Clock) -> None:
        self._nodes = nodes
        self._this_node = this_node
        self._runs = runs
        self._catalog = catalog
        self._clock = clock

    # -- nodes ------------------------------------------------------------------------------------------------------

    async def nodes(self) -> dict[str, Any]:
        """Return the nodes with state, numbers and lag. lag: None where the node did not tell."""
        gathered = await self._gather({"about": "lag"}, None)
        rows = [self._node_row(record, gathered.answers.get(record.node)) for record in gathered.nodes]
        return {"askedNode": self._nodes.node, "nodes": rows, **gathered.about()}

    @staticmethod
    def _node_row(record: NodeRecord, answer: Answer | None) -> dict[str, Any]:
        if answer is not None:  # newer than its last heartbeat
            record = NodeRecord.from_json(answer["record"], silent_ms=record.silent_ms, silent=record.silent)
        numbers = record.numbers
        return {
            "node": record.node,
            "host": record.host,
            "pid": record.pid,
            "version": record.version,
            "startedAtMs": record.started_at_ms,
            "state": "silent" if record.silent else record.state,
            "heartbeatAgeMs": record.silent_ms,
            "connections": numbers.connections,
            "conversations": numbers.conversations,
            "runs": numbers.runs,
            "position": str(numbers.position),
            "waitingMs": numbers.waiting_ms,
            "lag": answer["lag"] if answer is not None else None,
        }

    # -- connections ------------------------------------------------------------------------------------------------

    async def connections(
        self,
        *,
        conv_id: str | None = None,
        node: str | None = None,
        status: str | None = None,
        subject: str | None = None,
        limit: int = 100,
    ) -> dict[str, Any]:
        """Return at most `limit` connections of all nodes that fit, those that are behind first; `total` fit.

        Raises InvalidInput for an unknown status, NotFound for an unknown node.
        """
        if status is not None and status not in CONNECTION_STATUSES:
            raise InvalidInput(
                f"status {quoted(status)} does not exist: use {', '.join(CONNECTION_STATUSES)}", status=status
            )
        question = {"about": "connections", "conv_id": conv_id, "status": status, "subject": subject, "limit": limit}
        gathered = await self._gather(question, node)
        rows = [row for answer in gathered.answers.values() for row in answer["connections"]]
        rows.sort(key=worst_first)
        by_node = {name: answer["total"] for name, answer in gathered.answers.items()}
        return {
            "connections": rows[:limit],
            "total": sum(by_node.values()),
            "totalByNode": by_node,
            **gathered.about(),
        }

    # -- runs -------------------------------------------------------------------------------------------------------

    async def runs(
        self,
        *,
        conv_id: str | None = None,
        node: str | None = None,
        status: str | None = None,
        limit: int = 100,
    ) -> dict[str, Any]:
        """Return at most `limit` runs that have not ended, those that have stood still longest first; `total` fit.

        From the store, which knows of runs whose node is gone, too: `nodeState` then is `gone` until another one takes
        over. Raises InvalidInput for an unknown status, StoreError.
        """
        if status is not None and status not in STATUSES:
            raise InvalidInput(
                f"status {quoted(status)} does not exist: use {', '.join(sorted(STATUSES))}", status=status
            )
        records = {record.node: record for record in await self._nodes.list()}
        runs, holders = await self._runs.unsettled()
        rows = [
            self._run_row(run, self._nodes.node if holders is None else holders.get(run.conv_id), records)
            for run in runs
            if (conv_id is None or run.conv_id == conv_id) and (status is None or run.status == status)
        ]
        rows = [row for row in rows if node is None or row["node"] == node]
        rows.sort(key=lambda row: (row["sinceMs"], row["runId"]))
        return {"runs": rows[:limit], "total": len(rows)}

    @staticmethod
    def _run_row(run: Run, node: str | None, records: Mapping[str, NodeRecord]) -> dict[str, Any]:
        record = records.get(node) if node is not None else None
        if record is not None:
            state: str | None = "silent" if record.silent else record.state
        else:
            state = None if node is None else "gone"
        since: Mapping[str, int | None] = {"queued": run.created_at_ms, "running": run.started_at_ms}
        return {
            "runId": run.run_id,
            "convId": run.conv_id,
            "status": run.status,
            "sinceMs": since.get(run.status) or run.updated_at_ms,
            "createdAtMs": run.created_at_ms,
            "engineProfile": run.engine_profile,
            "step": run.step,
            "cancelRequested": run.cancel_requested,
            "node": node,
            "host": record.host if record is not None else None,
            "nodeState": state,
        }

    # -- debug channels ---------------------------------------------------------------------------------------------

    async def channels(self) -> dict[str, Any]:
        """Return the channels that can be switched: whether they are on, since when and by whom. Raises StoreError."""
        switches = await self._nodes.switches()
        catalog = self._catalog
        names = sorted(name for name, channel in catalog.channels.items() if channel.switchable)
        return {"channels": [self._channel_row(name, switches.get(name)) for name in names]}

    def _channel_row(self, name: str, switch: Switch | None) -> dict[str, Any]:
        return {
            "channel": name,
            "enabled": switch.on if switch is not None else self._catalog.on_by_setting(name),
            "source": "switched" if switch is not None else "setting",
            "sinceMs": switch.since_ms if switch is not None else None,
            "by": switch.by if switch is not None else None,
        }

    async def switch(self, name: str, *, on: bool | None, by: str) -> dict[str, Any]:
        """Switch a debug channel on all nodes; None: as each node's settings say. Return the channel as it is now.

        This node obeys when the call returns, the others at once or with their next heartbeat, nodes that start later
        from their start on. Raises UnknownChannel, InvalidInput for a channel without a switch, StoreError.
        """
        catalog = self._catalog
        if not catalog.channel(name).switchable:
            raise InvalidInput(f"channel {name!r} is always on: only debug channels can be switched", channel=name)
        known = (await self._nodes.switches()).get(name)
        wanted = None if on is None else Switch(on, self._clock.wall_ms(), by)
        if wanted is not None and known is not None and known.on == wanted.on:
            wanted = known  # since when it has been so is what somebody wants to read
        await self._nodes.switch(name, wanted)
        return self._channel_row(name, wanted)

    # -- asking all -------------------------------------------------------------------------------------------------

    async def _gather(self, question: Question, node: str | None) -> _Gathered:
        """Ask all nodes, or one. Raises NotFound when that one is not on the list."""
        own = self._this_node.record()
        problem: str | None = None
        try:
            nodes = await self._nodes.list()
        except StoreError as exc:
            nodes, problem = [own], f"the list of nodes cannot be read, this is the asked node alone: {exc}"
        wanted = [record for record in nodes if node is None or record.node == node]
        if not wanted:
            if problem is not None:
                raise StoreError(problem)
            known = ", ".join(f"{record.node} ({record.host})" for record in nodes)
            raise NotFound(f"node {quoted(node)} is not on the list of nodes; there are {known}", node=node)
        gathered = _Gathered(wanted, problem=problem)
        others = [record.node for record in wanted if record.node != own.node and not record.silent]
        is_wanted = any(record.node == own.node for record in wanted)
        answers, mine = await asyncio.gather(
            self._ask(others, question, gathered), self._this_node.answer(question) if is_wanted else _nothing()
        )
        if is_wanted:
            answers[own.node] = mine
        for record in wanted:
            answer = answers.get(record.node)
            if answer is not None and "error" not in answer:
                gathered.answers[record.node] = answer
            else:
                gathered.missing.append(self._missing(record, answer))
        return gathered

    async def _ask(self, nodes: list[str], question: Question, gathered: _Gathered) -> dict[str, Answer]:
        try:
            return await self._nodes.ask(nodes, question)
        except StoreError as exc:
            gathered.problem = f"the other nodes cannot be asked: {exc}"
            return {}

    def _missing(self, record: NodeRecord, answer: Answer | None) -> dict[str, Any]:
        if answer is not None:
            reason = str(answer["error"])
        elif record.silent:
            reason = (
                f"no heartbeat for {record.silent_ms / 1000:.1f} s: it was stopped or killed, or cannot reach Redis"
            )
        else:
            reason = f"no answer within {self._nodes.patience_s:.1f} s"
        return {
            "node": record.node,
            "host": record.host,
            "pid": record.pid,
            "reason": reason,
            "connections": record.numbers.connections,
        }


async def _nothing() -> Answer:
    return {}
