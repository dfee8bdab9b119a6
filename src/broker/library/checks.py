"""Checks of what people say about their conversations: ids, titles, metadata."""

from __future__ import annotations

import secrets

from broker.characters import is_shown
from broker.envelope import check_conv_id, encode_json
from broker.errors import InvalidInput, quoted
from broker.plugins.access import Access
from broker.runs.foreign import MAX_NESTING, too_deep
from broker.security import Principal

MAX_TITLE_CHARS = 200
MAX_METADATA_BYTES = 16_384


def check_title(title: str | None) -> None:
    """Raise InvalidInput for a title that is no line of text of 1 to 200 characters."""
    if title is not None and not (0 < len(title) <= MAX_TITLE_CHARS and title.strip() and all(map(is_shown, title))):
        raise InvalidInput(
            f"title {quoted(title)} is not usable: 1 to {MAX_TITLE_CHARS} printable characters, or null", field="title"
        )


def check_metadata(metadata: object) -> None:
    """Raise InvalidInput for metadata larger than 16 KiB of JSON, or nested more than 100 levels deep."""
    if too_deep(metadata):
        raise InvalidInput(
            f"metadata is nested more than {MAX_NESTING} levels deep: keep it flat", field="metadata", limit=MAX_NESTING
        )
    size = len(encode_json(metadata))
    if size > MAX_METADATA_BYTES:
        raise InvalidInput(
            f"metadata has {size} bytes as JSON, the limit is {MAX_METADATA_BYTES}: keep large things elsewhere",
            field="metadata",
            limit=MAX_METADATA_BYTES,
            actual=size,
        )


async def admitted_id(access: Access, principal: Principal, new_id: str | None) -> str:
    """Return the id of a conversation that a caller may create; None: a fresh one.

    Raises InvalidConversationId, PermissionDenied.
    """
    new_id = check_conv_id(new_id) if new_id is not None else f"c-{secrets.token_hex(8)}"
    await access.authorize(principal, "create", new_id)
    return new_id
