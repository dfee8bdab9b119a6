"""Every hook, with its contract: the first page for plugin authors. Signatures and docstrings only.

A plugin is a module, a package or an object with functions marked `@hookimpl`:

    from broker.hookspecs import hookimpl

    @hookimpl
    def build_filter(profile):
        if profile.name == "quiet":
            return lambda envelope: not envelope.type.endswith(".delta")

Take only the arguments you need, by their exact names. First words tell kinds apart: `register_` (once, at
start), `build_` (a factory: returns an object or a callable), `resolve_`, `check_`, `authenticate`, `authorize` and
`classify` (they answer one request and may refuse it), `start_` and `on_` (a life; results of `on_` are ignored).

Holds for all of them: a hook written `async def` here may be implemented with `def` or `async def`, any other one
only with `def`. None is "not mine" or "no opinion". Answers are checked, fields included; one that does not fit is an
error of the plugin, and nothing of it is taken. What you are handed is yours: envelopes, drafts and records are copies,
and nobody else sees what you change in them. The plugin that was registered last is asked first;
`tryfirst=True` and `trylast=True` change that. Each implementation is called on its own: one that raises does not
keep the others from being called. Calls run on the event loop: what blocks it, blocks every client, so wait with
`await` or in a thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from pydantic import BaseModel
    from typer import Typer

    from broker.channels import Channel, EventType
    from broker.envelope import Draft, Envelope
    from broker.eventlog.base import EventLog
    from broker.interfaces import Broker, Connections, OpenConnection, OpenConversation
    from broker.profiles import Profile
    from broker.publisher import Publisher
    from broker.runs.engine import Engine, EnginePlan, EngineProfile
    from broker.runs.plan import ResolvedRequest, RunRequest
    from broker.runs.state import Run
    from broker.runs.store import RunStore
    from broker.runs.tools import Tool
    from broker.runs.turns import Turn
    from broker.security import Action, Credentials, Principal
    from broker.settings import Settings
    from broker.timeline.handlers import TimelineHandler
    from broker.timeline.store import TimelineStore

    Emitter = Coroutine[Any, Any, Any] | AbstractAsyncContextManager[Any]

PROJECT = "broker"
hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)


# --- start ------------------------------------------------------------------------------------------------


@hookspec
def register_settings() -> type[BaseModel] | None:
    """Declare the plugin's own settings as a pydantic model.

    Called by: PluginHost, when the plugin is loaded.
    When: once, before any other hook of this plugin.
    Blocking: allowed, the server does not run yet.
    Arguments: none.
    Returns: a model class. Each field is read from `BROKER_PLUGIN_<NAME>_<FIELD>` (upper case; lists,
        mappings and nested models as JSON); a field without variable keeps its default. The instance goes to
        the plugin's own `configure(settings)`, if it has that function, and is what
        `PluginHost.settings_of(name)` returns. None: no settings.
    Raises: an error here, in a value or in `configure` is a start-up error that names plugin, variable and
        value.
    Example:
        from pydantic import BaseModel

        class Settings(BaseModel):
            url: str = "http://127.0.0.1:9000/"

        settings = Settings()

        def configure(loaded):
            global settings
            settings = loaded

        @hookimpl
        def register_settings():
            return Settings
    """


@hookspec(firstresult=True)
def build_event_log(settings: Settings) -> EventLog | None:
    """Provide the event log: what gives envelopes their `seq` and makes them durable.

    Called by: ConversationWSBroker, when it is made.
    When: once, at start.
    Blocking: allowed; opening the store belongs into the log's own `open`.
    Arguments:
        settings: the server's settings, frozen.
    Returns: an object with the methods of `broker.eventlog.base.EventLog`, not opened yet; the first answer
        is taken. None: not mine; without any answer the server uses the store that its settings ask for.
    Raises: an error is a start-up error: a server that quietly used another store would lose data.
    Example:
        from broker.clock import SystemClock
        from broker.eventlog.memory import MemoryEventLog

        @hookimpl
        def build_event_log(settings):
            if settings.db == "scratch":
                return MemoryEventLog(SystemClock())
    """


@hookspec(firstresult=True)
def build_timeline_store(settings: Settings) -> TimelineStore | None:
    """Provide the timeline store: what keeps the folded entities of conversations.

    Called by: ConversationWSBroker, when it is made.
    When: once, at start.
    Blocking: allowed; opening the store belongs into the store's own `open`.
    Arguments:
        settings: the server's settings, frozen.
    Returns: an object with the methods of `broker.timeline.store.TimelineStore`, not opened yet; the first
        answer is taken. None: not mine; without any answer the server uses the store that its settings ask
        for.
    Raises: an error is a start-up error.
    Example:
        from broker.timeline.memory import MemoryTimelineStore

        @hookimpl
        def build_timeline_store(settings):
            if settings.db == "scratch":
                return MemoryTimelineStore()
    """


@hookspec(firstresult=True)
def build_run_store(settings: Settings) -> RunStore | None:
    """Provide the run store: what keeps runs, queued prompts and idempotency keys.

    Called by: ConversationWSBroker, when it is made.
    When: once, at start.
    Blocking: allowed; opening the store belongs into the store's own `open`.
    Arguments:
        settings: the server's settings, frozen.
    Returns: an object with the methods of `broker.runs.store.RunStore`, not opened yet; the first answer is
        taken. None: not mine; without any answer the server uses the store that its settings ask for.
    Raises: an error is a start-up error.
    Example:
        @hookimpl
        def build_run_store(settings):
            if settings.db == "scratch":
                from broker.runs.memory import MemoryRunStore

                return MemoryRunStore()
    """


@hookspec
def register_channels() -> Iterable[Channel] | None:
    """Declare channels: classes of envelopes that clients can choose.

    Called by: ConversationWSBroker, when it builds its catalog.
    When: once, at start.
    Blocking: allowed, the server does not run yet.
    Arguments: none.
    Returns: channels; a name that is already declared, by the core or by another plugin, is a start-up error.
        One named `debug.…` takes the permission `debug` unless it names another. `default=True` puts it into the
        profile `default`, for those who may see it. None: no channels.
    Raises: an error is reported under the plugin's name; its channels are missing, so profiles that name them
        are refused at start.
    Example:
        from broker.channels import Channel

        @hookimpl
        def register_channels():
            return [Channel("presence", kind="event", default=True, description="who is looking")]
    """


@hookspec
def register_event_types() -> Iterable[EventType] | None:
    """Declare event types: channel, model of the data, how neighbours merge, whether one ends its run.

    Called by: ConversationWSBroker, when it builds its catalog.
    When: once, at start.
    Blocking: allowed, the server does not run yet. A `merge` function runs on the event loop and must be
        pure.
    Arguments: none.
    Returns: event types; a name that is already declared is a start-up error. None: no event types.
    Raises: an error is reported under the plugin's name and its types stay undeclared. A `merge` that raises
        is reported, and the two envelopes travel one by one.
    Example:
        from broker.channels import EventType

        @hookimpl
        def register_event_types():
            return [EventType("presence.joined", channel="sem", description="somebody came")]
    """


@hookspec
def register_profiles() -> Iterable[Profile] | None:
    """Declare profiles: named ways to look at a conversation, chosen by clients with `profile=`.

    Called by: ConversationWSBroker, when it builds its catalog.
    When: once, at start.
    Blocking: allowed, the server does not run yet.
    Arguments: none.
    Returns: profiles; a name that is already declared is a start-up error. None: no profiles.
    Raises: an error is reported under the plugin's name; its profiles do not exist and clients asking for
        them are refused.
    Example:
        from broker.profiles import Profile

        @hookimpl
        def register_profiles():
            return [Profile("quiet", "final messages", channels=("sem",), event_types=("llm.final", "run.*"))]
    """


@hookspec
def register_timeline_handlers() -> Iterable[TimelineHandler] | None:
    """Declare how event types fold into timeline entities.

    Called by: ConversationWSBroker, when it builds its projector.
    When: once, at start. The folds run once per envelope of their type, and again whenever a conversation is
        folded again: they must be pure, so no clock, no random, no I/O. Entities and envelope are copies, and what is
        returned is copied.
    Blocking: no. A fold runs on the event loop; 1 ms is much.
    Arguments: none.
    Returns: handlers, at most one per event type; a second one for a type is a start-up error. None: no
        handlers.
    Raises: an error is reported under the plugin's name. A fold that raises, or returns an entity that cannot be
        written (props that are no plain JSON, half a surrogate pair, an id its `keys` do not name), sends that one
        envelope to the conversation's dead letters and the rest goes on; `LateEnvelope` is no error but a refusal.
        Folds are never quarantined: the timeline has to equal the fold of the log.
    Example:
        from broker.timeline.handlers import TimelineHandler, new_entity

        def fold(entities, envelope):
            return [new_entity(envelope, "note", text=envelope.data["text"])]

        @hookimpl
        def register_timeline_handlers():
            return [TimelineHandler("note.added", fold)]
    """


@hookspec
def register_engine_profiles() -> Iterable[EngineProfile] | None:
    """Declare named configurations of engines, which prompts choose as `engine_profile`.

    Called by: RunService, when it starts.
    When: once, at start.
    Blocking: allowed, the server does not run yet.
    Arguments: none.
    Returns: engine profiles; a name that is already declared is a start-up error. The one with the highest
        priority is the server's default. None: no engine profiles.
    Raises: an error is reported under the plugin's name; its engine profiles do not exist.
    Example:
        from broker.runs.engine import EngineProfile

        @hookimpl
        def register_engine_profiles():
            return [EngineProfile("parrot", engine="parrot", description="says what you say")]
    """


@hookspec
def register_tools() -> Iterable[Tool] | None:
    """Declare tools that models may call while they answer.

    Called by: RunService, when it starts.
    When: once, at start. A tool's `call` runs whenever a model asks for it.
    Blocking: a plain `call` runs on a worker thread and may block up to its `timeout_s`, up to 32 of a plugin at once; an
        `async def` one may not block.
    Arguments: none.
    Returns: tools; a name that is already declared is a start-up error. None: no tools.
    Raises: an error is reported under the plugin's name; its tools do not exist. A `call` that raises answers
        the model with the error's text; the run goes on.
    Example:
        from broker.runs.tools import Tool

        def add(input, context):
            return input["a"] + input["b"]

        NUMBER = {"type": "number"}
        SCHEMA = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}

        @hookimpl
        def register_tools():
            return [Tool("add", "Add two numbers.", SCHEMA, add)]
    """


@hookspec
def register_transports(app: Any, broker: Broker, connections: Connections) -> None:
    """Add another way for bytes to get in and out, beside WebSocket, SSE and long poll.

    Called by: the application factory in `transports.app`.
    When: once per application, before it serves.
    Blocking: allowed, the server does not run yet.
    Arguments:
        app: the ASGI application (FastAPI) to mount on.
        broker: the broker, not started yet: `authenticate` says who is calling, `publisher` publishes.
        connections: `admit` lets a caller in, `add` takes a function that sends bytes and returns a connection to
            subscribe; leaving its block forgets it. A slow one is brought up to date from the log, as any other.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; the other transports serve. What `admit`, `add`
        and `subscribe` raise is a BrokerError, to be told to the caller: from a route it becomes a problem document,
        as long as the answer has not begun.
    Example:
        import asyncio

        from starlette.requests import Request
        from starlette.responses import StreamingResponse

        from broker.errors import BrokerError
        from broker.security import Credentials

        def lines(messages):
            return [message.text + b"\\n" for message in messages]

        @hookimpl
        def register_transports(app, broker, connections):
            @app.get("/lines/{conv_id}")
            async def follow(conv_id: str, request: Request):
                bearer = request.headers.get("authorization", "").removeprefix("Bearer ") or None
                caller = await broker.authenticate(Credentials(bearer, headers=dict(request.headers)))
                admitted = await connections.admit(caller, conv_id, since=0)

                async def body():
                    waiting = asyncio.Queue(maxsize=1)  # the next chunk is taken when this one has been sent
                    try:
                        async with connections.add(waiting.put, framing=lines, close=lambda *_: waiting.put(None)) as one:
                            await one.subscribe(admitted)
                            while (chunk := await waiting.get()) is not None:
                                yield chunk
                    except BrokerError as error:  # too many connections, the store is away: the status is out already
                        yield b'{"refused": "%s"}\\n' % error.code.encode()

                return StreamingResponse(body(), media_type="application/x-ndjson")
    """


@hookspec
def register_routes(router: Any) -> None:
    """Add HTTP routes of the plugin's own.

    Called by: the application factory in `transports.app`.
    When: once per application, before it serves.
    Blocking: allowed here. A route `async def` runs on the event loop, a plain one on a worker thread.
    Arguments:
        router: a FastAPI `APIRouter`; its routes are mounted below the server's prefix. Authentication is the
            route's own business: ask the broker (`authenticate`, `authorize`) before telling anything about a
            conversation.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; routes added before it stay. A route that raises
        answers 500.
    Example:
        @hookimpl
        def register_routes(router):
            @router.get("/api/hello")
            async def hello() -> dict[str, str]:
                return {"hello": "world"}
    """


@hookspec
def register_commands(cli: Typer) -> None:
    """Add commands to the `broker` command line.

    Called by: `broker.cli`, before it parses its arguments.
    When: once per command line.
    Blocking: allowed, but every `broker` command pays for it: import what is slow inside the command.
    Arguments:
        cli: the `typer.Typer` application.
    Returns: nothing.
    Raises: an error is reported under the plugin's name on standard error; the other commands work.
    Example:
        @hookimpl
        def register_commands(cli):
            @cli.command("hello")
            def hello(name: str = "world") -> None:
                print(f"hello {name}")
    """


@hookspec
async def on_startup(broker: Broker) -> None:
    """Open what the plugin needs: clients, files, background tasks.

    Called by: ConversationWSBroker.start.
    When: once, when the stores are open, before the first connection is accepted, and before any engine, tool or
        emitter of this process runs: runs that an earlier process left go on afterwards.
    Blocking: wait with `await`; the server is not ready before all have returned or timed out.
    Arguments:
        broker: the running broker; it can publish and read, and takes prompts when all have returned.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; the server starts without what the plugin wanted to
        open.
    Example:
        import asyncio

        tasks = set()

        @hookimpl
        async def on_startup(broker):
            tasks.add(asyncio.create_task(asyncio.sleep(3600), name="my-plugin"))
    """


@hookspec
async def on_shutdown(broker: Broker) -> None:
    """Close what `on_startup` opened.

    Called by: ConversationWSBroker.stop.
    When: once, after clients were told to come back elsewhere and runs have ended, before connections and stores are
        closed. Not where an operator switched the plugin off.
    Blocking: wait with `await`; the process ends without you after the time limit.
    Arguments:
        broker: the broker; it can still be read, but takes no more drafts.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; the shutdown goes on.
    Example:
        tasks = set()

        @hookimpl
        async def on_shutdown(broker):
            for task in tasks:
                task.cancel()
    """


# --- a request comes in -----------------------------------------------------------------------------------


@hookspec(firstresult=True)
async def authenticate(credentials: Credentials) -> Principal | None:
    """Say who is asking.

    Called by: `broker.plugins.access`, for HTTP, WebSocket and SSE alike.
    When: once per HTTP request and once per connection.
    Blocking: wait with `await`; look keys up from memory where you can, this is paid by every request.
    Arguments:
        credentials: what the caller presented: bearer token, ticket, headers, peer address.
    Returns: the caller; the first answer is taken and later plugins are not asked. With `--auth NAME` that plugin alone is
        asked, and while it is switched off nobody comes in. None: these credentials are not mine.
    Raises: `AuthenticationFailed` says "mine, but wrong" and refuses the caller (401, close code 4401). Any
        other error refuses too and is reported under the plugin's name. Never quarantined: a stranger who can
        make it fail must not be able to switch it off or to lock everybody out.
    Example:
        import hmac

        from broker.errors import AuthenticationFailed
        from broker.security import Principal

        @hookimpl
        def authenticate(credentials):
            if credentials.bearer is None or not credentials.bearer.startswith("dev-"):
                return None
            if not hmac.compare_digest(credentials.bearer, "dev-secret"):
                raise AuthenticationFailed("the development token is wrong; ask for a new one")
            return Principal("developer", frozenset({"debug"}))
    """


@hookspec
async def authorize(principal: Principal, action: Action, conv_id: str | None, channels: Sequence[str]) -> bool | None:
    """Say whether a caller may do something. All plugins must allow it.

    Called by: `broker.plugins.access`, before every read, publish, prompt, action and subscription.
    When: once per request; once per connection and again on each change of its view. Once more, one by one where that
        is refused, about channels that a view with state leaves out: what was made of their events may be in the state.
        For every connection again when a plugin is switched; who is refused then is closed with 4403.
    Blocking: wait with `await`; answer from memory where you can.
    Arguments:
        principal: who asks.
        action: what for: `read`, `create`, `publish`, `send`, `act`, `erase`, `list`, `debug`.
        conv_id: which conversation; None where the action is about none or about all of them.
        channels: of `read` the channels whose events, or what was made of them, would be told: in titles, search and
            runs' states, too; of `publish` those that are written to. Empty where the action is not about channels, and
            where a caller was refused them and would still be told that the conversation exists.
    Returns: False refuses; True allows; None has no opinion. One False is enough.
    Raises: `PermissionDenied` refuses and its text reaches the caller. Any other error refuses too and is
        reported under the plugin's name. Never quarantined: skipping it would open the door.
    Example:
        @hookimpl
        def authorize(principal, action, conv_id):
            if conv_id is not None and conv_id.startswith("private-"):
                return conv_id in principal.claims.get("conversations", ())
    """


@hookspec(firstresult=True)
async def resolve_request(request: RunRequest) -> ResolvedRequest | None:
    """Decide the request policy: which conversation, engine profile and overrides a prompt runs with.

    Called by: RunService, for every prompt, before it is queued.
    When: once per prompt; a repeated idempotency key gets the first answer without asking again.
    Blocking: wait with `await`; the prompt's HTTP request waits for the answer.
    Arguments:
        request: principal, conv_id (None asks for a new conversation), prompt, engine_profile (None leaves
            the choice to you), overrides, current_profile (the engine profile that the conversation has) and
            default_profile (the server's); frozen.
    Returns: what to run; the first answer is taken. None: not mine; without any answer the request is taken
        as it came.
    Raises: a `BrokerError` (`PermissionDenied`, `InvalidOverrides`, …) refuses the prompt with its own
        status; any other error refuses it too and is reported under the plugin's name.
    Example:
        from broker.runs.plan import ResolvedRequest

        @hookimpl
        def resolve_request(request):
            if request.conv_id is not None and request.prompt.startswith("/parrot "):
                return ResolvedRequest(request.conv_id, "parrot")
    """


@hookspec(firstresult=True)
async def build_engine(plan: EnginePlan) -> Engine | None:
    """Build the engine for a plan.

    Called by: the run's runner.
    When: before a run, only if the plan's signature differs from that of the engine at hand.
    Blocking: wait with `await`; open connections on first use rather than here.
    Arguments:
        plan: engine profile, engine, config with overrides applied, signature; frozen.
    Returns: an engine: `stream` (an async generator of events of `broker.runs.engine`) and `aclose`; the first answer is
        taken. None: `plan.engine` is not mine; without any answer the run fails.
    Raises: an `EngineError` fails the run with its text; any other error fails it too and is reported under
        the plugin's name.
    Example:
        from broker.runs.engine import Finish, TextDelta

        class Parrot:
            async def stream(self, request):
                yield TextDelta(request.messages[-1].content)
                yield Finish("stop")

            async def aclose(self):
                pass

        @hookimpl
        def build_engine(plan):
            if plan.engine == "parrot":
                return Parrot()
    """


# --- a conversation lives ---------------------------------------------------------------------------------


@hookspec
def start_emitters(conversation: OpenConversation, publisher: Publisher) -> Emitter | Iterable[Emitter] | None:
    """Start what publishes into a conversation for as long as it lives.

    Called by: EmitterSupervisor.
    When: once when a conversation is opened in this process, and once more for each restart of an emitter.
    Blocking: no. The hook returns at once; the emitters run as tasks on the event loop.
    Arguments:
        conversation: `conv_id`, `epoch` and `position` (its newest seq) when the hook is called.
        publisher: publishes into this conversation.
    Returns: an emitter or several: coroutines (an `async def` implementation is one itself) or async context
        managers, entered at once and left when the conversation closes. None: no emitter, and no task.
    Raises: an error is reported under the plugin's name. An emitter that raises is reported and restarted
        with exponential back-off: the hook is called anew and the emitter at the same place of its answer is
        taken. One that returns is done. At close each is cancelled and has a few seconds to end. As long as one
        runs, its conversation is not idle; where more than `BROKER_MAX_OPEN_CONVERSATIONS` are open, it goes last.
    Example:
        import asyncio

        async def heartbeat(publisher):
            while True:
                await asyncio.sleep(30)
                await publisher.publish("log", {"message": "still here", "level": "info"})

        @hookimpl
        def start_emitters(conversation, publisher):
            if conversation.conv_id.startswith("demo-"):
                return heartbeat(publisher)
    """


@hookspec
def on_conversation_opened(conversation: OpenConversation) -> None:
    """Observe that a conversation was opened in this process.

    Called by: ConversationManager.
    When: when the conversation is first needed here, and again after it was evicted.
    Blocking: no. It runs on the event loop before the first envelope is dispatched; hand work to a task.
    Arguments:
        conversation: `conv_id`, `epoch` and `position` (its newest seq) when the hook is called.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; nobody else notices. Repeated failure leads to
        quarantine.
    Example:
        seen = set()

        @hookimpl
        def on_conversation_opened(conversation):
            seen.add(conversation.conv_id)
    """


@hookspec
def on_conversation_closed(conversation: OpenConversation, reason: str) -> None:
    """Observe that a conversation left this process's memory.

    Called by: ConversationManager.
    When: when an idle conversation is evicted, or one is erased; not at shutdown.
    Blocking: no. It runs on the event loop.
    Arguments:
        conversation: `conv_id`, `epoch` and last `position`.
        reason: `idle` or `erased`.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; nobody else notices. Repeated failure leads to
        quarantine.
    Example:
        counts = {}

        @hookimpl
        def on_conversation_closed(conversation, reason):
            counts[reason] = counts.get(reason, 0) + 1
    """


@hookspec
def on_connection_opened(connection: OpenConnection) -> None:
    """Observe that a client subscribed to a conversation: presence, audit.

    Called by: `broker.delivery`, once a subscription stands.
    When: once per connection, after it was let in.
    Blocking: no. It runs on the event loop; hand work to a task.
    Arguments:
        connection: `connection_id`, `conv_id`, `profile`, `channels` and `subject` of the subscription.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; the connection stays. Repeated failure leads to
        quarantine.
    Example:
        present = {}

        @hookimpl
        def on_connection_opened(connection):
            present.setdefault(connection.conv_id, set()).add(connection.connection_id)
    """


@hookspec
def on_connection_closed(connection: OpenConnection, reason: str) -> None:
    """Observe that a client went away.

    Called by: `broker.delivery`, once a subscription that stood has ended.
    When: once for each `on_connection_opened`.
    Blocking: no. It runs on the event loop.
    Arguments:
        connection: `connection_id`, `conv_id`, `profile`, `channels` and `subject` of the subscription.
        reason: why, in a few words, for people: `closed`, `gone`, `drain`, …
    Returns: nothing.
    Raises: an error is reported under the plugin's name; nobody else notices. Repeated failure leads to
        quarantine.
    Example:
        present = {}

        @hookimpl
        def on_connection_closed(connection, reason):
            present.get(connection.conv_id, set()).discard(connection.connection_id)
    """


# --- an envelope travels ----------------------------------------------------------------------------------


@hookspec
def check_draft(draft: Draft) -> Draft | None:
    """Validate, enrich or refuse a draft before it gets its `seq`.

    Called by: ConversationWSBroker.publish.
    When: once per draft, whoever publishes it; each plugin gets what the one before it returned.
    Blocking: no. It runs on the event loop for every draft: answer within 0.1 ms.
    Arguments:
        draft: type, data, id, channel, dedupe_key; a copy of the producer's, whose data fit their type.
    Returns: the draft to go on with, the one you were given or another; it is compared with its type once more. None:
        leave the draft as it was, whatever you did to your copy.
    Raises: `DraftRefused` refuses the draft, and with it all that were published together; the publisher gets
        the text. Any other error refuses too, as a `PluginError` that names the plugin, and is reported. The
        end of a run cannot be refused: it is offered again without its details, and then told without asking.
        Never quarantined: a producer who can make it fail must not be able to switch it off.
    Example:
        from broker.errors import DraftRefused

        @hookimpl
        def check_draft(draft):
            if draft.type == "note.added" and not draft.data.get("text"):
                raise DraftRefused("a note needs a text")
    """


@hookspec(firstresult=True)
def classify(event_type: str) -> str | None:
    """Name the channel of an event type that nobody declared.

    Called by: ConversationWSBroker.publish, through a lookup by type.
    When: once per undeclared event type, then the answer is kept until plugins change.
    Blocking: no. It runs on the event loop.
    Arguments:
        event_type: dotted name, `notes.added`.
    Returns: the name of an event channel that exists; the first answer is taken. None: not mine; without any
        answer the channel is `sem`.
    Raises: an error refuses the draft and is reported under the plugin's name: on a guessed channel it could
        reach clients that must not see it.
    Example:
        @hookimpl
        def classify(event_type):
            if event_type.startswith("trace."):
                return "debug.trace"
    """


@hookspec
def build_filter(profile: Profile) -> Callable[[Envelope], bool] | None:
    """Return a predicate that decides which envelopes connections with this profile receive.

    Called by: the compilation of views in `broker.views`.
    When: once when a view of the profile is first needed, and again after a plugin change. The predicate runs
        once per envelope and view, before encoding, for live delivery, recovery and long poll alike.
    Blocking: no. The predicate runs on the event loop: answer within 0.1 ms from memory.
    Arguments:
        profile: name, channels, options and permission of the profile, frozen.
    Returns: a predicate: True to show, False (or nothing) to withhold; anything else is an error. All plugins are asked;
        one False is enough. None: no opinion, and no cost per envelope. It holds for whatever is made of events,
        too: an entity is shown where its
        `timeline.upsert` passes and every event passes by which it can be told (a finished message as its
        `user.message` or `llm.final`, a call as its `tool.…`; of a plugin's own types one event each, with the
        entity's props as data). Titles and search are made of what the profile `default` shows, and the state of
        runs is seen through it: a filter for another profile alone leaves these as they are.
        `broker.testing.assert_hidden` proves that a filter holds.
    Raises: an exception of the predicate withholds that envelope from this view; one of the factory withholds
        all envelopes from it until it is compiled again. Both are reported under the plugin's name. A predicate that
        keeps failing or stalling in a view is quarantined there: it is not called for that view any more, which withholds
        everything until it is released; other views go on.
    Example:
        @hookimpl
        def build_filter(profile):
            if profile.name == "quiet":
                return lambda envelope: not envelope.type.endswith(".delta")
    """


@hookspec
def build_transform(profile: Profile) -> Callable[[Envelope], Envelope] | None:
    """Return a function that adds, redacts or reshapes `data` for connections with this profile.

    Called by: the compilation of views in `broker.views`.
    When: as for `build_filter`. The function runs once per envelope that passed the filters, and view; each
        plugin gets what the one before it returned.
    Blocking: no. The function runs on the event loop: 0.1 ms.
    Arguments:
        profile: name, channels, options and permission of the profile, frozen.
    Returns: a function `envelope -> envelope`; return `envelope.with_data({...})` to change something, the same object to
        change nothing, never another `seq`. What you change in `envelope.data` in place is changed for this view alone.
        None: no opinion, no cost. It holds for whatever is made of events, too: one that leaves a `timeline.upsert` as it
        is, is applied to the events by which the entity can be told (see `build_filter`), and the entity is shown
        as they then fold; of an upsert it may change the entity's `id`, `kind` and `props`, not its version and
        position. `broker.testing.assert_hidden` proves that a mask holds.
    Raises: as for `build_filter`: the envelope is withheld, since the original may hold what was to be
        redacted.
    Example:
        @hookimpl
        def build_transform(profile):
            if profile.permission is not None:
                return None

            def mask(envelope):
                if "password" not in envelope.data:
                    return envelope
                return envelope.with_data({**envelope.data, "password": "***"})

            return mask
    """


@hookspec
async def on_published(envelopes: Sequence[Envelope]) -> None:
    """Observe what was published: bridges, metrics, audit.

    Called by: `broker.plugins.observers`, after the envelopes are durable.
    When: once per batch of up to 1000, in `seq` order within a conversation; live only, not for recovery.
    Blocking: wait with `await`, up to the time limit; the next batch waits for this one, delivery to clients does not.
        An observer that falls 50,000 envelopes behind misses the oldest of them; the log still has them.
    Arguments:
        envelopes: a list of copies, yours alone.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; delivery does not notice. Repeated failure or
        stalling leads to quarantine.
    Example:
        from collections import Counter

        by_type = Counter()

        @hookimpl
        def on_published(envelopes):
            by_type.update(envelope.type for envelope in envelopes)
    """


# --- a run works ------------------------------------------------------------------------------------------


@hookspec
async def on_turn_phase(turn: Turn, phase: str) -> None:
    """Observe a run's recorded input and output: snapshots, evaluation, cost.

    Called by: the run's turn recorder, after the turn was stored.
    When: at each phase of a run, in order.
    Blocking: wait with `await`, up to the time limit; the run's later phases are recorded after this one, the run
        itself goes on.
    Arguments:
        turn: ids and content of the turn, frozen.
        phase: `request`, `response`, `tools` or `final`.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; the run goes on. Repeated failure or stalling leads
        to quarantine.
    Example:
        tokens = {}

        @hookimpl
        def on_turn_phase(turn, phase):
            if phase == "response":
                used = turn.content.get("usage", {}).get("total_tokens", 0)
                tokens[turn.run_id] = tokens.get(turn.run_id, 0) + used
    """


@hookspec
async def on_run_finished(run: Run) -> None:
    """Observe that a run ended: finished, failed, cancelled or interrupted.

    Called by: RunService, after the run's terminal event is durable.
    When: once per run, also for a run whose end was written by the recovery after a crash.
    Blocking: wait with `await`, up to the time limit; the conversation's next run does not wait for it.
    Arguments:
        run: the ended run with its status.
    Returns: nothing.
    Raises: an error is reported under the plugin's name; nobody else notices. Repeated failure leads to
        quarantine.
    Example:
        ended = []

        @hookimpl
        async def on_run_finished(run):
            ended.append(run.status)
    """
