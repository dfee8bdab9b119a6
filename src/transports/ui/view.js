// Draws the store's entities: one card each, in order, at most once per frame of the screen.

import { makeCard } from "./cards.js";
import { beginning, h } from "./dom.js";
import { ENDED } from "./folds.js";

const ANNOUNCED_CHARS = 1500;

/** Where an entity is listed: by position, but how a run ended is said where it ended, not where it began. */
function place(entity) {
  return entity.kind === "run" && ENDED.has(entity.props.status) ? entity.version : entity.position;
}

export class TimelineView {
  #root;
  #store;
  #actions;
  #announce;
  #cards = new Map(); // entity id -> {element, update, place}
  #dirty = new Set();
  #rebuild = true;
  #settled = false; // what there was before this page is here; only then does nothing mean that nothing was said
  #frame = 0;
  #announced = new Set();
  #activity = h("div", { class: "activity", hidden: true }, h("span", { class: "dots", "aria-hidden": "true" }), h("span", { text: "Working…" }));
  #empty;
  #afterDraw;

  /**
   * root: the element to fill. announce(text): say it to people who do not see the page. empty: what to show while there is
   * nothing. afterDraw(): called after each drawing.
   */
  constructor({ root, store, actions, announce, empty, afterDraw = () => {} }) {
    this.#root = root;
    this.#store = store;
    this.#actions = actions;
    this.#announce = announce;
    this.#empty = empty;
    this.#afterDraw = afterDraw;
  }

  /** Note a change of the store (its onChange). */
  changed({ entity, removed = false, all = false }) {
    if (all) {
      this.#rebuild = true;
      this.#settled = false;
    } else if (removed) this.#remove(entity.id);
    else this.#dirty.add(entity.id);
    this.schedule();
  }

  schedule() {
    // A hidden tab has no frames, and would keep everything for later.
    if (this.#frame !== 0) return;
    const draw = () => {
      this.#frame = 0;
      this.#draw();
    };
    this.#frame = document.hidden ? setTimeout(draw, 250) : requestAnimationFrame(draw);
  }

  /** All that there was is known, and counts as read: only what comes from now on is announced. */
  settle() {
    this.#settled = true;
    this.schedule();
    for (const entity of this.#store.list()) if (!this.#store.isOpen(entity)) this.#announced.add(entity.id);
  }

  dispose() {
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.#frame);
    this.#root.replaceChildren();
  }

  #draw() {
    if (this.#rebuild) this.#startOver();
    for (const id of this.#dirty) {
      const entity = this.#store.get(id);
      if (entity !== undefined) this.#drawEntity(entity);
    }
    this.#dirty.clear();
    const busy = this.#store.isBusy();
    this.#activity.hidden = !busy || this.#showsLife();
    const nothing = ![...this.#cards.values()].some((card) => !card.element.hidden);
    this.#empty.hidden = !nothing || busy || !this.#settled;
    this.#afterDraw();
  }

  /** The last thing on the page says itself that something is going on: a growing text, a question to the reader. */
  #showsLife() {
    const last = this.#store.list().at(-1);
    const growing = last !== undefined && this.#store.isOpen(last) && (last.kind === "thinking" || last.text.length > 0);
    return growing || this.#store.isWaitingForPerson();
  }

  #startOver() {
    this.#rebuild = false;
    this.#cards.clear();
    this.#root.replaceChildren(this.#empty, this.#activity);
    this.#dirty = new Set(this.#store.list().map((entity) => entity.id));
  }

  #drawEntity(entity) {
    let card = this.#cards.get(entity.id);
    // A message changes sides when its role becomes known only after its first piece.
    if (card !== undefined && card.role !== entity.props.role) {
      this.#remove(entity.id);
      card = undefined;
    }
    const at = place(entity);
    if (card === undefined) {
      card = { ...makeCard(entity, this.#actions), role: entity.props.role, place: null, id: entity.id };
      card.element.dataset.kind = entity.kind;
      card.element.dataset.entity = entity.id;
      this.#cards.set(entity.id, card);
    }
    if (card.place !== at) this.#move(card, at, entity);
    const run = this.#store.runOf(entity);
    const open = this.#store.isOpen(entity);
    try {
      card.update(entity, { open, run, ended: ENDED.has(run?.props.status) });
    } catch (error) {
      // One card that cannot be drawn (a plugin's widget, say) takes none of the others with it.
      console.error(`entity ${entity.id} of kind ${entity.kind} could not be drawn`, error);
    }
    this.#say(entity, open);
  }

  #move(card, at, entity) {
    card.place = at;
    card.local = entity.local;
    let next = this.#activity;
    for (let element = this.#activity.previousElementSibling; element !== null; element = element.previousElementSibling) {
      const other = this.#cards.get(element.dataset.entity);
      if (element === card.element) continue;
      if (other === undefined || !isAfter(other, card)) break;
      next = element;
    }
    if (card.element.nextElementSibling !== next || card.element.parentNode === null) this.#root.insertBefore(card.element, next);
  }

  #remove(id) {
    this.#cards.get(id)?.element.remove();
    this.#cards.delete(id);
    this.#dirty.delete(id);
  }

  #say(entity, open) {
    if (open || entity.local || this.#announced.has(entity.id)) return;
    const words = spoken(entity);
    if (words === "") return;
    this.#announced.add(entity.id);
    this.#announce(words.length > ANNOUNCED_CHARS ? `${beginning(words, ANNOUNCED_CHARS)}…` : words);
  }
}

function isAfter(other, card) {
  if (other.place !== card.place) return other.place > card.place;
  if (other.local !== card.local) return card.local;
  return other.id > card.id;
}

function spoken({ kind, props, text }) {
  if (kind === "message") return `${props.role === "user" ? "You" : "Assistant"}: ${text.toString()}`;
  if (kind === "tool_call" && props.status === "awaiting_approval") return `The tool ${props.name} needs your approval.`;
  if (kind === "run" && props.status === "failed") return "The answer failed.";
  return "";
}
