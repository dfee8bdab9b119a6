"""Plans: one canonical signature, checked overrides, request policy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import EngineError, InvalidOverrides, PluginError, UnknownEngineProfile
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.runs.engine import EngineProfile
from broker.runs.plan import (
    EngineProfiles,
    ResolvedRequest,
    RunRequest,
    canonical_json,
    check_overrides,
    make_plan,
    masked,
    plan_changes,
)
from broker.security import Principal

PROFILE = EngineProfile(
    "smart",
    "openai",
    config={"model": "m", "temperature": 1, "api_key": "sk-secret", "stop": {"b": 1, "a": 2}},
    overridable={
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "max_tokens": {"type": "integer", "default": 100},
        "api_key": {"type": "string"},
    },
    secrets=frozenset({"api_key"}),
)


def signature(**overrides: Any) -> str:
    return make_plan("c", PROFILE, overrides).signature


def test_giving_a_default_changes_nothing() -> None:
    assert signature() == signature(temperature=1) == signature(temperature=1.0) == signature(max_tokens=100)
    assert signature() != signature(temperature=0.5)
    assert make_plan("c", PROFILE, {}).config["max_tokens"] == 100


def test_key_order_and_conversation_change_nothing() -> None:
    turned = EngineProfile(
        "smart",
        "openai",
        config={"stop": {"a": 2, "b": 1}, "api_key": "sk-secret", "temperature": 1, "model": "m"},
        overridable=PROFILE.overridable,
        secrets=PROFILE.secrets,
    )
    assert make_plan("d", turned, {}).signature == signature()


def test_a_secret_is_not_in_the_signature_nor_shown_but_reaches_the_engine() -> None:
    rotated = EngineProfile(
        "smart",
        "openai",
        config={**PROFILE.config, "api_key": "other"},
        overridable=PROFILE.overridable,
        secrets=PROFILE.secrets,
    )
    plan = make_plan("c", rotated, {})
    assert plan.signature == signature()
    assert plan.config["api_key"] == "other"
    assert masked(plan, rotated)["config"]["api_key"] == "***"


def test_changes_name_the_differing_keys() -> None:
    old = masked(make_plan("c", PROFILE, {}), PROFILE)
    new = masked(make_plan("c", PROFILE, {"temperature": 0}), PROFILE)
    assert plan_changes(old, new) == {"config.temperature": {"from": 1, "to": 0}}
    assert plan_changes(old, old) == {}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=st.dictionaries(st.text(), JSON, max_size=6))
def test_canonical_json_does_not_depend_on_order(value: dict[str, Any]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


def test_canonical_json_keeps_true_and_one_apart() -> None:
    assert canonical_json({"a": True}) != canonical_json({"a": 1})
    assert canonical_json(1.0) == canonical_json(1)
    assert canonical_json(1.5) == b"1.5"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model": "x"},
            r"override 'model' is not allowed by engine profile 'smart'; allowed: max_tokens, temperature",
        ),
        ({"temperature": 3}, r"temperature=3 is not usable: 3 is greater than the maximum of 2; allowed"),
        ({"temperature": "hot"}, r"temperature='hot' is not usable: 'hot' is not of type 'number'"),
        ({"max_tokens": 1.5}, r"max_tokens=1.5 is not usable"),
        ({"api_key": "mine"}, r"override 'api_key' is not allowed"),
    ],
)
def test_a_refused_override_names_key_value_and_what_is_allowed(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOverrides, match=message):
        check_overrides(PROFILE, overrides)


def host(*plugins: Any) -> PluginHost:
    made = PluginHost()
    for plugin in plugins:
        made.add(plugin)
    return made


class Profiles:
    def __init__(self, *profiles: EngineProfile, name: str = "profiles") -> None:
        self.name = name
        self._profiles = profiles

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return list(self._profiles)


SMALL = EngineProfile("small", "e", priority=1)
BIG = EngineProfile("big", "e", priority=9)


def request(**more: Any) -> RunRequest:
    return RunRequest(Principal("alice"), more.pop("conv_id", "c"), "hi", **more)


@pytest.mark.parametrize(
    ("asked", "current", "expected"),
    [(None, None, "big"), (None, "small", "small"), ("small", "big", "small"), (None, "gone", "big")],
)
async def test_default_policy(asked: str | None, current: str | None, expected: str) -> None:
    profiles = EngineProfiles(host(Profiles(SMALL, BIG)))
    resolved = await profiles.resolve(request(engine_profile=asked, current_profile=current), "fresh")
    assert resolved == ResolvedRequest("c", expected, {})


async def test_a_new_conversation_gets_the_fresh_id() -> None:
    profiles = EngineProfiles(host(Profiles(SMALL)))
    assert (await profiles.resolve(request(conv_id=None), "fresh")).conv_id == "fresh"


async def test_unknown_and_missing_profiles_say_what_there_is() -> None:
    with pytest.raises(UnknownEngineProfile, match="'hug' does not exist; known engine profiles: big, small"):
        await EngineProfiles(host(Profiles(SMALL, BIG))).resolve(request(engine_profile="hug"), "fresh")
    with pytest.raises(EngineError, match="no engine profile is registered"):
        await EngineProfiles(host()).resolve(request(), "fresh")


class Policy:
    name = "policy"

    def __init__(self, answer: ResolvedRequest | None) -> None:
        self.answer = answer
        self.seen: list[RunRequest] = []

    @hookimpl
    async def resolve_request(self, request: RunRequest) -> ResolvedRequest | None:
        self.seen.append(request)
        return self.answer


async def test_a_plugin_decides_and_is_checked() -> None:
    policy = Policy(ResolvedRequest("elsewhere", "small"))
    profiles = EngineProfiles(host(Profiles(SMALL, BIG), policy))
    assert (await profiles.resolve(request(), "fresh")).conv_id == "elsewhere"
    assert policy.seen[0].prompt == "hi"
    policy.answer = ResolvedRequest("no spaces please", "small")
    with pytest.raises(PluginError, match="plugin 'policy', hook resolve_request: .*'no spaces please'"):
        await profiles.resolve(request(), "fresh")
    policy.answer = ResolvedRequest("c", "small", {"x": 1})
    with pytest.raises(PluginError, match="override 'x' is not allowed"):
        await profiles.resolve(request(), "fresh")
    with pytest.raises(InvalidOverrides):  # it is the caller who asked for it
        await profiles.resolve(request(overrides={"x": 1}), "fresh")


def test_two_plugins_with_one_profile_name_are_an_error_naming_both() -> None:
    with pytest.raises(PluginError, match=r"'small' is already registered by '(one|two)'"):
        EngineProfiles(host(Profiles(SMALL, name="one"), Profiles(SMALL, name="two")))


def test_an_override_schema_must_be_a_schema() -> None:
    bad = EngineProfile("bad", "e", overridable={"x": {"type": "nonsense"}})
    with pytest.raises(PluginError, match="engine profile 'bad', override 'x': the JSON schema is not valid"):
        EngineProfiles(host(Profiles(bad)))


def test_descriptions_show_no_secret() -> None:
    described = EngineProfiles(host(Profiles(PROFILE, SMALL))).describe()
    assert [(d["name"], d["default"]) for d in described] == [("small", True), ("smart", False)]
    assert "sk-secret" not in str(described)
    assert "api_key" not in described[1]["overridable"]
