"""Engines in use: one per conversation, rebuilt if and only if the plan's signature changed (I10)."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from broker.errors import EngineError
from broker.runs.engine import Engine, EnginePlan
from broker.runs.ports import Plugins
from broker.tasks import Tasks

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 4.0


@dataclass(slots=True, eq=False)
class EngineLease:
    """An engine as one run holds it. The engine lives at least until the last lease on it is given back.

    plugin: who built it, and answers for it.
    """

    engine: Engine
    plugin: str
    plan: EnginePlan
    users: int = 0
    retired: bool = False


class EngineCache:
    """The engine that each conversation's newest plan asked for.

    A run that is under way keeps the engine it started with; the replaced one is closed after its last use.
    """

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._current: dict[str, EngineLease] = {}
        self._closing = Tasks()
        self.built = 0

    async def acquire(self, plan: EnginePlan) -> EngineLease:
        """Return the conversation's engine if it was built from an equal plan, else build one.

        Raises EngineError (`config`) when no plugin builds it or the one that should have failed. Give it back with
        `release`.
        """
        lease = self._current.get(plan.conv_id)
        if lease is None or lease.plan.signature != plan.signature:
            plugin, engine = await self._build(plan)
            self.forget(plan.conv_id)
            lease = self._current[plan.conv_id] = EngineLease(engine, plugin, plan)
        lease.users += 1
        return lease

    def release(self, lease: EngineLease) -> None:
        """Give a lease back."""
        lease.users -= 1
        self._close_if_unused(lease)

    def forget(self, conv_id: str) -> None:
        """Drop the conversation's engine: it was evicted or erased. A run that uses it may finish."""
        lease = self._current.pop(conv_id, None)
        if lease is not None:
            lease.retired = True
            self._close_if_unused(lease)

    async def aclose(self) -> None:
        """Close all engines and wait until those that are closing are closed."""
        for conv_id in list(self._current):
            self.forget(conv_id)
        await self._closing.wait(CLOSE_TIMEOUT_S + 2.0)  # what does not end is left behind a second after its time

    async def _build(self, plan: EnginePlan) -> tuple[str, Engine]:
        try:
            built: tuple[str, Engine] | None = await self._plugins.acall_first_named("build_engine", plan=plan)
        except EngineError:
            raise
        except Exception as exc:
            # A plugin host may have wrapped it with the plugin's name; an EngineError inside says it better.
            if isinstance(exc.__cause__, EngineError):
                raise exc.__cause__ from None
            raise EngineError(f"engine {plan.engine!r} could not be built: {exc}", kind="config") from exc
        if built is None:
            raise EngineError(
                f"no loaded plugin builds engine {plan.engine!r}, which engine profile {plan.engine_profile!r} asks for: "
                "load the plugin that does, or ask for another profile (`broker plugins list` shows what is loaded)",
                kind="config",
                engine=plan.engine,
            )
        self.built += 1
        return built

    def _close_if_unused(self, lease: EngineLease) -> None:
        if lease.retired and lease.users == 0:
            self._closing.spawn(self._close(lease))

    async def _close(self, lease: EngineLease) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._plugins.driver(lease.plugin, "build_engine")(lease.engine.aclose())
        except Exception as exc:
            self._plugins.report(lease.plugin, "build_engine", exc)
            log.warning("engine %s of %s did not close: %s", lease.plan.engine, lease.plan.conv_id, exc)
