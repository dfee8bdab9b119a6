"""Publishing from outside the process: drafts are checked against their types, repeated keys get the first answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

RESERVED_PREFIXES = ("ws.", "timeline.")


def _dedupe_prefix(idempotency_key: str) -> str:
    """Return what the dedupe keys of a request begin with. With its length: no key begins like another one."""
    return f"publish:{len(idempotency_key)}:{idempotency_key}:"
