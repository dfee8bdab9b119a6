// The event lane: what passed over the wire, for developers. Bounded, and repeats of one event share a line.

import { beginning, h, setText, showValue } from "./dom.js";

const MAX_ROWS = 400;
const SHOWN_CHARS = 4000;
const REPEATING = /\.delta$|^ws\.through$|^ws\.pong$|^timeline\.upsert$/;

export class EventLane {
  #list;
  #count;
  #recent = []; // the two last rows: an event and the state that follows from it come in turns
  #pending = [];
  #frame = 0;
  #total = 0;

  /** list: the `ol` to fill. count: where the number of events is shown. */
  constructor({ list, count }) {
    this.#list = list;
    this.#count = count;
  }

  /** Add an event or control frame. */
  add(event) {
    this.#total += 1;
    this.#pending.push(event);
    // Only the newest can stay anyway.
    if (this.#pending.length > 2 * MAX_ROWS) this.#pending.splice(0, MAX_ROWS);
    if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  clear() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#pending = [];
    this.#total = 0;
    this.#recent = [];
    this.#list.replaceChildren();
    setText(this.#count, "");
  }

  #draw() {
    this.#frame = 0;
    const scroller = this.#list.parentElement;
    const follow = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
    for (const event of this.#pending) this.#row(event);
    this.#pending = [];
    while (this.#list.childElementCount > MAX_ROWS) this.#list.firstElementChild.remove();
    setText(this.#count, String(this.#total));
    if (follow) scroller.scrollTop = scroller.scrollHeight;
  }

  #row(event) {
    const same = this.#recent.find((row) => row.type === event.type && row.id === event.id);
    if (same !== undefined && REPEATING.test(event.type)) {
      same.times += 1;
      setText(same.counter, `×${same.times}`);
      setText(same.body, preview(event));
      return;
    }
    const counter = h("span", { class: "times" });
    const body = h("code", { dir: "auto", text: preview(event) });
    const data = event.data ?? {};
    const level = event.type === "log" ? String(data.level ?? "info") : "";
    const line = event.type === "log" ? String(data.message ?? "") : summary(event);
    const head = h("summary", {},
      h("span", { class: "event-type", text: level === "" ? event.type : `${event.type} ${level}` }),
      counter,
      h("span", { class: "event-line", dir: "auto", text: beginning(line, 200) }));
    const row = h("li", { dataset: { level, channel: event.channel ?? "" } }, h("details", {}, head, h("pre", {}, body)));
    this.#list.append(row);
    this.#recent = [...this.#recent.slice(-1), { type: event.type, id: event.id, times: 1, counter, body }];
  }
}

function summary({ type, id, data = {} }) {
  if (type.startsWith("ws.")) return data.reason ?? data.message ?? data.seq ?? "";
  return String(data.name ?? data.phase ?? id ?? "");
}

function preview(event) {
  const text = showValue(event);
  return text.length > SHOWN_CHARS ? `${beginning(text, SHOWN_CHARS)}…` : text;
}
