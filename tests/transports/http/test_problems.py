"""Errors become problem documents: one table, stable types, no internals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker import errors
from broker.errors import BrokerError
from transports.http.problems import HttpProblem, response_of, status_of


def answer(error: Exception) -> tuple[int, dict[str, Any], Any]:
    response = response_of(error)
    return response.status_code, json.loads(bytes(response.body)), response.headers


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidConversationId("a b"), 400, "invalid-conversation-id"),
        (errors.UnknownProfile("x", ["default"]), 400, "unknown-profile"),
        (errors.UnknownChannel("x", ["sem"]), 400, "unknown-channel"),
        (errors.AuthenticationFailed("no"), 401, "unauthenticated"),
        (errors.PermissionDenied("no"), 403, "not-permitted"),
        (errors.NotFound("no"), 404, "not-found"),
        (errors.Conflict("no"), 409, "conflict"),
        (errors.IdempotencyPending("k"), 409, "idempotency-pending"),
        (errors.IdempotencyMismatch("k"), 422, "idempotency-mismatch"),
        (errors.DraftRefused("no"), 422, "draft-refused"),
        (errors.RunEnded("no"), 409, "run-ended"),
        (errors.LimitExceeded("no"), 429, "limit-exceeded"),
        (errors.EngineError("no"), 502, "engine-error"),
        (errors.Unavailable("no"), 503, "unavailable"),
        (errors.StoreUnavailable("no"), 503, "store-unavailable"),
    ],
)
def test_each_error_has_its_status_and_a_stable_type(error: BrokerError, status: int, code: str) -> None:
    found, document, headers = answer(error)
    assert found == status
    assert document["type"] == f"urn:conversation-broker:problem:{code}"
    assert document["status"] == status
    assert document["detail"] == error.message
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"


def all_errors(kind: type[BrokerError]) -> list[type[BrokerError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in all_errors(child))]


def test_only_what_is_the_servers_own_fault_is_500() -> None:
    """A new error class without a row in the table would answer 500: the reasons for each are known."""
    internal = {kind.__name__ for kind in all_errors(BrokerError) if status_of(kind.__new__(kind)) == 500}
    ours = {name for name in internal if hasattr(errors, name)}
    assert ours == {"BrokerError", "PluginError", "StoreError", "ForeignDatabase", "NewerDatabase"}


def test_fields_are_in_the_document_and_cannot_replace_standard_members() -> None:
    _, document, _ = answer(errors.PermissionDenied("no", permission="debug", status="x"))
    assert document["permission"] == "debug"
    assert document["status"] == 403


def test_challenges_and_delays_are_headers() -> None:
    assert answer(errors.AuthenticationFailed("no"))[2]["www-authenticate"] == "Bearer"
    assert answer(errors.LimitExceeded("no", retry_after_ms=1500))[2]["retry-after"] == "2"
    assert "retry-after" not in answer(errors.LimitExceeded("no"))[2]
    assert int(answer(errors.Unavailable("no"))[2]["retry-after"]) > 0


def test_internals_stay_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    status, document, _ = answer(errors.StoreError("table at /secret/path is broken"))
    assert status == 500
    assert "secret" not in json.dumps(document)
    assert "/secret/path" in caplog.text


def test_a_value_that_is_no_unicode_still_gives_a_document() -> None:
    status, document, _ = answer(HttpProblem(400, "x", "half a pair \ud800"))
    assert (status, document["status"]) == (400, 400)
    assert "ud800" in document["detail"]
