"""Tell reasoning from answer where a model writes `<think>…</think>` into its text."""

from __future__ import annotations

from collections.abc import Iterator

_OPEN = "<think>"
_CLOSE = "</think>"


class ThinkTagSplitter:
    """Splits one choice's text, however it is cut into pieces. Nothing but the tags themselves is left out.

    An opening tag counts only where nothing but white space came before it (at the start, or right after a
    closing tag): an answer that explains `<think>` tags keeps its words.
    """

    def __init__(self) -> None:
        self._thinking = False
        self._may_open = True
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yield `(is_reasoning, text)` pieces.

        What may be the start of a tag is held back until it is known.
        """
        rest = self._held + text
        self._held = ""
        while rest:
            if self._thinking:
                before, tag, rest = rest.partition(_CLOSE)
                if not tag:
                    before, self._held = _split_at_partial_tag(before, _CLOSE)
                if before:
                    yield True, before
                if tag:
                    self._thinking, self._may_open = False, True
            elif self._may_open:
                body = rest.lstrip()
                if body.startswith(_OPEN):
                    if space := rest[: len(rest) - len(body)]:
                        yield False, space
                    self._thinking, rest = True, body[len(_OPEN) :]
                elif _OPEN.startswith(body):
                    # Only white space so far, or the first letters of the tag: both are shown once it is
                    # settled.
                    self._held, rest = rest, ""
                else:
                    self._may_open = False
            else:
                yield False, rest
                rest = ""

    def flush(self) -> Iterator[tuple[bool, str]]:
        """Yield what is still held back.

        The text is over. A tag that was never closed makes all of it reasoning.
        """
        if self._held:
            yield self._thinking, self._held
            self._held = ""


def _split_at_partial_tag(text: str, tag: str) -> tuple[str, str]:
    """Return `text` in two: what is certain, and an end that may be the beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length], text[-length:]
    return text, ""
