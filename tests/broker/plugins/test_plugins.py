"""The plugin host, through its public door: real plugin files, real objects, a clock that tests step."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar

import orjson
import pytest

from broker.channels import Channel
from broker.clock import ManualClock
from broker.envelope import Draft, Envelope
from broker.errors import AuthenticationFailed, DraftRefused, NotFound, PluginError
from broker.hookspecs import hookimpl
from broker.plugins import IsolationLimits, PluginHost
from broker.profiles import Profile
from broker.security import Credentials, Principal
from broker.settings import Settings
from broker.timeline.handlers import LateEnvelope

PROFILE = Profile("default")
ENVELOPE = Envelope("c1", "llm.delta", "m1", "sem", b'{"delta":"x"}', 1, 1_000_000)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def host(clock: ManualClock) -> PluginHost:
    return PluginHost(clock=clock, limits=IsolationLimits(failures=3, stalls=2, stall_s=0.25, call_timeout_s=0.05))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that writes a plugin file below the plugins directory."""

    def write_file(name: str, source: str) -> Path:
        path = tmp_path / "plugins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from broker.hookspecs import hookimpl\n" + dedent(source))
        return path.parent

    return write_file


def described(host: PluginHost, name: str) -> dict[str, Any]:
    return next(one for one in host.describe() if one["name"] == name)


class Classifier:
    """A plugin that classifies everything as `channel`, and remembers in `asked` that it was asked."""

    def __init__(self, name: str, channel: str | None, asked: list[str] | None = None) -> None:
        self.name = name
        self.channel = channel
        self.asked = [] if asked is None else asked

    @hookimpl
    def classify(self, event_type: str) -> str | None:
        self.asked.append(self.name)
        return self.channel


# --- loading ----------------------------------------------------------------------------------------------------


def test_a_file_of_the_plugins_directory_is_a_plugin_named_after_it(host, write):
    """One `.py` file is enough, and its hook answers."""
    directory = write(
        "greeter.py",
        """
        __version__ = "1.2"

        @hookimpl
        def classify(event_type):
            return "sem" if event_type == "hello.said" else None
        """,
    )
    host.load_directory(directory)
    assert host.names == ["greeter"]
    assert host.call_first("classify", event_type="hello.said") == "sem"
    assert host.call_first("classify", event_type="other") is None
    assert described(host, "greeter")["version"] == "1.2"
    assert described(host, "greeter")["hooks"] == ["classify"]
    assert "greeter.py" in described(host, "greeter")["source"]


def test_a_folder_plugin_may_import_its_own_modules_relatively(host, write):
    """A folder with an `__init__.py` is a package, also for imports that happen while a hook runs."""
    write("deep/words.py", 'CHANNEL = "control"\n')
    write("deep/late.py", 'CHANNEL = "sem"\n')
    write(
        "deep/__init__.py",
        """
        from .words import CHANNEL

        @hookimpl
        def classify(event_type):
            from . import late
            return CHANNEL if event_type == "a" else late.CHANNEL
        """,
    )
    directory = write("_ignored.py", "raise RuntimeError('must not be imported')")
    (directory / "notes").mkdir()
    host.load_directory(directory)
    assert host.names == ["deep"]
    assert host.call_first("classify", event_type="a") == "control"
    assert host.call_first("classify", event_type="b") == "sem"


def test_two_hosts_of_a_process_do_not_share_a_plugins_module_state(write, clock):
    """Each host imports the folder for itself; closing one takes its modules away and leaves the other's."""
    directory = write(
        "counter.py", "calls = []\n\n@hookimpl\ndef classify(event_type):\n    calls.append(event_type)\n"
    )
    first, second = PluginHost(clock=clock), PluginHost(clock=clock)
    first.load_directory(directory)
    second.load_directory(directory)
    first.call_first("classify", event_type="a")
    assert first.get("counter").calls == ["a"]
    assert second.get("counter").calls == []
    assert "counter" not in sys.modules
    module = first.get("counter").__name__
    first.close()
    assert module not in sys.modules
    assert second.get("counter").__name__ in sys.modules


def test_a_plugin_may_name_itself(host, write):
    """`__plugin_name__` wins over the file's name."""
    host.load_directory(
        write("some_file.py", '__plugin_name__ = "presence"\n\n@hookimpl\ndef classify(event_type): ...\n')
    )
    assert host.names == ["presence"]


def test_an_import_error_names_plugin_file_and_line(host, write):
    """The plugin's own line is named, not the library's in which it ended."""
    directory = write("broken.py", "\nimport orjson\n\norjson.loads('{')\n")
    with pytest.raises(
        PluginError, match=r"plugin 'broken'.*cannot be imported: JSONDecodeError: .*broken\.py, line 5"
    ):
        host.load_directory(directory)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import not_there_at_all", r"ModuleNotFoundError: .*not_there_at_all.*bad\.py, line 2\); install it"),
        ("def x(:", r"SyntaxError: .*bad\.py, line 2"),
        ("import sys; sys.exit(3)", r"SystemExit: 3 .*bad\.py, line 2"),
    ],
)
def test_whatever_ends_an_import_is_a_start_up_error(host, write, source, text):
    """A missing module, a syntax error and a call of sys.exit are told the same way, and leave no module behind."""
    before = set(sys.modules)
    with pytest.raises(PluginError, match=text):
        host.load_directory(write("bad.py", source))
    assert not [name for name in set(sys.modules) - before if name.startswith("_broker_plugin")]


def test_a_misspelled_hook_names_plugin_misfit_and_closest_hook(host, write):
    """The start fails, and the message is all one needs to correct it."""
    directory = write("typo.py", "@hookimpl\ndef biuld_filter(profile): ...\n")
    with pytest.raises(PluginError, match=r"plugin 'typo'.*no hook 'biuld_filter', the closest one is 'build_filter'"):
        host.load_directory(directory)


def test_a_misspelled_argument_names_plugin_hook_and_closest_argument(host, write):
    """The same for arguments; all misfits of a plugin are told at once."""
    directory = write(
        "typo.py",
        "@hookimpl\ndef build_filter(profil): ...\n\n@hookimpl\ndef classify(kind=None): ...\n",
    )
    with pytest.raises(PluginError) as raised:
        host.load_directory(directory)
    assert "hook build_filter: there is no argument 'profil', the closest one is 'profile'; it has: profile" in str(
        raised.value
    )
    assert "hook classify: there is no argument 'kind'; it has: event_type" in str(raised.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("@hookimpl\nasync def build_filter(profile): ...", "hook build_filter: is an async function"),
        ("@hookimpl\ndef on_published(envelopes):\n    yield 1", "hook on_published: is a generator function"),
        ("@hookimpl\nasync def on_published(envelopes):\n    yield 1", "is an async generator function"),
        ("@hookimpl(wrapper=True)\ndef classify(event_type):\n    return (yield)", "wrappers are not supported"),
        ("@hookimpl\ndef classify(*args): ...", r"takes \*args, arguments have to be named: event_type"),
        ("@hookimpl\ndef classify(event_type, /): ...", "'event_type' is positional-only"),
        ("def build_filter(profile): ...", "build_filter is not marked with @hookimpl"),
        ("x = 1", "it implements no hook"),
    ],
)
def test_an_implementation_that_could_not_work_is_a_start_up_error(host, write, source, text):
    """What pluggy would accept and the broker could not call properly is refused at start."""
    with pytest.raises(PluginError, match=text):
        host.load_directory(write("misfit.py", source + "\n"))


def test_an_argument_with_a_default_is_passed_all_the_same(host):
    """pluggy leaves arguments with defaults out; a filter for the wrong profile would be the result."""

    class Plugin:
        @hookimpl
        def classify(self, event_type: str = "nothing") -> str:
            return event_type

    host.add(Plugin())
    assert host.call_first("classify", event_type="a.b") == "a.b"


def test_two_plugins_of_one_name_are_refused(host, write):
    """The message names both sources."""
    host.add(Classifier("twin", None))
    with pytest.raises(
        PluginError, match=r"two plugins are called 'twin': code .*Classifier\) and directory .*twin\.py"
    ):
        host.load_directory(write("twin.py", "@hookimpl\ndef classify(event_type): ...\n"))


def test_a_name_that_fits_no_environment_variable_is_refused(host, write):
    """Names become part of `BROKER_PLUGIN_<NAME>_…`."""
    with pytest.raises(PluginError, match=r"plugin name 'my-plugin'.*is not usable.*rename it"):
        host.load_directory(write("my-plugin.py", "@hookimpl\ndef classify(event_type): ...\n"))


def test_objects_without_a_name_get_one_from_their_class(host):
    """Local classes, given as such or as instances, are the way of tests; two of one class get different names."""

    class LogKeeper:
        @hookimpl
        def classify(self, event_type: str) -> None: ...

    assert [host.add(LogKeeper), host.add(LogKeeper())] == ["log_keeper", "log_keeper_2"]


def test_load_takes_directory_and_objects_and_asks_the_last_registered_first(write, tmp_path):
    """Objects given by code come before the plugins directory; a directory that does not exist holds none."""
    write("b.py", "@hookimpl\ndef classify(event_type): return 'control'\n")
    directory = str(write("a.py", "@hookimpl\ndef classify(event_type): return 'sem'\n"))
    assert PluginHost.load(Settings(plugins_dir=directory)).call_first("classify", event_type="x") == "control"
    host = PluginHost.load(Settings(plugins_dir=directory), [Classifier("code", "timeline")])
    assert host.call_first("classify", event_type="x") == "timeline"
    assert [name for name, _ in host.implementations("classify")][:3] == ["code", "b", "a"]
    assert "code" not in PluginHost.load(Settings(plugins_dir=str(tmp_path / "nowhere"))).names


def test_an_installed_package_is_loaded_by_its_entry_point(tmp_path, monkeypatch):
    """The version of the package is the plugin's where it declares none."""
    (tmp_path / "installed_plugin_module.py").write_text(
        "from broker.hookspecs import hookimpl\n\n@hookimpl\ndef classify(event_type): return 'sem'\n"
    )
    info = tmp_path / "installed_plugin-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-plugin\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[broker.plugins]\nfrom_package = installed_plugin_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    host = PluginHost()
    host.load_entry_points()
    assert described(host, "from_package")["version"] == "3.1"
    assert "installed package installed-plugin" in described(host, "from_package")["source"]
    assert "3.1" in host.identity("from_package")
    monkeypatch.delitem(sys.modules, "installed_plugin_module")


def test_the_identity_of_a_plugin_changes_with_its_code(write, clock):
    """So a view's digest tells a resuming client that what it is shown may have changed."""
    directory = write("f.py", "@hookimpl\ndef classify(event_type): return 'sem'\n")
    identities = set()
    for source in ("return 'sem'", "return 'control'"):
        write("f.py", f"@hookimpl\ndef classify(event_type): {source}\n")
        host = PluginHost(clock=clock)
        host.load_directory(directory)
        identities.add(host.identity("f"))
    assert len(identities) == 2


# --- settings ---------------------------------------------------------------------------------------------------

SETTINGS_PLUGIN = """
from pydantic import BaseModel, SecretStr

class Options(BaseModel):
    url: str = "http://127.0.0.1/"
    retries: int = 3
    tags: list[str] = []
    pin: SecretStr | None = None

given = None

def configure(settings):
    global given
    given = settings

@hookimpl
def register_settings():
    return Options
"""


def test_settings_come_from_the_environment_and_reach_the_plugin(host, write, monkeypatch):
    """Each field has its variable; lists are JSON; the plugin's `configure` gets the instance."""
    monkeypatch.setenv("BROKER_PLUGIN_HOOKER_RETRIES", "7")
    monkeypatch.setenv("BROKER_PLUGIN_HOOKER_TAGS", '["a", "b"]')
    host.load_directory(write("hooker.py", SETTINGS_PLUGIN))
    settings = host.settings_of("hooker")
    assert settings is host.get("hooker").given
    assert isinstance(settings, host.get("hooker").Options)
    assert settings.model_dump(exclude={"pin"}) == {"url": "http://127.0.0.1/", "retries": 7, "tags": ["a", "b"]}
    host.add(Classifier("plain", None))
    assert host.settings_of("plain") is None


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("RETRIES", "many", r"plugin 'hooker': BROKER_PLUGIN_HOOKER_RETRIES='many' is not usable: .*integer"),
        ("TAGS", "{no", r"plugin 'hooker': BROKER_PLUGIN_HOOKER_TAGS='\{no' is not usable: the value has to be JSON"),
        ("TAGS", "[1]", r"BROKER_PLUGIN_HOOKER_TAGS='\[1\]' is not usable at \[0\]: .*string"),
    ],
)
def test_an_unusable_setting_names_variable_value_and_plugin(host, write, monkeypatch, variable, value, text):
    """It is a start-up error, and the plugin is not there afterwards."""
    monkeypatch.setenv(f"BROKER_PLUGIN_HOOKER_{variable}", value)
    with pytest.raises(PluginError, match=text):
        host.load_directory(write("hooker.py", SETTINGS_PLUGIN))
    assert host.names == []


def test_a_secret_setting_is_not_shown_in_an_error(host, write, monkeypatch):
    """The value of a secret field stays out of the log."""
    monkeypatch.setenv("BROKER_PLUGIN_HOOKER_PIN", "hunter2")
    source = SETTINGS_PLUGIN.replace("SecretStr | None = None", "SecretStr = Field(max_length=3)").replace(
        "import BaseModel", "import BaseModel, Field"
    )
    with pytest.raises(PluginError, match=r"BROKER_PLUGIN_HOOKER_PIN=\(hidden\) is not usable") as raised:
        host.load_directory(write("hooker.py", source))
    assert "hunter2" not in str(raised.value)


def test_a_misspelled_variable_is_told(host, write, monkeypatch, caplog):
    """It would silently have no effect; a longer plugin name's variables are not meant."""
    monkeypatch.setenv("BROKER_PLUGIN_HOOKER_RETRYS", "7")
    monkeypatch.setenv("BROKER_PLUGIN_HOOKER_TWO_URL", "x")
    host.add(Classifier("hooker_two", None))
    caplog.clear()
    host.load_directory(write("hooker.py", SETTINGS_PLUGIN))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "BROKER_PLUGIN_HOOKER_RETRYS has no effect" in told[0]
    assert "the closest one is 'BROKER_PLUGIN_HOOKER_RETRIES'" in told[0]


def test_a_failing_configure_is_a_start_up_error(host, write):
    """A plugin that refuses its own settings stops the start, under its name."""
    source = SETTINGS_PLUGIN.replace("    given = settings", "    raise ValueError('url and tags exclude each other')")
    with pytest.raises(PluginError, match=r"plugin 'hooker': configure\(settings\) failed: ValueError: url and tags"):
        host.load_directory(write("hooker.py", source))


# --- calls and isolation ----------------------------------------------------------------------------------------


class Failing:
    """A plugin whose hooks raise."""

    name = "failing"

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or RuntimeError("broken")
        self.calls = 0

    def fail(self) -> Any:
        self.calls += 1
        raise self.error

    @hookimpl(tryfirst=True)
    def register_channels(self) -> Any:
        self.fail()

    @hookimpl(tryfirst=True)
    def on_conversation_opened(self, conversation: Any) -> None:
        self.fail()

    @hookimpl(tryfirst=True)
    async def on_published(self, envelopes: Any) -> None:
        self.fail()

    @hookimpl(tryfirst=True)
    def authenticate(self, credentials: Credentials) -> Any:
        self.fail()

    @hookimpl(tryfirst=True)
    def authorize(self) -> Any:
        self.fail()

    @hookimpl(tryfirst=True)
    def check_draft(self) -> Any:
        self.fail()

    @hookimpl(tryfirst=True)
    def build_filter(self, profile: Profile) -> Any:
        self.fail()


class Watching:
    """A plugin that sees what the others leave it."""

    name = "watching"

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [Channel("notes")]

    @hookimpl
    def on_conversation_opened(self, conversation: Any) -> None:
        self.seen.append(conversation)

    @hookimpl
    async def on_published(self, envelopes: Any) -> None:
        await asyncio.sleep(0)
        self.seen.append(envelopes)


async def test_one_plugins_failure_does_not_silence_another(host):
    """Where results are collected or observed each implementation is called on its own."""
    watching = Watching()
    host.add(watching)
    host.add(Failing())
    assert host.call_collect("register_channels") == [("watching", [Channel("notes")])]
    host.call_collect("on_conversation_opened", conversation="c")
    await host.acall_all("on_published", envelopes=["e"])
    assert watching.seen == ["c", ["e"]]
    assert described(host, "failing")["errors"] == 3
    assert described(host, "failing")["last_error"] == "on_published: RuntimeError: broken"
    assert described(host, "watching")["errors"] == 0


async def test_a_plugin_that_tries_to_end_the_process_is_only_a_failing_one(host):
    """SystemExit is contained like any other error."""
    watching = Watching()
    host.add(watching)
    host.add(Failing(SystemExit(1)))
    await host.acall_all("on_published", envelopes=["e"])
    host.call_collect("on_conversation_opened", conversation="c")
    assert watching.seen == [["e"], "c"]


async def test_the_first_answer_ends_the_search(host):
    """In the order: tryfirst, registered last, registered first."""
    asked: list[str] = []
    host.add(Classifier("a", "sem", asked))
    host.add(Classifier("b", "control", asked))
    host.add(Classifier("c", None, asked))
    assert host.call_first("classify", event_type="x") == "control"
    assert asked == ["c", "b"]
    assert await host.acall_first("authenticate", credentials=Credentials()) is None


async def test_mine_but_wrong_reaches_the_caller_as_it_is(host):
    """A BrokerError of a `first` hook is an answer: not wrapped, not counted as a failure, nobody else asked."""
    host.add(Failing(AuthenticationFailed("the token is expired; get a new one")))
    with pytest.raises(AuthenticationFailed, match="the token is expired"):
        await host.acall_first("authenticate", credentials=Credentials())
    assert described(host, "failing")["errors"] == 0


async def test_any_other_error_of_a_first_hook_is_wrapped_with_the_plugins_name(host):
    """The original is its cause."""
    host.add(Failing())
    with pytest.raises(PluginError, match="plugin 'failing', hook authenticate: RuntimeError: broken") as raised:
        await host.acall_first("authenticate", credentials=Credentials())
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert described(host, "failing")["errors"] == 1


@pytest.mark.parametrize("call", ["acall_all", "acall_collect"])
async def test_an_authorizer_that_raises_is_never_overlooked(host, call):
    """For `authorize` the collecting calls raise too: a failure that was swallowed would be a permission."""
    host.add(Failing())
    question = {"principal": Principal("p"), "action": "read", "conv_id": "c", "channels": ()}
    with pytest.raises(PluginError, match="hook authorize"):
        await getattr(host, call)("authorize", **question)
    with pytest.raises(PluginError, match="hook authorize"):
        host.call_collect("authorize", **question)


async def test_answers_of_all_authorizers_are_returned_false_included(host):
    """The caller looks for False."""

    class Sync:
        name = "sync"

        @hookimpl
        def authorize(self, conv_id: str) -> bool:
            return conv_id == "mine"

    class Async:
        name = "async"

        @hookimpl
        async def authorize(self, principal: Principal) -> bool:
            return True

    host.add(Sync())
    host.add(Async())
    question = {"principal": Principal("p"), "action": "read", "conv_id": "yours", "channels": ()}
    assert await host.acall_all("authorize", **question) == [("async", True), ("sync", False)]


def test_check_draft_passes_each_plugins_draft_on_to_the_next(host):
    """Ordered: enrich, leave alone, refuse."""

    class Adds:
        def __init__(self, word: str | None) -> None:
            self.word = word

        @hookimpl
        def check_draft(self, draft: Draft) -> Draft | None:
            return None if self.word is None else Draft(draft.type, {"text": draft.data["text"] + self.word})

    for word in ("c", None, "b"):
        host.add(Adds(word))
    assert host.call_ordered("check_draft", draft=Draft("note.added", {"text": "a"})).data == {"text": "abc"}
    host.add(Failing(DraftRefused("no notes today")))
    with pytest.raises(DraftRefused, match="no notes today"):
        host.call_ordered("check_draft", draft=Draft("note.added", {"text": "a"}))


async def test_implementations_take_all_arguments_and_are_measured(host):
    """For callers with rules of their own: the plugin's function still gets only the arguments that it names."""

    class Plugin:
        name = "plugin"

        @hookimpl
        def authorize(self, action: str) -> bool:
            return action == "read"

    host.add(Plugin())
    assert host.has("authorize")
    ((name, implementation),) = host.implementations("authorize")
    answer = implementation(principal=Principal("p"), action="read", conv_id=None, channels=[])
    assert (name, answer) == ("plugin", True)
    assert described(host, "plugin")["time"]["authorize"]["calls"] == 1


def test_a_wrong_call_is_the_callers_fault_not_a_plugins(host):
    """A hook that does not exist, or other arguments than it has, is a TypeError, also without any plugin."""
    with pytest.raises(TypeError, match="'classify' was called with kind: it takes event_type"):
        host.call_first("classify", kind="x")
    with pytest.raises(TypeError, match="no such hook"):
        host.call_collect("on_nothing")


@pytest.mark.parametrize("answer", [Channel("one"), "sem", [Channel("ok"), "sem"], {"a": 1}])
def test_a_list_of_the_wrong_things_is_the_plugins_failure(host, answer):
    """So whoever reads the list need not check it."""

    class Plugin:
        name = "plugin"

        @hookimpl
        def register_channels(self) -> Any:
            return answer

    host.add(Plugin())
    assert host.call_collect("register_channels") == []
    assert "Channel is required" in described(host, "plugin")["last_error"]


def test_a_generator_may_list_what_a_plugin_registers(host):
    """`yield` is natural for lists; one that raises midway counts as a whole."""

    class Plugin:
        def __init__(self, fail: bool) -> None:
            self.fail = fail

        @hookimpl
        def register_channels(self) -> Any:
            yield Channel("notes")
            if self.fail:
                raise RuntimeError("midway")

    host.add(Plugin(fail=False), name="good")
    host.add(Plugin(fail=True), name="bad")
    assert host.call_collect("register_channels") == [("good", [Channel("notes")])]


async def test_an_implementation_that_does_not_answer_in_time_is_cancelled_and_counted(host):
    """The others' calls go on; the error says what was waited for."""

    class Stuck:
        name = "stuck"

        @hookimpl
        async def on_published(self, envelopes: Any) -> None:
            await asyncio.Event().wait()

    watching = Watching()
    host.add(Stuck())
    host.add(watching)
    await host.acall_all("on_published", envelopes=["e"])
    assert watching.seen == [["e"]]
    assert described(host, "stuck")["last_error"] == "on_published: TimeoutError: no answer within 0.05 s"
    await host.acall_all("on_published", envelopes=["e"])
    assert "no answer within" in described(host, "stuck")["quarantined"]["on_published"]


async def test_a_cancellation_that_a_plugin_lets_out_does_not_cancel_the_caller(host):
    """An awaited task of the plugin was cancelled; the server's own task was not."""

    class Plugin:
        name = "plugin"

        @hookimpl
        async def on_published(self, envelopes: Any) -> None:
            raise asyncio.CancelledError

    host.add(Plugin())
    await host.acall_all("on_published", envelopes=[])
    assert "cancelled from within" in described(host, "plugin")["last_error"]


async def test_cancelling_the_caller_reaches_the_plugin_and_is_no_failure(host):
    """A request that is given up cancels what it waits for."""

    class Slow:
        name = "slow"
        cancelled = False
        asked = asyncio.Event()

        @hookimpl
        async def authenticate(self, credentials: Credentials) -> None:
            self.asked.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    slow = Slow()
    host.add(slow)
    asking = asyncio.create_task(host.acall_first("authenticate", credentials=Credentials()))
    await slow.asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert slow.cancelled
    assert described(host, "slow")["errors"] == 0


def test_a_failing_hook_is_logged_once_a_minute_with_the_number_left_out(host, clock, caplog):
    """A plugin that fails for every envelope must not fill the disk."""
    host.add(Classifier("noisy", None))
    for _ in range(5):
        host.report("noisy", "classify", RuntimeError("again"))
    clock.advance(61)
    host.report("noisy", "classify", RuntimeError("again"))
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert messages == [
        "plugin noisy, hook classify: RuntimeError: again",
        "plugin noisy, hook classify: RuntimeError: again (4 more errors of it were not logged)",
    ]
    assert described(host, "noisy")["errors"] == 6


def test_reporting_for_a_name_that_is_no_plugin_is_harmless(host):
    """Engines are named by profiles, and callers report under the name they have."""
    host.report("some_engine", "build_engine", RuntimeError("x"))
    assert host.describe() == []


def test_an_error_that_cannot_be_shown_is_reported_all_the_same(host):
    """A broken `__str__` stays inside."""

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    host.add(Classifier("odd", None))
    host.report("odd", "classify", Odd())
    assert "cannot be shown" in described(host, "odd")["last_error"]


# --- quarantine, switching --------------------------------------------------------------------------------------


def test_an_observer_that_keeps_failing_is_quarantined_told_and_released(host):
    """Its failing hook is skipped, its other hooks go on, an operator lets it back in."""
    quarantined: list[tuple[str, str]] = []
    host.on_quarantine = lambda plugin, why: quarantined.append((plugin, why))
    failing = Failing()
    host.add(failing)
    for _ in range(10):
        host.call_collect("on_conversation_opened", conversation="c")
    assert failing.calls == 3
    assert quarantined == [
        ("failing", "hook on_conversation_opened: 3 failures in a row, the last: RuntimeError: broken")
    ]
    assert list(described(host, "failing")["quarantined"]) == ["on_conversation_opened"]
    host.call_collect("register_channels")
    assert failing.calls == 4
    changes: list[str] = []
    host.subscribe_changes(lambda: changes.append("changed"))
    assert host.release("failing")
    assert changes == ["changed"]
    assert described(host, "failing")["quarantined"] == {}
    for _ in range(10):
        host.call_collect("on_conversation_opened", conversation="c")
    assert failing.calls == 7
    assert len(quarantined) == 2


def test_a_success_in_between_keeps_a_hook_out_of_quarantine(host):
    """Only consecutive failures count."""

    class Sometimes:
        name = "sometimes"
        calls = 0

        @hookimpl
        def on_conversation_opened(self) -> None:
            self.calls += 1
            if self.calls % 3:
                raise RuntimeError("not now")

    plugin = Sometimes()
    host.add(plugin)
    for _ in range(30):
        host.call_collect("on_conversation_opened", conversation="c")
    assert plugin.calls == 30


def test_a_hook_that_keeps_the_event_loop_waiting_is_quarantined(host, clock):
    """Two stalls in a row are enough here; one is not."""

    class Slow:
        name = "slow"

        def __init__(self) -> None:
            self.durations = [0.3, 0.0, 0.3, 0.4, 0.0]

        @hookimpl
        def on_conversation_opened(self) -> None:
            clock.advance(self.durations.pop(0))

    plugin = Slow()
    host.add(plugin)
    for _ in range(5):
        host.call_collect("on_conversation_opened", conversation="c")
    assert plugin.durations == [0.0]
    assert described(host, "slow")["quarantined"] == {
        "on_conversation_opened": "2 stalls in a row, the last: a call took 400 ms of the event loop"
    }
    assert described(host, "slow")["time"]["on_conversation_opened"] == {
        "calls": 4,
        "errors": 0,
        "stalls": 3,
        "total_ms": 1000.0,
        "max_ms": 400.0,
    }


async def test_what_answers_a_request_is_never_quarantined(host):
    """A stranger who makes an authenticator fail must neither switch it off nor lock everybody out."""
    failing = Failing()
    host.add(failing)
    for _ in range(10):
        with pytest.raises(PluginError):
            await host.acall_first("authenticate", credentials=Credentials())
    failing.error = AuthenticationFailed("wrong")
    with pytest.raises(AuthenticationFailed):
        await host.acall_first("authenticate", credentials=Credentials())
    assert failing.calls == 11
    assert described(host, "failing")["quarantined"] == {}


def test_a_filter_that_could_not_be_made_withholds_everything(host):
    """A factory that raises leaves a predicate that raises, so nothing passes; the others' filters are there too."""

    class Open:
        name = "open"

        @hookimpl
        def build_filter(self, profile: Profile) -> Any:
            return lambda envelope: True

    host.add(Open())
    host.add(Failing())
    filters = [
        (name, host.guard(name, "build_filter", fn)) for name, fn in host.call_collect("build_filter", profile=PROFILE)
    ]
    assert [name for name, _ in filters] == ["failing", "open"]
    with pytest.raises(PluginError, match="plugin 'failing', hook build_filter: RuntimeError: broken"):
        filters[0][1](ENVELOPE)
    assert filters[1][1](ENVELOPE) is True


class Gate:
    """A plugin with a filter under the test's control."""

    name = "gate"

    def __init__(self, predicate: Any) -> None:
        self.predicate = predicate

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return self.predicate


def gate(host: PluginHost) -> Callable[..., Any]:
    ((name, fn),) = host.call_collect("build_filter", profile=PROFILE)
    return host.guard(name, "build_filter", fn)


def test_a_filter_in_quarantine_withholds_until_it_is_released(host):
    """Neither what was made before nor what is made now lets anything through, without calling the plugin."""
    calls = []

    def predicate(envelope: Envelope) -> bool:
        calls.append(envelope)
        if len(calls) <= 3:
            raise ValueError("broken predicate")
        return True

    host.add(Gate(predicate))
    before = gate(host)
    for _ in range(3):
        with pytest.raises(ValueError, match="broken predicate"):
            before(ENVELOPE)
    for filter_ in (before, gate(host)):
        with pytest.raises(PluginError, match=r"in quarantine.*3 failures in a row.*release it"):
            filter_(ENVELOPE)
    assert len(calls) == 3
    host.release("gate")
    assert before(ENVELOPE) is True
    assert gate(host)(ENVELOPE) is True


def test_a_filter_that_stalls_is_quarantined(host, clock):
    """It would hold up every client; withholding is the lesser harm."""
    host.add(Gate(lambda envelope: clock.advance(0.3) or True))
    filter_ = gate(host)
    assert filter_(ENVELOPE)
    assert filter_(ENVELOPE)
    with pytest.raises(PluginError, match="2 stalls in a row"):
        filter_(ENVELOPE)


def test_one_views_failing_predicate_is_not_excused_by_anothers(host):
    """Each predicate counts for itself."""
    host.add(Gate(lambda envelope: True))
    good = gate(host)
    bad = host.guard("gate", "build_filter", lambda envelope: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            bad(ENVELOPE)
        if not described(host, "gate")["quarantined"]:
            good(ENVELOPE)
    assert "3 failures in a row" in described(host, "gate")["quarantined"]["build_filter"]


def test_a_filter_that_fails_in_one_view_is_taken_out_of_that_view_alone(host):
    """What others look at stays open, views made afterwards too; the one view is closed until the plugin is released."""
    host.add(Gate(lambda envelope: True))
    bad = host.guard("gate", "build_filter", lambda envelope: 1 / 0, scope="bad (sem)")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            bad(ENVELOPE)
    for again in (bad, host.guard("gate", "build_filter", lambda envelope: True, scope="bad (sem)")):
        with pytest.raises(PluginError, match=r"in quarantine \(3 failures in a row"):
            again(ENVELOPE)
    assert described(host, "gate")["quarantined"]["build_filter"].startswith("view bad (sem): 3 failures in a row")
    assert host.guard("gate", "build_filter", lambda envelope: True, scope="good (sem)")(ENVELOPE) is True
    assert gate(host)(ENVELOPE) is True
    host.release("gate")
    assert host.guard("gate", "build_filter", lambda envelope: True, scope="bad (sem)")(ENVELOPE) is True


def test_a_factory_that_fails_for_one_profile_is_asked_for_the_others(host):
    class Picky:
        name = "picky"
        asked: ClassVar[list[str]] = []

        @hookimpl
        def build_filter(self, profile: Profile) -> Any:
            self.asked.append(profile.name)
            if profile.name == "bad":
                raise RuntimeError("not this one")
            return lambda envelope: True

    def made(name: str) -> Callable[..., Any]:
        ((plugin, fn),) = host.call_collect("build_filter", profile=Profile(name))
        guarded: Callable[..., Any] = host.guard(plugin, "build_filter", fn, scope=name)
        return guarded

    host.add(Picky())
    for _ in range(5):
        with pytest.raises(PluginError):
            made("bad")(ENVELOPE)
        assert made("good")(ENVELOPE) is True
    assert Picky.asked.count("bad") == 3
    assert described(host, "picky")["quarantined"]["build_filter"].startswith("view bad: 3 failures in a row")


def test_a_filter_that_fails_in_ever_more_views_is_taken_out_of_all(host):
    """Clients choose views as they like; what is remembered of them stays bounded, and closed."""
    host.add(Gate(lambda envelope: True))
    for number in range(200):
        bad = host.guard("gate", "build_filter", lambda envelope: 1 / 0, scope=f"view {number}")
        for _ in range(3):
            with pytest.raises((ZeroDivisionError, PluginError)):
                bad(ENVELOPE)
    assert len(described(host, "gate")["quarantined"]["build_filter"]) < 300
    with pytest.raises(PluginError, match="in quarantine"):
        host.guard("gate", "build_filter", lambda envelope: True, scope="view 0")(ENVELOPE)


def slow_calls(host: PluginHost, clock: ManualClock, call_s: float, every_s: float, count: int) -> int:
    """Call a filter that takes `call_s` once every `every_s`; return how many calls were made."""

    def predicate(envelope: Envelope) -> bool:
        clock.advance(call_s)
        return True

    filter_ = host.guard("gate", "build_filter", predicate, scope="default (sem)")
    for made in range(count):
        try:
            filter_(ENVELOPE)
        except PluginError:
            return made
        clock.advance(max(0.0, every_s - call_s))
    return count


@pytest.mark.parametrize(
    ("call_s", "every_s", "calls"),
    [
        (0.2, 0.2, 3),  # 0.5 s are enough here: each call is below the limit of a stall, together they are above
        (0.2, 1.5, 4),
        (0.03, 0.03, 18),
        (0.03, 1.0, 1000),  # 3 % of the time: bearable
        (0.01, 0.01, 1000),  # a busy server, not a slow filter
    ],
)
def test_calls_that_are_slow_without_stalling_add_up(host, clock, call_s, every_s, calls):
    """A filter that takes 0.2 s per event holds every client up, whatever lies between two events."""
    host.add(Gate(None))
    assert slow_calls(host, clock, call_s, every_s, 1000) == calls
    quarantined = described(host, "gate")["quarantined"]
    if calls < 1000:
        assert "slow calls that took" in quarantined["build_filter"]
        assert slow_calls(host, clock, 0.0, 0.1, 5) == 0
    else:
        assert quarantined == {}


def test_a_process_that_was_stopped_in_the_midst_of_a_call_quarantines_nobody(host, clock):
    host.add(Gate(None))
    assert slow_calls(host, clock, 600.0, 700.0, 1) == 1
    assert described(host, "gate")["quarantined"] == {}
    assert described(host, "gate")["time"]["build_filter"]["stalls"] == 1


def test_a_filter_that_sleeps_and_raises_is_counted_as_both(host, clock):
    def predicate(envelope: Envelope) -> bool:
        clock.advance(0.3)
        raise ValueError("and slow")

    host.add(Gate(None))
    filter_ = host.guard("gate", "build_filter", predicate)
    for _ in range(2):
        with pytest.raises(ValueError, match="and slow"):
            filter_(ENVELOPE)
    assert "2 stalls in a row" in described(host, "gate")["quarantined"]["build_filter"]
    assert described(host, "gate")["time"]["build_filter"] == {
        "calls": 2,
        "errors": 2,
        "stalls": 2,
        "total_ms": 600.0,
        "max_ms": 300.0,
    }


async def _async_predicate(envelope: Envelope) -> bool:
    return False


def _hidden_async_predicate(envelope: Envelope) -> Any:
    return _async_predicate(envelope)


@pytest.mark.parametrize("predicate", [_async_predicate, _hidden_async_predicate, True, "yes"])
def test_a_filter_that_cannot_answer_withholds(host, predicate):
    """A coroutine is truthy: taken for an answer it would leak. Nothing is left unawaited either."""
    host.add(Gate(predicate))
    with pytest.raises(PluginError):
        gate(host)(ENVELOPE)
    gc.collect()
    assert described(host, "gate")["errors"] == 1


def test_a_guard_measures_counts_and_raises_again(host, clock):
    """The caller decides what an error means; it is counted here."""

    def transform(envelope: Envelope, fail: bool) -> Envelope:
        clock.advance(0.01)
        if fail:
            raise KeyError("x")
        return envelope

    host.add(Gate(None))
    guarded = host.guard("gate", "build_transform", transform)
    assert guarded(ENVELOPE, fail=False) is ENVELOPE
    with pytest.raises(KeyError):
        guarded(ENVELOPE, fail=True)
    assert described(host, "gate")["time"]["build_transform"] == {
        "calls": 2,
        "errors": 1,
        "stalls": 0,
        "total_ms": 20.0,
        "max_ms": 10.0,
    }


@pytest.mark.parametrize("answer", [None, {"delta": "y"}, b"{}"])
def test_a_transform_that_returns_no_envelope_withholds(host, answer):
    """A forgotten `return` is the likeliest mistake of all."""
    host.add(Gate(None))
    with pytest.raises(PluginError, match="Envelope is required"):
        host.guard("gate", "build_transform", lambda envelope: answer)(ENVELOPE)
    assert described(host, "gate")["errors"] == 1


def test_a_fold_is_never_quarantined_and_may_refuse_a_late_envelope(host):
    """The timeline has to equal the fold of the log, however often one envelope fails; too late is no error."""
    answers: list[Any] = [ValueError("odd")] * 10 + [LateEnvelope("final")]

    def fold(entities: Any, envelope: Envelope) -> Any:
        raise answers.pop(0)

    host.add(Gate(None))
    guarded = host.guard("gate", "register_timeline_handlers", fold)
    for _ in range(10):
        with pytest.raises(ValueError, match="odd"):
            guarded({}, ENVELOPE)
    with pytest.raises(LateEnvelope):
        guarded({}, ENVELOPE)
    assert described(host, "gate")["errors"] == 10


def test_a_disabled_plugin_is_as_if_it_were_not_loaded(host):
    """Its filter is absent, also one in quarantine: that is the operator's decision. Enabled, it is back."""
    changes: list[str] = []
    unsubscribe = host.subscribe_changes(lambda: changes.append("changed"))
    host.add(Gate(lambda envelope: 1 / 0))
    filter_ = gate(host)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            filter_(ENVELOPE)
    host.disable("gate")
    host.disable("gate")
    assert host.call_collect("build_filter", profile=PROFILE) == []
    assert not host.has("build_filter")
    assert described(host, "gate")["enabled"] is False
    host.enable("gate")
    assert host.has("build_filter")
    assert changes == ["changed"] * 3
    unsubscribe()
    host.disable("gate")
    assert len(changes) == 3


def test_switching_an_unknown_plugin_names_those_that_exist(host):
    """An operator's typing error is told with the remedy."""
    host.add(Classifier("known", None))
    for act in (host.disable, host.enable, host.release, host.settings_of, host.get, host.identity):
        with pytest.raises(NotFound, match="plugin 'unknwon' is not loaded; loaded: known"):
            act("unknwon")


def test_the_description_is_json(host, write):
    """It is an answer of the HTTP API."""
    host.load_directory(write("a.py", SETTINGS_PLUGIN))
    host.add(Failing())
    host.call_collect("register_channels")
    assert orjson.loads(orjson.dumps(host.describe())) == host.describe()


def test_a_failing_observer_of_quarantines_is_contained(host, caplog):
    """Reporting must not make things worse."""

    def observer(plugin: str, why: str) -> None:
        raise RuntimeError("observer broke")

    host.on_quarantine = observer
    host.add(Failing())
    for _ in range(4):
        host.call_collect("on_conversation_opened", conversation="c")
    assert "observer of quarantines failed" in caplog.text
