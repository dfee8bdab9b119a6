"""What callers from outside the process ask for, with their permissions checked: reading, polling, publishing.

Transports call this; in-process producers use `ConversationWSBroker.publish` and need no permission.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import ValidationError

from broker.api.publishing import RESERVED_PREFIXES, _dedupe_prefix
from broker.conversations.reader import TimelinePage
from broker.delivery.start import decide_start
from broker.envelope import TIMELINE, Draft, check_conv_id, encode_json
from broker.errors import IdempotencyMismatch, IdempotencyPending, InvalidDraft, Unavailable
from broker.security import Principal
from broker.views.frames import event_messages, reset_message, through_message
from broker.views.view import View

if TYPE_CHECKING:
    from broker.broker import ConversationWSBroker
    from broker.conversations.conversation import Conversation

STATE_PAGE_ENTITIES = 1000
PAGE_BYTES_MAX = 1_048_576
"""About how much of the log one page of messages may cover, shown or hidden: what one request costs is bounded."""


@dataclass(slots=True)
class MessagesPage:
    """Recovery over HTTP: the frames that a socket would have carried, in order.

    oldest_seq: everything after this position is retained. head_seq: the conversation's last seq. more: ask again with
    the last frame's position (the page is full in frames, or has covered enough of the log).
    """

    epoch: str
    oldest_seq: int
    head_seq: int
    recovered: bool
    frames: list[bytes] = field(default_factory=list)
    more: bool = False


class Outside:
    """The checked face of a broker."""

    def __init__(self, broker: ConversationWSBroker) -> None:
        self._broker = broker
        self._publishing: set[tuple[str, str]] = set()

    # -- reading --------------------------------------------------------------------------------------------------

    async def messages(
        self,
        principal: Principal,
        conv_id: str,
        *,
        since: int,
        epoch: str | None,
        profile: str,
        channels: str | None,
        limit: int,
        wait_s: float,
    ) -> MessagesPage:
        """Return the frames after `since` as the view shows them; wait up to `wait_s` seconds if there are none yet.

        Hidden envelopes move the position by a closing `ws.through` frame. With a view that has state, the entities
        that changed up to the page's end follow the events. Raises what `subscribe` raises; Unavailable ends the waiting.
        """
        broker = self._broker
        view = broker.views.compile(principal, profile, channels)
        await broker.authorize_following(principal, conv_id, view.channel_names)
        deadline_s = time.monotonic() + wait_s
        while True:
            conversation = await broker.conversations.open(conv_id)
            conversation.holds += 1
            try:
                page = await self._page(conversation, view, since=since, epoch=epoch, limit=limit)
                left_s = deadline_s - time.monotonic()
                if page.more or not page.recovered or left_s <= 0 or self._shows_something(page):
                    page.frames += broker.subscriptions.notices.page(view)
                    return page
                if broker.lifecycle.draining:
                    raise Unavailable("this process is shutting down: ask again, another one has what comes next")
                # Asleep only if nothing came, and nobody erased the conversation, while the page was read.
                if page.head_seq >= conversation.position and broker.conversations.get(conv_id) is conversation:
                    await conversation.next_dispatch(left_s)
            finally:
                conversation.holds -= 1

    def _shows_something(self, page: MessagesPage) -> bool:
        return any(b'"type":"ws.through"' not in frame[:40] for frame in page.frames)

    async def _page(
        self, conversation: Conversation, view: View, *, since: int, epoch: str | None, limit: int
    ) -> MessagesPage:
        broker, conv_id = self._broker, conversation.conv_id
        state = await broker.log.state(conv_id)
        start = await decide_start(
            broker.log,
            conv_id,
            state,
            head=conversation.position,
            since=since,
            epoch=epoch,
            hydrate=False,
            has_state=view.state,
        )
        page = MessagesPage(
            epoch=state.epoch,
            oldest_seq=state.trimmed_seq,
            head_seq=conversation.position,
            recovered=start.recovered,
        )
        told = since
        if start.reset is not None:
            reset = reset_message(
                start.reset, epoch=state.epoch, oldest_seq=start.oldest_seq, start=start.after, connection_id=conv_id
            )
            page.frames.append(reset.text)
            page.frames.append(through_message(conv_id, start.after).text)
            told = start.after
        cursor = start.after
        head = conversation.position
        events = scanned = 0
        while cursor < head and events < limit and scanned < PAGE_BYTES_MAX:
            stretch = await broker.log.read(conv_id, after=cursor, upto=head, limit=limit - events)
            if stretch.trimmed_seq > cursor:  # retention overtook this reading
                if not events:
                    return await self._page(conversation, view, since=since, epoch=epoch, limit=limit)
                break  # what was found stands; the next request begins where nothing is left, and is told so
            shown = [seen for envelope in stretch.envelopes if (seen := view.show(envelope)) is not None]
            page.frames.extend(message.text for message in event_messages(shown, told))
            events += len(shown)
            scanned += sum(envelope.size_bytes for envelope in stretch.envelopes)
            told = shown[-1].seq if shown else told
            cursor = max(cursor, stretch.through)
        page.more = cursor < head
        if view.state:
            upto = cursor if page.more else None
            page.frames.extend(await self._state_frames(conversation, view, start.state_after or 0, upto))
        if told < cursor:
            page.frames.append(through_message(conv_id, cursor).text)
        return page

    async def _state_frames(
        self, conversation: Conversation, view: View, since_version: int, upto: int | None
    ) -> list[bytes]:
        """Return the upserts of entities with since_version < version <= upto: a later page has those after it."""
        frames: list[bytes] = []
        after_position = 0
        while True:
            found = await self._broker.timeline.page_of(
                conversation, since_version=since_version, after_position=after_position, limit=STATE_PAGE_ENTITIES
            )
            entities = [entity for entity in found.entities if upto is None or entity.version <= upto]
            messages = self._broker.dispatcher.state_messages(conversation, view, entities)
            frames.extend(message.text for message in messages)
            if not found.more:
                return frames
            after_position = found.entities[-1].position

    async def timeline_page(
        self,
        principal: Principal,
        conv_id: str,
        *,
        since_version: int = 0,
        after_position: int = 0,
        limit: int = 1000,
        profile: str = "default",
        newest: bool = False,
    ) -> TimelinePage:
        """Return a page of a conversation's entities; one that does not exist is empty and stays so.

        newest: with everything that the log has now, also where this process still has to read it.
        The profile's filters and transforms apply to it as to `timeline.upsert` frames (I14).
        """
        broker = self._broker
        view = broker.views.compile(principal, profile, None)
        # State is what this shows, also for a profile that has none of it: who may not see it is not let in this way.
        shown = sorted({*view.channel_names, TIMELINE})
        await broker.access.authorize(principal, "read", check_conv_id(conv_id), shown)
        if broker.conversations.get(conv_id) is None:
            state = await broker.log.state(conv_id)
            if not state.exists:
                return TimelinePage(conv_id, 0, state.epoch, [])
        if newest:
            await broker.conversations.current(conv_id)
        while True:
            page = await broker.timeline.page(
                conv_id, since_version=since_version, after_position=after_position, limit=limit
            )
            if not view.filters and not view.transforms:
                return page
            shown_entities = broker.dispatcher.entities_as_shown(conv_id, view, page.entities)
            if shown_entities or not page.more:
                page.entities = shown_entities
                return page
            after_position = page.entities[-1].position  # all hidden: such a page could not be gone on from

    # -- publishing -----------------------------------------------------------------------------------------------

    async def publish(
        self, principal: Principal, conv_id: str, drafts: Sequence[Draft], *, idempotency_key: str | None
    ) -> tuple[list[int], str]:
        """Publish drafts of a caller, checked against their declared types; return (seqs, epoch).

        A repeated `idempotency_key` returns the first answer for as long as the envelopes are retained. Raises
        InvalidDraft, IdempotencyMismatch, IdempotencyPending, PermissionDenied and what `publish` raises.
        """
        broker = self._broker
        await broker.access.authorize(principal, "publish", check_conv_id(conv_id))
        broker.availability.admit()
        for draft in drafts:
            self.check(draft)
        epoch = (await broker.log.state(conv_id)).epoch
        if idempotency_key is None:
            return await broker.publish(conv_id, drafts), epoch
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
            return before if before is not None else await broker.publish(conv_id, keyed), epoch
        finally:
            self._publishing.discard(pending)

    def check(self, draft: Draft) -> None:
        """Raise InvalidDraft for a type that is the broker's own, and for data that do not fit their declared type."""
        if draft.type.startswith(RESERVED_PREFIXES):
            raise InvalidDraft(
                f"type {draft.type!r} is the broker's own: publish the event that causes it", type=draft.type
            )
        declared = self._broker.catalog.event_types.get(draft.type)
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
        log, catalog = self._broker.log, self._broker.catalog
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

    # -- what there is --------------------------------------------------------------------------------------------

    def profiles(self, principal: Principal) -> list[dict[str, Any]]:
        """Return the profiles that the caller may choose, with the channels that each has for them."""
        offered = []
        for profile in self._broker.catalog.profiles.values():
            if not principal.may(profile.permission):
                continue
            try:
                view = self._broker.views.compile(principal, profile.name, None)
            except Exception:  # names a channel that this caller may not see: not offered
                continue
            offered.append(
                {
                    "name": profile.name,
                    "description": profile.description,
                    "channels": view.channel_names,
                    "slow": profile.slow,
                    "view": view.key,
                }
            )
        return offered

    def channels(self, principal: Principal) -> list[dict[str, Any]]:
        """Return the channels that the caller may see."""
        return [
            {
                "name": channel.name,
                "kind": channel.kind,
                "default": channel.default,
                "description": channel.description,
                "permission": channel.permission,
                "switchable": channel.switchable,
                "on": self._broker.catalog.is_on(channel),
            }
            for channel in self._broker.catalog.channels.values()
            if principal.may(channel.permission)
        ]
