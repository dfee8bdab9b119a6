"""Lists as parameters: whatever their length and whatever is in them, SQLite finds those values and no others."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from broker.sqlite.lists import parts_of


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as opened:
        opened.execute("CREATE TABLE things (id TEXT PRIMARY KEY)")
        yield opened


def found(connection: sqlite3.Connection, wanted: list[str]) -> list[str]:
    rows = []
    for places, values in parts_of(wanted):
        rows += connection.execute(f"SELECT id FROM things WHERE id IN {places}", values).fetchall()
    return [id for (id,) in rows]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 255, 256, 257, 511, 512, 700])
def test_every_value_is_found_once_and_no_other(connection: sqlite3.Connection, count: int) -> None:
    ids = [f"id {number}" for number in range(count)]
    connection.executemany("INSERT INTO things VALUES (?)", [(id,) for id in [*ids, "another", ""]])
    assert sorted(found(connection, ids)) == sorted(ids)


def test_a_value_with_a_nul_is_itself_and_not_its_beginning(connection: sqlite3.Connection) -> None:
    connection.executemany("INSERT INTO things VALUES (?)", [("a",), ("a\0b",)])
    assert found(connection, ["a\0b"]) == ["a\0b"]


def test_there_are_few_statements_and_none_with_too_many_parameters() -> None:
    """Each is prepared once; SQLite before 3.32 takes 999 parameters."""
    statements = {places for count in range(1, 1500) for places, _ in parts_of(["x"] * count)}
    assert len(statements) == 9
    assert max(places.count("?") for places in statements) == 256
