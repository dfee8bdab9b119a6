"""What hooks may answer, checked in one place before anybody uses it: what does not fit is the plugin's failure (I9).

A wrong answer counts as an exception of the plugin does: the caller gets a PluginError that names plugin, hook and
value, a filter or transform withholds, an observer is reported. Nothing of it is taken, also not the part that fits.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from broker.envelope import RESERVED_PREFIXES, TIMELINE, Draft, Envelope
from broker.errors import PluginError, quoted
from broker.eventlog.base import EventLog
from broker.plugins.rules import EMITTERS, ITEM_TYPES
from broker.runs.engine import Engine
from broker.runs.plan import ResolvedRequest
from broker.runs.store import RunStore
from broker.security import Principal
from broker.timeline.store import TimelineStore

ITEMS_MAX = 10_000

Check = Callable[[Any], Any]
"""Returns an answer as its caller takes it. Raises PluginError that says what came and what is required."""

CheckMade = Callable[[Any, tuple[Any, ...]], Any]
"""`(result, arguments)`: returns a result as its caller takes it, or raises PluginError. arguments: as they were before
the plugin got its copies of them."""


def check_answer(hook: str, answer: Any) -> Any:
    """Return what an implementation answered, several of something as a list; None is always an answer.

    Raises PluginError for what cannot be used.
    """
    if answer is None:
        return None
    item_type = ITEM_TYPES.get(hook)
    if item_type is None and hook != EMITTERS:
        _refuse_unrun(answer)
    check = _CHECKS.get(hook)
    if check is not None:
        return check(answer)
    return _items(answer, item_type) if item_type is not None else answer


def check_made(hook: str) -> CheckMade | None:
    """Return what checks the results of callables that a hook made; None: anything goes there."""
    return _MADE.get(hook)


def drop(made: Iterable[Any]) -> None:
    """Close coroutines that nobody will await; a context manager that was not entered needs nothing."""
    for each in made:
        if inspect.iscoroutine(each):
            each.close()


def _refuse_unrun(answer: Any) -> None:
    """Raise PluginError for code that nobody will run: it looks like an answer, and is true."""
    if inspect.iscoroutine(answer):
        answer.close()
        raise PluginError("returned a coroutine, which nobody awaits here")
    if inspect.isgenerator(answer) or inspect.isasyncgen(answer):
        raise PluginError("returned a generator, so nothing of it was run")


# --- answers of hooks -----------------------------------------------------------------------------------------------


def _refuse(answer: Any, required: str) -> PluginError:
    return PluginError(f"returned {quoted(answer)}: {required} is required")


def _a(kind: type) -> Check:
    """Return the check for an answer of one dataclass, its fields included."""

    def check(answer: Any) -> Any:
        if not isinstance(answer, kind):
            raise _refuse(answer, kind.__name__)
        _check_fields(answer, kind)
        return answer

    return check


def _with_methods(contract: type, *, required: str) -> Check:
    """Return the check for an object that has to have the methods of a protocol."""
    names = [name for name, member in vars(contract).items() if inspect.isfunction(member) and name[0] != "_"]

    def check(answer: Any) -> Any:
        if inspect.isclass(answer):
            raise PluginError(f"returned the class {answer.__name__}: {required}, made already, is required")
        missing = [name for name in names if not callable(getattr(answer, name, None))]
        if missing:
            raise PluginError(
                f"returned {quoted(answer)}, which has no method {missing[0]!r}: {required} is required "
                f"(methods: {', '.join(names)})"
            )
        return answer

    return check


def _engine(answer: Any) -> Any:
    _ENGINE_METHODS(answer)
    if inspect.iscoroutinefunction(answer.stream):
        raise PluginError(
            f"returned {quoted(answer)}, whose stream is an async function that yields nothing: "
            "an async generator is required"
        )
    return answer


def _model_class(answer: Any) -> Any:
    if not (inspect.isclass(answer) and issubclass(answer, BaseModel)):
        raise _refuse(answer, "a pydantic model class")
    return answer


def _bool(answer: Any) -> Any:
    if not isinstance(answer, bool):  # neither yes nor no, such as an empty list of what may be read
        raise _refuse(answer, "True, False or None")
    return answer


def _text(answer: Any) -> Any:
    if not isinstance(answer, str):
        raise _refuse(answer, "a text")
    return answer


def _items(answer: Any, kind: type) -> list[Any]:
    wanted = f"a list of {kind.__name__}"
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | dict):
        if inspect.iscoroutine(answer):
            answer.close()
        raise _refuse(answer, wanted)
    made = _listed(answer)
    for item in made:
        if not isinstance(item, kind):
            drop(made)
            raise PluginError(f"returned a list with {quoted(item)} in it: {kind.__name__} is required")
        _check_fields(item, kind)
    return made


def _callable(answer: Any) -> Any:
    if not callable(answer):
        raise _refuse(answer, "a callable")
    if is_async_callable(answer):
        raise PluginError("returned an async function: nobody awaits it here, make it a plain one")
    return answer


def is_async_callable(candidate: Any) -> bool:
    """Say whether calling it gives a coroutine, as far as can be told without calling it."""
    if inspect.iscoroutinefunction(candidate):
        return True
    return inspect.iscoroutinefunction(vars(type(candidate)).get("__call__"))


def _listed(answer: Iterable[Any]) -> list[Any]:
    """Return all of it, if it has an end. What came before something raised is dropped."""
    made: list[Any] = []
    try:
        for item in answer:
            made.append(item)
            if len(made) > ITEMS_MAX:
                raise PluginError(f"returned more than {ITEMS_MAX} of them: a list that ends is required")
    except BaseException:
        drop(made)
        raise
    return made


def _emitters(answer: Any) -> list[Any]:
    if isinstance(answer, Coroutine | AbstractAsyncContextManager):
        return [answer]
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | dict):
        raise _refuse(answer, "a coroutine, an async context manager or a list")
    made = _listed(answer)
    for each in made:
        if not isinstance(each, Coroutine | AbstractAsyncContextManager):
            drop(made)
            raise PluginError(
                f"returned a list with {quoted(each)} in it: coroutines and async context managers are required"
            )
    return made


_ENGINE_METHODS = _with_methods(Engine, required="an engine")

_CHECKS: Mapping[str, Check] = {
    "register_settings": _model_class,
    "build_event_log": _with_methods(EventLog, required="an event log"),
    "build_timeline_store": _with_methods(TimelineStore, required="a timeline store"),
    "build_run_store": _with_methods(RunStore, required="a run store"),
    "authenticate": _a(Principal),
    "authorize": _bool,
    "resolve_request": _a(ResolvedRequest),
    "build_engine": _engine,
    "check_draft": _a(Draft),
    "classify": _text,
    "build_filter": _callable,
    "build_transform": _callable,
    EMITTERS: _emitters,
}
"""`register_…` hooks that answer with several of something are in ITEM_TYPES; other hooks answer nothing, and what they
return is not looked at."""


# --- results of callables that hooks made ---------------------------------------------------------------------------


def _kept(result: Any, _arguments: tuple[Any, ...]) -> Any:
    # None: a predicate that says True for what is to be seen and nothing else.
    if result is not True and result is not False and result is not None:
        _refuse_unrun(result)
        raise PluginError(f"returned {quoted(result)}: True or False is required (bool(…) makes one)")
    return result


def _shaped(result: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the envelope that is shown: the one there was, where the plugin changed nothing."""
    given: Envelope = arguments[0]
    if type(result) is not Envelope:  # nor one of a subclass, whose fields may be anything the next time
        _refuse_unrun(result)
        raise _refuse(result, "Envelope")
    as_it_was = (
        result.type is given.type
        and result.id is given.id
        and result.channel is given.channel
        and result.conv_id is given.conv_id
        and result.stream_id is given.stream_id
    )
    if result.seq != given.seq:
        raise PluginError(f"changed seq {given.seq} to {quoted(result.seq)}: an envelope keeps its place")
    if not as_it_was:
        for name in ("conv_id", "type", "id", "channel"):
            _check_written(name, getattr(result, name))
        if result.stream_id is not None:
            _check_written("stream_id", result.stream_id)
        for name, reserved in (("type", _is_own_type), ("channel", TIMELINE.__eq__)):
            was, now = getattr(given, name), getattr(result, name)
            if was != now and reserved(now):
                raise PluginError(f"changed {name} {quoted(was)} to {quoted(now)}: that is the broker's own")
    if result.data_json is not given.data_json:
        if not isinstance(result.data_json, bytes):
            raise PluginError(f"returned an envelope with data_json={quoted(result.data_json)}: bytes are required")
        _check_object(result)
    settled = result.settled()  # what was masked in place is masked
    return given if as_it_was and settled.data_json is given.data_json else settled


def _is_own_type(event_type: str) -> bool:
    return event_type.startswith(RESERVED_PREFIXES)


def _check_object(envelope: Envelope) -> None:
    try:
        decoded: Any = envelope.data
    except ValueError as exc:
        raise PluginError(f"returned an envelope whose data_json is no JSON: {exc}") from exc
    if not isinstance(decoded, dict):
        raise PluginError(f"returned an envelope with data {quoted(decoded)}: an object is required")


def _check_written(name: str, value: object) -> None:
    """Raise PluginError for what could not stand in a frame: no text, or one with half of a surrogate pair."""
    if not isinstance(value, str) or (not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)):
        raise PluginError(f"returned an envelope with {name}={quoted(value)}: a text is required")


def _merged(result: Any, _arguments: tuple[Any, ...]) -> Any:
    if result is not None and not isinstance(result, Mapping):
        _refuse_unrun(result)
        raise _refuse(result, "an object or None")
    return result


_MADE: Mapping[str, CheckMade] = {
    "build_filter": _kept,
    "build_transform": _shaped,
    "register_event_types": _merged,
}
"""What folds return is checked in `views/catalog.py`, results of tools in `runs/tool_runner.py`."""


# --- fields ---------------------------------------------------------------------------------------------------------


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _check_fields(answer: Any, kind: type) -> None:
    """Raise PluginError for a field whose value is of another type than the dataclass says: nobody else would notice.

    Permissions given as a text, for example, contain every permission that is a part of it.
    """
    assert is_dataclass(kind)
    for name, hint in _hints(kind).items():
        value = getattr(answer, name)
        if not _fits(value, hint):
            shown = getattr(hint, "__name__", None) if isinstance(hint, type) and not get_args(hint) else None
            raise PluginError(f"returned {kind.__name__} with {name}={quoted(value)}: {shown or str(hint)} is required")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, parameters = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, parameters[0])
    if origin is Union or origin is types.UnionType:
        return any(_fits(value, one) for one in parameters)
    if origin is Literal:
        return any(value is one or (type(value) is type(one) and value == one) for one in parameters)
    if origin is type:
        return inspect.isclass(value) and issubclass(value, parameters[0])
    if origin is Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, parameters[0]) and _fits(item, parameters[1]) for key, item in value.items()
        )
    if isinstance(origin, type) and issubclass(origin, Collection):  # a list will do for a tuple
        each = parameters[0] if parameters[-1:] == (...,) or len(parameters) == 1 else Any
        return (
            isinstance(value, Collection)
            and not isinstance(value, str | bytes | Mapping)
            and all(_fits(item, each) for item in value)
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
