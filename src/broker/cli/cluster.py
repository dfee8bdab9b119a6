"""`broker cluster …`: what operators see of all nodes of a running server, as tables."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
import typer

from broker.cli.terminal import span, table
from broker.logs import escape_controls

EXIT_INCOMPLETE = 1
DEFAULT_URL = "http://127.0.0.1:8000/"

app = typer.Typer(
    help="Look at all nodes of a running server. Needs the permission 'debug'.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Url = Annotated[str, typer.Option("--url", envvar="BROKER_URL", help="Base URL of the server, prefix included.")]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="BROKER_TOKEN", help="Bearer token, where the server asks for one."),
]
Conversation = Annotated[str | None, typer.Option("--conv", help="Only those of this conversation.")]
Node = Annotated[str | None, typer.Option("--node", help="Only those of this node.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="Most lines to print.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as the server gave it.")]


@app.command()
def nodes(url: Url = DEFAULT_URL, token: Token = None, json: Json = False) -> None:
    """List the nodes: state, connections, runs, and how far each is behind the log."""
    answer = _get(url, token, "api/debug/nodes")
    if json:
        _print_json(answer)
    else:
        now_ms = time.time() * 1000
        head = (
            "NODE",
            "HOST",
            "PID",
            "VERSION",
            "STATE",
            "UP",
            "CONNECTIONS",
            "CONVERSATIONS",
            "RUNS",
            "LAG",
            "BEHIND",
        )
        rows = [
            (
                one["node"], one["host"], one["pid"], one["version"], one["state"],
                span(int(now_ms - one["startedAtMs"])), one["connections"], one["conversations"], one["runs"],
                span(one["lag"]["ms"]) if one["lag"] else "?",
                _worst(one["lag"]) if one["lag"] else "?",
            )
            for one in answer["nodes"]
        ]  # fmt: skip
        _print(table(head, rows))
    _end(answer)


def _worst(lag: Mapping[str, Any]) -> str:
    """Return the conversations that are furthest behind with their events."""
    named = [f"{one['convId']} ({one['events']}{'+' if one['eventsMore'] else ''})" for one in lag["worst"]]
    rest = lag["conversationsBehind"] - len(named)
    return ", ".join(named) + (f" and {rest} more" if rest else "") or "-"


@app.command()
def connections(
    url: Url = DEFAULT_URL,
    token: Token = None,
    conv: Conversation = None,
    node: Node = None,
    status: Annotated[
        str | None, typer.Option(help="Only those with this status: live, behind, parked or starting.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="Only those of this caller.")] = None,
    limit: Limit = 100,
    json: Json = False,
) -> None:
    """List who is connected to any node, those that are behind first."""
    answer = _get(
        url, token, "api/debug/connections", conv_id=conv, node=node, status=status, subject=subject, limit=str(limit)
    )
    if json:
        _print_json(answer)
    else:
        now_ms = time.time() * 1000
        head = ("CONNECTION", "NODE", "CONVERSATION", "SUBJECT", "PROFILE", "CHANNELS", "STATUS", "POSITION", "BEHIND",
                "QUEUED", "PARKED", "SKIPPED", "AGE")  # fmt: skip
        rows = [
            (
                one["connectionId"], one["node"], one["convId"], one["subject"], one["profile"],
                ",".join(one["channels"]), one["status"], one["position"],
                _behind(one),
                one["queuedBytes"], one["parkedTimes"], one["skippedEvents"], span(int(now_ms - one["openedAtMs"])),
            )
            for one in answer["connections"]
        ]  # fmt: skip
        _print(table(head, rows))
        _print([f"{len(rows)} of {answer['total']} connections"])
    _end(answer)


def _behind(connection: Mapping[str, Any]) -> str:
    if not connection["behind"]:
        return "-"
    if connection["behindEvents"] is None:
        return "yes"
    return f"{connection['behindEvents']} events, {span(connection['behindMs'])}"


@app.command()
def runs(
    url: Url = DEFAULT_URL,
    token: Token = None,
    conv: Conversation = None,
    node: Node = None,
    status: Annotated[str | None, typer.Option(help="Only those with this status, such as running or queued.")] = None,
    limit: Limit = 100,
    json: Json = False,
) -> None:
    """List the runs that have not ended and the node that works on each, the longest unchanged first."""
    answer = _get(url, token, "api/debug/runs", conv_id=conv, node=node, status=status, limit=str(limit))
    if json:
        _print_json(answer)
        return
    now_ms = time.time() * 1000
    rows = [
        (
            one["runId"], one["convId"], one["status"], span(int(now_ms - one["sinceMs"])), one["engineProfile"],
            one["node"] or "-", one["nodeState"] or "-",
        )
        for one in answer["runs"]
    ]  # fmt: skip
    _print(table(("RUN", "CONVERSATION", "STATUS", "SINCE", "ENGINE PROFILE", "NODE", "NODE STATE"), rows))
    _print([f"{len(rows)} of {answer['total']} runs"])


@app.command()
def channels(url: Url = DEFAULT_URL, token: Token = None, json: Json = False) -> None:
    """List the debug channels: whether they are on, since when, and who switched them."""
    answer = _get(url, token, "api/debug/channels")
    if json:
        _print_json(answer)
    else:
        _print(_channel_table(answer["channels"]))


@app.command()
def switch(
    channel: Annotated[str, typer.Argument(help="The debug channel.")],
    to: Annotated[Literal["on", "off", "default"], typer.Argument(help="default: what each node's own settings say.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Switch a debug channel on all nodes; holds until it is switched again, also after restarts."""
    from broker.client import BrokerClient

    async def run() -> dict[str, Any]:
        async with BrokerClient(url, token=token) as client:
            return await client.switch_channel(channel, {"on": True, "off": False}.get(to))

    answer = asyncio.run(run())
    if json:
        _print_json(answer)
    else:
        _print(_channel_table([answer]))


def _channel_table(found: list[dict[str, Any]]) -> list[str]:
    now_ms = time.time() * 1000
    rows = [
        (
            one["channel"],
            "on" if one["enabled"] else "off",
            span(int(now_ms - one["sinceMs"])) if one["sinceMs"] is not None else "start",
            one["by"] or "setting",
        )
        for one in found
    ]
    return table(("CHANNEL", "STATE", "SINCE", "BY"), rows)


# -- asking and printing ------------------------------------------------------------------------------------------


def _get(url: str, token: str | None, path: str, **query: str | None) -> dict[str, Any]:
    from broker.client import BrokerClient

    async def run() -> dict[str, Any]:
        async with BrokerClient(url, token=token) as client:
            return await client.get(path, **{name: value for name, value in query.items() if value is not None})

    return asyncio.run(run())


def _print(lines: list[str]) -> None:
    print("\n".join(lines))


def _print_json(answer: Mapping[str, Any]) -> None:
    print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())


def _end(answer: Mapping[str, Any]) -> None:
    """Say what the answer lacks; exit code 1 where it lacks something."""
    if answer["complete"]:
        return
    if "problem" in answer:
        print(escape_controls(f"broker: {answer['problem']}"), file=sys.stderr)
    for one in answer["notAnswering"]:
        text = f"node {one['node']} ({one['host']}, process {one['pid']}, {one['connections']} connections): {one['reason']}"
        print(escape_controls(f"broker: {text}"), file=sys.stderr)
    raise typer.Exit(EXIT_INCOMPLETE)
