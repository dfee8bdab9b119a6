"""Answers of hooks: whatever a plugin returns, what does not fit is its own failure, by name, and opens nothing."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import httpx
import pluggy
import pytest

from broker import hookspecs
from broker.channels import Channel, EventType
from broker.clock import ManualClock
from broker.envelope import Draft, Envelope
from broker.errors import AuthenticationFailed, InvalidDraft, InvalidInput, PermissionDenied, PluginError
from broker.hookspecs import hookimpl
from broker.interfaces import OpenConversation
from broker.plugins import IsolationLimits, PluginHost
from broker.plugins.access import Access
from broker.plugins.emitters import EmitterSupervisor
from broker.plugins.rules import FAIL_CLOSED, ITEM_TYPES, may_quarantine
from broker.profiles import Profile
from broker.runs.engine import EngineProfile
from broker.runs.plan import ResolvedRequest
from broker.runs.tools import Tool
from broker.security import Credentials, Principal
from broker.settings import Settings
from broker.testing import memory_broker
from broker.timeline.handlers import TimelineHandler
from transports.app import create_app

MANAGER = pluggy.PluginManager(hookspecs.PROJECT)
MANAGER.add_hookspecs(hookspecs)
HOOKS = vars(MANAGER.hook)
FAILURES = 3
ENVELOPE = Envelope("c1", "llm.delta", "m1", "sem", b'{"delta":"x"}', 1, 1_000_000)


async def _nothing() -> bool:
    return True


def _generator() -> Any:
    yield True


NONSENSE: dict[str, Callable[[], Any]] = {
    "true": lambda: True,
    "a text": lambda: "x",
    "a number": lambda: 3,
    "an object": object,
    "a coroutine": _nothing,
    "a generator": _generator,
    "a tuple": lambda: ("wrong", 1),
    "a class": lambda: Settings,
}

FITS = {
    ("authorize", "true"),
    ("classify", "a text"),  # until the catalog looks for such a channel
    ("start_emitters", "a coroutine"),
    ("authorize", "a coroutine"),  # it is awaited, and says True
    ("build_filter", "a class"),  # can be called, until it is
    ("build_transform", "a class"),
}

ANSWERS_NOTHING = {name for name in HOOKS if name.startswith("on_")} | {
    "register_transports",
    "register_routes",
    "register_commands",
}


class Plugin:
    """Answers one hook with what a test wants."""

    name = "odd"


def plugin_with(hook: str, answer: Callable[[], Any]) -> Plugin:
    arguments = ", ".join(HOOKS[hook].spec.argnames)
    made: dict[str, Any] = {"answer": answer}
    exec(f"def {hook}(self, {arguments}): return answer()", made)
    return cast("Plugin", type("Plugin", (Plugin,), {hook: hookimpl(made[hook])})())


def host_with(*plugins: object) -> PluginHost:
    host = PluginHost(clock=ManualClock(), limits=IsolationLimits(failures=FAILURES))
    for plugin in plugins:
        host.add(plugin)
    return host


def arguments_of(hook: str) -> dict[str, Any]:
    given = {name: object() for name in HOOKS[hook].spec.argnames}
    for name, value in (("profile", Profile("default")), ("draft", Draft("a.b", {})), ("channels", ())):
        if name in given:
            given[name] = value
    return given


async def ask(host: PluginHost, hook: str) -> Any:
    """Call a hook as the broker does; return what the caller gets."""
    spec, given = HOOKS[hook].spec, arguments_of(hook)
    awaited = spec.function.__code__.co_flags & 0x80
    if hook == "check_draft":
        return host.call_ordered(hook, **given)
    if hook in ("build_filter", "build_transform"):
        return [host.guard(name, hook, made)(ENVELOPE) for name, made in host.call_collect(hook, **given)]
    if hook == "start_emitters":
        ((_, implementation),) = host.implementations(hook)
        return implementation(**given)
    if spec.opts["firstresult"]:
        return await host.acall_first(hook, **given) if awaited else host.call_first(hook, **given)
    return await host.acall_collect(hook, **given) if awaited else host.call_collect(hook, **given)


def described(host: PluginHost) -> dict[str, Any]:
    return next(one for one in host.describe() if one["name"] == "odd")


REFUSED = [
    (hook, kind)
    for hook in HOOKS
    for kind in NONSENSE
    if hook not in ANSWERS_NOTHING and (hook, kind) not in FITS and hook != "register_settings"
]


def _name(part: object) -> str:
    """Name a case of a test: the same in every process, so without addresses of objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(part))[:120]


@pytest.mark.parametrize(("hook", "kind"), REFUSED, ids=_name)
async def test_an_answer_that_does_not_fit_is_the_plugins_failure_and_is_not_taken(hook: str, kind: str) -> None:
    """Every hook that answers something, with several kinds of nonsense: named, counted, nothing of it is used."""
    host = host_with(plugin_with(hook, NONSENSE[kind]))
    for _ in range(FAILURES):
        if hook in ITEM_TYPES:
            assert await ask(host, hook) == []
        elif hook == "start_emitters":
            with pytest.raises(PluginError, match=r"required|generator"):
                await ask(host, hook)
            continue
        else:
            with pytest.raises(PluginError, match=rf"plugin 'odd', hook {hook}: ") as told:
                await ask(host, hook)
            assert told.value.fields["plugin"] == "odd"
        assert described(host)["last_error"].startswith(f"{hook}: PluginError: returned ")
    assert described(host)["errors"] == (0 if hook == "start_emitters" else FAILURES)
    assert set(described(host)["quarantined"]) == ({hook} if hook in FAIL_CLOSED else set())
    gc.collect()  # no coroutine is left unawaited: that would be a warning, and warnings are errors


@pytest.mark.parametrize("hook", sorted(ANSWERS_NOTHING))
@pytest.mark.parametrize("kind", NONSENSE)
async def test_what_hooks_return_that_answer_nothing_is_not_looked_at_but_for_code_that_never_ran(
    hook: str, kind: str
) -> None:
    awaited = HOOKS[hook].spec.function.__code__.co_flags & 0x80
    host = host_with(plugin_with(hook, NONSENSE[kind]))
    for _ in range(FAILURES):
        await ask(host, hook)
    never_ran = kind == "a generator" or (kind == "a coroutine" and not awaited)
    assert described(host)["errors"] == (FAILURES if never_ran else 0)
    assert (described(host)["quarantined"].keys() == {hook}) == (never_ran and may_quarantine(hook))


async def _coroutine_in_a_coroutine() -> Any:
    return _nothing()


@pytest.mark.parametrize("hook", ["authenticate", "authorize", "resolve_request", "build_engine", "on_published"])
async def test_a_coroutine_that_comes_out_of_an_awaited_hook_is_no_answer(hook: str) -> None:
    host = host_with(plugin_with(hook, _coroutine_in_a_coroutine))
    if hook == "on_published":
        await ask(host, hook)
    else:
        with pytest.raises(PluginError, match="nobody awaits"):
            await ask(host, hook)
    assert described(host)["errors"] == 1
    gc.collect()


@pytest.mark.parametrize("kind", NONSENSE)
def test_settings_that_are_no_model_stop_the_start(kind: str) -> None:
    if kind == "a class":  # a model class indeed
        return
    with pytest.raises(PluginError, match="plugin 'odd', hook register_settings: returned"):
        host_with(plugin_with("register_settings", NONSENSE[kind]))
    gc.collect()


def call(*_: Any) -> None:
    return None


WRONG_FIELDS: list[tuple[str, Callable[[], Any], str]] = [
    ("authenticate", lambda: Principal(None), "subject=None"),  # type: ignore[arg-type]
    ("authenticate", lambda: Principal("ann", "nodebug"), "permissions='nodebug'"),  # type: ignore[arg-type]
    ("authenticate", lambda: Principal("ann", frozenset({7})), "permissions="),  # type: ignore[arg-type]
    ("resolve_request", lambda: ResolvedRequest(3, "parrot"), "conv_id=3"),  # type: ignore[arg-type]
    ("resolve_request", lambda: ResolvedRequest("c1", "parrot", ["x"]), "overrides="),  # type: ignore[arg-type]
    ("check_draft", lambda: Draft(3, {}), "type=3"),  # type: ignore[arg-type]
    ("check_draft", lambda: Draft("a.b", ["x"]), "data="),  # type: ignore[arg-type]
    ("check_draft", lambda: Draft("a.b", {}, channel=True), "channel=True"),  # type: ignore[arg-type]
    ("register_channels", lambda: [Channel(3)], "name=3"),  # type: ignore[arg-type]
    ("register_channels", lambda: [Channel("a", kind="odd")], "kind='odd'"),  # type: ignore[arg-type]
    ("register_event_types", lambda: [EventType("a.b", "sem", model=3)], "model=3"),  # type: ignore[arg-type]
    ("register_event_types", lambda: [EventType("a.b", "sem", merge="x")], "merge='x'"),  # type: ignore[arg-type]
    ("register_profiles", lambda: [Profile("a", channels="sem")], "channels='sem'"),  # type: ignore[arg-type]
    ("register_profiles", lambda: [Profile("a", slow="no")], "slow='no'"),  # type: ignore[arg-type]
    ("register_timeline_handlers", lambda: [TimelineHandler("a.b", "fold")], "fold='fold'"),  # type: ignore[arg-type]
    ("register_engine_profiles", lambda: [EngineProfile("a", "b", overridable=["x"])], "overridable="),  # type: ignore[arg-type]
    ("register_tools", lambda: [Tool("a", "b", {}, None)], "call=None"),  # type: ignore[arg-type]
    ("register_tools", lambda: [Tool("a", "b", {}, call, timeout_s="1")], "timeout_s='1'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("hook", "answer", "told"), WRONG_FIELDS, ids=lambda part: "answer" if callable(part) else str(part)[:30]
)
async def test_the_fields_of_an_answer_are_checked_too(hook: str, answer: Callable[[], Any], told: str) -> None:
    """The right class with the wrong content is no better: permissions given as a text contain 'debug' in 'nodebug'."""
    host = host_with(plugin_with(hook, answer))
    if hook in ITEM_TYPES:
        assert await ask(host, hook) == []
    else:
        with pytest.raises(PluginError, match=f"plugin 'odd', hook {hook}"):
            await ask(host, hook)
    assert told in described(host)["last_error"]


def test_a_list_does_where_a_tuple_is_written() -> None:
    profiles = [Profile("a", channels=["sem"])]  # type: ignore[arg-type]
    host = host_with(plugin_with("register_profiles", lambda: profiles))
    assert host.call_collect("register_profiles") == [("odd", profiles)]


@pytest.mark.parametrize("hook", ["register_channels", "register_tools", "start_emitters"])
async def test_a_list_without_an_end_is_no_answer(hook: str) -> None:
    """What was made of it is dropped: no coroutine is left that nobody awaits."""

    def endless() -> Any:
        while True:
            yield (
                _nothing()
                if hook == "start_emitters"
                else Channel("a")
                if "channels" in hook
                else Tool("a", "b", {}, call)
            )

    host = host_with(plugin_with(hook, endless))
    if hook == "start_emitters":
        with pytest.raises(PluginError, match="more than 10000"):
            await ask(host, hook)
    else:
        assert await ask(host, hook) == []
        assert "more than 10000" in described(host)["last_error"]
    gc.collect()


class HalfAnEngine:
    async def stream(self, request: Any) -> Any:
        return "no generator"

    async def aclose(self) -> None: ...


async def test_an_engine_that_could_not_be_read_is_none() -> None:
    host = host_with(plugin_with("build_engine", HalfAnEngine))
    with pytest.raises(PluginError, match="async generator is required"):
        await ask(host, "build_engine")


@pytest.mark.parametrize("answer", ["yes", 1, object(), [1], "generator"])
def test_a_predicate_that_says_neither_yes_nor_no_withholds(answer: Any) -> None:
    """A generator function is always true: as a filter it would show everything."""
    predicate = (lambda envelope: _generator()) if answer == "generator" else (lambda envelope: answer)
    host = host_with(plugin_with("build_filter", lambda: predicate))
    with pytest.raises(PluginError):
        host.guard("odd", "build_filter", predicate)(ENVELOPE)
    assert described(host)["errors"] == 1


def test_a_predicate_that_forgets_to_return_withholds_without_being_an_error() -> None:
    host = host_with(plugin_with("build_filter", lambda: call))
    assert not host.guard("odd", "build_filter", call)(ENVELOPE)
    assert described(host)["errors"] == 0


class AnswersEverything:
    """Has every attribute that it is asked for, as proxies and mocks do, and spoils what it is handed."""

    def __getattr__(self, name: str) -> Any:
        return True

    def __call__(self, envelope: Envelope) -> Any:
        envelope.data["spoiled"] = True
        return "yes"


@pytest.mark.parametrize("hook", ["build_filter", "build_transform"])
def test_a_callable_that_has_every_attribute_is_guarded_as_any_other(hook: str) -> None:
    """It is no stand-in of ours, which nobody has to watch."""
    made = AnswersEverything()
    host = host_with(plugin_with(hook, lambda: made))
    with pytest.raises(PluginError):
        host.guard("odd", hook, made)(ENVELOPE)
    assert described(host)["errors"] == 1
    assert "spoiled" not in ENVELOPE.data


class Changing(Envelope):
    """Has another id whenever it is asked."""

    __slots__ = ()
    asked: list[int] = []

    @property
    def id(self) -> Any:
        self.asked.append(1)
        return "m1" if len(self.asked) < 4 else 7

    @id.setter
    def id(self, value: Any) -> None: ...


BAD_ENVELOPES: dict[str, Callable[[Envelope], Any]] = {
    "data no object": lambda e: e.with_data(None),  # type: ignore[arg-type]
    "another seq": lambda e: Envelope(e.conv_id, e.type, e.id, e.channel, b"{}", 1, 7),
    "a seq of text": lambda e: Envelope(e.conv_id, e.type, e.id, e.channel, b"{}", 1, "7"),  # type: ignore[arg-type]
    "no id": lambda e: Envelope(e.conv_id, e.type, None, e.channel, b"{}", 1, e.seq),  # type: ignore[arg-type]
    "half a pair": lambda e: Envelope(e.conv_id, e.type, "\ud800", e.channel, b"{}", 1, e.seq),
    "type 3": lambda e: Envelope(e.conv_id, 3, e.id, e.channel, b"{}", 1, e.seq),  # type: ignore[arg-type]
    "text for bytes": lambda e: Envelope(e.conv_id, e.type, e.id, e.channel, "{}", 1, e.seq),  # type: ignore[arg-type]
    "no JSON": lambda e: Envelope(e.conv_id, e.type, e.id, e.channel, b"{", 1, e.seq),
    "a list": lambda e: Envelope(e.conv_id, e.type, e.id, e.channel, b"[]", 1, e.seq),
    "a subclass": lambda e: Changing(e.conv_id, e.type, e.id, e.channel, b"{}", 1, e.seq),
    "stream id 3": lambda e: Envelope(e.conv_id, e.type, e.id, e.channel, b"{}", 1, e.seq, 3),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", BAD_ENVELOPES)
def test_a_transform_that_returns_what_no_frame_can_hold_withholds(kind: str) -> None:
    host = host_with(plugin_with("build_transform", lambda: BAD_ENVELOPES[kind]))
    with pytest.raises(Exception, match=r"."):
        host.guard("odd", "build_transform", BAD_ENVELOPES[kind])(ENVELOPE)
    assert described(host)["errors"] == 1
    assert (ENVELOPE.seq, ENVELOPE.id, ENVELOPE.data_json) == (1_000_000, "m1", b'{"delta":"x"}')


def test_an_emitter_that_is_none_is_reported_and_the_others_start() -> None:
    host = host_with(plugin_with("start_emitters", lambda: 3))
    supervisor = EmitterSupervisor(host, ManualClock())

    def start(coroutine: Coroutine[Any, Any, None]) -> None:
        with pytest.raises(StopIteration):
            coroutine.send(None)

    start(supervisor.start(OpenConversation("c1", "e", 0), None))  # type: ignore[arg-type]
    assert described(host)["last_error"].startswith("start_emitters: PluginError: returned 3")
    assert not supervisor.holds("c1")


# -- through public doors ---------------------------------------------------------------------------------------------


class Answers:
    """A plugin whose hooks answer what a test puts into it."""

    def __init__(self, name: str = "odd", **answers: Any) -> None:
        self.name = name
        self.answers = answers

    @hookimpl
    async def authenticate(self, credentials: Credentials) -> Any:
        return self.answers.get("authenticate")

    @hookimpl
    def authorize(self, principal: Principal) -> Any:
        return self.answers.get("authorize")

    @hookimpl
    def check_draft(self, draft: Draft) -> Any:
        return self.answers.get("check_draft")

    @hookimpl
    def classify(self, event_type: str) -> Any:
        return self.answers.get("classify")

    @hookimpl
    def resolve_request(self, request: Any) -> Any:
        return self.answers.get("resolve_request")

    @hookimpl
    def register_engine_profiles(self) -> Any:
        return [EngineProfile("parrot", engine="parrot")]


def over_http(tmp_path: Path, *plugins: object, auth: str | None = None) -> Any:
    settings = Settings(db=":memory:", plugins_dir=str(tmp_path / "none"), auth=auth, debug_channels=("debug.trace",))
    return create_app(settings, plugins=list(plugins))


@pytest.mark.parametrize("answer", [True, "admin", object(), ("ann",), {"subject": "ann"}])
async def test_an_authenticator_that_answers_nonsense_lets_nobody_in(tmp_path: Path, answer: Any) -> None:
    app = over_http(tmp_path, Answers("door", authenticate=answer), auth="door")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client,
    ):
        for path in ("/api/conversations", "/api/timeline?conv_id=c1", "/api/profiles"):
            refused = await client.get(path, headers={"authorization": "Bearer x"})
            assert refused.status_code >= 400, path
        assert (await client.get("/api/conversations")).json()["type"].endswith("plugin-error")


async def test_only_the_plugin_that_auth_names_says_who_a_caller_is() -> None:
    """Another plugin's answer does not count: not as the first, not where the named one knows nobody, not alone."""
    ann, eve = Principal("ann"), Principal("eve")

    def access(*plugins: object) -> Access:
        return Access(Settings(auth="door"), host_with(*plugins))

    both = access(Answers("door", authenticate=ann), Answers("other", authenticate=eve))
    assert await both.authenticate(Credentials(bearer="x")) == ann
    for plugins in (
        [Answers("door"), Answers("other", authenticate=eve)],
        [Answers("other", authenticate=eve)],
    ):
        with pytest.raises(AuthenticationFailed):
            await access(*plugins).authenticate(Credentials(bearer="x"))


async def test_an_authenticator_that_is_switched_off_leaves_the_door_closed() -> None:
    host = host_with(Answers("door", authenticate=Principal("ann")), Answers("other", authenticate=Principal("eve")))
    host.disable("door")
    with pytest.raises(AuthenticationFailed):
        await Access(Settings(auth="door"), host).authenticate(Credentials(bearer="x"))


@pytest.mark.parametrize("answer", [1, "yes", [], {}, object(), ("yes",)])
async def test_an_authorizer_that_answers_nonsense_denies(answer: Any) -> None:
    host = host_with(Answers(authorize=answer))
    with pytest.raises(PermissionDenied):
        await Access(Settings(), host).authorize(Principal("ann"), "read", "c1")
    assert described(host)["last_error"].startswith("authorize: PluginError: returned ")


@pytest.mark.parametrize(
    "answers",
    [
        {"check_draft": True},
        {"check_draft": "x"},
        {"check_draft": Draft("notes.added", {}, channel="nowhere")},
        {"check_draft": Draft("notes.added", {}, channel="timeline")},
        {"check_draft": Draft("ws.reset", {})},
        {"check_draft": Draft("llm.delta", {"delta": 3})},
        {"check_draft": Draft("no type", {})},
        {"check_draft": Draft("notes.added", {"x": object()})},
        {"check_draft": Draft("notes.added", {"x": "y" * 2_000_000})},
        {"check_draft": Draft("notes.added", {}, id="")},
        {"classify": True},
        {"classify": "nowhere"},
        {"classify": "timeline"},
    ],
    ids=_name,
)
async def test_publishing_names_the_plugin_whose_answer_does_not_fit(tmp_path: Path, answers: dict[str, Any]) -> None:
    """A producer is not told that its own draft is wrong, and an operator finds the plugin."""
    ((hook, _),) = answers.items()
    odd = Answers(**answers)
    async with memory_broker(odd) as running:
        with pytest.raises(PluginError, match=f"plugin 'odd', hook {hook}: "):
            await running.publish("c1", "notes.added", {"text": "a"})
        assert described(running.parts.plugins)["last_error"].startswith(f"{hook}: ")
        assert (await running.broker.head("c1")).head_seq == 0
    app = over_http(tmp_path, Answers(**answers))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client,
    ):
        answer = await client.post("/api/publish", json={"conv_id": "c1", "type": "notes.added", "data": {}})
        assert (answer.status_code, answer.json()["type"].rpartition(":")[2]) == (500, "plugin-error")


async def test_a_producers_own_nonsense_is_not_blamed_on_the_plugin_that_lets_it_pass() -> None:
    class Enriching:
        name = "odd"

        @hookimpl
        def check_draft(self, draft: Draft) -> Draft:
            return Draft(draft.type, {**draft.data, "more": 1}, draft.id, draft.channel)

    async with memory_broker(Enriching()) as running:
        for type, data in (("notes.added", {"x": object()}), ("llm.delta", {"delta": 3}), ("ws.bye", {})):
            with pytest.raises(InvalidDraft):
                await running.publish("c1", type, data)
        assert described(running.parts.plugins)["errors"] == 0
        assert await running.publish("c1", "notes.added", {})


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (ResolvedRequest("not usable!", "parrot"), "conversation id"),
        (ResolvedRequest("c1", "nobody's"), "engine profile"),
        (ResolvedRequest("c1", "parrot", {"made up": 1}), "override"),
        (ResolvedRequest("c1", "parrot", {"mark": object()}), "override"),
    ],
    ids=["conv_id", "profile", "override", "value"],
)
async def test_what_a_policy_makes_up_is_its_own_fault_and_what_it_takes_over_the_callers(
    answer: ResolvedRequest, told: str
) -> None:
    class Overridable(Answers):
        @hookimpl
        def register_engine_profiles(self) -> Any:
            return [EngineProfile("parrot", engine="parrot", overridable={"mark": {"type": "string"}})]

    async with memory_broker(Overridable(resolve_request=answer)) as running:
        with pytest.raises(PluginError, match=f"plugin 'odd', hook resolve_request: .*{told}"):
            await running.parts.runs.send(Principal("ann"), "c1", "hi")
        assert described(running.parts.plugins)["errors"] == 1
        same: dict[str, Any] = {"engine_profile": answer.engine_profile, "overrides": answer.overrides}
        with pytest.raises(InvalidInput):
            await running.parts.runs.send(Principal("ann"), answer.conv_id, "hi", **same)
        assert described(running.parts.plugins)["errors"] == 1


@pytest.mark.parametrize("answer", [True, "x", 3, ("c1", "parrot")], ids=_name)
async def test_a_prompt_names_the_plugin_whose_policy_does_not_fit(tmp_path: Path, answer: Any) -> None:
    app = over_http(tmp_path, Answers(resolve_request=answer))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client,
    ):
        answered = await client.post("/chat", json={"conv_id": "c1", "prompt": "hi"})
        assert (answered.status_code, answered.json()["type"].rpartition(":")[2]) == (500, "plugin-error")
        shown = {one["name"]: one for one in (await client.get("/api/debug/plugins")).json()["plugins"]}
        assert shown["odd"]["errors"] == 1
