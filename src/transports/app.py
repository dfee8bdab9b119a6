"""The web application: everything (`create_app`), or its parts for somebody else's FastAPI app.

    create_app()             API, WebSocket, SSE and web pages in one; its lifespan starts and stops the broker
    create_api(broker)       the API, WebSocket and SSE alone
    create_ui(...)           the web pages alone

Each can be mounted under any prefix. A mounted app gets no lifespan events from Starlette, so the outer app has to
start the broker: `FastAPI(lifespan=lifespan_of(app))`; see docs/how-to/embed.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from broker.broker import ConversationWSBroker
from broker.plugins import PluginHost
from broker.settings import Settings, load_settings
from transports.closing import Closing
from transports.http import problems
from transports.http.actions import actions_router
from transports.http.caller import Api
from transports.http.catalog import catalog_router
from transports.http.chat import chat_router
from transports.http.conversations import conversations_router
from transports.http.cut_short import CutShort
from transports.http.debug import debug_router
from transports.http.gate import Gate
from transports.http.health import health_router
from transports.http.publish import publish_router
from transports.http.recovery import recovery_router
from transports.http.timeline import timeline_router
from transports.pages import WebPages
from transports.places import Places
from transports.plugin_connections import PluginConnections
from transports.pool import ConnectionPool
from transports.sse import make_sse_endpoint
from transports.websocket import make_websocket_endpoint

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class _Made:
    """What a broker was made with. Kept apart from it, so that whoever gets the broker has no way to either (I7)."""

    pool: ConnectionPool
    plugins: PluginHost


_MADE: WeakKeyDictionary[ConversationWSBroker, _Made] = WeakKeyDictionary()

_ROUTERS: tuple[Callable[[Api], APIRouter], ...] = (
    chat_router,
    actions_router,
    conversations_router,
    timeline_router,
    recovery_router,
    publish_router,
    catalog_router,
    debug_router,
    health_router,
)


def create_broker(settings: Settings | None = None, *, plugins: Sequence[object] = ()) -> ConversationWSBroker:
    """Return a broker with its connection pool, not started yet.

    settings: None reads the environment. plugins: plugin objects beside those of entry points and, where
    the settings name one, of `plugins_dir`.
    Raises InvalidInput for unusable settings, PluginError for a broken plugin.
    """
    settings = settings or load_settings()
    pool = ConnectionPool(write_timeout_s=settings.write_timeout_s)
    host = PluginHost.load(settings, plugins)
    broker = ConversationWSBroker(settings, pool=pool, plugins=host)
    _MADE[broker] = _Made(pool, host)
    return broker


def create_app(
    settings: Settings | None = None,
    *,
    plugins: Sequence[object] = (),
    broker: ConversationWSBroker | None = None,
    ui_dir: str | Path | None = None,
) -> FastAPI:
    """Return the whole application: API, WebSocket, SSE and web pages; `app.state.broker` is its broker.

    broker: one made by `create_broker`, None makes it from settings and plugins. ui_dir: folder with the web pages,
    None: `settings.ui_dir`, else the bundled ones. With `settings.prefix` everything is served below it. Run alone, its
    lifespan starts and stops the broker; mounted, the outer app does (`lifespan_of`).
    """
    broker = broker or create_broker(settings, plugins=plugins)
    app = create_api(broker)
    pages = WebPages(ui_dir or broker.settings.ui_dir)
    app.router.default = _pages_below(pages)
    if not broker.settings.prefix:
        return app
    outer = FastAPI(title=app.title, lifespan=lifespan_of(broker), openapi_url=None, docs_url=None, redoc_url=None)
    outer.state.broker = broker
    outer.mount(broker.settings.prefix, app)
    problems.install(outer)
    return outer


def create_api(broker: ConversationWSBroker) -> FastAPI:
    """Return the API of `broker` (made by `create_broker`): HTTP routes, `/ws` and `/sse`, without web pages."""
    made = _MADE.get(broker) if isinstance(broker, ConversationWSBroker) else None
    if made is None:
        raise TypeError("create_api needs a broker made by transports.app.create_broker: it comes with its pool")
    app = FastAPI(
        title="Conversation broker",
        version=version("conversation-broker"),
        lifespan=lifespan_of(broker),
        docs_url=None,  # the pages load their scripts from other people's servers
        redoc_url=None,
    )
    app.state.broker = broker
    doors = broker.doors
    api = Api(doors)
    places = Places(made.pool, doors.settings.max_connections)
    # First: routes are tried in order, and matching all others took as long as the rest of accepting a connection.
    app.router.routes.append(WebSocketRoute("/ws", make_websocket_endpoint(doors, made.pool, places)))
    app.router.routes.append(Route("/sse", make_sse_endpoint(doors, made.pool, places), methods=["GET"]))
    for make_router in _ROUTERS:
        app.include_router(make_router(api))
    _add_routes_of_plugins(app, made.plugins)
    _add_transports_of_plugins(app, broker, made, places)
    problems.install(app)
    app.add_middleware(Gate, settings=broker.settings)
    app.add_middleware(CutShort)
    app.add_middleware(Closing)
    if broker.settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(broker.settings.allowed_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "if-none-match", "last-event-id"],
            expose_headers=["etag", "retry-after"],
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def _add_routes_of_plugins(app: FastAPI, plugins: PluginHost) -> None:
    for plugin, register in plugins.implementations("register_routes"):
        own_routes = APIRouter(tags=["plugins"])  # each its own: what one does to it changes nothing for the others
        try:
            register(router=own_routes)
        except (Exception, SystemExit) as exc:
            plugins.report(plugin, "register_routes", exc)
        app.include_router(own_routes)


def _add_transports_of_plugins(app: FastAPI, broker: ConversationWSBroker, made: _Made, places: Places) -> None:
    for plugin, register in made.plugins.implementations("register_transports"):
        report = partial(made.plugins.report, plugin, "register_transports")
        connections = PluginConnections(broker.doors, made.pool, places, report=report)
        try:
            register(app=app, broker=broker.handle, connections=connections)
        except (Exception, SystemExit) as exc:
            report(exc)


def create_ui(*, api_base: str = "./", directory: str | Path | None = None) -> ASGIApp:
    """Return the web pages as an application to be mounted.

    api_base: where the API is, as seen from the pages: a path such as "/broker/", or relative, "./" for pages and API
    at the same place. directory: own pages in place of the bundled ones; None: the bundled ones.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.router.default = WebPages(directory, api_base=api_base)
    problems.install(app)
    return app


def lifespan_of(*parts: FastAPI | ConversationWSBroker) -> Lifespan:
    """Return a FastAPI lifespan that starts the brokers of `parts` and stops them, for an app that mounts them.

    parts: brokers, or apps made by `create_app` or `create_api`; a broker that several share is started once.
    """
    brokers = list(dict.fromkeys(part.state.broker if isinstance(part, FastAPI) else part for part in parts))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for broker in brokers:
                await stack.enter_async_context(_running(broker))
            yield

    return lifespan


@asynccontextmanager
async def _running(broker: ConversationWSBroker) -> AsyncIterator[None]:
    starting: asyncio.Task[None] | None = None
    if broker.settings.redis_url is None:
        await broker.start()
    else:
        # Redis may be away for a while: health checks are answered meanwhile, and say so.
        starting = asyncio.create_task(broker.start_when_possible())
    try:
        yield
    finally:
        if starting is not None and not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        await broker.stop(drain_s=broker.settings.drain_timeout_s)


def _pages_below(pages: ASGIApp) -> ASGIApp:
    """Return what answers when no route of the API fits: a page, or "not found" for what can only be meant for it."""

    async def fallback(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 4404, "reason": "no such path"})
            return
        if get_route_path(scope).startswith("/api/") or scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        await pages(scope, receive, send)

    return fallback


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schema.setdefault("components", {}).setdefault("schemas", {})["Problem"] = {
            "type": "object",
            "description": "RFC 9457 problem details",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                "type": {"type": "string", "description": f"{problems.TYPE_PREFIX}<code>, stable"},
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string", "description": "what was wrong, the value, the remedy"},
            },
        }
        app.openapi_schema = schema
    return app.openapi_schema
