// The conversation as the page knows it: entities, listed by position, merged by version.

import { parseSeq } from "./cursor.js";
import { ENDED, entityIdOf, FOLDS, promptOf } from "./folds.js";
import { GrowingText } from "./growing.js";
import { writeJson } from "./json.js";

// The property that holds an entity's growing text, by kind. It is kept apart from the other properties.
const TEXT_PROPERTY = { message: "text", thinking: "text", tool_call: "inputText" };

/**
 * One thing of the conversation. version and position are BigInt. folded: the last change was folded from an event by this
 * page; a state frame of the same version then replaces it. local: an echo of what is being sent, unknown to the server.
 */
function makeEntity({ id, kind, position, atMs, local = false }) {
  return {
    id, kind, position, local,
    version: 0n,
    createdAtMs: atMs,
    updatedAtMs: atMs,
    props: {},
    text: new GrowingText(),
    folded: true,
  };
}

function before(a, b) {
  if (a.position !== b.position) return a.position < b.position;
  if (a.local !== b.local) return a.local;
  return a.id < b.id;
}

export class EntityStore {
  #entities = new Map();
  #order = [];
  #onChange;
  #now;

  /** onChange({entity, removed, all}): something changed; `all`: everything did. */
  constructor({ onChange = () => {}, now = Date.now } = {}) {
    this.#onChange = onChange;
    this.#now = now;
  }

  get size() {
    return this.#order.length;
  }

  get(id) {
    return this.#entities.get(id);
  }

  /** All entities by position. Do not change the array. */
  list() {
    return this.#order;
  }

  /** Forget everything but what is still being sent. */
  clear() {
    const echoes = this.#order.filter((entity) => entity.local);
    this.#order = echoes;
    this.#entities = new Map(echoes.map((entity) => [entity.id, entity]));
    this.#onChange({ all: true });
  }

  /** Take a state frame's entity if it is newer than what is known. Returns whether it was. */
  mergeState(wire) {
    if (typeof wire?.id !== "string" || typeof wire.kind !== "string") return false;
    const version = parseSeq(wire.version);
    let entity = this.#entities.get(wire.id);
    if (entity !== undefined) {
      // Equal is newer too where the page folded an event by itself: the server's fold of it is the better one.
      if (version < entity.version || (version === entity.version && !entity.folded)) return false;
    } else {
      entity = makeEntity({ id: wire.id, kind: wire.kind, position: parseSeq(wire.position), atMs: wire.createdAtMs });
      this.#insert(entity);
    }
    this.#replaceProps(entity, wire);
    this.#place(entity, parseSeq(wire.position));
    entity.version = version;
    entity.folded = false;
    entity.updatedAtMs = wire.updatedAtMs;
    this.#changed(entity);
    return true;
  }

  /** Fold an event frame. Returns false for a type that is no part of the conversation's state, or one already in it. */
  applyEvent(event) {
    const rule = FOLDS.get(event.type);
    if (rule === undefined) return false;
    const id = entityIdOf(event);
    const seq = parseSeq(event.seq);
    let entity = this.#entities.get(id);
    if (entity === undefined) {
      entity = makeEntity({ id, kind: rule.kind, position: seq, atMs: this.#now() });
      this.#insert(entity);
    } else if (seq <= entity.version || entity.kind !== rule.kind) return false;
    if (!rule.fold(entity, event.data ?? {}, event)) return false;
    entity.version = seq;
    entity.folded = true;
    entity.updatedAtMs = this.#now();
    this.#tellPrompt(entity, promptOf(event), seq);
    this.#changed(entity);
    return true;
  }

  /** A prompt that waited takes its place when its run begins, and the run with it; one that was taken back says so. */
  #tellPrompt(run, prompt, seq) {
    if (prompt === undefined) return;
    if (prompt.begins) this.#place(run, seq);
    const message = this.#entities.get(prompt.id);
    if (message === undefined || message.props.role !== "user" || seq <= message.version) return;
    if (prompt.begins) this.#place(message, seq);
    else message.props.withdrawn = true;
    message.version = seq;
    message.folded = true;
    this.#changed(message);
  }

  // -- what is being sent -------------------------------------------------------------------------------------------

  /** Show a message that is on its way. Everything that comes after it gets a higher seq than what is known now. */
  addEcho(key, text) {
    const position = this.#newest() + 1n;
    const entity = makeEntity({ id: `echo-${key}`, kind: "message", position, atMs: this.#now(), local: true });
    entity.props = { role: "user", idempotencyKey: key, delivery: "sending" };
    entity.text.append(text);
    this.#insert(entity);
    this.#changed(entity);
    return entity;
  }

  /** Note how the sending goes: delivery is sending, retrying, accepted, queued or failed; more: position, error. */
  updateEcho(key, delivery, more = {}) {
    const entity = this.#entities.get(`echo-${key}`);
    if (entity === undefined) return;
    entity.props = { ...entity.props, ...more, delivery };
    this.#changed(entity);
  }

  /** Take an echo away: it was given up, or the real message is here. */
  dropEcho(key) {
    const entity = this.#entities.get(`echo-${key}`);
    if (entity === undefined) return;
    this.#entities.delete(entity.id);
    this.#order = this.#order.filter((other) => other !== entity);
    this.#onChange({ entity, removed: true });
  }

  #settleEcho(entity) {
    if (entity.kind !== "message" || entity.props.role !== "user" || entity.local) return;
    const key = entity.props.idempotencyKey;
    if (typeof key === "string") this.dropEcho(key);
    else {
      // A view without the key: the oldest echo of the same words is the one.
      const text = entity.text.toString();
      const match = (other) => other.local && other.position <= entity.position && other.text.toString() === text;
      const echo = this.#order.find(match);
      if (echo !== undefined) this.dropEcho(echo.props.idempotencyKey);
    }
  }

  // -- what follows from several entities ---------------------------------------------------------------------------

  /** The run that an entity belongs to, if it is known. */
  runOf(entity) {
    return entity.props.runId === undefined ? undefined : this.#entities.get(entity.props.runId);
  }

  /** More is expected of this entity. What a dead process left open is not, once its run has ended. */
  isOpen(entity) {
    if (entity.props.streaming !== true) return false;
    return !ENDED.has(this.runOf(entity)?.props.status);
  }

  /** Something is being answered: a run is under way or, in views without runs, a text is growing. */
  isBusy() {
    for (let index = this.#order.length - 1; index >= 0; index -= 1) {
      const entity = this.#order[index];
      if (entity.kind === "run" && !ENDED.has(entity.props.status)) return true;
      if (entity.kind !== "run" && this.isOpen(entity)) return true;
    }
    return false;
  }

  /** A run stands still until a person decides on a tool call. */
  isWaitingForPerson() {
    return this.#order.some(
      (entity) => entity.props.status === "awaiting_approval" && !ENDED.has(this.runOf(entity)?.props.status),
    );
  }

  // -- inside -------------------------------------------------------------------------------------------------------

  /** The highest seq that any entity knows of: whatever is created from now on gets a higher one. */
  #newest() {
    let newest = 0n;
    for (const { version, position } of this.#order) {
      if (version > newest) newest = version;
      if (position > newest) newest = position;
    }
    return newest;
  }

  #replaceProps(entity, wire) {
    const { ...props } = wire.props ?? {};
    const name = TEXT_PROPERTY[wire.kind];
    if (name !== undefined) {
      // Absent means gone: a tool call whose input is complete has no text of it any more.
      const text = props[name] ?? "";
      entity.text.assign(typeof text === "string" ? text : writeJson(text));
      delete props[name];
    }
    entity.props = props;
    entity.kind = wire.kind;
  }

  #insert(entity) {
    this.#entities.set(entity.id, entity);
    // Nearly always the newest: look from the end.
    let index = this.#order.length;
    while (index > 0 && before(entity, this.#order[index - 1])) index -= 1;
    this.#order.splice(index, 0, entity);
  }

  #place(entity, position) {
    if (entity.position === position) return;
    this.#order.splice(this.#order.indexOf(entity), 1);
    entity.position = position;
    this.#insert(entity);
  }

  #changed(entity) {
    this.#settleEcho(entity);
    this.#onChange({ entity });
    if (entity.kind !== "run" || !ENDED.has(entity.props.status)) return;
    for (const other of this.#order) if (other !== entity && other.props.runId === entity.id) this.#onChange({ entity: other });
  }
}
