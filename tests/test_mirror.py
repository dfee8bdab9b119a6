"""Each module has a test file of its name in the mirrored folder, or a line here that says which file tests it, and how.

A line names test files below `tests/` and gives the reason. Each of the files, or what it imports of the tests' own help,
imports the module; where it does not, the line quotes the public door through which the file reaches the module: a path,
a flag, a hook, a handle, as it is written in that file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
SOURCES = TESTS.parent / "src"


class By(NamedTuple):
    """files: of the tests, separated by spaces. door: text that stands in those of them which do not import the module."""

    files: str
    why: str
    door: str = ""


API = "transports/http/test_api.py"
CONVERSATIONS = "transports/http/test_conversations.py"
SWITCHES = "transports/http/test_plugin_switches.py"
EVENT_LOGS = "broker/eventlog/test_eventlog_contract.py"
DELIVERY = "broker/delivery/test_delivery.py"
RACES = "broker/delivery/test_core_races.py"
LIBRARY = "broker/library/test_library.py"
NODES = "broker/nodes/test_nodes.py"
PLUGINS = "broker/plugins/test_plugins.py"
RUNS = "broker/runs/test_service.py"
LEASES = "broker/runs/test_leases.py"
HANDOVER = "broker/runs/test_handover.py"
ANSWER = "broker/runs/chat_completions/test_answer.py"
SERVE = "e2e/test_serve.py"
EACH_LOG = "one contract for every event log"
EACH_LIBRARY = "one contract for every store of the library"
EACH_RUN_STORE = "one contract for every store of runs and turns"
OVER_HTTP = "its routes are asked over HTTP"

ELSEWHERE: dict[str, By] = {
    # -- what is tested together with the rooms around it
    "broker/pauses.py": By("broker/library/test_turns_of_the_loop.py", "turns between the steps"),
    "broker/timeline/budget.py": By("broker/timeline/test_projector.py", "upserts that wait"),
    "broker/views/retold.py": By(
        "transports/http/test_what_plugins_mask.py transports/http/test_what_copies_forget.py",
        "state under filters for events",
        "/api/timeline",
    ),
    # -- the floor
    "broker/channels.py": By("broker/views/test_catalog.py", "records without behaviour, declared to the catalog"),
    "broker/copies.py": By(
        "broker/plugins/test_own_copies.py", "what plugins change in place stays theirs", "vandalise("
    ),
    "broker/errors.py": By("transports/http/test_problems.py", "every class, with its status and text"),
    "broker/exact_json.py": By("broker/runs/test_foreign.py broker/runs/test_ends.py", "numbers that a model says"),
    "broker/interfaces.py": By("broker/plugins/test_what_plugins_hold.py", "all that hooks are given", "hookspecs"),
    "broker/phase.py": By(
        "broker/test_broker.py broker/assembly/test_readiness.py", "what each phase answers", "readiness"
    ),
    "broker/profiles.py": By("broker/views/test_views.py", "a record; what it says shows in views"),
    "broker/publisher.py": By("broker/test_testing.py broker/plugins/test_emitters.py", "as producers hold it"),
    "broker/security.py": By("broker/plugins/test_access.py", "records; the rules are hooks"),
    # -- redis
    "broker/redis/announcements.py": By("faults/test_redis_wakeups.py", "wake-ups over real servers", "live_channel"),
    "broker/redis/connection.py": By(
        "broker/redis/test_deadlines.py faults/test_redis_client.py", "one server, a cluster, servers that go away"
    ),
    "broker/redis/script.py": By("broker/redis/test_deadlines.py", "every script of every room"),
    "broker/redis/servers.py": By(
        "broker/redis/test_lane.py faults/test_redis_wakeups.py faults/test_redis_client.py",
        "servers and lanes end together; clusters",
        "redis_cluster_url",
    ),
    "broker/redis/subscription.py": By(
        "faults/test_redis_wakeups.py", "connections that break, slots that move", "listeners("
    ),
    "broker/redis/topology.py": By("broker/redis/test_parts.py", "addresses, and the refusal of those that cannot be"),
    # -- sqlite
    "broker/sqlite/file.py": By("broker/sqlite/test_database.py", "whose file it is, and who may open it"),
    "broker/sqlite/group_commit.py": By("broker/sqlite/test_database.py", "batches, failures, closing", ".write("),
    "broker/sqlite/jobs.py": By("broker/sqlite/test_database.py", "what `Database.write` is given", ".write("),
    "broker/sqlite/schema.py": By("broker/sqlite/test_database.py", "marks, epochs and versions of a file", "epoch"),
    "broker/sqlite/scrub.py": By("broker/sqlite/test_erase.py", "no byte is left in the files", "scrub"),
    "broker/sqlite/traces.py": By("broker/sqlite/test_erase.py", "no byte is left in the files", "STEP_BYTES"),
    # -- eventlog
    "broker/eventlog/base.py": By(EVENT_LOGS, EACH_LOG),
    "broker/eventlog/memory.py": By(EVENT_LOGS, EACH_LOG),
    "broker/eventlog/redis.py": By(f"{EVENT_LOGS} faults/test_redis_log.py", EACH_LOG),
    "broker/eventlog/redis_append.py": By(
        f"{EVENT_LOGS} faults/test_redis_log.py", "appends at the same time, and answers that are lost", "RedisEventLog"
    ),
    "broker/eventlog/redis_following.py": By(
        "faults/test_redis_nodes.py", "what one node appends reaches the others", "RedisEventLog"
    ),
    "broker/eventlog/redis_gates.py": By("broker/library/test_filling.py", "nodes that keep each other out"),
    "broker/eventlog/redis_keys.py": By(
        f"broker/redis/test_parts.py {EVENT_LOGS}", "names and escapes; entries that come back", "RedisEventLog"
    ),
    "broker/eventlog/redis_scripts.py": By(
        f"{EVENT_LOGS} faults/test_redis_log.py", "each is run by the log", "RedisEventLog"
    ),
    "broker/eventlog/requests.py": By(
        f"{EVENT_LOGS} broker/api/test_publish_once.py", "a key is answered once, in every log", "publish"
    ),
    "broker/eventlog/sqlite.py": By(EVENT_LOGS, EACH_LOG),
    "broker/eventlog/sqlite_append.py": By(EVENT_LOGS, "the appends of the SQLite log", "SqliteEventLog"),
    "broker/timeline/checked.py": By(
        "broker/timeline/test_unwritable.py", "handlers that return what cannot be stored", "TimelineHandler"
    ),
    # -- timeline
    "broker/timeline/entity.py": By("broker/timeline/test_builtin.py broker/timeline/test_store.py", "folded and kept"),
    "broker/timeline/handlers.py": By("broker/timeline/test_projector.py", "handlers that a test declares"),
    "broker/timeline/memory.py": By("broker/timeline/test_store.py", "one contract for every timeline store"),
    "broker/timeline/rebuild.py": By(
        f"broker/timeline/test_prompt_order.py {LIBRARY}", "forks and exports of what was trimmed", "fork"
    ),
    "broker/timeline/redis.py": By("broker/timeline/test_store.py", "one contract for every timeline store"),
    "broker/timeline/sqlite.py": By("broker/timeline/test_store.py", "one contract for every timeline store"),
    # -- runs
    "broker/runs/actions.py": By(RUNS, "what people do to runs", ".approve_tools("),
    "broker/runs/chat_completions/errors.py": By(
        "plugins/openai_engine/test_provider_errors.py", "what providers answer", "http_error"
    ),
    "broker/runs/chat_completions/reasoning.py": By(ANSWER, "reasoning in all its places", "reasoning"),
    "broker/runs/chat_completions/tool_calls.py": By(ANSWER, "calls in fragments", "tool_calls"),
    "broker/runs/ending.py": By(
        "broker/runs/test_runner.py", "the last events of runs, however they end", "run.failed"
    ),
    "broker/runs/engine.py": By("broker/runs/test_runner.py", "an engine that plays a script"),
    "broker/runs/engines.py": By(RUNS, "when an engine is built anew, and closed", "EnginePlugin"),
    "broker/runs/intake.py": By(f"{RUNS} broker/runs/test_prompt_first.py", "prompts on their way in", ".send("),
    "broker/runs/lease_keeper.py": By(HANDOVER, "leases kept, lost, taken over"),
    "broker/runs/limits.py": By("broker/runs/test_runner.py", "records; each limit is met there"),
    "broker/runs/memory.py": By("broker/runs/test_store.py", EACH_RUN_STORE),
    "broker/runs/memory_turns.py": By("broker/runs/test_store.py broker/runs/test_turn_pieces.py", EACH_RUN_STORE),
    "broker/runs/places.py": By("broker/runs/test_tool_runner.py", "plain tools that hang", "ToolRunner("),
    "broker/runs/ports.py": By(RUNS, "protocols, which the bench fits"),
    "broker/runs/queue.py": By(RUNS, "one run at a time, in order", "queue"),
    "broker/runs/redis.py": By(f"broker/runs/test_store.py {LEASES}", EACH_RUN_STORE),
    "broker/runs/redis_keys.py": By(LEASES, "idempotency keys over all conversations"),
    "broker/runs/redis_leases.py": By(LEASES, "who works where, and what it tells the others", "RedisRunStore"),
    "broker/runs/redis_scripts.py": By(LEASES, "each is run by the store", "RedisRunStore"),
    "broker/runs/redis_turns.py": By("broker/runs/test_store.py broker/runs/test_turn_pieces.py", EACH_RUN_STORE),
    "broker/runs/run_publisher.py": By("broker/runs/test_runner.py", "nothing after the end"),
    "broker/runs/runtime.py": By(
        "broker/runs/test_recovery.py", "ends that are written although a store fails", "Bench"
    ),
    "broker/runs/snapshot.py": By(RUNS, "the state that clients get, and its tag", "state_etag"),
    "broker/runs/sqlite.py": By("broker/runs/test_store.py", EACH_RUN_STORE),
    "broker/runs/sqlite_turns.py": By("broker/runs/test_store.py broker/runs/test_turn_pieces.py", EACH_RUN_STORE),
    "broker/runs/state.py": By("broker/runs/test_store.py", "every transition there is, over each store"),
    "broker/runs/tool_round.py": By(RUNS, "calls that wait for a person", "requires_approval"),
    "broker/runs/tools.py": By("broker/runs/test_tool_runner.py", "tools, whatever they do"),
    "broker/runs/turns.py": By("broker/runs/test_store.py", EACH_RUN_STORE),
    # -- plugins
    "broker/plugins/calls.py": By(PLUGINS, "through the host: each hook's answers and failures", "PluginHost"),
    "broker/plugins/checks.py": By(PLUGINS, "plugins that do not fit are refused", "PluginError"),
    "broker/plugins/host.py": By(PLUGINS, "the host by its public door", "PluginHost"),
    "broker/plugins/isolation.py": By(PLUGINS, "measured, reported, put into quarantine", "IsolationLimits"),
    "broker/plugins/loading.py": By(PLUGINS, "from packages, folders and objects", "PluginHost"),
    "broker/plugins/observers.py": By(RACES, "what observers are told, and when", "on_published"),
    "broker/plugins/rules.py": By(
        f"broker/test_hookspecs.py {PLUGINS}", "each hook has its rules; what is never quarantined", "quarantine"
    ),
    "broker/plugins/settings.py": By(PLUGINS, "from the environment", "BROKER_PLUGIN_"),
    # -- views
    "broker/views/compiler.py": By("broker/views/test_views.py", "views of profiles and channels"),
    "broker/views/draft_checks.py": By(
        "broker/conversations/test_typed_publish.py", "checked for every producer alike", "publish"
    ),
    "broker/views/frames.py": By(f"broker/views/test_views.py {DELIVERY}", "frames as they go out", "connect("),
    "broker/views/upsert.py": By("broker/views/test_views.py", "what a view shows of entities"),
    "broker/views/view.py": By("broker/views/test_views.py", "what a view shows"),
    # -- conversations
    "broker/conversations/conversation.py": By(
        "broker/conversations/test_eviction.py", "what is kept of one that is open", "conversations.open("
    ),
    "broker/conversations/follower.py": By(
        "faults/test_redis_nodes.py", "a node that is behind, and one that is reset", "position"
    ),
    "broker/conversations/gates.py": By(
        "broker/library/test_filling.py broker/delivery/test_erasure.py",
        "who fills or erases one keeps others out",
        "erase",
    ),
    "broker/conversations/ingest.py": By(
        f"{DELIVERY} broker/conversations/test_current.py", "all that is published comes in here", "publish("
    ),
    "broker/conversations/manager.py": By(
        "broker/conversations/test_eviction.py broker/conversations/test_current.py",
        "opened and given up",
        "parts.conversations",
    ),
    "broker/conversations/reader.py": By(
        f"broker/api/test_messages_api.py {LIBRARY}", "pages of a timeline, live ones laid over", "timeline"
    ),
    # -- delivery
    "broker/delivery/admission.py": By("broker/api/test_doors.py", "who is let in, asked once", "Admitted"),
    "broker/delivery/chunks.py": By("broker/delivery/test_state_in_bytes.py", "what a slow reader lacks, in chunks"),
    "broker/delivery/coordinator.py": By(f"{RACES} {DELIVERY}", "order, gaps, what has to wait", "publish("),
    "broker/delivery/dispatch.py": By(f"{DELIVERY} broker/views/test_views.py", "one frame for each view", "connect("),
    "broker/delivery/notices.py": By(
        "broker/eventlog/test_availability.py faults/test_store_notice.py", "outages are told to clients", "ws.notice"
    ),
    "broker/delivery/pool.py": By(
        "broker/test_testing.py", "a protocol, which the real and the captured pool fit", "Pool"
    ),
    "broker/delivery/recovery.py": By(
        f"{DELIVERY} faults/test_cut_anywhere.py", "joins and resumes, cut at every place", "since="
    ),
    "broker/delivery/registry.py": By(
        "broker/api/test_doors.py transports/test_websocket.py", "who is subscribed, and that nobody stays", "registry"
    ),
    "broker/delivery/start.py": By(
        f"{DELIVERY} broker/api/test_messages_api.py", "live, from a position, with the state", "hydrate"
    ),
    "broker/delivery/state_sender.py": By("broker/delivery/test_state_in_bytes.py", "the state, by pages and in bytes"),
    "broker/delivery/subscription.py": By(
        f"{DELIVERY} transports/test_plugin_connections.py", "positions, opening frames, what hooks see", "subscribe("
    ),
    "broker/delivery/subscriptions.py": By(f"{DELIVERY} {RACES}", "opened, parked, ended", "subscribe("),
    "broker/delivery/view_change.py": By(DELIVERY, "another profile in place", "change_view"),
    "broker/delivery/viewed.py": By("broker/delivery/test_view_changes.py", "replays after changes of view"),
    # -- nodes
    "broker/nodes/base.py": By(NODES, "the seam, over one process and many"),
    "broker/nodes/redis.py": By(NODES, "heartbeats, questions, switches"),
    "broker/nodes/redis_scripts.py": By(NODES, "run by the registry"),
    "broker/nodes/single.py": By(NODES, "the seam, over one process"),
    "broker/nodes/switches.py": By(NODES, "switches that outlive a start"),
    "broker/nodes/this_node.py": By(
        "broker/nodes/test_overview.py", "what a node says of its connections", "behindEvents"
    ),
    # -- api
    "broker/api/following.py": By(
        "broker/api/test_doors.py transports/test_client_messages.py", "all ways in; pings", "following"
    ),
    "broker/api/offers.py": By(API, OVER_HTTP, "/api/profiles"),
    "broker/api/operators.py": By("broker/api/test_doors.py", "the permission `debug`, once per request"),
    "broker/api/polling.py": By("broker/api/test_messages_api.py", "long polls, and what ends them"),
    "broker/api/prompts.py": By("broker/api/test_doors.py", "permissions of prompts and actions"),
    "broker/api/publishing.py": By(f"broker/api/test_messages_api.py {API}", "checked, and once per key", "publish("),
    "broker/api/reading.py": By(
        "broker/api/test_messages_api.py", "pages of the timeline; who may read", "timeline_page("
    ),
    "broker/api/run_state.py": By(
        "transports/http/test_what_authorize_refuses.py", "as each caller may see it", "/state"
    ),
    # -- library
    "broker/library/checks.py": By(LIBRARY, "titles and metadata that are refused", "title"),
    "broker/library/exporting.py": By(f"{LIBRARY} {CONVERSATIONS}", "exports", "export"),
    "broker/library/forking.py": By(f"{LIBRARY} {CONVERSATIONS}", "forks", "fork"),
    "broker/library/importing.py": By(f"{LIBRARY} {CONVERSATIONS}", "imports", "import"),
    "broker/library/indexing.py": By(
        f"broker/library/test_store.py {LIBRARY}", "titles; messages as they are saved", "title"
    ),
    "broker/library/jsonl.py": By(LIBRARY, "lines that are good, bad, and cut off"),
    "broker/library/memory.py": By("broker/library/test_store.py", EACH_LIBRARY),
    "broker/library/redis_index.py": By("broker/library/test_redis.py", "words, shards, what an erasure leaves"),
    "broker/library/redis_scripts.py": By("broker/library/test_redis.py", "entries that several nodes write"),
    "broker/library/sqlite.py": By("broker/library/test_store.py", EACH_LIBRARY),
    "broker/library/terms.py": By("broker/library/test_store.py", "words in many languages"),
    # -- assembly
    "broker/assembly/build.py": By(
        "broker/assembly/test_lifecycle.py", "a broker is put together", "ConversationWSBroker"
    ),
    "broker/assembly/housekeeping.py": By(
        f"broker/assembly/test_retention_sweep.py broker/eventlog/test_retention.py {RACES}",
        "sweeps and ticks",
        "housekeeping",
    ),
    "broker/assembly/parts.py": By("broker/plugins/test_what_plugins_hold.py", "a record; nobody outside gets it"),
    "broker/assembly/stores.py": By(
        "broker/test_settings_extremes.py broker/assembly/test_lifecycle.py", "each store is chosen and opened", "Core("
    ),
    "broker/assembly/wiring.py": By(f"{DELIVERY} {RACES}", "a commit reaches clients, a reset drops them", "Core("),
    # -- cli
    "broker/cli/cluster.py": By("broker/cli/test_cli.py e2e/test_operate_page.py", "its commands, run", "cluster"),
    "broker/cli/doctor.py": By("broker/cli/test_cli.py", "its command, run", "doctor"),
    "broker/cli/main.py": By("broker/cli/test_cli.py", "its commands, run"),
    # -- transports
    "transports/admission.py": By(SERVE, "a server with few descriptors", "descriptor"),
    "transports/app.py": By("e2e/test_mounting.py", "the whole and its parts, mounted in another app"),
    "transports/closing.py": By(
        "transports/test_websocket.py", "close codes that a server refuses, reasons that are too long", "stand_in"
    ),
    "transports/fast_connection.py": By("transports/test_uvicorn_ws.py", "on real sockets"),
    "transports/framing.py": By("transports/test_deflate.py transports/test_asgi_delivery.py", "each kind of wire"),
    "transports/hard_end.py": By("e2e/test_stubborn_plugins.py", "a server whose plugins do not end", "start_broker"),
    "transports/on_demand.py": By("e2e/test_mounting.py", "a server that sends no lifespan events"),
    "transports/places.py": By(
        "transports/test_plugin_connections.py transports/test_websocket.py", "as many as may come", "max_connections"
    ),
    "transports/pool_groups.py": By("transports/test_pool_shards.py", "through the pool", "ConnectionPool"),
    "transports/takeover.py": By("transports/test_uvicorn_ws.py transports/test_uvicorn_ws_deflate.py", "taken over"),
    "transports/uvicorn_plain_ws.py": By(
        "e2e/test_delivery_ways.py", "one of the ways of delivery", "uvicorn_plain_ws:"
    ),
    "transports/workers.py": By(f"{SERVE} faults/test_redis_processes.py", "several processes", "--workers"),
    "transports/write_timeout.py": By(
        "transports/test_progress.py e2e/test_delivery_ways.py", "peers that take nothing"
    ),
    "transports/http/actions.py": By(API, OVER_HTTP, "/actions/"),
    "transports/http/answers.py": By(API, "tags and headers of answers", "etag"),
    "transports/http/body.py": By(API, "bodies that do not fit", "content-type"),
    "transports/http/caller.py": By(API, "credentials and keys", "authorization"),
    "transports/http/catalog.py": By(API, OVER_HTTP, "/api/profiles"),
    "transports/http/chat.py": By(API, OVER_HTTP, "/chat"),
    "transports/http/cut_short.py": By(SERVE, "requests at work when the drain is over", "503"),
    "transports/http/debug.py": By(f"{API} {SWITCHES}", OVER_HTTP, "/api/debug/"),
    "transports/http/health.py": By(API, OVER_HTTP, "/readyz"),
    "transports/http/publish.py": By(API, OVER_HTTP, "/api/publish"),
    "transports/http/recovery.py": By(API, OVER_HTTP, "/api/messages"),
    "transports/http/timeline.py": By(API, OVER_HTTP, "/api/timeline"),
}


def modules() -> Iterator[str]:
    for path in sorted(SOURCES.rglob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            yield path.relative_to(SOURCES).as_posix()


def own_file(module: str) -> Path:
    path = TESTS / module
    return path.with_name(f"test_{path.name}")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, and the names it takes of them, which may be modules too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def with_its_help(path: Path) -> set[Path]:
    """Return a test file, the fixtures around it, and what it imports of the tests' own modules."""
    found: set[Path] = set()
    waiting = [path, *(folder / "conftest.py" for folder in path.parents if folder.is_relative_to(TESTS))]
    while waiting:
        one = waiting.pop()
        if one in found or not one.is_file():
            continue
        found.add(one)
        waiting += [
            TESTS.parent / f"{name.replace('.', '/')}.py" for name in imported(one) if name.startswith("tests.")
        ]
    return found


def problems(module: str) -> Iterator[str]:
    line = ELSEWHERE.get(module)
    if own_file(module).is_file():
        if line is not None:
            yield f"it has {own_file(module).relative_to(TESTS)}: take its line out of ELSEWHERE"
        return
    if line is None:
        yield f"write {own_file(module).relative_to(TESTS)}, or say in ELSEWHERE which file tests it"
        return
    name = module.removesuffix(".py").replace("/", ".")
    for file in line.files.split():
        path = TESTS / file
        if not path.is_file() or not path.name.startswith("test_"):
            yield f"tests/{file} is no test file"
        elif not (line.door and line.door in path.read_text()) and not any(
            name in imported(one) for one in with_its_help(path)
        ):
            how = f"contains {line.door!r}" if line.door else "a door to it is named"
            yield f"tests/{file} does not import {name}, nor {how}"
    if not line.why:
        yield "its line gives no reason"
    texts = [path.read_text() for path in map(TESTS.joinpath, line.files.split()) if path.is_file()]
    if line.door and not any(line.door in text for text in texts):
        yield f"no file contains {line.door!r}"


@pytest.mark.parametrize("module", list(modules()))
def test_each_module_has_a_test_file_or_says_which(module: str) -> None:
    assert list(problems(module)) == []


def test_every_line_is_of_a_module_there_is() -> None:
    assert sorted(ELSEWHERE.keys() - set(modules())) == []
