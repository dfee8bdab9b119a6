"""Frames of providers: one JSON text or several, and what else stands in them."""

from __future__ import annotations

import pytest

from broker.runs.chat_completions.json_texts import DONE, json_texts


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"a":1}', [{"a": 1}]),
        (' {"a":1} \n', [{"a": 1}]),
        ('{"a":1}{"b":2}', [{"a": 1}, {"b": 2}]),
        ('\ufeff{"a":1}\x1e\n{"b":2}', [{"a": 1}, {"b": 2}]),
        ("[DONE]", [DONE]),
        ('{"a":1}\n[DONE]', [{"a": 1}, DONE]),
        ('{"a":"[DONE]"}{"b":2}', [{"a": "[DONE]"}, {"b": 2}]),
        ('{"a":NaN,"b":-Infinity,"c":inf,"d":+nan}', [{"a": None, "b": None, "c": None, "d": None}]),
        ('{"a":"NaN is \\" not a number"}{"b":NaN}', [{"a": 'NaN is " not a number'}, {"b": None}]),
        ('{"a":"x\ty"}', [{"a": "x\ty"}]),
        ('{"a":"\\ud83d"}', [{"a": "\ud83d"}]),
        ('{"n":123456789012345678901}', [{"n": 123456789012345678901}]),
        ('{"n":1}{"m":123456789012345678901}', [{"n": 1}, {"m": 123456789012345678901}]),
        (f'{{"n":1}}{{"m":{"9" * 5000}}}', [{"n": 1}, {"m": None}]),
    ],
)
def test_what_a_frame_holds(text: str, values: list[object]) -> None:
    assert list(json_texts(text)) == values


@pytest.mark.parametrize("text", ["", "  \n", "{", '{"a":1}{', "<html>", '{"a":1} and more', "{'a':1}", "[" * 100_000])
def test_where_no_json_goes_on_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        list(json_texts(text))


def test_what_came_before_an_error_is_not_lost() -> None:
    texts = json_texts('{"a":1}{"b":')
    assert next(texts) == {"a": 1}
    with pytest.raises(ValueError, match="."):
        next(texts)
