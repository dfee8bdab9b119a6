"""Every error the broker raises on purpose.

    BrokerError
    ├── InvalidInput                 a value that cannot be used: the caller fixes it
    │   ├── InvalidConversationId
    │   ├── InvalidDraft             also: a draft that is too large
    │   ├── UnknownProfile / UnknownChannel / UnknownEngineProfile
    │   └── InvalidOverrides
    ├── AuthenticationFailed         credentials missing or wrong
    ├── PermissionDenied             credentials fine, permission missing
    ├── DraftRefused                 a plugin's check_draft said no
    ├── NotFound                     a conversation, run, tool call that does not exist
    ├── Conflict
    │   ├── ConversationShut         it is being filled or erased
    │   ├── IdempotencyMismatch      the key was used with another body
    │   └── IdempotencyPending       the first request with this key is still being decided
    ├── LimitExceeded                queue full, too many connections, polling too fast
    ├── RunEnded                     a write to a run after its terminal event
    ├── Unavailable                  draining, starting
    ├── StoreError                   the store refused or failed; nothing was written
    │   ├── StoreUnavailable         locked, read-only, full, unreachable: may come back
    │   ├── ForeignDatabase          the file is not ours
    │   └── NewerDatabase            the file was written by a newer version
    ├── EngineError                  an engine could not answer
    └── PluginError                  a plugin is broken: bad hook, duplicate name, failed import

Errors carry fields and build their text from them: what was expected, what came, what to do.
`code` is the stable, machine-readable name (the last part of a problem document's `type`).
"""

from __future__ import annotations

from typing import Any, ClassVar

_SHOWN = 120


def quoted(value: object) -> str:
    """Return `value` as it may appear in an error text: repr, cut to 120 characters."""
    try:
        text = repr(value)
    except RecursionError:  # what nests too deeply is shown in exactly the errors that say so
        text = f"<{type(value).__name__}, deeply nested>"
    except Exception as exc:  # an integer of more than 4,300 digits, a __repr__ that fails
        text = f"<{type(value).__name__}, not shown: {type(exc).__name__}>"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + f"… ({len(text)} characters)"


class BrokerError(Exception):
    """Base of all errors raised on purpose. `fields` are for machines, `str()` is for people."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


class InvalidInput(BrokerError):
    """A value that cannot be used. Say which, what it was and what would be right."""

    code = "invalid-input"


class InvalidConversationId(InvalidInput):
    code = "invalid-conversation-id"

    def __init__(self, conv_id: object) -> None:
        super().__init__(
            f"conversation id {quoted(conv_id)} is not usable: use 1 to 128 of the characters "
            "A-Z a-z 0-9 . _ : @ ~ -, starting with a letter or a digit",
            conv_id=str(conv_id)[:_SHOWN],
        )


class InvalidDraft(InvalidInput):
    code = "invalid-draft"


class UnknownProfile(InvalidInput):
    code = "unknown-profile"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"profile {quoted(name)} does not exist; known profiles: {', '.join(sorted(known))}",
            profile=name[:_SHOWN],
            known=sorted(known),
        )


class UnknownChannel(InvalidInput):
    code = "unknown-channel"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"channel {quoted(name)} does not exist; known channels: {', '.join(sorted(known))}",
            channel=name[:_SHOWN],
            known=sorted(known),
        )


class UnknownEngineProfile(InvalidInput):
    code = "unknown-engine-profile"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"engine profile {quoted(name)} does not exist; known engine profiles: {', '.join(sorted(known))}",
            engine_profile=name[:_SHOWN],
            known=sorted(known),
        )


class InvalidOverrides(InvalidInput):
    code = "invalid-overrides"


class AuthenticationFailed(BrokerError):
    """Credentials are missing, or nobody here knows them."""

    code = "unauthenticated"


class PermissionDenied(BrokerError):
    """The caller is known, and may not do this."""

    code = "not-permitted"


class DraftRefused(BrokerError):
    """Raised by a `check_draft` hook to refuse a draft. The publisher gets it, nobody else sees anything."""

    code = "draft-refused"


class NotFound(BrokerError):
    """What was named does not exist, or the caller may not know that it does."""

    code = "not-found"


class Conflict(BrokerError):
    """What was asked for does not go together with what is there."""

    code = "conflict"


class IdempotencyMismatch(Conflict):
    code = "idempotency-mismatch"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"idempotency key {quoted(key)} was already used with another body; "
            "use a new key for a new request, or repeat the first body unchanged",
            key=key[:_SHOWN],
        )


class IdempotencyPending(Conflict):
    code = "idempotency-pending"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"the first request with idempotency key {quoted(key)} is still being decided; repeat in a moment",
            key=key[:_SHOWN],
        )


class ConversationShut(Conflict):
    """A conversation is being filled (imported, forked) or erased, and admits nobody else."""

    code = "conversation-shut"

    @classmethod
    def of(cls, conv_id: str, why: str) -> ConversationShut:
        """Return the error. why: `filled`, `erased`; `lost` for who kept the others out and was not heard of for too long."""
        doing = {
            "filled": "is being filled by an import or a fork: choose another id, or wait until it is there",
            "erased": "is being erased: try again in a moment",
        }.get(why, "was let go by this process, which was not heard of for too long: try again")
        return cls(f"conversation {conv_id!r} {doing}", conv_id=conv_id, why=why)

    @property
    def passing(self) -> bool:
        """Whether it is over in a moment, so that waiting is worth while."""
        return bool(self.fields["why"] == "erased")


class LimitExceeded(BrokerError):
    """A documented limit was reached. `retry_after_ms` says when it is worth trying again, None: not by waiting."""

    code = "limit-exceeded"

    def __init__(self, message: str, *, retry_after_ms: int | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.retry_after_ms = retry_after_ms


class RunEnded(BrokerError):
    """A run has ended, or its lease has passed to another process: what came after it is refused."""

    code = "run-ended"


class Unavailable(BrokerError):
    """This process cannot do it now (starting, shutting down, stopping): ask again, or another one."""

    code = "unavailable"


class StoreError(BrokerError):
    """A store failed, or holds what it cannot hold."""

    code = "store-error"


class StoreUnavailable(StoreError):
    """The store cannot be reached or written to right now: nothing was written, try again."""

    code = "store-unavailable"


class ForeignDatabase(StoreError):
    """The database file is not one of this project: name another file."""

    code = "foreign-database"


class NewerDatabase(StoreError):
    """The database file was written by a newer version: use that one."""

    code = "newer-database"


class EngineError(BrokerError):
    """An engine could not answer, or not to the end.

    kind: `http` (refused by the provider), `stream` (an error inside the stream), `cut` (the stream ended without
    a finish), `timeout`, `connect`, `config`. retryable: a fresh try may succeed; the runtime retries only when
    nothing of the answer was published yet.
    """

    code = "engine-error"

    def __init__(
        self, message: str, *, kind: str = "stream", status: int | None = None, retryable: bool = False, **fields: Any
    ) -> None:
        super().__init__(message, kind=kind, status=status, **fields)
        self.kind = kind
        self.status = status
        self.retryable = retryable


class PluginError(BrokerError):
    """A plugin cannot be loaded, does not fit, or failed; the text names it and its hook."""

    code = "plugin-error"
