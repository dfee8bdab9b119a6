"""The parts of the way to Redis that need no Redis: the protocol, addresses, slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import InvalidInput
from broker.eventlog.redis_keys import escaped, unescaped
from broker.redis_resp import RedisReplyError, ReplyReader, encode
from broker.redis_topology import key_slot, parse_redis_url

Replies = st.recursive(
    st.one_of(st.none(), st.binary(max_size=40), st.integers(-(2**63), 2**63 - 1)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


def written(reply: object) -> bytes:
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    assert isinstance(reply, list)
    return b"*%d\r\n" % len(reply) + b"".join(written(one) for one in reply)


@given(st.lists(Replies, max_size=6), st.integers(1, 50))
def test_replies_are_read_however_they_are_cut(replies: list[object], piece: int) -> None:
    data = b"".join(written(reply) for reply in replies)
    reader = ReplyReader()
    read = [one for at in range(0, len(data), piece) for one in reader.feed(data[at : at + piece])]
    assert read == replies


def test_states_and_errors() -> None:
    read = ReplyReader().feed(b"+OK\r\n-OOM no memory\r\n*-1\r\n")
    assert read[0] == b"OK"
    assert isinstance(read[1], RedisReplyError)
    assert (read[1].code, str(read[1])) == ("OOM", "OOM no memory")
    assert read[2] is None


def test_what_is_no_redis_is_recognised() -> None:
    with pytest.raises(ValueError, match="not a Redis reply"):
        ReplyReader().feed(b"HTTP/1.1 400 Bad Request\r\n")


def test_commands_are_counted_in_bytes() -> None:
    assert encode(("SET", "ä", 12, b"\r\n")) == b"*4\r\n$3\r\nSET\r\n$2\r\n\xc3\xa4\r\n$2\r\n12\r\n$2\r\n\r\n\r\n"


def test_slots_are_those_of_redis() -> None:
    """The values of the cluster specification, and one slot for all keys of a conversation."""
    assert key_slot(b"123456789") == 0x31C3
    assert key_slot(b"foo{bar}{zap}") == key_slot(b"bar")
    assert key_slot(b"foo{}{bar}") != key_slot(b"bar")
    assert len({key_slot(b"chat:{c1}" + end) for end in (b"", b":log", b":keys", b":append:x", b":run-state")}) == 1


@given(st.text(max_size=20), st.text(max_size=20))
def test_dedupe_keys_hold_any_character_and_keep_their_prefixes(key: str, more: str) -> None:
    assert unescaped(escaped(key)) == key
    assert "\x00" not in escaped(key)
    assert escaped(key + more).startswith(escaped(key))


def test_urls() -> None:
    plain = parse_redis_url("redis://me:p%40ss@example.org:7000/2")
    assert plain.addresses == (("example.org", 7000),)
    assert (plain.login.username, plain.login.password, plain.login.db) == ("me", "p@ss", 2)
    assert parse_redis_url("rediss://x").login.tls is not None
    sentinel = parse_redis_url("redis+sentinel://:pw@a:1,b/main/3")
    assert sentinel.addresses == (("a", 1), ("b", 26379))
    assert (sentinel.service, sentinel.login.password, sentinel.login.db) == ("main", "pw", 3)


@pytest.mark.parametrize(
    "url", ["http://x", "redis://", "redis://:secret@x/one", "redis+sentinel://:secret@a", "redis://x?db=1"]
)
def test_an_unusable_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="the Redis URL cannot be used") as refused:
        parse_redis_url(url)
    assert "secret" not in str(refused.value)
