"""Runs tools: input checked, time, concurrency and output limited, and no failure leaves this room as an exception."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
import threading
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from jsonschema import Draft202012Validator

from broker.characters import beginning
from broker.copies import own
from broker.errors import quoted
from broker.runs.engine import ToolCall, ToolSpec
from broker.runs.foreign import clean_text, told, unusable
from broker.runs.places import AllStuck, Held, Places
from broker.runs.plan import check_schema, check_unique
from broker.runs.ports import Drive, Plugins
from broker.runs.tools import Tool, ToolContext, ToolResult

MAX_THREADS_PER_PLUGIN = 32
"""Plain (not async) tools of one plugin that run at once in this process. A thread cannot be stopped: one that hangs keeps
its place, so each plugin has places of its own."""


HOOK = "register_tools"

_NOTE_BYTES = 256
"""Room for the words that say that a result was cut."""


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """What became of a call. result: JSON value as it is published. error: why it failed, None if it did not."""

    result: ToolResult
    error: str | None = None

    @property
    def content(self) -> str:
        """The result as the model gets it: text as it is, anything else as JSON."""
        return self.result if isinstance(self.result, str) else orjson.dumps(self.result).decode()


def failed(error: str) -> ToolOutcome:
    """Return the outcome of a call that failed, told to clients and model in the same way."""
    error = clean_text(error)
    return ToolOutcome({"error": error}, error)


@dataclass(slots=True)
class _Entry:
    tool: Tool
    plugin: str
    validator: Draft202012Validator
    places: Places | None
    drive: Drive


class ToolRunner:
    """The tools of all plugins, by name."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._entries: dict[str, _Entry] = {}
        self._threads: dict[str, Places] = {}
        self.load()

    def load(self) -> None:
        """Collect the tools of all plugins again.

        Raises PluginError for a name that two register, and for `parameters` that are no JSON schema.
        """
        entries: dict[str, _Entry] = {}
        owners: dict[str, str] = {}
        for plugin, result in self._plugins.call_collect(HOOK):
            for tool in [result] if isinstance(result, Tool) else result:
                check_unique(plugin, HOOK, tool.name, owners)
                check_schema(plugin, f"tool {tool.name!r}", tool.parameters)
                places = Places(tool.max_concurrency) if tool.max_concurrency else None
                drive = self._plugins.driver(plugin, HOOK)
                entries[tool.name] = _Entry(tool, plugin, Draft202012Validator(tool.parameters), places, drive)
        self._entries = entries

    def specs(self, names: list[str]) -> list[ToolSpec]:
        """Return what the engine offers to the model: those of `names` that are loaded."""
        entries = [self._entries[name] for name in names if name in self._entries]
        return [ToolSpec(e.tool.name, e.tool.description, e.tool.parameters) for e in entries]

    def refusal(self, call: ToolCall, offered: list[str]) -> str | None:
        """Return why a call cannot be run at all, None if it can: unknown tool, or input that its schema refuses."""
        entry = self._entries.get(call.name) if call.name in offered else None
        if entry is None:
            known = [name for name in offered if name in self._entries]
            return f"tool {quoted(call.name)} does not exist; tools: {', '.join(sorted(known)) or 'none'}"
        try:
            error = next(iter(entry.validator.iter_errors(dict(call.input))), None)
        except Exception as exc:  # a schema that cannot be applied: a reference to nowhere, an endless pattern
            return f"input of {call.name} cannot be checked: {told(exc)}"
        if error is None:
            return None
        where = ".".join(str(part) for part in error.absolute_path)
        return f"input of {call.name} is not valid{f' at {where}' if where else ''}: {error.message[:300]}"

    def needs_approval(self, name: str) -> bool:
        """Say whether a person must approve each call of the tool."""
        return name in self._entries and self._entries[name].tool.requires_approval

    async def run(self, call: ToolCall, context: ToolContext, max_result_bytes: int = 1_000_000) -> ToolOutcome:
        """Run a call that `refusal` had nothing against. Never raises but CancelledError.

        max_result_bytes: longest result, as JSON, that one envelope carries; a longer one is cut.
        """
        entry = self._entries.get(call.name)
        if entry is None:
            return failed(f"tool {quoted(call.name)} was unloaded")
        tool, held = entry.tool, Held()
        in_thread = not inspect.iscoroutinefunction(tool.call)
        try:
            # What it waits for its turn is not its own time.
            if entry.places is not None:
                await held.enter(entry.places)
            if in_thread:
                await held.enter(self._threads.setdefault(entry.plugin, Places(MAX_THREADS_PER_PLUGIN)))
        except AllStuck:
            held.leave()
            return self._all_stuck(entry)
        except BaseException:
            held.leave()
            raise
        try:
            async with asyncio.timeout(tool.timeout_s) as limit:
                value = await self._call(entry, own(call.input), context, held, in_thread)
        except TimeoutError as exc:
            if not limit.expired():
                return self._raised(entry, exc)
            if in_thread:
                held.got_stuck()
            return failed(f"tool {tool.name} did not answer within its time limit of {tool.timeout_s:g} s")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._raised(entry, RuntimeError("it was cancelled from within"))
        except Exception as exc:
            return self._raised(entry, exc)
        return _limited(tool, value, max_result_bytes)

    def _all_stuck(self, entry: _Entry) -> ToolOutcome:
        error = RuntimeError("every place for its calls is held by one that did not end within its time limit")
        return self._raised(entry, error)

    def _raised(self, entry: _Entry, exc: Exception) -> ToolOutcome:
        self._plugins.report(entry.plugin, HOOK, exc)
        return failed(f"tool {entry.tool.name} failed: {told(exc)}")

    async def _call(
        self, entry: _Entry, tool_input: Mapping[str, Any], context: ToolContext, held: Held, in_thread: bool
    ) -> ToolResult:
        call = entry.tool.call
        if not in_thread:
            try:
                return await entry.drive(call(tool_input, context))  # type: ignore[no-any-return, arg-type]
            finally:
                held.leave()
        value: ToolResult | Awaitable[ToolResult] = await _in_thread(held, lambda: call(tool_input, context))
        # A plain function may hand back an awaitable (a partial, a callable object).
        return await entry.drive(value) if inspect.isawaitable(value) else value


async def _in_thread(held: Held, fn: Any) -> Any:
    """Run `fn` on a thread of its own, which holds its places until it really ends, even when nobody waits any more.

    Daemon threads: a tool that hangs must not keep the process from ending, which an executor's threads would.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        held.leave()
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(value)

    def work() -> None:
        value: Any = None
        error: Exception | None = None
        try:
            value = fn()
        except StopIteration as exc:  # a future refuses it
            error = RuntimeError(f"StopIteration: {exc}")
        except BaseException as exc:
            error = exc if isinstance(exc, Exception) else RuntimeError(f"{type(exc).__name__}: {exc}")
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    context = contextvars.copy_context()
    threading.Thread(target=lambda: context.run(work), name="tool", daemon=True).start()
    return await future


def _limited(tool: Tool, value: ToolResult, max_bytes: int) -> ToolOutcome:
    """Return the outcome with a result that is cut, and says so, where it is longer than the tool may answer.

    max_bytes: what one envelope carries, as JSON, whatever the tool may answer.
    """
    if (why := unusable(value, sys.maxsize)) is not None:
        return failed(f"tool {tool.name} returned {type(value).__name__}, which JSON cannot carry (it {why})")
    written = orjson.dumps(value)
    # Decoded again: what is published cannot be changed any more by the tool, nor differ from what is replayed.
    encoded = value.encode() if isinstance(value, str) else written
    limit = tool.max_output_bytes
    if len(encoded) <= limit and len(written) <= max_bytes:
        return ToolOutcome(orjson.loads(written))
    kept = _beginning(encoded, limit)
    if len(orjson.dumps(kept)) + _NOTE_BYTES > max_bytes:
        limit = max(0, max_bytes - _NOTE_BYTES) // 6  # JSON makes up to six bytes of one
        kept = _beginning(encoded, limit)
    return ToolOutcome(f"{kept}\n[cut: the first {limit} of {len(encoded)} bytes]")


def _beginning(encoded: bytes, limit: int) -> str:
    """Return the first `limit` bytes of a longer text, or a few less: no half characters."""
    following = encoded[: limit + 4].decode(
        errors="ignore"
    )  # one code point more, to see whether it belongs to the last
    return beginning(following, len(encoded[:limit].decode(errors="ignore")))
