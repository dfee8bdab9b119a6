"""A producer's handle: publishes into one conversation and can do nothing else."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from broker.envelope import Draft

PublishMany = Callable[[str, Sequence[Draft]], Coroutine[Any, Any, list[int]]]


class Publisher:
    """Publishes into one conversation. Cheap; make as many as you like (`broker.publisher(conv_id)`)."""

    __slots__ = ("_conv_id", "_publish")

    def __init__(self, conv_id: str, publish: PublishMany) -> None:
        self._conv_id = conv_id
        self._publish = publish

    @property
    def conv_id(self) -> str:
        """The conversation that it publishes into, and no other."""
        return self._conv_id

    async def publish(
        self,
        type: str,
        data: Mapping[str, Any],
        *,
        id: str | None = None,
        channel: str | None = None,
        dedupe_key: str | None = None,
    ) -> int:
        """Publish one envelope; return its seq once it is durable.

        Envelopes that one task publishes one after another keep that order. Raises InvalidDraft, DraftRefused,
        StoreError; then nothing was published.
        """
        seqs = await self._publish(self._conv_id, (Draft(type, data, id, channel, dedupe_key),))
        return seqs[0]

    def publish_many(self, drafts: Sequence[Draft]) -> Coroutine[Any, Any, list[int]]:
        """Publish several, all or none, with neighbouring places in the conversation; await their seqs.

        A draft for a debug channel that is switched off is dropped; its seq is 0.
        """
        return self._publish(self._conv_id, drafts)
