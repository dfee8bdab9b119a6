"""Settings: environment, flags on top, and errors that say what to do."""

from __future__ import annotations

import pytest

from broker.errors import InvalidInput
from broker.settings import GROUPS, Settings, load_settings, misspelled_variables


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("BROKER_")]:
        monkeypatch.delenv(name)


def test_defaults_need_nothing() -> None:
    """A server without any configuration listens on loopback and keeps its data in one file."""
    settings = load_settings()
    assert (settings.host, settings.port, settings.db, settings.auth) == ("127.0.0.1", 8000, "broker.db", None)


def test_a_variable_sets_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_PORT", "9001")
    assert load_settings().port == 9001
    assert load_settings(port=None).port == 9001
    assert load_settings(port=9002).port == 9002


def test_comma_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_DEBUG_CHANNELS", "debug.trace, debug.turn_snapshot,")
    assert load_settings().debug_channels == ("debug.trace", "debug.turn_snapshot")


def test_an_empty_variable_takes_an_optional_setting_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_AUTH", "")
    monkeypatch.setenv("BROKER_REDIS_URL", "")
    assert load_settings().auth is None
    assert load_settings().redis_url is None


def test_an_error_names_variable_value_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_PORT", "eighty")
    with pytest.raises(InvalidInput, match=r"BROKER_PORT='eighty' is not usable: .*integer.*0 takes a free one"):
        load_settings()


def test_an_error_names_the_flag_where_a_flag_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"--port=70000 is not usable: .*65535"):
        load_settings(port=70000)


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        load_settings(port=-1, prefix="no-slash", durability="maybe")
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == ["--port", "--prefix", "--durability"]


def test_a_password_is_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "redis://:hunter2@redis/0"
    assert "hunter2" not in repr(load_settings(redis_url=secret))
    with pytest.raises(InvalidInput) as caught:
        load_settings(redis_url=["redis://:hunter2@redis/0"])
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(("given", "kept"), [("", ""), ("/x/", "/x"), ("/a/b", "/a/b"), ("/", "")])
def test_prefix_forms(given: str, kept: str) -> None:
    assert load_settings(prefix=given).prefix == kept


@pytest.mark.parametrize("given", ["x", "/a//b", "/a b", "/{x}", "/a?b"])
def test_unusable_prefixes(given: str) -> None:
    with pytest.raises(InvalidInput, match="a path such as /broker"):
        load_settings(prefix=given)


def test_a_misspelled_variable_is_reported_with_the_closest_one() -> None:
    assert misspelled_variables({"BROKER_PROT": "1", "BROKER_PORT": "1", "PATH": ""}) == [
        "environment variable BROKER_PROT is not a setting and has no effect: did you mean BROKER_PORT?"
    ]


def test_a_variable_like_nothing_else_points_to_the_help() -> None:
    assert "broker serve --help" in misspelled_variables({"BROKER_XYZZY": "1"})[0]


def test_variables_of_plugins_and_commands_are_not_misspelled() -> None:
    assert misspelled_variables({"BROKER_PLUGIN_X_Y": "1", "BROKER_URL": "1", "BROKER_TAIL_SINCE": "0"}) == []


def test_every_setting_is_described_and_says_its_unit() -> None:
    """Numbers carry their unit in the name or in the description, and the headings name fields that exist."""
    assert set(GROUPS) <= set(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        assert field.description, f"{name} has no description"
        if field.annotation is float:
            assert name.endswith("_s"), f"{name} is a time without unit"
