"""The projector: folds a conversation's envelopes into entities, in memory, and says what is worth showing and saving.

Two budgets keep bytes linear (I16). An entity that still grows is shown, and saved, only while the sum of everything
shown (saved) of it stays within a multiple of its present size plus a slack; see budget.py, which also says how long it may
be held back. Everything that is not growing is shown at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from broker.envelope import Envelope
from broker.timeline.budget import Budget
from broker.timeline.entity import Entity
from broker.timeline.handlers import LateEnvelope, TimelineHandler
from broker.timeline.sources import UNKNOWN, Source, Sources, joined, shared
from broker.timeline.store import DEAD_LETTER_ERROR_CHARS, DEAD_LETTERS_KEPT, DeadLetter, TimelineSave

logger = logging.getLogger(__name__)

DEBUG_CHANNELS = "debug."
"""What is published to these is not folded: it is not for those who may only see the timeline (I14)."""
ENTITY_OVERHEAD_BYTES = 256
CACHED_ENTITIES = 256
"""Finished entities kept in memory per open conversation; older ones are read from the store when needed again."""
CACHED_BYTES = 4 * 1024 * 1024
"""About how many bytes of them, as JSON; one that is larger is not kept at all."""
ADOPTED_ENTITIES_MAX = 64
"""Beyond these, until the next save: newest entities that a client came back for and that only the store had."""
REFOLD_MAX = 2000
"""Envelopes folded before the cursor is saved even though no entity changed, or one waits for its budget: what opening has
to fold again at most."""
REFOLD_BYTES = 256
"""Unless what waits is larger than so much per envelope: it is saved beyond its budget only as often as bytes stay linear."""
DEAD_LETTER_ENTITY_CHARS = 128
"""How much of an entity's id names a state of it that could not be written, where other dead letters name their type."""
LOGGED_DEAD_LETTERS = 10
"""Dead letters that an open conversation logs one by one; after these only each DEAD_LETTERS_KEPT-th, so that no producer
can fill the log."""


@dataclass(slots=True)
class _Unsaved:
    first_seq: int  # the oldest envelope that the stored entity lacks; 0: none, but it grows
    budget: Budget


class ConversationTimeline:
    """The live end of one conversation's timeline. No I/O here: the coordinator loads what `missing` asks for.

    position: every envelope with seq <= position is folded.
    """

    __slots__ = (
        "_absent",
        "_ahead",
        "_cache_floor",
        "_cursor",
        "_dead",
        "_entities",
        "_fed",
        "_folded",
        "_forgotten",
        "_handlers",
        "_linked_seq",
        "_shown",
        "_unsaved",
        "_weights",
        "complete",
        "conv_id",
        "dead_letters",
        "epoch",
        "late",
        "pending",
        "position",
        "readers",
    )

    def __init__(self, conv_id: str, handlers: Mapping[str, TimelineHandler]) -> None:
        self.conv_id = conv_id
        self.position = 0
        self.epoch = ""  # life of the log that is folded here
        self.complete = False  # every entity that exists is in memory: nothing needs to be looked up
        self.late = 0
        self.dead_letters = 0
        self.pending: set[str] = set()  # changed, but not shown yet
        self.readers = 0  # snapshots being read: saves wait, so that the store stays as it was when they began
        self._handlers = handlers
        self._entities: dict[str, Entity] = {}
        self._absent: set[str] = set()
        self._ahead: set[str] = set()  # saved by another process in a state that the log has not brought here yet
        self._unsaved: dict[str, _Unsaved] = {}
        self._shown: dict[str, tuple[Budget, int]] = {}  # growing entities: budget, version last shown
        self._fed: dict[str, int] = {}  # growing entities without a growing text: bytes of the envelopes folded in
        self._weights: dict[str, int] = {}  # bytes of entities that are safe in the store
        self._dead: dict[int, DeadLetter] = {}  # not saved yet, by seq
        self._forgotten = 0  # not saved and not worth it any more: newer ones follow
        self._cursor = 0  # what the store has
        self._folded = 0  # about how many envelopes since then
        self._cache_floor = 0  # newest version that memory may lack
        self._linked_seq = 0  # newest envelope whose fold looked at several entities

    def begin(self, cursor: int) -> None:
        """Start where the store stands."""
        self.position = self._cursor = self._cache_floor = cursor

    # -- folding --------------------------------------------------------------------------------------------------

    def missing(self, envelopes: Iterable[Envelope]) -> set[str]:
        """Return ids of entities that folding `envelopes` needs and that only the store may have."""
        if self.complete:
            return set()
        wanted: set[str] = set()
        for envelope in envelopes:
            handler = self._handlers.get(envelope.type)
            if handler is not None and not envelope.channel.startswith(DEBUG_CHANNELS):
                try:
                    wanted.update(handler.keys(envelope))
                except Exception:  # the fold meets the same envelope and dead-letters it with its reason
                    continue
        return {id for id in wanted if id not in self._entities and id not in self._absent}

    def adopt(self, ids: Iterable[str], loaded: Mapping[str, Entity]) -> None:
        """Take what the store answered for `ids`: entities, or the knowledge that there is none.

        Where several processes fold one log, the store may have what this one has yet to fold. It changes nothing then,
        but has to be shown all the same: nobody here has seen it.
        """
        for id in ids:
            if id in loaded:
                if self._entities.setdefault(id, loaded[id]).version > self.position:
                    self._ahead.add(id)
                if self._entities[id].growing:  # kept in memory until it is finished: see growing_up_to
                    self._unsaved.setdefault(id, _Unsaved(0, Budget()))
                self._weigh(id)
            else:
                self._absent.add(id)

    def adopt_newer(self, version: int, entities: Sequence[Entity]) -> None:
        """Take all entities newer than `version`: what a reader found that kept saves waiting until this very moment.

        So the next reader that asks for what is newer needs no store. Many are left where they are.
        """
        if self.complete or len(entities) > ADOPTED_ENTITIES_MAX:
            return
        for entity in entities:
            self._entities.setdefault(entity.id, entity)
            self._weigh(entity.id)
            self._absent.discard(entity.id)
        self._cache_floor = min(self._cache_floor, version)

    def fold(self, envelopes: Sequence[Envelope]) -> list[Entity]:
        """Fold envelopes in; return the entities that should be shown now, each once, in its newest state."""
        touched: dict[str, None] = {}
        for envelope in envelopes:
            handler = self._handlers.get(envelope.type)
            if handler is not None and not envelope.channel.startswith(DEBUG_CHANNELS):
                for id in self._fold_one(handler, envelope):
                    touched[id] = None
            self.position = envelope.seq
        self._folded += len(envelopes)
        show: list[Entity] = []
        for id in touched:
            entity = self._entities[id]
            if entity.growing and id in self._shown:  # without a call: most are deltas
                self.pending.add(id)  # shown not long ago: the next tick is soon enough (trailing edge)
            elif self._may_show(entity):
                show.append(entity)
            else:
                self.pending.add(id)
        return show

    def _fold_one(self, handler: TimelineHandler, envelope: Envelope) -> list[str]:
        try:
            keys = handler.keys(envelope)
            if len(keys) == 1:  # nearly always, and without a call
                one = self._entities.get(keys[0])
                known = {} if one is None else {one.id: one}
                contained = one is not None and one.version >= envelope.seq
            else:
                known = {id: self._entities[id] for id in keys if id in self._entities}
                contained = self._contained(keys, known, envelope.seq)
            if contained:
                return self._first_seen(keys) if self._ahead else []
            if len(keys) > 1:  # also if it changes nothing now: over a newer state of one of them it might
                self._linked_seq = envelope.seq
            changed = list(handler.fold(known, envelope))
        except LateEnvelope:
            self.late += 1
            return []
        except Exception as exc:
            self._bury(envelope.seq, envelope.type, exc)
            return []
        touched = []
        source = (envelope.channel, envelope.type)
        for entity in changed:
            old = self._entities.get(entity.id)
            # The version guard: folding again from an older cursor must not change what already contains this envelope.
            if old is not None and old.version >= envelope.seq:
                touched.extend(self._first_seen((entity.id,)))
                continue
            sources = old.sources if old is not None else None
            if sources is None or source not in sources or len(known) > 1:
                sources = _sources(handler, entity.id, keys, known, source)
            self._entities[entity.id] = Entity(  # `replace` takes twice as long
                entity.id,
                entity.kind,
                old.created_at_ms if old else entity.created_at_ms,
                envelope.time_ms,
                envelope.seq,
                old.position if old and not handler.moves else entity.position,
                entity.props,
                entity.growing,
                sources,
            )
            if entity.growing and not entity.grown_bytes:
                self._fed[entity.id] = self._fed.get(entity.id, 0) + len(envelope.data_json)
            self._absent.discard(entity.id)
            if entity.id not in self._unsaved:
                self._unsaved[entity.id] = _Unsaved(envelope.seq, Budget())
                self._weights.pop(entity.id, None)
            elif self._unsaved[entity.id].first_seq == 0:
                self._unsaved[entity.id].first_seq = envelope.seq
            touched.append(entity.id)
        return touched

    def _contained(self, keys: Sequence[str], known: Mapping[str, Entity], seq: int) -> bool:
        """Say whether an envelope is folded again whose entities are newer already: it has nothing to say any more."""
        for id in keys:
            entity = known.get(id)
            if entity is None or entity.version < seq:
                return False
        return bool(keys)

    def _first_seen(self, ids: Sequence[str]) -> list[str]:
        """Return those of `ids` that were ahead of this process's log, once each."""
        found = [id for id in ids if id in self._ahead]
        self._ahead.difference_update(found)
        return found

    def discard(self, entity: Entity, error: Exception) -> None:
        """Give up a state of an entity that turned out to be unwritable: it goes to the dead letters under its version.

        What the store has of it stays, and is what the next envelope about it is folded over.
        """
        if self._entities.get(entity.id) is not entity:
            return
        del self._entities[entity.id]
        self._unsaved.pop(entity.id, None)
        self._shown.pop(entity.id, None)
        self._fed.pop(entity.id, None)
        self.pending.discard(entity.id)
        self._ahead.discard(entity.id)
        self._cache_floor = max(self._cache_floor, entity.version)
        self.complete = False
        self._bury(entity.version, f"entity {entity.id}"[:DEAD_LETTER_ENTITY_CHARS], error)

    def discard_unwritable(self, entities: Iterable[Entity]) -> int:
        """Give up those of `entities`, just now found by a save that failed, which cannot be written; return how many."""
        found = 0
        for entity in entities:
            try:
                entity.wire_json()
            except Exception as exc:
                self.discard(entity, exc)
                found += 1
        return found

    def _bury(self, seq: int, type: str, error: Exception) -> None:
        self.dead_letters += 1
        text = _told(error)
        if self.dead_letters <= LOGGED_DEAD_LETTERS or self.dead_letters % DEAD_LETTERS_KEPT == 0:
            logger.warning(
                "conversation %s: %s seq %s cannot be folded (number %s here): %s",
                self.conv_id,
                type,
                seq,
                self.dead_letters,
                text,
            )
        self._dead[seq] = DeadLetter(self.conv_id, seq, type, text)
        if len(self._dead) > DEAD_LETTERS_KEPT:  # the store is away, or slower than they come
            del self._dead[next(iter(self._dead))]
            self._forgotten += 1

    # -- showing --------------------------------------------------------------------------------------------------

    def _may_show(self, entity: Entity, *, now_s: float | None = None) -> bool:
        """Say whether an entity is shown now, and take note of it. now_s: of the tick, None for one that was just changed
        and was never shown while it grew."""
        if not entity.growing:  # a final state is never delayed
            self.pending.discard(entity.id)
            self._shown.pop(entity.id, None)
            self._fed.pop(entity.id, None)
            return True
        known = self._shown.get(entity.id)
        budget = known[0] if known is not None else Budget()
        size = self._size(entity)
        if not (budget.allows(size) if now_s is None else budget.due(size, now_s)):
            return False
        budget.spend(size)
        self._shown[entity.id] = (budget, entity.version)
        self.pending.discard(entity.id)
        return True

    def _size(self, entity: Entity) -> int:
        """About how many bytes an upsert or a save of a growing entity costs."""
        return entity.grown_bytes + self._fed.get(entity.id, 0) + ENTITY_OVERHEAD_BYTES

    def due(self, now_s: float) -> list[Entity]:
        """Return the pending entities that may be shown now, or waited long enough. Called by the shared upsert tick.

        now_s: monotonic.
        """
        return [entity for id in list(self.pending) if self._may_show(entity := self._entities[id], now_s=now_s)]

    def next_due_s(self, now_s: float) -> float | None:
        """Return when there is something to show or save though nothing more is folded; None if nothing waits."""
        if self._dead or self._folded >= REFOLD_MAX:
            return now_s
        due_s = [self._shown[id][0].due_s(now_s) if id in self._shown else now_s for id in self.pending]
        for id, unsaved in self._unsaved.items():
            if unsaved.first_seq:
                due_s.append(unsaved.budget.due_s(now_s) if self._entities[id].growing else now_s)
        return min(due_s, default=None)

    def shown_version(self, entity: Entity) -> int | None:
        """Return up to which version a growing entity was shown to those who were there; None: nothing of it is held back."""
        known = self._shown.get(entity.id) if entity.growing else None
        return known[1] if known is not None else None

    def entity(self, id: str) -> Entity | None:
        """Return an entity if memory has it."""
        return self._entities.get(id)

    @property
    def shown_floor(self) -> int:
        """Every entity version up to here was shown to those who were there: where a parked client's state stands."""
        floor = self.position
        for id in self.pending:
            floor = min(floor, self._shown[id][1] if id in self._shown else self._entities[id].position - 1)
        return floor

    def changed_since(self, version: int) -> list[Entity] | None:
        """Return all entities newer than `version`, by position, or None if only the store can tell."""
        if not self.complete and version < self._cache_floor:
            return None
        found = [entity for entity in self._entities.values() if entity.version > version]
        return sorted(found, key=lambda entity: entity.position)

    def growing_since(self, version: int) -> list[Entity]:
        """Return the growing entities newer than `version`, by position: memory has all of them that change."""
        found = [entity for entity in self._entities.values() if entity.growing and entity.version > version]
        return sorted(found, key=lambda entity: entity.position)

    def growing_up_to(self, version: int) -> list[Entity]:
        """Return the entities that still grow and did not change after `version`; memory keeps all that it met, and opening
        reads the newest of them (GROWING_MAX).

        Whoever was there at `version` may not have been shown them as they are: they may have been held back then.
        """
        return [entity for entity in self._entities.values() if entity.growing and entity.version <= version]

    def changed_by(self, handler: TimelineHandler, envelope: Envelope) -> list[Entity]:
        """Return the entities that folding `envelope`, just now, changed."""
        try:
            keys = handler.keys(envelope)
        except Exception:  # it went to the dead letters
            return []
        return [
            self._entities[id] for id in keys if id in self._entities and self._entities[id].version == envelope.seq
        ]

    def has(self, id: str) -> bool:
        """Say whether an entity is in memory."""
        return id in self._entities

    def live(self) -> dict[str, Entity]:
        """Return the entities in memory by id: with the store's, the whole state at `position`."""
        return dict(self._entities)

    # -- saving ---------------------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        return (
            bool(self._dead)
            or self._folded >= REFOLD_MAX
            or any(unsaved.first_seq for unsaved in self._unsaved.values())
        )

    def take_save(self, now_s: float, *, everything: bool = False) -> TimelineSave | None:
        """Return what should be saved now, None if nothing. Confirm with `saved` once it is durable.

        now_s: monotonic. everything: also what still grows, whatever its budget (eviction, shutdown, retention).
        """
        if self.readers and not everything:
            return None
        entities = []
        waiting = []
        waiting_bytes = 0
        for id, unsaved in self._unsaved.items():
            if not unsaved.first_seq:
                continue
            entity = self._entities[id]
            size = self._size(entity)
            if everything or not entity.growing or unsaved.budget.due(size, now_s):
                entities.append(entity)
            else:
                waiting.append(unsaved.first_seq)
                waiting_bytes += size
        if waiting and self._folded >= max(REFOLD_MAX, waiting_bytes // REFOLD_BYTES):
            return self.take_save(now_s, everything=True)
        if waiting and self._linked_seq > self._cursor:
            # A fold read one entity to change another. Folded again over a newer state of the one, it would change the
            # other to something else: the stored entities have to be of one moment, so all of them wait.
            return self._save([], self._cursor) if self._dead else None
        cursor = max(min(waiting) - 1 if waiting else self.position, self._cursor)
        overdue = self._folded >= REFOLD_MAX or (everything and self._folded)
        if not entities and not self._dead and not (overdue and cursor > self._cursor):
            return None
        return self._save(entities, cursor)

    def _save(self, entities: Sequence[Entity], cursor: int) -> TimelineSave:
        letters = tuple(self._dead.values())
        return TimelineSave(self.conv_id, entities, cursor, letters, self.epoch, self._forgotten)

    def saved(self, save: TimelineSave) -> None:
        """Note that `save` is durable, and forget finished entities that are safe in the store."""
        for entity in save.entities:
            unsaved = self._unsaved.get(entity.id)
            if unsaved is None:
                continue
            unsaved.budget.spend(self._size(entity))
            current = self._entities[entity.id]
            if current.version != entity.version:
                # Changed while it was being saved: the stored one lacks what came after that version.
                unsaved.first_seq = entity.version + 1
            elif current.growing:
                unsaved.first_seq = 0
            else:
                del self._unsaved[entity.id]
                self._weigh(entity.id)
        for letter in save.dead_letters:  # not the first so many: another save of them may have been under way too
            self._dead.pop(letter.seq, None)
        self._forgotten = max(0, self._forgotten - save.forgotten)
        if save.cursor > self._cursor:
            self._cursor = save.cursor
            self._folded = 0
        self._shrink()

    def _weigh(self, id: str) -> None:
        """Note what keeping an entity costs that the store has as well. Once per finished entity, so linear (I16)."""
        if id not in self._unsaved:
            self._weights[id] = len(self._entities[id].props_json())

    def _shrink(self) -> None:
        if len(self._absent) > CACHED_ENTITIES:
            self._absent.clear()
        surplus = len(self._entities) - CACHED_ENTITIES
        surplus_bytes = sum(self._weights.values()) - CACHED_BYTES
        if surplus <= 0 and surplus_bytes <= 0:
            return
        for id in [id for id in self._entities if id not in self._unsaved and id not in self.pending]:
            if surplus <= 0 and surplus_bytes <= 0:
                return
            entity = self._entities.pop(id)
            surplus -= 1
            surplus_bytes -= self._weights.pop(id, 0)
            self._cache_floor = max(self._cache_floor, entity.version)
            self.complete = False


def _told(error: Exception) -> str:
    """Return what an exception says as a store can keep it, however badly it is made."""
    try:
        said = str(error)
    except Exception:
        said = "its text cannot be read"
    text = f"{type(error).__name__}: {said[:DEAD_LETTER_ERROR_CHARS]}"
    return text.encode("utf-8", "backslashreplace").decode()[:DEAD_LETTER_ERROR_CHARS]


def _sources(
    handler: TimelineHandler, id: str, keys: Sequence[str], known: Mapping[str, Entity], source: Source
) -> Sources:
    """Return what an entity is made of once an envelope from `source` has changed it. known: what the fold could read."""
    old = known.get(id)
    if handler.remarks:
        before = old.sources if old is not None else None
        source = source if id == keys[0] else (source[0], "")
    else:
        before = None
        for one in known.values():
            before = one.sources if before is None else joined(before, one.sources)
    if before is None:
        return shared(frozenset((source,)))
    return shared(before | {source}) if before else UNKNOWN
