// Tables of Markdown: rows between pipes under a head and a line. Pipes alone make none: they are what |x| is written with.

import { direct } from "./direction.js";
import { h } from "./dom.js";
import { inlineNodes } from "./inline.js";

/** A row is drawn when it is complete; a longer line is none, however it arrives. */
export const MAX_ROW_CHARS = 4000;
const MAX_CELLS = 50;
const DELIMITER = /^:?-+:?$/;

/** Say whether this is how a row of a table begins. */
export function beginsRow(line) {
  return /^ {0,3}\|/.test(line);
}

/** Say whether a whole line is a row of a table, if there is a table. */
export function isRow(line) {
  if (line.length > MAX_ROW_CHARS || !beginsRow(line)) return false;
  const row = line.trim();
  return row.length > 1 && row.endsWith("|") && !row.endsWith("\\|");
}

/** Say whether a whole line makes `head`, the row before it, the head of a table. Without such a line there is none. */
export function makesTable(head, line) {
  if (!isRow(line)) return false;
  const cells = cellsOf(line);
  return cells.every((cell) => DELIMITER.test(cell)) && cells.length === cellsOf(head).length;
}

/** Say whether this may become the line under the head of a table. */
export function maybeDelimiter(line) {
  return line.length <= MAX_ROW_CHARS && /^ {0,3}(?:\|[|:\s-]*)?$/.test(line);
}

/** A table that grows by rows. */
export class TableBlock {
  #body = h("tbody");
  #align;
  #element;
  #directed = false;

  /** head, delimiters: the two lines that make a table. */
  constructor(parent, head, delimiters) {
    this.#align = cellsOf(delimiters).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : null));
    // Wide tables scroll inside, and must be reachable for that by keyboard.
    this.#element = h("div", { class: "table", tabindex: "0" });
    const table = h("table", {}, h("thead", {}, this.#row("th", head)), this.#body);
    this.#element.append(table);
    parent.append(this.#element);
  }

  /** Add the row that this line is. */
  add(line) {
    this.#body.append(this.#row("td", line));
  }

  #row(tag, line) {
    const cell = (text, index) => h(tag, this.#align[index] ? { class: this.#align[index] } : {}, inlineNodes(text));
    this.#directed ||= direct(this.#element, line);
    return h("tr", {}, ...cellsOf(line).map(cell));
  }
}

/** The cells of a row; of too many, the last one holds the rest as it stands. */
function cellsOf(line) {
  const cells = line.trim().slice(1, -1).split(/(?<!\\)\|/);
  const kept = cells.slice(0, MAX_CELLS - 1);
  if (cells.length >= MAX_CELLS) kept.push(cells.slice(MAX_CELLS - 1).join("|"));
  return kept.map((cell) => cell.trim().replaceAll("\\|", "|"));
}
