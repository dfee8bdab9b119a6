"""`<think>` tags, wherever the text is cut."""

from __future__ import annotations

import pytest

from broker.runs.chat_completions.think_tags import ThinkTagSplitter

CASES = [
    ("<think>a</think>b", "a", "b"),
    ("\n <think>a</think>\n\nb", "a", "\n \n\nb"),
    ("<think></think>b", "", "b"),
    ("<think>1</think> <think>2</think>b", "12", " b"),
    ("no tags at all", "", "no tags at all"),
    ("about <think> tags </think>", "", "about <think> tags </think>"),
    ("<thinker>", "", "<thinker>"),
    ("<thi", "", "<thi"),
    ("  ", "", "  "),
    ("<think>never closed </thin", "never closed </thin", ""),
    ("<think>x < y </b> </think>z", "x < y </b> ", "z"),
    ("<think>tag </think</think>z", "tag </think", "z"),
    ("<think>a<think>b</think>c", "a<think>b", "c"),
    ("", "", ""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize(("text", "reasoning", "answer"), CASES)
def test_reasoning_and_answer_are_told_apart(text: str, reasoning: str, answer: str, size: int) -> None:
    splitter = ThinkTagSplitter()
    pieces = [piece for start in range(0, len(text), size) for piece in splitter.feed(text[start : start + size])]
    pieces += splitter.flush()
    assert "".join(text for is_reasoning, text in pieces if is_reasoning) == reasoning
    assert "".join(text for is_reasoning, text in pieces if not is_reasoning) == answer
    assert all(text for _, text in pieces)


def test_nothing_certain_is_held_back() -> None:
    """Only what may still become a tag waits."""
    splitter = ThinkTagSplitter()
    assert list(splitter.feed("<think>abc</th")) == [(True, "abc")]
    assert list(splitter.feed("at was no tag")) == [(True, "</that was no tag")]
    assert list(splitter.feed("</think>")) == []
    assert list(splitter.feed("shown")) == [(False, "shown")]
    assert list(splitter.feed(" <")) == [(False, " <")]
