"""Both plugins as the plugin host loads them: from the plugins folder, with their settings from the environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.openai_engine.answers import HELLO
from tests.support.engine_answers import fold
from tests.support.recorded_provider import Exchange, RecordedProvider

from broker.plugins import PluginHost
from broker.runs.engine import EnginePlan

FOLDER = Path(__file__).resolve().parents[3] / "plugins"


@pytest.fixture
def host() -> Iterator[PluginHost]:
    made = PluginHost()
    yield made
    made.close()


def collected(host: PluginHost, hook: str) -> dict[str, Any]:
    """Return what the plugins registered, by name."""
    return {item.name: item for _, items in host.call_collect(hook) for item in items}


async def test_from_the_environment_to_an_answer(
    host: PluginHost, made_up: RecordedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'data: {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    made_up.add("good", Exchange(body))
    monkeypatch.setenv("OPENAI_BASE_URL", made_up.url("good"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("BROKER_PLUGIN_OPENAI_ENGINE_MODEL", "big")
    monkeypatch.setenv("BROKER_PLUGIN_OPENAI_ENGINE_TOOLS", '["clock"]')
    monkeypatch.setenv("BROKER_PLUGIN_OPENAI_ENGINE_EXTRA_BODY", '{"user": "u1"}')
    host.load_directory(FOLDER)
    profile = collected(host, "register_engine_profiles")["openai"]
    assert profile.tools == ("clock",)
    plan = EnginePlan("c1", "openai", profile.engine, {}, profile.config, "signature")
    engine = await host.acall_first("build_engine", plan=plan)
    try:
        assert fold([event async for event in engine.stream(HELLO)]).text == {0: "Hi"}
    finally:
        await engine.aclose()
    [seen] = made_up.requests
    assert (seen.headers["authorization"], seen.body["model"], seen.body["user"]) == ("Bearer sk-1", "big", "u1")


def test_the_offered_tools_exist(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    host.load_directory(FOLDER)
    profile = collected(host, "register_engine_profiles")["openai"]
    assert set(profile.tools) <= set(collected(host, "register_tools"))


def test_without_a_provider_only_others_offer_profiles(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    host.load_directory(FOLDER)
    assert "openai" not in collected(host, "register_engine_profiles")
