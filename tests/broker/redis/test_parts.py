"""The parts of the way to Redis that need no Redis: refusals, addresses, slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import Connection
from redis.crc import key_slot
from redis.exceptions import DataError, MovedError, OutOfMemoryError, ResponseError

from broker.errors import InvalidInput
from broker.eventlog.redis_keys import escaped, live_channel, log_keys, unescaped
from broker.redis.script import RedisReplyError
from broker.redis.topology import parse_redis_url


def test_error_replies_keep_their_first_word() -> None:
    """The client library takes known first words away; what is decided by them needs them."""
    known = RedisReplyError.of(OutOfMemoryError("no memory", status_code="OOM"))
    assert (known.code, str(known)) == ("OOM", "OOM no memory")
    other = RedisReplyError.of(ResponseError("NOREPLICAS Not enough good replicas to write."))
    assert other.code == "NOREPLICAS"
    wrapped = "Error running script (call to f_8c): @user_script:46: @user_script: 46: -READONLY You can't write here."
    for status in ("ERR", None):  # Redis 6.2
        within = RedisReplyError.of(ResponseError(wrapped, status_code=status))
        assert (within.code, str(within)) == ("READONLY", "READONLY You can't write here.")
    moved = RedisReplyError.of(MovedError("3999 127.0.0.1:6381", status_code="MOVED"))
    assert moved.code == "MOVED"
    assert moved.redirect is not None
    assert moved.redirect.port == 6381


def test_all_keys_of_a_conversation_are_in_one_slot() -> None:
    """So is the channel on which its appends are announced."""
    names = [*log_keys("c1"), live_channel("c1"), "chat:{c1}:append:x", "chat:{c1}:run-state"]
    assert len({key_slot(name.encode()) for name in names}) == 1
    assert key_slot(live_channel("c1").encode()) != key_slot(live_channel("c2").encode())


@given(st.text(max_size=20), st.text(max_size=20))
def test_dedupe_keys_hold_any_character_and_keep_their_prefixes(key: str, more: str) -> None:
    assert unescaped(escaped(key)) == key
    assert "\x00" not in escaped(key)
    assert escaped(key + more).startswith(escaped(key))


def test_urls() -> None:
    plain = parse_redis_url("redis://me:p%40ss@example.org:7000/2")
    assert plain.addresses == (("example.org", 7000),)
    assert (plain.login.username, plain.login.password, plain.login.db) == ("me", "p@ss", 2)
    assert parse_redis_url("rediss://x").login.tls
    sentinel = parse_redis_url("redis+sentinel://:pw@a:1,b/main/3")
    assert sentinel.addresses == (("a", 1), ("b", 26379))
    assert (sentinel.service, sentinel.login.password, sentinel.login.db) == ("main", "pw", 3)


@pytest.mark.parametrize(
    "url",
    [
        "http://x",
        "redis://",
        "redis://:secret@x/one",
        "redis+sentinel://:secret@a",
        "redis://x?db=1",
        "redis://me:secret/word@x",
        "redis://me:12/secret@x",
        "redis://me:12#secret@x",
        "redis://me:12?secret@x",
        "redis://me:pw@x:secret",
        "redis+sentinel://me:12/secret@a:1/main",
        "redis+sentinel://:12/secret@a/main",
        "redis+sentinel://:pw@a:secret/main",
    ],
)
def test_an_unusable_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="the Redis URL cannot be used") as refused:
        parse_redis_url(url)
    assert "secret" not in str(refused.value)


ARGUMENTS = st.lists(st.text() | st.binary() | st.integers(), max_size=20)


@given(st.sampled_from(["GET", "EVALSHA", "CONFIG GET", b"SCRIPT LOAD"]), ARGUMENTS)
def test_commands_are_packed_as_the_client_library_packs_them(
    name: str | bytes, arguments: list[str | bytes | int]
) -> None:
    """Ours are packed in C, for speed."""
    urls = ("redis://a", "rediss://a", "redis+sentinel://a/main")
    for ours in (parse_redis_url(url).client(1.0).connection_pool.make_connection() for url in urls):
        packed = b"".join(ours.pack_command(name, *arguments))
        assert packed == b"".join(Connection().pack_command(name, *arguments))


@pytest.mark.parametrize("value", [None, True, object()])
def test_what_redis_cannot_be_sent_is_refused_before_it_is_sent(value: object) -> None:
    connection = parse_redis_url("redis://a").client(1.0).connection_pool.make_connection()
    with pytest.raises(DataError):
        connection.pack_command("SET", "k", value)
