"""Foreign web pages and rebound names do not get in; programs and own pages do."""

from __future__ import annotations

import pytest

from broker.settings import Settings
from transports.http.gate import foreign

OPEN = Settings()
GUARDED = Settings(auth="tokens")


def refused(settings: Settings = OPEN, /, **headers: str) -> str | None:
    found = foreign({name.replace("_", "-"): value for name, value in headers.items()}, settings)
    return found.code if found else None


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000", "LOCALHOST:1"])
def test_loopback_names_are_ours(host: str) -> None:
    assert refused(host=host) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil:80"]
)
def test_a_name_that_was_made_to_point_here_is_not(host: str) -> None:
    """DNS rebinding: the page's own name resolves to 127.0.0.1, so that its requests count as same-origin."""
    assert refused(host=host, origin=f"http://{host}") == "foreign-host"


def test_own_names_can_be_allowed() -> None:
    assert refused(Settings(allowed_hosts=("Chat.example",)), host="chat.example:80") is None
    assert refused(Settings(allowed_hosts=("*",)), host="whatever") is None
    assert refused(Settings(insecure=True), host="192.168.1.5:8000") is None
    assert refused(GUARDED, host="chat.example") is None


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:3000",
        "https://127.0.0.1",
        "null",
        "file://",
        "http://127.0.0.1:8000.evil.example",
        "http://127.0.0.1:x",
        "chrome-extension://abc",
    ],
)
def test_a_foreign_page_is_refused(origin: str) -> None:
    assert refused(host="127.0.0.1:8000", origin=origin) == "foreign-origin"


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "https://127.0.0.1:8000"])
def test_own_pages_pass(origin: str) -> None:
    """Also with another scheme: a proxy that ends TLS talks plain HTTP to us."""
    assert refused(host="127.0.0.1:8000", origin=origin) is None


def test_default_ports_are_the_same_with_and_without_number() -> None:
    assert refused(GUARDED, host="chat.example", origin="https://chat.example") is None
    assert refused(GUARDED, host="chat.example:443", origin="https://chat.example") is None


def test_a_program_sends_no_origin_and_passes() -> None:
    assert refused(host="127.0.0.1:8000") is None


def test_allowed_origins_pass() -> None:
    settings = Settings(allowed_origins=("https://app.example",))
    assert refused(settings, host="localhost", origin="https://app.example") is None
    assert refused(settings, host="localhost", origin="https://app.example.evil") == "foreign-origin"


def test_a_token_counts_only_where_tokens_are_checked() -> None:
    """With auth, whoever knows a token may come from any page; without, a made-up token opens nothing."""
    for headers in ({"authorization": "Bearer x"}, {"sec_websocket_protocol": "conversation.v1, bearer.x"}):
        assert refused(GUARDED, host="chat.example", origin="https://app.example", **headers) is None
        assert refused(host="localhost", origin="https://app.example", **headers) == "foreign-origin"
    assert refused(GUARDED, host="chat.example", origin="https://app.example") == "foreign-origin"
