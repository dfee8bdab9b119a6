"""What a turn says in lists is stored in pieces, each once per conversation, named by what it says.

A run's request repeats the whole conversation, so turns that are stored whole grow with its square. Here each message is a
piece, and so is each full block of their names: a turn has the names of its blocks, and of the messages behind the last
one. Two requests that begin alike share their blocks; one that leaves out some messages still shares the rest.
"""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import orjson

from broker.runs.turns import Turn

BLOCK = 64
"""Messages per block: at most 63 names stand in a turn beside those of its blocks."""
SWEEP_AFTER = 64
"""So many turns of a conversation are forgotten between two looks for pieces that no turn has any more."""
_AT_ONCE = 200  # messages that are encoded on the event loop; more are encoded beside it
_NAME_BYTES = 15


@dataclass(frozen=True, slots=True)
class Packed:
    """A turn as it is stored. body: JSON without the lists' contents, with the names of pieces. names: these.

    pieces: JSON by name, of all. under: names of messages by the name of their block.
    """

    turn: Turn
    body: bytes
    names: tuple[str, ...]
    pieces: Mapping[str, bytes]
    under: Mapping[str, tuple[str, ...]]


async def pack(turn: Turn) -> Packed:
    """Return `turn` as it is stored. Raises TypeError for content that is no JSON."""
    if sum(len(value) for value in turn.content.values() if _has_pieces(value)) <= _AT_ONCE:
        return _pack(turn)
    return await asyncio.to_thread(_pack, turn)


def _pack(turn: Turn) -> Packed:
    pieces: dict[str, bytes] = {}
    under: dict[str, tuple[str, ...]] = {}
    lists: dict[str, tuple[list[str], list[str]]] = {}
    rest = dict(turn.content)
    for key, value in turn.content.items():
        if not _has_pieces(value):
            continue
        del rest[key]
        names = [_add(pieces, one) for one in value]
        blocks: list[str] = []
        full = len(names) - len(names) % BLOCK
        for start in range(0, full, BLOCK):
            blocks.append(_add(pieces, names[start : start + BLOCK]))
            under[blocks[-1]] = tuple(names[start : start + BLOCK])
        lists[key] = (blocks, names[full:])
    stored = {**asdict(_with(turn, {})), "content": rest}
    body = orjson.dumps({**stored, "lists": lists} if lists else stored)
    return Packed(turn, body, tuple(_flat(lists.values())), pieces, under)


def _has_pieces(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, dict) for one in value)


def _add(pieces: dict[str, bytes], value: object) -> str:
    body = orjson.dumps(value)
    name = urlsafe_b64encode(blake2b(body, digest_size=_NAME_BYTES).digest()).decode()
    pieces[name] = body
    return name


def _with(turn: Turn, content: Mapping[str, Any]) -> Turn:
    return Turn(turn.turn_id, turn.conv_id, turn.session_id, turn.run_id, turn.phase, turn.created_at_ms, content)


def _flat(lists: Iterable[Sequence[Sequence[str]]]) -> Iterator[str]:
    for blocks, rest in lists:
        yield from blocks
        yield from rest


class Unpacking:
    """Turns that are read, with the pieces that they need.

    `names` says which pieces are needed next; `take` them; again until there are none; then `turns`.
    """

    def __init__(self, bodies: Iterable[bytes]) -> None:
        self._stored: list[dict[str, Any]] = [orjson.loads(body) for body in bodies]
        self._pieces: dict[str, Any] = {}
        self._asked: set[str] = set()
        self._blocks = {name for one in self._lists() for name in one[0]}

    def names(self) -> list[str]:
        """Return names that were not asked for yet: first those in the turns, then those in their blocks."""
        wanted = set(_flat(self._lists()))
        wanted.update(name for block in self._blocks for name in self._pieces.get(block, ()))
        wanted -= self._asked
        self._asked |= wanted
        return list(wanted)

    def take(self, found: Iterable[tuple[str, bytes]]) -> None:
        """Take pieces that were found."""
        for name, body in found:
            self._pieces[name] = orjson.loads(body)

    def turns(self) -> list[Turn]:
        """Return the turns. One of which a piece was not found is left out: it was forgotten while it was read."""
        found: list[Turn] = []
        for stored in self._stored:
            lists = stored.get("lists", {})
            try:
                values = {key: self._values(*names) for key, names in lists.items()}
            except KeyError:
                continue
            stored = {key: value for key, value in stored.items() if key != "lists"}
            found.append(Turn(**{**stored, "content": {**stored["content"], **values}}))
        return found

    def _values(self, blocks: Sequence[str], rest: Sequence[str]) -> list[Any]:
        names = [name for block in blocks for name in self._pieces[block]]
        return [self._pieces[name] for name in (*names, *rest)]

    def _lists(self) -> Iterator[Sequence[Sequence[str]]]:
        for stored in self._stored:
            yield from stored.get("lists", {}).values()


def unpacked(bodies: Iterable[bytes], find: Callable[[list[str]], Iterable[tuple[str, bytes]]]) -> list[Turn]:
    """Return the turns that are stored as `bodies`. find: returns those of the pieces that there are, with their names."""
    reading = Unpacking(bodies)
    while names := reading.names():
        reading.take(find(names))
    return reading.turns()


def names_and_blocks(bodies: Iterable[bytes]) -> tuple[set[str], set[str]]:
    """Return the names that stand in stored turns, and which of them are blocks, whose content is in use as well."""
    names: set[str] = set()
    blocks: set[str] = set()
    for body in bodies:
        for one in orjson.loads(body).get("lists", {}).values():
            names.update(_flat([one]))
            blocks.update(one[0])
    return names, blocks


def names_in(blocks: Iterable[bytes]) -> Iterator[str]:
    """Yield the names of messages that stand in blocks, which are pieces themselves."""
    for body in blocks:
        yield from orjson.loads(body)
