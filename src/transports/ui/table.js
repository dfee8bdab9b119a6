// Tables of Markdown: rows between pipes, the first one a head if the second is a line.

import { h } from "./dom.js";
import { inlineNodes } from "./inline.js";

const ROW = /^ {0,3}\|.*\|\s*$/;
const DELIMITER = /^ {0,3}\|(?:\s*:?-+:?\s*\|)+\s*$/;
const MAX_CELLS = 50;

/** Say whether a whole line is a row of a table. */
export function isRow(line) {
  return ROW.test(line);
}

/** A table that grows by rows. */
export class TableBlock {
  #head = h("thead");
  #body = h("tbody");
  #align = [];

  constructor(parent) {
    const table = h("table", {}, this.#head, this.#body);
    // Wide tables scroll inside, and must be reachable for that by keyboard.
    parent.append(h("div", { class: "table", tabindex: "0", dir: "auto" }, table));
  }

  /** Add the row that this line is. */
  add(line) {
    const cells = cellsOf(line);
    const second = this.#head.childElementCount === 0 && this.#body.childElementCount === 1;
    if (second && DELIMITER.test(line)) this.#makeHead(cells);
    else this.#body.append(h("tr", {}, ...cells.map((cell, index) => this.#cell("td", inlineNodes(cell), index))));
  }

  #makeHead(delimiters) {
    this.#align = delimiters.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : null));
    const row = this.#body.firstElementChild;
    const cells = [...row.children].map((cell, index) => this.#cell("th", [...cell.childNodes], index));
    row.remove();
    this.#head.append(h("tr", {}, ...cells));
  }

  #cell(tag, content, index) {
    const cell = h(tag, this.#align[index] ? { class: this.#align[index] } : {});
    cell.append(...(Array.isArray(content) ? content : [content]));
    return cell;
  }
}

function cellsOf(line) {
  const inside = line.trim().slice(1, -1);
  return inside.split(/(?<!\\)\|/).slice(0, MAX_CELLS).map((cell) => cell.trim().replaceAll("\\|", "|"));
}
