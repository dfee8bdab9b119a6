"""The `broker` command line. Only `serve` imports the web server, when it is called."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import orjson
import typer

from broker.cli.cluster import DEFAULT_URL, Token, Url
from broker.cli.cluster import app as cluster_app
from broker.errors import BrokerError, InvalidInput, quoted
from broker.exact_json import loads_checked
from broker.logs import escape_controls
from broker.sequence import parse_seq
from broker.settings import GROUPS, Settings, describe, load_settings, of_commands, variable

if TYPE_CHECKING:
    from broker.client import BrokerClient

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="broker",
    help="Broadcast LLM and agent conversations to many clients: one order, filtered views, no gaps.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
plugins_app = typer.Typer(help="Look at plugins, switch and release them.", no_args_is_help=True, rich_markup_mode=None)
timeline_app = typer.Typer(help="Look after timelines.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plugins_app, name="plugins")
app.add_typer(timeline_app, name="timeline")
app.add_typer(cluster_app, name="cluster")

_TOLD = frozenset({"ws.reset", "ws.bye", "ws.error", "ws.notice"})
"""Control frames that a person who follows a conversation wants to know of."""
_DATA_EXAMPLE = """one such as '{"message": "hi"}'"""


@app.callback(invoke_without_command=True)
def _top(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        print(f"conversation-broker {version('conversation-broker')}")
        raise typer.Exit


# -- serve --------------------------------------------------------------------------------------------------------


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(**flags)` one option per field of `Settings`: a new setting is a new flag, with its help."""
    parameters = []
    group = ""
    for name, field in Settings.model_fields.items():
        group = GROUPS.get(name, group)
        shown_default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        default = f" [default: {shown_default}]" if shown_default not in (None, "", False) else ""
        text = f"{describe(name)} [env: {variable(name)}]{default}"
        flag = f"--{name.replace('_', '-')}"
        kind = _option_type(field.annotation)
        names = (flag, f"--no-{flag[2:]}") if kind is bool else (flag,)
        option = typer.Option("/".join(names), help=text, show_default=False, rich_help_panel=group)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option_type(annotation: Any) -> type:
    """Return the type in which the command line reads a field; pydantic does the real check."""
    if get_origin(annotation) is Union or "|" in str(annotation):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation if annotation in (int, float, bool) else str


@app.command(help="Run the server until SIGTERM or Ctrl-C; prints one line with the URL when it is ready.")
@_settings_options
def serve(**flags: Any) -> None:
    settings = load_settings(**flags)
    # Here, not above: no other command pays for the web server (I8).
    from transports.server import serve as run_server

    raise typer.Exit(run_server(settings))


# -- talking to a server ------------------------------------------------------------------------------------------


@app.command()
def tail(
    conv_id: Annotated[str, typer.Argument(help="The conversation to follow.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    profile: Annotated[
        str, typer.Option(envvar="BROKER_TAIL_PROFILE", help="The profile to look through.")
    ] = "default",
    channels: Annotated[
        str | None,
        typer.Option(envvar="BROKER_TAIL_CHANNELS", help="Channels in place of the profile's, or +name,-name."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            envvar="BROKER_TAIL_SINCE", help="Begin after this seq; 0: everything retained. Else: from now on."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", envvar="BROKER_TAIL_JSON", help="Print frames as the server wrote them.")
    ] = False,
    once: Annotated[
        bool,
        typer.Option(
            "--once", envvar="BROKER_TAIL_ONCE", help="End when the retained part is printed (since is 0 if not given)."
        ),
    ] = False,
) -> None:
    """Follow a conversation; comes back by itself when the connection breaks."""
    from broker.cli.terminal import line_of
    from broker.client import BrokerClient

    position = parse_seq(since) if since is not None else 0 if once else None
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    async def run() -> None:
        async with BrokerClient(url, token=token) as client:
            frames = client.frames(conv_id, profile=profile, channels=channels, since=position, control=True)
            async with aclosing(frames):
                async for text in frames:
                    event = orjson.loads(text)["event"]
                    if json:
                        print(text, flush=True)
                    elif not event["type"].startswith("ws.") or event["type"] in _TOLD:
                        print(line_of(event, colour=colour), flush=True)
                    if once and event["type"] == "ws.caught_up":
                        return

    _run(run())


@app.command()
def send(
    conv_id: Annotated[str, typer.Argument(help="The conversation.")],
    text: Annotated[str, typer.Argument(help="The prompt; '-' reads standard input.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    engine_profile: Annotated[
        str | None,
        typer.Option(envvar="BROKER_SEND_ENGINE_PROFILE", help="Which engine configuration answers."),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(envvar="BROKER_SEND_IDEMPOTENCY_KEY", help="Repeat a request under the same key: asked once."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", envvar="BROKER_SEND_JSON", help="Print the answer as JSON.")] = False,
) -> None:
    """Send a prompt to a conversation."""
    from broker.client import BrokerClient

    async def run() -> dict[str, Any]:
        async with BrokerClient(url, token=token) as client:
            return await client.send(
                _argument_or_stdin(text),
                conv_id=conv_id,
                engine_profile=engine_profile,
                idempotency_key=idempotency_key,
            )

    answer = _run(run())
    if json:
        print(orjson.dumps(answer).decode())
        return
    place = f", place {answer['queue_position']} in the queue" if answer.get("status") == "queued" else ""
    print(escape_controls(f"{answer.get('status')}: run {answer.get('run_id')}{place}"))


@app.command()
def publish(
    conv_id: Annotated[str, typer.Argument(help="The conversation.")],
    type: Annotated[str, typer.Argument(metavar="TYPE", help="Event type, such as log.")],
    data: Annotated[
        str, typer.Argument(metavar="JSON", help="The event's data, a JSON object; '-' reads standard input.")
    ],
    url: Url = DEFAULT_URL,
    token: Token = None,
    id: Annotated[
        str | None,
        typer.Option(envvar="BROKER_PUBLISH_ID", help="Stable id of what the event is about; else a fresh one."),
    ] = None,
    channel: Annotated[
        str | None,
        typer.Option(envvar="BROKER_PUBLISH_CHANNEL", help="Channel; else the one of the event type."),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(envvar="BROKER_PUBLISH_IDEMPOTENCY_KEY", help="Repeat under the same key: published once."),
    ] = None,
) -> None:
    """Publish one event into a conversation; prints its seq once it is durable."""
    from broker.client import BrokerClient

    text = _argument_or_stdin(data)
    try:
        value = loads_checked(text)
    except ValueError as exc:
        raise InvalidInput(f"JSON {quoted(text)} is not valid: {exc}; give {_DATA_EXAMPLE}") from exc
    if not isinstance(value, dict):
        raise InvalidInput(f"JSON {quoted(text)} is no object: give {_DATA_EXAMPLE}")

    async def run() -> int:
        async with BrokerClient(url, token=token) as client:
            return await client.publish(conv_id, type, value, id=id, channel=channel, idempotency_key=idempotency_key)

    print(_run(run()))


def _argument_or_stdin(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


# -- looking at this installation ---------------------------------------------------------------------------------


@plugins_app.command("list")
def plugins_list(
    plugins_dir: Annotated[
        str | None,
        typer.Option(help="Folder whose plugins are loaded [env: BROKER_PLUGINS_DIR]."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", envvar="BROKER_URL", help="Ask this running server instead, for errors and time spent."),
    ] = None,
    token: Token = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List plugins: source, version, hooks, errors, time spent, what is in quarantine and why."""
    found = _run(_served_plugins(url, token)) if url is not None else _loaded_plugins(plugins_dir)
    if json:
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    from broker.cli.terminal import plugin_lines

    for plugin in found:
        print("\n".join(plugin_lines(plugin)))
    if any("hooks" not in plugin for plugin in found):
        print("broker: hooks, errors and quarantine are told to callers with the permission 'debug'", file=sys.stderr)
    if not found:
        print("no plugins are loaded; see --plugins-dir")


PluginName = Annotated[str, typer.Argument(help="The plugin, as `broker plugins list` names it.")]


@plugins_app.command("release")
def plugins_release(name: PluginName, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Take a plugin's hooks out of quarantine on a running server, once what was wrong is mended."""
    released = _run(_with_client(url, token, lambda client: client.release_plugin(name)))["released"]
    print(f"{name} was released" if released else f"{name} was not in quarantine")


@plugins_app.command("enable")
def plugins_enable(name: PluginName, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Switch a plugin on again on a running server."""
    _run(_with_client(url, token, lambda client: client.switch_plugin(name, True)))
    print(f"{name} is on")


@plugins_app.command("disable")
def plugins_disable(name: PluginName, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Switch a plugin off on a running server until it ends: none of its hooks is called, its filters are gone too."""
    _run(_with_client(url, token, lambda client: client.switch_plugin(name, False)))
    print(f"{name} is off")


async def _with_client(
    url: str, token: str | None, ask: Callable[[BrokerClient], Coroutine[Any, Any, dict[str, Any]]]
) -> dict[str, Any]:
    from broker.client import BrokerClient

    async with BrokerClient(url, token=token) as client:
        return await ask(client)


def _loaded_plugins(plugins_dir: str | None) -> list[dict[str, Any]]:
    from broker.plugins import PluginHost

    return PluginHost.load(of_commands(load_settings(plugins_dir=plugins_dir))).describe()


async def _served_plugins(url: str, token: str | None) -> list[dict[str, Any]]:
    from broker.client import BrokerClient

    async with BrokerClient(url, token=token) as client:
        found: list[dict[str, Any]] = (await client.get("api/plugins"))["plugins"]
        return found


@timeline_app.command("verify")
def timeline_verify(
    conv_id: Annotated[str | None, typer.Argument(help="One conversation; else all.")] = None,
    db: Annotated[str | None, typer.Option(help="SQLite file [env: BROKER_DB].")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis in place of a file [env: BROKER_REDIS_URL].")] = None,
    plugins_dir: Annotated[
        str | None,
        typer.Option(help="Folder with the plugins whose handlers fold [env: BROKER_PLUGINS_DIR]."),
    ] = None,
) -> None:
    """Fold the log again and compare with the stored timeline; exit code 1 when they differ."""
    from broker.cli.verify import verify_store

    report = _run(verify_store(load_settings(db=db, redis_url=redis_url, plugins_dir=plugins_dir), conv_id))
    for line in report.lines():
        print(escape_controls(line))
    raise typer.Exit(0 if report.ok else EXIT_FAILED)


@app.command(help="Check store, plugins, limits and port on this machine, and say what to fix.")
@_settings_options
def doctor(**flags: Any) -> None:
    from broker.cli.doctor import examine

    problems = 0
    for finding in examine(load_settings(**flags)):
        problems += finding.level == "problem"
        print(f"{finding.level:8} {finding.check:9} {escape_controls(finding.text)}")
    raise typer.Exit(EXIT_FAILED if problems else 0)


# -- start --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; what the broker refuses is one clear line on standard error, not a traceback."""
    _add_plugin_commands(sys.argv[1:])
    try:
        app()
    except BrokerError as exc:
        print(f"broker: {escape_controls(str(exc), keep=chr(10))}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(exc, InvalidInput) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # `broker tail … | head`: the reader has enough. Nothing more may be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def _add_plugin_commands(arguments: list[str]) -> None:
    """Let plugins add commands, unless the command is one of ours: those must work without and in spite of plugins."""
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    own = {info.name or getattr(info.callback, "__name__", "") for info in app.registered_commands}
    own |= {group.name or "" for group in app.registered_groups}
    if wanted in own:
        return
    from broker.plugins import PluginHost

    try:
        PluginHost.load(of_commands(load_settings())).call_collect("register_commands", cli=app)
    except BrokerError as exc:
        print(f"broker: commands of plugins are missing: {exc}", file=sys.stderr)
