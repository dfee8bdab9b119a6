"""Publishing from outside the process: drafts are checked against their types, repeated keys get the first answer."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol

from broker.envelope import Draft, check_conv_id, encode_json
from broker.errors import IdempotencyMismatch, IdempotencyPending, PermissionDenied
from broker.eventlog.availability import Availability
from broker.eventlog.base import EventLog
from broker.eventlog.requests import AlreadyAppended, Request, answer_of
from broker.plugins.access import Access
from broker.security import Principal
from broker.views.catalog import Catalog

_HASH_CHARS = 40


class PublishDrafts(Protocol):
    """`Ingest.publish`, as far as it is needed here."""

    def __call__(
        self, conv_id: str, drafts: Sequence[Draft], *, request: Request | None = None
    ) -> Awaitable[list[int]]: ...


class Publishing:
    """Takes drafts of callers. In-process producers publish through a Publisher and need no permission.

    publish: takes drafts that were checked here.
    """

    def __init__(
        self, access: Access, availability: Availability, catalog: Catalog, log: EventLog, publish: PublishDrafts
    ) -> None:
        self._access = access
        self._availability = availability
        self._catalog = catalog
        self._log = log
        self._publish = publish
        self._publishing: dict[tuple[str, str], str] = {}
        """Requests that are being published, by conversation and name: the hash of each one's body."""

    async def publish(
        self, principal: Principal, conv_id: str, drafts: Sequence[Draft], *, idempotency_key: str | None
    ) -> tuple[list[int], str]:
        """Publish drafts of a caller, checked against their declared types; return (seqs, epoch).

        Who publishes into a conversation that does not exist yet has to be one who may create it. A repeated
        `idempotency_key` returns the first answer for as long as the envelopes are retained. Raises
        InvalidDraft, IdempotencyMismatch, IdempotencyPending, PermissionDenied and what `publish` raises.
        """
        channels = sorted({draft.channel or self._catalog.channel_of(draft.type) for draft in drafts})
        await self._access.authorize(principal, "publish", check_conv_id(conv_id), channels)
        for name in channels:
            self.check_channel(principal, name)
        self._availability.admit()
        for draft in drafts:
            self._catalog.drafts.check(draft)
        if idempotency_key is None:
            epoch = await self._admitted(principal, conv_id)
            return await self._publish(conv_id, drafts), epoch
        request = _request(principal, idempotency_key, drafts)
        pending = (conv_id, request.name)
        if pending in self._publishing:
            if self._publishing[pending] != request.body:
                raise IdempotencyMismatch(idempotency_key)
            raise IdempotencyPending(idempotency_key)
        self._publishing[pending] = request.body
        try:
            epoch = await self._admitted(principal, conv_id)
            seqs = await self._answered(conv_id, idempotency_key, request, len(drafts))
            if seqs is None:
                seqs = await self._publish_once(conv_id, idempotency_key, request, drafts)
            return seqs, epoch
        finally:
            del self._publishing[pending]

    def check_channel(self, principal: Principal, name: str) -> None:
        """Raise PermissionDenied where a caller may not see a channel: then it may not write to it either.

        Raises UnknownChannel.
        """
        permission = self._catalog.channel(name).permission
        if not principal.may(permission):
            raise PermissionDenied(
                f"channel {name!r} takes the permission {permission!r}, which {principal.subject!r} does not have",
                permission=permission,
            )

    async def _admitted(self, principal: Principal, conv_id: str) -> str:
        """Return the conversation's epoch. Raises PermissionDenied where there is none yet and the caller may create none."""
        state = await self._log.state(conv_id)
        if not state.exists:
            await self._access.authorize(principal, "create", conv_id)
        return state.epoch

    async def _publish_once(self, conv_id: str, key: str, request: Request, drafts: Sequence[Draft]) -> list[int]:
        try:
            return await self._publish(conv_id, drafts, request=request)
        except AlreadyAppended:  # through another node, meanwhile
            seqs = await self._answered(conv_id, key, request, len(drafts))
            if seqs is None:  # and erased
                raise IdempotencyPending(key) from None
            return seqs

    async def _answered(self, conv_id: str, key: str, request: Request, count: int) -> list[int] | None:
        """Return the seqs that this key's first request got, None if it is new. Raises IdempotencyMismatch."""
        last = await self._log.find_request(conv_id, request.name)
        if last is None:
            return None
        body, seqs = answer_of(*last, count)
        if body != request.body:
            raise IdempotencyMismatch(key)
        return seqs


def _request(principal: Principal, key: str, drafts: Sequence[Draft]) -> Request:
    """Return what is asked for. Keys belong to one caller: others can neither learn of them nor run into them."""
    asked = [
        [draft.type, draft.id, draft.channel, dict(draft.data) if isinstance(draft.data, Mapping) else draft.data]
        for draft in drafts
    ]
    return Request(f"publish:{_hash([principal.subject, key])}", _hash(asked))


def _hash(value: object) -> str:
    # As it was sent, but for the order of names: 1, 1.0 and true are stored differently, so they are different requests.
    return hashlib.sha256(encode_json(value, sort_keys=True)).hexdigest()[:_HASH_CHARS]
