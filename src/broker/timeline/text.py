"""Text that grows by appending, at a cost linear in what is appended.

A pure handler returns a new entity per delta. With plain strings that copies the whole text each time; `Text` values
share one list of pieces and remember how much of it is theirs.
"""

from __future__ import annotations


class Text:
    """An immutable text. `append` returns a longer one and leaves this one as it was.

    Both raise UnicodeEncodeError for half a surrogate pair, which nothing can carry: the piece is lost then, not the text.
    """

    __slots__ = ("_count", "_pieces", "size")

    def __init__(self, text: str = "") -> None:
        self._pieces: list[str] = [text] if text else []
        self._count = len(self._pieces)
        self.size = len(text.encode())

    def append(self, piece: str) -> Text:
        """Return this text followed by `piece`."""
        size = self.size + len(piece.encode())
        longer = Text.__new__(Text)
        # The shared list may be extended only by the text that ends where the list ends; any other (an older version
        # folded again) gets its own copy.
        pieces = self._pieces if len(self._pieces) == self._count else self._pieces[: self._count]
        pieces.append(piece)
        longer._pieces = pieces
        longer._count = len(pieces)
        longer.size = size
        return longer

    def __str__(self) -> str:
        return "".join(self._pieces[: self._count])

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Text | str) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"Text({str(self)!r})"
