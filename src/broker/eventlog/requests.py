"""What is published under a key of the caller's, a request, is appended once: how its dedupe keys are written and read.

    name US body US place [= which]

name: whose key it is. body: hash of what the caller asked for, before anybody added to it. place: of the envelope in the
request, from 0, eight hex digits, so that keys of one request sort as its envelopes do. which: only with the last one,
which retention removes last: the places that were appended, as bits of a hex number (those that are missing were dropped,
their debug channel being off). So the last envelope alone tells the whole answer: the seqs of one append follow each
other by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker.envelope import SEPARATOR, Envelope
from broker.errors import BrokerError

AFTER_SEPARATOR = "\x20"


class AlreadyAppended(BrokerError):
    """An append under this request's name is retained; nothing was appended now. Ask the log for it (`find_request`)."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the request {name!r} was appended before")


@dataclass(frozen=True, slots=True)
class Request:
    """A request: its name, unique for the caller and its key, and the hash of its body. Both without SEPARATOR."""

    name: str
    body: str

    def mark(self, envelopes: Sequence[Envelope], places: Sequence[int]) -> None:
        """Give the envelopes of one append, which stand at `places` of the request, their dedupe keys."""
        for envelope, place in zip(envelopes, places, strict=True):
            envelope.dedupe_key = f"{self.name}{SEPARATOR}{self.body}{SEPARATOR}{place:08x}"
        if envelopes:
            which = sum(1 << place for place in places)
            envelopes[-1].dedupe_key = f"{envelopes[-1].dedupe_key}={which:x}"


def name_of(dedupe_key: str) -> str | None:
    """Return the name of the request that a dedupe key belongs to; None where it belongs to none."""
    name, separator, _ = dedupe_key.partition(SEPARATOR)
    return name if separator else None


def answer_of(last_key: str, last_seq: int, count: int) -> tuple[str, list[int]]:
    """Return the body's hash and the `count` seqs of the request whose last envelope has this key and seq; 0 for dropped."""
    _, body, place = last_key.split(SEPARATOR)
    which = int(place.partition("=")[2], 16)
    seqs = [0] * max(count, which.bit_length())
    for index in reversed(range(which.bit_length())):
        if which >> index & 1:
            seqs[index] = last_seq
            last_seq -= 1
    return body, seqs
