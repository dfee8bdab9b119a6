"""One settings object for all that is configured: `BROKER_*` environment variables, which CLI flags override.

`Settings()` reads the environment; `load_settings(port=…)` does the same with flags on top and turns what is
wrong into one `InvalidInput` that names variable, value and remedy. Every field has its unit in its name or in
its description; `broker serve --help` and `docs/reference/settings.md` are made from the descriptions.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from broker.errors import InvalidInput, quoted

PREFIX = "BROKER_"
PLUGINS_DIR = "plugins"
PLUGIN_PREFIX = "BROKER_PLUGIN_"
"""Variables of plugins: `BROKER_PLUGIN_<NAME>_…`, read by the plugin's own settings model."""
COMMAND_PREFIXES = ("BROKER_URL", "BROKER_TOKEN", "BROKER_TAIL_", "BROKER_SEND_", "BROKER_PUBLISH_")
"""Variables of the commands that talk to a server."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
DAY_S = 86_400.0
LONGEST_S = 3650 * DAY_S
"""Ten years: what is longer overflows a timer or a timestamp somewhere, and nobody can mean it."""
SHORTEST_S = 0.01
"""Shortest pause of a timer: a process that does nothing has to rest."""
MOST = 1_000_000_000
"""Largest count that every store and every system takes."""

LogLevel = Literal["debug", "info", "warning", "error"]
CommaList = Annotated[tuple[str, ...], NoDecode]

GROUPS = {
    "host": "Server",
    "auth": "Access",
    "db": "Storage and retention",
    "max_envelope_bytes": "Limits",
    "connection_buffer_bytes": "Delivery",
    "run_timeout_s": "Runs",
}
"""Headings of help and documentation, by the first field below each."""


class Settings(BaseSettings):
    """Settings of one broker process. Frozen; in tests `model_copy(update=…)` gives a changed one."""

    # The text under a field is its description in `broker serve --help` and in the settings reference.
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=False, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65_535)
    """TCP port to listen on; 0 takes a free one."""
    prefix: str = ""
    """Path under which everything is served, for example /broker."""
    workers: int = Field(1, ge=1, le=256)
    """Server processes; more than one needs Redis."""
    plugins_dir: str | None = None
    """Folder whose plugins are loaded; one that does not exist holds none. Not named: `plugins` for `broker serve` and the
    other commands, no folder for an app that embeds the broker."""
    debug_channels: CommaList = ()
    """Debug channels that are switched on from the start, as a comma list (debug.trace,…)."""
    ui_dir: str | None = None
    """Folder with web pages to serve in place of the bundled ones."""
    log_format: Literal["text", "json"] = "text"
    """Form of the log lines on standard error."""
    log_level: LogLevel = "info"
    """Least important level that is logged."""
    access_log: bool = False
    """Log a line per HTTP request."""
    fast_path: bool = True
    """Write WebSocket frames straight to the transport (uvicorn only); off: plain ASGI sends."""
    drain_timeout_s: float = Field(10.0, ge=0, le=LONGEST_S)
    """Seconds that open connections and runs get to end at shutdown."""

    auth: str | None = None
    """Name of the plugin whose authenticate hook, and no other, decides who may come in; none: loopback only."""
    insecure: bool = False
    """Listen on other than loopback addresses without auth."""
    allowed_hosts: CommaList = ()
    """Host names besides the loopback ones under which this server is reached, as a comma list. Only
    checked without auth, against DNS rebinding; '*' accepts all."""
    allowed_origins: CommaList = ()
    """Web origins besides the server's own whose pages may use it (https://app.example), as a comma list."""

    db: str = Field("broker.db", min_length=1)
    """SQLite file; ':memory:' keeps nothing."""
    redis_url: str | None = Field(None, repr=False)
    """Redis to use instead of SQLite, for many nodes."""
    redis_patience_s: float = Field(5.0, gt=0, le=LONGEST_S)
    """Seconds for which a publisher waits for a Redis that is away, before it gets an error."""
    store_away: Literal["wait", "refuse"] = "wait"
    """What producers get while the store is away: wait = for redis_patience_s (for a locked file 5 s, or
    10 s behind a write that waits for it already), then an error; refuse = an error at once. A run in the middle of its
    answer always waits."""
    run_lease_s: float = Field(10.0, ge=1, le=LONGEST_S)
    """With Redis: seconds after which the runs of a node that says nothing are taken over by another."""
    node_heartbeat_s: float = Field(1.0, ge=0.1, le=10)
    """With Redis: seconds between two signs of life of a node to the others."""
    durability: Literal["normal", "full"] = "normal"
    """What an acknowledged write survives: normal = the end of the process; full = power loss too (SQLite
    synchronous NORMAL or FULL)."""
    retention_count: int = Field(100_000, ge=0, le=MOST)
    """Newest envelopes kept per conversation; 0 = no limit."""
    retention_bytes: int = Field(64 * MIB, ge=0, le=1024 * GIB)
    """Bytes of envelopes kept per conversation; 0 = no limit."""
    retention_age_s: float = Field(30 * DAY_S, ge=0, le=LONGEST_S)
    """Seconds that an envelope is kept; 0 = no limit."""
    turn_retention_s: float = Field(7 * DAY_S, ge=0, le=LONGEST_S)
    """Seconds that recorded turns are kept; 0 = no limit."""
    idempotency_window_s: float = Field(DAY_S, gt=0, le=LONGEST_S)
    """Seconds for which a repeated idempotency key gets the first answer."""
    sweep_interval_s: float = Field(5.0, ge=SHORTEST_S, le=LONGEST_S)
    """Seconds between two looks for what can be evicted or trimmed."""

    max_envelope_bytes: int = Field(MIB, ge=KIB, le=64 * MIB)
    """Largest data of one envelope, in bytes of JSON."""
    max_body_bytes: int = Field(2 * MIB, ge=KIB, le=GIB)
    """Largest HTTP request body, in bytes; an import may be larger."""
    max_import_bytes: int = Field(32 * MIB, ge=KIB, le=GIB)
    """Largest file that POST /api/conversations/import takes, in bytes."""
    max_client_message_bytes: int = Field(64 * KIB, ge=KIB, le=64 * MIB)
    """Largest WebSocket message from a client, in bytes."""
    max_publish_batch: int = Field(1000, ge=1, le=MOST)
    """Most envelopes in one publish request."""
    max_connections: int = Field(10_000, ge=1, le=MOST)
    """Most client connections of this process."""
    max_open_conversations: int = Field(10_000, ge=1, le=MOST)
    """Most conversations kept in memory; idle ones beyond are evicted."""
    idle_conversation_s: float = Field(300.0, gt=0, le=LONGEST_S)
    """Seconds without use after which a conversation leaves memory."""
    poll_max_wait_s: float = Field(30.0, ge=0, le=LONGEST_S)
    """Longest wait of one long poll, in seconds."""
    poll_max_frames: int = Field(1000, ge=1, le=MOST)
    """Most frames in one answer of /api/messages."""
    max_long_polls: int = Field(1000, ge=1, le=MOST)
    """Most long polls that wait at once in this process."""
    state_poll_interval_s: float = Field(0.1, ge=0, le=LONGEST_S)
    """Shortest average time between two state requests of one caller; sooner gets 429. 0 = no limit."""

    connection_buffer_bytes: int = Field(256 * KIB, ge=KIB, le=GIB)
    """Bytes that may wait for one connection before it is caught up from the log."""
    compression: Literal["off", "per_view"] = "off"
    """Compress WebSocket frames for clients that offer it (permessage-deflate): per_view = each frame once for all
    connections of a view, without context takeover. Needs the fast path."""
    compression_min_bytes: int = Field(128, ge=0, le=GIB)
    """With compression: shorter frames go out as they are."""
    compression_level: int = Field(1, ge=1, le=9)
    """With compression: zlib's level, 1 = fast to 9 = small."""
    write_timeout_s: float = Field(30.0, ge=SHORTEST_S, le=LONGEST_S)
    """Seconds that a connection may take nothing while bytes wait for it."""
    ping_interval_s: float = Field(20.0, ge=0, le=LONGEST_S)
    """Seconds between WebSocket pings of the server; 0 = none."""
    ping_timeout_s: float = Field(20.0, ge=SHORTEST_S, le=LONGEST_S)
    """Seconds that a client may take to answer a ping."""
    keep_alive_s: int = Field(75, ge=1, le=int(LONGEST_S))
    """Seconds for which an HTTP connection stays open after an answer. Longer than the load balancer in front keeps
    its idle ones (60 s is usual): else requests meet a connection that is just being closed, and fail."""
    sse_heartbeat_s: float = Field(15.0, ge=SHORTEST_S, le=LONGEST_S)
    """Seconds between comments on a silent event stream."""
    upsert_interval_s: float = Field(0.25, ge=SHORTEST_S, le=LONGEST_S)
    """Shortest time between two upserts of one growing entity."""
    timeline_flush_interval_s: float = Field(0.25, ge=SHORTEST_S, le=LONGEST_S)
    """Seconds between two saves of changed timeline entities."""
    replay_page_events: int = Field(512, ge=1, le=100_000)
    """Envelopes per page read from the log for a client that catches up."""
    replay_page_bytes: int = Field(256 * KIB, ge=KIB, le=64 * MIB)
    """Bytes per page read from the log for a client that catches up."""
    through_interval_s: float = Field(5.0, gt=0, le=LONGEST_S)
    """Seconds after which a client that sees nothing is told how far it is."""
    through_events: int = Field(100, ge=1, le=MOST)
    """Hidden envelopes after which a client is told how far it is."""

    run_timeout_s: float = Field(900.0, ge=SHORTEST_S, le=LONGEST_S)
    """Longest time of one run, in seconds."""
    engine_idle_timeout_s: float = Field(150.0, ge=SHORTEST_S, le=LONGEST_S)
    """Seconds without a byte from the engine after which a run fails."""
    queue_depth: int = Field(32, ge=0, le=MOST)
    """Most prompts that wait in one conversation."""
    max_tool_steps: int = Field(8, ge=0, le=MOST)
    """Most rounds of tools in one run."""

    @field_validator("debug_channels", "allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split_comma_list(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("redis_url", "auth", "ui_dir", "plugins_dir", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        # `BROKER_AUTH= broker serve` is how a shell takes a setting back.
        return None if value == "" else value

    @field_validator("ping_interval_s")
    @classmethod
    def _check_interval(cls, value: float) -> float:
        if 0 < value < SHORTEST_S:
            raise ValueError(f"0, or at least {SHORTEST_S} is required")
        return value

    @field_validator("prefix")
    @classmethod
    def _check_prefix(cls, value: str) -> str:
        value = value.rstrip("/")
        if value and (not value.startswith("/") or any(c in value for c in "?#{}\\ ") or "//" in value):
            raise ValueError("a path such as /broker is required")
        return value


def load_settings(**flags: Any) -> Settings:
    """Return the settings of the environment with `flags` (field names; None means not given) on top.

    Raises InvalidInput that names every wrong variable or flag with its value and what would be right.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as exc:
        problems = [_problem(error, given) for error in exc.errors()]
    # Outside of the except block: pydantic's own error shows the values, also that of redis_url.
    raise InvalidInput("\n".join(problems))


def of_commands(settings: Settings) -> Settings:
    """Return the settings as the command line means them: with a plugins folder where none is named.

    An app that embeds the broker may well have a package `plugins` of its own, which is none of ours.
    """
    return settings.model_copy(update={"plugins_dir": settings.plugins_dir or PLUGINS_DIR})


def _problem(error: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    field = str(error["loc"][0]) if error["loc"] else ""
    where = f"--{field.replace('_', '-')}" if field in flags else variable(field)
    # The value of redis_url may hold a password: never repeat it.
    value = "(hidden)" if field == "redis_url" else quoted(error["input"])
    about = describe(field) if field in Settings.model_fields else "There is no such setting."
    return f"{where}={value} is not usable: {error['msg']}. {about}"


def describe(field: str) -> str:
    """Return what a setting means, on one line."""
    return " ".join((Settings.model_fields[field].description or "").split())


def variable(field: str) -> str:
    """Return the environment variable of a settings field."""
    return PREFIX + field.upper()


def misspelled_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return a warning per `BROKER_…` variable that no setting reads, naming the closest one that exists.

    environ: None means the process's own. Plugins' variables (`BROKER_PLUGIN_…`) are left to the plugins.
    """
    fields = [field.upper() for field in Settings.model_fields]
    known = {PREFIX + field for field in fields}
    warnings = []
    for name in sorted(os.environ if environ is None else environ):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper.startswith((PLUGIN_PREFIX, *COMMAND_PREFIXES)) or upper in known:
            continue
        # Without the prefix, which alone would make any two names look alike.
        close = difflib.get_close_matches(upper.removeprefix(PREFIX), fields, n=1, cutoff=0.6)
        remedy = f"did you mean {PREFIX}{close[0]}?" if close else "see `broker serve --help` for those that exist"
        warnings.append(f"environment variable {name} is not a setting and has no effect: {remedy}")
    return warnings
