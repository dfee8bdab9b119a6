"""What may be published under which type, asked of every producer alike: callers over HTTP, embedding apps and plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson
from pydantic import ValidationError

from broker.channels import EventType
from broker.copies import own
from broker.envelope import RESERVED_PREFIXES, Draft, check_event_type, encode_json
from broker.errors import InvalidDraft, PluginError
from broker.plugins import PluginHost
from broker.plugins.isolation import ENDINGS, brief

HOOK = "register_event_types"
_TYPES_MAX = 4096

Validate = Callable[[Any], object]
"""Raises pydantic's ValidationError for data that do not fit a model."""


class DraftChecks(dict[str, Validate | None]):
    """The check of each type, by name: found out when it is first looked up, None for a type whose data may be anything.

    Looking up a type that is the broker's own raises InvalidDraft. A dict, since every draft of a producer passes here.
    """

    def __init__(self, event_types: Mapping[str, EventType], owners: Mapping[str, str], plugins: PluginHost) -> None:
        """owners: the plugins that declared types, by type; the others are built in."""
        super().__init__()
        self._event_types = event_types
        self._owners = owners
        self._plugins = plugins

    def __missing__(self, event_type: str) -> Validate | None:
        if event_type.startswith(RESERVED_PREFIXES):
            raise InvalidDraft(
                f"type {event_type!r} is the broker's own: publish the event that causes it", type=event_type
            )
        declared = self._event_types.get(event_type)
        check: Validate | None = None
        if declared is not None and declared.model is not None:
            check = declared.model.__pydantic_validator__.validate_python
            if event_type in self._owners:
                check = self._contained(event_type, check)
        if len(self) >= _TYPES_MAX:  # types come from outside too: bounded
            self.clear()
        self[event_type] = check
        return check

    def _contained(self, event_type: str, validate: Validate) -> Validate:
        """Wrap a plugin's model: its validators are code as well, which may change what they see, and may fail."""
        plugin = self._owners[event_type]

        def contained(data: Any) -> None:
            try:
                validate(own(data))
            except ValidationError:
                raise
            except (Exception, *ENDINGS) as exc:
                self._plugins.report(plugin, HOOK, exc)
                raise PluginError(
                    f"plugin {plugin!r}, hook {HOOK}: the model of {event_type} failed: {brief(exc)}", plugin=plugin
                ) from exc

        return contained

    def check(self, draft: Draft) -> None:
        """Raise InvalidDraft for a type that is the broker's own, and for data that do not fit their declared type."""
        validate = self[check_event_type(draft.type)]
        if validate is not None:
            try:
                validate(
                    orjson.loads(encode_json(draft.data))
                )  # as others will see them: a tuple is a list, for example
            except ValidationError as exc:
                raise misfit(draft.type, exc) from exc


def misfit(event_type: str, error: ValidationError) -> InvalidDraft:
    """Return what a producer is told of data that do not fit their type."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "data"
    return InvalidDraft(
        f"data of {event_type} does not fit its type: {place}: {first['msg']}", type=event_type, field=place
    )
