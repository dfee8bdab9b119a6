"""The plugin's hooks: what it offers, and for which environment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import orjson
import pytest
from plugins.openai_engine.engine import OpenAIEngine
from plugins.openai_engine.settings import EngineConfig, OpenAISettings
from pydantic import SecretStr

from broker.errors import EngineError, PluginError
from broker.runs.engine import EnginePlan, EngineProfile
from plugins import openai_engine


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    openai_engine.configure(OpenAISettings())
    yield
    openai_engine.configure(OpenAISettings())


def profile() -> EngineProfile:
    [found] = openai_engine.register_engine_profiles()
    return found


def plan(config: dict[str, Any], engine: str = "openai_engine") -> EnginePlan:
    return EnginePlan("c1", "openai", engine, {}, config, "signature")


def test_without_a_provider_there_is_no_profile() -> None:
    assert openai_engine.register_engine_profiles() == []


@pytest.mark.parametrize("value", ["", " "])
def test_empty_variables_are_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", value)
    monkeypatch.setenv("OPENAI_API_KEY", value)
    assert openai_engine.register_engine_profiles() == []


def test_a_key_alone_means_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
    found = profile()
    assert (found.name, found.engine, found.priority) == ("openai", "openai_engine", 10)
    assert found.config["base_url"] == "https://api.openai.com/v1"
    assert found.config["api_key"] == "sk-1"
    assert found.secrets == {"api_key", "extra_headers"}
    assert tuple(found.tools) == ("calculator", "clock", "search_document")


def test_an_address_alone_means_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:11434/v1/")
    assert profile().config["base_url"] == "http://127.0.0.1:11434/v1"
    assert "api_key" not in profile().config


def test_settings_shape_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    settings: dict[str, Any] = {
        "model": "big",
        "temperature": 0.5,
        "tools": [],
        "priority": 3,
        "system_prompt": "Be brief.",
    }
    openai_engine.configure(OpenAISettings(**settings, api_key=SecretStr("sk-own"), base_url="https://example.org/v1"))
    found = profile()
    assert (found.config["model"], found.config["temperature"], found.config["api_key"]) == ("big", 0.5, "sk-own")
    assert found.config["base_url"] == "https://example.org/v1"
    assert (tuple(found.tools), found.priority, found.system_prompt) == ((), 3, "Be brief.")
    assert found.description == "big at example.org"


def test_the_config_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's signature is made of it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert orjson.loads(orjson.dumps(dict(profile().config))) == profile().config


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OPENAI_BASE_URL", "localhost:8000", "must be an http"),
        ("OPENAI_BASE_URL", "ftp://example.org", "must be an http"),
        ("OPENAI_BASE_URL", "http://", "must be an http"),
        ("OPENAI_BASE_URL", "https://example.org/v1?key=sk-1", "no query"),
        ("OPENAI_BASE_URL", "https://me:sk-1@example.org/v1", "no user name"),
        ("OPENAI_API_KEY", "sk-1\nX: y", "printable ASCII"),
        ("OPENAI_API_KEY", "sk-1é", "printable ASCII"),
    ],
)
def test_unusable_variables_are_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(PluginError, match=words) as caught:
        openai_engine.register_engine_profiles()
    assert name in caught.value.message
    assert "sk-1" not in caught.value.message


def test_settings_do_not_show_the_key() -> None:
    assert "sk-1" not in repr(OpenAISettings(api_key=SecretStr("sk-1")))
    assert "sk-1" not in repr(EngineConfig(api_key=SecretStr("sk-1")))


def test_every_setting_is_described() -> None:
    for name, field in OpenAISettings.model_fields.items():
        assert field.description, name


def test_overrides_are_a_schema_that_fits_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    found = profile()
    schema = {"type": "object", "properties": found.overridable, "additionalProperties": False}
    jsonschema.Draft202012Validator.check_schema(schema)
    overrides = {"model": "x", "temperature": 2, "top_p": 1, "max_tokens": 5, "reasoning_effort": "low", "seed": -1}
    assert set(overrides) == set(found.overridable)
    jsonschema.validate(overrides, schema)
    assert isinstance(openai_engine.build_engine(plan({**found.config, **overrides})), OpenAIEngine)
    for name in ("base_url", "api_key", "extra_headers", "extra_body", "idle_timeout_s"):
        assert name not in found.overridable


def test_another_engines_plan_is_not_ours() -> None:
    assert openai_engine.build_engine(plan({}, engine="replay_engine")) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"modle": "x"}, "modle"),
        ({"temperature": 9}, "temperature"),
        ({"base_url": "nowhere"}, "base_url"),
        ({"extra_body": {"stream": False}}, "stream cannot"),
        ({"extra_body": {"n": "2"}}, "n must be"),
        ({"api_key": "sk-1\nx"}, "printable"),
    ],
)
def test_an_unusable_config_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        openai_engine.build_engine(plan(config))
    assert caught.value.kind == "config"
    assert "sk-1" not in caught.value.message
