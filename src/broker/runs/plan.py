"""From a request to an engine plan: request policy, checked overrides, and the one place that computes signatures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from broker.envelope import check_conv_id
from broker.errors import EngineError, InvalidOverrides, PluginError, UnknownEngineProfile, quoted
from broker.runs.engine import EnginePlan, EngineProfile
from broker.runs.foreign import MAX_NESTING, too_deep
from broker.runs.ports import Plugins
from broker.security import Principal

MASK = "***"


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a caller asked for; what `resolve_request` gets to see.

    conv_id: None asks for a new conversation. engine_profile: None leaves the choice to the policy. current_profile: the
    engine profile that the conversation has, None for a new one. default_profile: the server's.
    """

    principal: Principal
    conv_id: str | None
    prompt: str
    engine_profile: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    current_profile: str | None = None
    default_profile: str | None = None


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """What a request resolved to. overrides: checked against what the engine profile allows before anything is stored."""

    conv_id: str
    engine_profile: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


def canonical_json(value: object) -> bytes:
    """Return JSON that is equal for equal values: keys sorted, 1.0 written as 1.

    Raises TypeError for what is not JSON, or nested more than 100 levels deep.
    """
    if too_deep(value):
        raise TypeError(f"it is nested more than {MAX_NESTING} levels deep")
    return orjson.dumps(_canonical(value), option=orjson.OPT_SORT_KEYS)


def _canonical(value: object) -> object:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value


def digest(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def make_plan(conv_id: str, profile: EngineProfile, overrides: Mapping[str, Any]) -> EnginePlan:
    """Return the plan for checked `overrides` of `profile`.

    The signature covers engine, profile name and the config as it takes effect: defaults applied, secrets left out. So
    neither the order of keys nor giving a default explicitly changes it.
    """
    defaults = {key: schema["default"] for key, schema in profile.overridable.items() if "default" in schema}
    config = {**defaults, **profile.config, **overrides}
    signed = {key: value for key, value in config.items() if key not in profile.secrets}
    signature = digest({"engine": profile.engine, "engine_profile": profile.name, "config": signed})
    return EnginePlan(conv_id, profile.name, profile.engine, dict(overrides), config, signature)


def masked(plan: EnginePlan, profile: EngineProfile) -> dict[str, Any]:
    """Return the plan as it may be shown and stored: secret values replaced."""
    config = {key: MASK if key in profile.secrets else value for key, value in plan.config.items()}
    return {"engine": plan.engine, "engine_profile": plan.engine_profile, "config": config}


def plan_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys in which two masked plans differ: `{"config.temperature": {"from": 0, "to": 1}}`."""
    before = _flat(old)
    after = _flat(new)
    return {
        key: {"from": before.get(key), "to": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if canonical_json(before.get(key)) != canonical_json(after.get(key))
    }


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in plan.items() if key != "config"}
    return flat | {f"config.{key}": value for key, value in plan.get("config", {}).items()}


def check_overrides(profile: EngineProfile, overrides: Mapping[str, Any]) -> None:
    """Raise InvalidOverrides for a key that the profile does not let requests set, or a value its schema refuses."""
    if too_deep(overrides):
        raise InvalidOverrides(f"the overrides are nested more than {MAX_NESTING} levels deep")
    allowed = sorted(set(profile.overridable) - profile.secrets)
    for key, value in overrides.items():
        if key not in allowed:
            # A secret is not part of the signature: were it overridable, one caller's key could serve another's run.
            raise InvalidOverrides(
                f"override {quoted(key)} is not allowed by engine profile {profile.name!r}; "
                f"allowed: {', '.join(allowed) or 'none'}",
                key=str(key)[:120],
                allowed=allowed,
            )
        schema = profile.overridable[key]
        error = next(iter(Draft202012Validator(schema).iter_errors(value)), None)
        if error is not None:
            raise InvalidOverrides(
                f"override {key}={quoted(value)} is not usable: {error.message[:200]}; "
                f"allowed by engine profile {profile.name!r}: {orjson.dumps(schema).decode()[:300]}",
                key=key,
                schema=dict(schema),
            )


def check_unique(plugin: str, hook: str, name: str, owners: dict[str, str]) -> None:
    """Note in `owners` that `plugin` registers `name`. Raises PluginError naming both when another one did already."""
    if name in owners:
        raise PluginError(
            f"plugin {plugin!r}, hook {hook}: {name!r} is already registered by {owners[name]!r}; "
            "choose another name or unload one of the two",
            plugin=plugin,
            hook=hook,
            name=name,
        )
    owners[name] = plugin


def check_schema(plugin: str, what: str, schema: Mapping[str, Any]) -> None:
    """Raise PluginError where `schema` is not a JSON schema."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as exc:
        raise PluginError(
            f"plugin {plugin!r}: {what}: the JSON schema is not valid: {exc.message[:200]}", plugin=plugin
        ) from exc


class EngineProfiles:
    """The engine profiles by name, as the plugins registered them."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._profiles: dict[str, EngineProfile] = {}
        self.load()

    def load(self) -> None:
        """Collect the profiles of all plugins again.

        Raises PluginError for a name that two register, and for an `overridable` that is no JSON schema.
        """
        profiles: dict[str, EngineProfile] = {}
        owners: dict[str, str] = {}
        for plugin, result in self._plugins.call_collect("register_engine_profiles"):
            for profile in [result] if isinstance(result, EngineProfile) else result:
                check_unique(plugin, "register_engine_profiles", profile.name, owners)
                for key, schema in profile.overridable.items():
                    check_schema(plugin, f"engine profile {profile.name!r}, override {key!r}", schema)
                profiles[profile.name] = profile
        self._profiles = profiles

    @property
    def default(self) -> EngineProfile | None:
        """The profile with the highest priority; of equals the first by name. None when there is none."""
        return min(self._profiles.values(), key=lambda p: (-p.priority, p.name), default=None)

    def get(self, name: str) -> EngineProfile:
        """Return the profile `name`, or raise UnknownEngineProfile naming those that exist."""
        try:
            return self._profiles[name]
        except KeyError:
            raise UnknownEngineProfile(name, list(self._profiles)) from None

    def describe(self) -> list[dict[str, Any]]:
        """Return what a client may know of the profiles: secrets masked, the default first."""
        ordered = sorted(self._profiles.values(), key=lambda p: (-p.priority, p.name))
        return [
            {
                "name": profile.name,
                "engine": profile.engine,
                "description": profile.description,
                "default": profile is self.default,
                "config": {k: MASK if k in profile.secrets else v for k, v in profile.config.items()},
                "overridable": {k: dict(v) for k, v in profile.overridable.items() if k not in profile.secrets},
                "tools": list(profile.tools),
            }
            for profile in ordered
        ]

    async def resolve(self, request: RunRequest, fresh_conv_id: str) -> ResolvedRequest:
        """Return what the request means: the first answer of the `resolve_request` hooks, else the default policy.

        Default policy: the profile that was asked for, else the conversation's own, else the server's default. An own
        profile that exists no more counts as none. The answer is checked whoever gave it. Raises
        InvalidConversationId, UnknownEngineProfile, InvalidOverrides, EngineError when no profile exists at all.
        """
        if self.default is None:
            raise EngineError(
                "no engine profile is registered, so nothing can answer: load an engine plugin "
                "(replay_engine needs no key) and see `broker plugins list`",
                kind="config",
            )
        resolved: ResolvedRequest | None = await self._plugins.acall_first("resolve_request", request=request)
        if resolved is None:
            name = request.engine_profile
            if name is None:
                name = request.current_profile if request.current_profile in self._profiles else self.default.name
            resolved = ResolvedRequest(request.conv_id or fresh_conv_id, name or self.default.name, request.overrides)
        check_conv_id(resolved.conv_id)
        check_overrides(self.get(resolved.engine_profile), resolved.overrides)
        return resolved
