// Blocks of code between fences.

import { h } from "./dom.js";

/** A line longer than this opens or closes no block. */
export const MAX_FENCE_CHARS = 80;

/** A fenced block. Text is only ever added, in one node per drawing: joining them would copy the whole block each time. */
export class CodeBlock {
  #code;
  #new = "";
  #indent;
  #mark;

  constructor(parent, [, indent, mark, info]) {
    this.#indent = indent.length;
    this.#mark = mark;
    this.#code = h("code", { dir: "ltr" });
    const copy = h("button", { type: "button", class: "quiet copy", text: "Copy", on: { click: () => this.#copy(copy) } });
    const bar = h("div", { class: "code-bar" }, h("span", { text: info.trim() || "text" }), navigator.clipboard ? copy : null);
    parent.append(h("div", { class: "code-block" }, bar, h("pre", { tabindex: "0" }, this.#code)));
  }

  closedBy(line) {
    if (line.length > MAX_FENCE_CHARS || line.length - line.trimStart().length > this.#indent + 3) return false;
    const text = line.trim();
    return text.length >= this.#mark.length && text === this.#mark[0].repeat(text.length);
  }

  unindented(line) {
    let drop = 0;
    while (drop < this.#indent && line[drop] === " ") drop += 1;
    return line.slice(drop);
  }

  write(text) {
    this.#new += text;
  }

  flush() {
    if (this.#new !== "") this.#code.append(this.#new);
    this.#new = "";
  }

  async #copy(button) {
    try {
      await navigator.clipboard.writeText(this.#code.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
}
