"""Publishing from outside the process: drafts are checked against their types, repeated keys get the first answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import orjson
from pydantic import ValidationError

from broker.envelope import Draft, check_conv_id, encode_json
from broker.errors import IdempotencyMismatch, IdempotencyPending, InvalidDraft, PermissionDenied
from broker.eventlog.availability import Availability
from broker.eventlog.base import EventLog
from broker.plugins.access import Access
from broker.security import Principal
from broker.views.catalog import Catalog

RESERVED_PREFIXES = ("ws.", "timeline.")

PublishDrafts = Callable[[str, Sequence[Draft]], Awaitable[list[int]]]


class Publishing:
    """Takes drafts of callers. In-process producers publish through a Publisher and need no permission."""

    def __init__(
        self, access: Access, availability: Availability, catalog: Catalog, log: EventLog, publish: PublishDrafts
    ) -> None:
        self._access = access
        self._availability = availability
        self._catalog = catalog
        self._log = log
        self._publish = publish
        self._publishing: set[tuple[str, str]] = set()

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
            self.check(draft)
        state = await self._log.state(conv_id)
        if not state.exists:
            await self._access.authorize(principal, "create", conv_id)
        epoch = state.epoch
        if idempotency_key is None:
            return await self._publish(conv_id, drafts), epoch
        pending = (conv_id, idempotency_key)
        if pending in self._publishing:
            raise IdempotencyPending(idempotency_key)
        self._publishing.add(pending)
        try:
            prefix = _dedupe_prefix(idempotency_key)
            keyed = [
                Draft(draft.type, draft.data, draft.id, draft.channel, f"{prefix}{index}/{len(drafts)}")
                for index, draft in enumerate(drafts)
            ]
            before = await self._answered(conv_id, idempotency_key, keyed)
            return before if before is not None else await self._publish(conv_id, keyed), epoch
        finally:
            self._publishing.discard(pending)

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

    def check(self, draft: Draft) -> None:
        """Raise InvalidDraft for a type that is the broker's own, and for data that do not fit their declared type."""
        if draft.type.startswith(RESERVED_PREFIXES):
            raise InvalidDraft(
                f"type {draft.type!r} is the broker's own: publish the event that causes it", type=draft.type
            )
        declared = self._catalog.event_types.get(draft.type)
        if declared is None or declared.model is None:
            return
        try:
            declared.model.model_validate(draft.data)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "data"
            raise InvalidDraft(
                f"data of {draft.type} does not fit its type: {place}: {first['msg']}", type=draft.type, field=place
            ) from exc

    async def _answered(self, conv_id: str, key: str, drafts: Sequence[Draft]) -> list[int] | None:
        """Return the seqs that this key's first request got, None if it is new. Raises IdempotencyMismatch."""
        log, catalog = self._log, self._catalog
        seqs: list[int] = []
        for draft in drafts:
            assert draft.dedupe_key is not None
            seq = await log.find(conv_id, draft.dedupe_key) or 0
            found = (await log.read(conv_id, after=seq - 1, upto=seq, limit=1)).envelopes if seq else []
            for known in found:
                if known.type != draft.type or known.data != orjson.loads(encode_json(dict(draft.data))):
                    raise IdempotencyMismatch(key)
            seqs.append(seq if found else 0)
        if not any(seqs) and not await log.find_prefix(conv_id, _dedupe_prefix(key)):
            return None
        for draft, seq in zip(drafts, seqs, strict=True):
            # What is not there was dropped at that time, for its debug channel was off; or this is another request.
            if not seq and not catalog.channel(draft.channel or catalog.channel_of(draft.type)).switchable:
                raise IdempotencyMismatch(key)
        return seqs


def _dedupe_prefix(idempotency_key: str) -> str:
    """Return what the dedupe keys of a request begin with. With its length: no key begins like another one."""
    return f"publish:{len(idempotency_key)}:{idempotency_key}:"
