"""Copies for code that is not ours: what a plugin is handed shares nothing with what others see that could be changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from broker.envelope import Envelope
from broker.errors import InvalidDraft

_UNCHANGEABLE = frozenset({str, int, float, bool, bytes, type(None)})


def own(value: Any) -> Any:
    """Return a copy of `value` down to its last list and object; what cannot be changed stays as it is.

    Takes JSON values, envelopes (their data is decoded anew, once somebody looks at it) and dataclasses. Costs by the
    number of its parts, not by the length of its texts. Raises InvalidDraft for what nests deeper than JSON can.
    """
    try:
        return _own(value)
    except RecursionError:
        raise InvalidDraft("data is nested too deeply") from None


def _own(value: Any) -> Any:
    kind = type(value)
    if kind in _UNCHANGEABLE:
        return value
    if isinstance(value, Envelope):
        return value.own()
    if kind is dict or isinstance(value, Mapping):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_own(item) for item in value]
    if kind is tuple:
        return tuple([_own(item) for item in value])
    if isinstance(value, set):
        return set(value)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)  # not `replace`: a subclass may have more than its fields
        for field in fields(value):
            object.__setattr__(made, field.name, _own(getattr(value, field.name)))
        return made
    return value
