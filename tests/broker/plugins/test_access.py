"""Access: who a caller is and what it may do, with and without auth, and with plugins that cannot decide."""

from __future__ import annotations

from typing import Any

import pytest

from broker.errors import AuthenticationFailed, BrokerError, PermissionDenied
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.plugins.access import Access
from broker.security import Credentials, Principal
from broker.settings import Settings


class Door:
    """A plugin that answers what a test wants. known: principals by token. answer: for `authorize`."""

    def __init__(self, name: str = "door", answer: Any = None, **known: Principal) -> None:
        self.name = name
        self.answer = answer
        self.known = known
        self.asked: list[tuple[str, str | None, list[str]]] = []

    @hookimpl
    async def authenticate(self, credentials: Credentials) -> Principal | None:
        if credentials.bearer == "wrong":
            raise AuthenticationFailed("the token has expired: get a new one")
        if credentials.bearer == "crash":
            raise RuntimeError("the key file holds secret-key-7")
        return self.known.get(credentials.bearer or "")

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None, channels: list[str]) -> Any:
        self.asked.append((action, conv_id, channels))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


ANN = Principal("ann")


def access(*plugins: object, **settings: Any) -> Access:
    host = PluginHost()
    for plugin in plugins:
        host.add(plugin)
    return Access(Settings(**settings), host)


# -- who ---------------------------------------------------------------------------------------------------------------


async def test_without_auth_everybody_is_local_and_without_debug() -> None:
    principal = await access().authenticate(Credentials())
    assert principal == Principal("local")
    assert not principal.may("debug")
    assert principal.may(None)


async def test_switching_debug_channels_on_is_what_permits_them_without_auth() -> None:
    assert (await access(debug_channels=("debug.trace",)).authenticate(Credentials())).may("debug")


async def test_a_plugin_knows_its_callers() -> None:
    asked = access(Door(ann=ANN), auth="door")
    assert await asked.authenticate(Credentials(bearer="ann")) is ANN
    for bearer in (None, "", "bob"):
        with pytest.raises(AuthenticationFailed, match="Authorization: Bearer"):
            await asked.authenticate(Credentials(bearer=bearer))


async def test_mine_but_wrong_is_refused_with_the_plugins_reason() -> None:
    with pytest.raises(AuthenticationFailed, match="expired"):
        await access(Door(ann=ANN), auth="door").authenticate(Credentials(bearer="wrong"))


@pytest.mark.parametrize("auth", ["door", None])
async def test_a_plugin_that_crashes_lets_nobody_in(auth: str | None) -> None:
    """Also not as `local`: who presents credentials that break the check is not let in as somebody else."""
    with pytest.raises(BrokerError):
        await access(Door(ann=ANN), auth=auth).authenticate(Credentials(bearer="crash"))


# -- what --------------------------------------------------------------------------------------------------------------


async def test_without_plugins_everything_but_debug_is_allowed() -> None:
    free = access()
    for action in ("read", "create", "publish", "send", "act", "erase", "list"):
        await free.authorize(ANN, action, "c1")
    with pytest.raises(PermissionDenied, match="'debug'"):
        await free.authorize(ANN, "debug", None)
    await free.authorize(Principal("op", frozenset({"debug"})), "debug", None)


async def test_plugins_are_asked_with_all_there_is_to_know() -> None:
    door = Door()
    await access(door).authorize(ANN, "read", "c1", ("sem", "timeline"))
    assert door.asked == [("read", "c1", ["sem", "timeline"])]


async def test_one_no_is_enough() -> None:
    with pytest.raises(PermissionDenied, match=r"'ann' may not read conversation 'c1' \(plugin 'no'\)"):
        await access(Door("yes", True), Door("no", False), Door("none")).authorize(ANN, "read", "c1")
    await access(Door("yes", True), Door("none")).authorize(ANN, "read", "c1")


async def test_a_refusal_names_the_channels_that_were_asked_for() -> None:
    """Who may read others of the conversation is not told that it may read none."""
    with pytest.raises(PermissionDenied, match=r"'ann' may not read channels sem, timeline of conversation 'c1' "):
        await access(Door("no", False)).authorize(ANN, "read", "c1", ("sem", "timeline"))


async def test_a_refusal_with_a_reason_reaches_the_caller() -> None:
    with pytest.raises(PermissionDenied, match="not before noon"):
        await access(Door(answer=PermissionDenied("not before noon"))).authorize(ANN, "read", "c1")


async def test_who_cannot_decide_denies_and_tells_nothing_of_its_inside() -> None:
    door = Door(answer=RuntimeError("postgres://user:password@db is down"))
    with pytest.raises(PermissionDenied) as told:
        await access(door).authorize(ANN, "read", "c1")
    assert "password" not in str(told.value)


@pytest.mark.parametrize("answer", [0, "", [], {}, "no", object()])
async def test_what_is_neither_yes_nor_no_denies(answer: Any) -> None:
    """`return claims.get("conversations")` with nothing in it must not open the door."""
    with pytest.raises(PermissionDenied):
        await access(Door(answer=answer)).authorize(ANN, "read", "c1")
