// A small Markdown for text that is still arriving. Every character is read once: what is finished stays as it is in the
// DOM, only the end of the last block is drawn again.

import { h } from "./dom.js";
import { inlineNodes } from "./inline.js";
import { isRow, TableBlock } from "./table.js";

// The part of a paragraph that is drawn again with each piece is at most this long; emphasis does not reach across.
const TAIL_CHARS = 1000;
// A line beginning that could still become several things is held back, but not for ever.
const HELD_CHARS = 80;
// A row of a table is drawn when it is complete.
const HELD_ROW_CHARS = 2000;

const UNDECIDED = /^\s*(?:#{1,6}|[-*+_\s]*|\d{1,9}[.)]?|`{1,2}|~{1,2}|[`~]{3}.*|>)\s*$/;
const FENCE = /^(\s*)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const MAX_LIST_DEPTH = 6;

/** Draws Markdown into an element as its text arrives. */
export class MarkdownStream {
  #root;
  #held = ""; // the beginning of a line that cannot be judged yet
  #midLine = false;
  #blank = true; // the line before was empty: what follows is a new paragraph
  #inline = null; // the block that text is being added to
  #fence = null;
  #table = null;
  #lists = []; // open lists, outermost first: {element, item, indent, ordered}

  /** root: an empty element that this object fills from now on. */
  constructor(root) {
    this.#root = root;
  }

  /** Add the next piece of the text. */
  append(piece) {
    const text = this.#held + piece;
    this.#held = "";
    let at = 0;
    while (at < text.length) {
      const newline = text.indexOf("\n", at);
      const complete = newline >= 0;
      const segment = text.slice(at, complete ? newline : text.length).replace(/\r$/, "");
      const fence = this.#fence;
      if (this.#midLine) this.#continueLine(segment);
      else if (!complete && this.#undecided(segment)) {
        this.#held = segment;
        break;
      } else this.#startLine(segment, complete);
      this.#midLine = !complete;
      if (complete && fence === this.#fence) fence?.write("\n"); // not for the lines that open and close the block
      at = complete ? newline + 1 : text.length;
    }
    this.#inline?.draw(true);
    this.#fence?.flush();
  }

  /** The text is complete. */
  end() {
    const held = this.#held;
    this.#held = "";
    if (held !== "") this.#startLine(held, true);
    this.#closeInline();
    this.#fence?.flush();
    this.#fence = null;
    this.#lists = [];
    this.#midLine = false;
  }

  #undecided(segment) {
    const row = this.#fence === null && /^ {0,3}\|/.test(segment);
    if (segment.length > (row ? HELD_ROW_CHARS : HELD_CHARS)) return false;
    if (row) return true;
    return this.#fence === null ? UNDECIDED.test(segment) : /^\s*[`~]*\s*$/.test(segment);
  }

  #continueLine(segment) {
    if (this.#fence !== null) this.#fence.write(segment);
    else this.#inline?.write(segment);
  }

  // complete: the line is whole; if not, it is decided what it begins, or it is too long to wait for its end.
  #startLine(line, complete) {
    if (this.#fence !== null) {
      if (this.#fence.closedBy(line)) {
        this.#fence.flush();
        this.#fence = null;
        this.#blank = true;
      } else this.#fence.write(this.#fence.unindented(line));
      return;
    }
    if (line.trim() === "") {
      this.#closeInline();
      this.#table = null;
      this.#blank = true;
      return;
    }
    if (complete && isRow(line)) {
      this.#addRow(line);
      return;
    }
    this.#table = null;
    if (!this.#startBlock(line, complete)) this.#startText(line);
    this.#blank = false;
  }

  #startBlock(line, complete) {
    let found;
    if (complete && (found = FENCE.exec(line))) {
      this.#closeInline();
      this.#fence = new CodeBlock(this.#container(found[1].length), found);
    } else if ((found = HEADING.exec(line))) {
      this.#closeLists();
      // Below the page's own headings, so that the outline of the page stays right.
      const level = Math.min(6, found[1].length + 2);
      this.#openInline(h(`h${level}`, { dir: "auto" }), found[2]);
      this.#inline.ownLine = true;
    } else if (complete && RULE.test(line)) {
      this.#closeLists();
      this.#root.append(h("hr"));
    } else if ((found = ITEM.exec(line))) this.#startItem(found);
    else if ((found = QUOTE.exec(line))) this.#startQuote(found[1]);
    else return false;
    return true;
  }

  #addRow(line) {
    if (this.#table === null) {
      this.#closeInline();
      this.#table = new TableBlock(this.#container(line.length - line.trimStart().length));
    }
    this.#table.add(line);
    this.#blank = true; // the table is its own block: what follows it is none of its text
  }

  #startText(line) {
    const continues = this.#inline !== null && !this.#blank && !this.#inline.ownLine;
    if (continues) {
      this.#inline.write(`\n${line.trimStart()}`);
      return;
    }
    this.#closeInline();
    const indent = line.length - line.trimStart().length;
    this.#openInline(h("p", { dir: "auto" }), line.trimStart(), this.#container(indent));
  }

  #startItem([, space, marker, content]) {
    this.#closeInline();
    const indent = space.replace(/\t/g, "    ").length;
    const ordered = /\d/.test(marker);
    while (this.#lists.length > 0 && indent < this.#lists.at(-1).indent) this.#lists.pop();
    let list = this.#lists.at(-1);
    if (list !== undefined && indent >= list.indent + 2 && this.#lists.length < MAX_LIST_DEPTH) list = undefined;
    else if (list !== undefined && list.ordered !== ordered) {
      this.#lists.pop();
      list = undefined;
    }
    if (list === undefined) {
      const parent = this.#lists.at(-1)?.item ?? this.#root;
      const start = ordered && Number.parseInt(marker, 10) !== 1 ? Number.parseInt(marker, 10) : null;
      const element = h(ordered ? "ol" : "ul", { start });
      parent.append(element);
      list = { element, item: null, indent, ordered };
      this.#lists.push(list);
    }
    // The direction is the item's, for its bullet too: a paragraph with one of its own would not count for it.
    list.item = h("li", { dir: "auto" });
    list.element.append(list.item);
    this.#openInline(h("p"), content, list.item);
  }

  #startQuote(content) {
    if (content.trim() === "") {
      this.#closeInline();
      return;
    }
    if (this.#inline?.quote && !this.#blank) {
      this.#inline.write(`\n${content}`);
      return;
    }
    this.#closeLists();
    const last = this.#root.lastElementChild;
    const quote = last?.localName === "blockquote" && !this.#blank ? last : h("blockquote", { dir: "auto" });
    if (quote !== last) this.#root.append(quote);
    this.#openInline(h("p"), content, quote);
    this.#inline.quote = true;
  }

  /** Where a block of this indentation belongs: the list item it is under, or the root. */
  #container(indent) {
    while (this.#lists.length > 0 && indent < this.#lists.at(-1).indent + 2) this.#lists.pop();
    return this.#lists.at(-1)?.item ?? this.#root;
  }

  #openInline(element, text, parent = this.#root) {
    parent.append(element);
    this.#inline = new InlineBlock(element);
    this.#inline.write(text);
  }

  #closeInline() {
    this.#inline?.draw(false);
    this.#inline = null;
  }

  #closeLists() {
    this.#closeInline();
    this.#lists = [];
  }
}

/** A block of running text. Its settled part is never touched again. */
class InlineBlock {
  ownLine = false;
  quote = false;
  #element;
  #tail = "";
  #lastSettled = null; // the child nodes up to this one are final

  constructor(element) {
    this.#element = element;
  }

  write(text) {
    this.#tail += text;
    const line = this.#tail.lastIndexOf("\n") + 1;
    if (line > 0 && isBalanced(this.#tail.slice(0, line))) this.#settle(line);
    while (this.#tail.length > TAIL_CHARS) this.#settle(cutAt(this.#tail, TAIL_CHARS));
  }

  #settle(count) {
    this.#replaceTail(inlineNodes(this.#tail.slice(0, count)));
    this.#lastSettled = this.#element.lastChild;
    this.#tail = this.#tail.slice(count);
  }

  draw(open) {
    this.#replaceTail(inlineNodes(this.#tail, { open }));
  }

  #replaceTail(nodes) {
    while (this.#element.lastChild !== this.#lastSettled) this.#element.lastChild.remove();
    this.#element.append(nodes);
  }
}

/** Nothing that began in this text can end after it. Errs towards no, which only means to draw it again. */
function isBalanced(text) {
  return ["*", "_", "`"].every((mark) => text.split(mark).length % 2 === 1) && !text.includes("[");
}

/** Where to cut a text of more than `limit` characters: after a blank if there is one, never inside a character. */
function cutAt(text, limit) {
  const blank = text.lastIndexOf(" ", limit - 1);
  if (blank > limit / 2) return blank + 1;
  const code = text.charCodeAt(limit - 1);
  return code >= 0xd800 && code <= 0xdbff ? limit - 1 : limit;
}

/** A fenced block. Text is only ever added, in one node per drawing: joining them would copy the whole block each time. */
class CodeBlock {
  #code;
  #new = "";
  #indent;
  #mark;

  constructor(parent, [, indent, mark, info]) {
    this.#indent = indent.length;
    this.#mark = mark;
    const language = info.trim().split(/\s+/)[0].slice(0, 40);
    this.#code = h("code", { dir: "ltr" });
    const copy = h("button", { type: "button", class: "quiet copy", text: "Copy", on: { click: () => this.#copy(copy) } });
    const bar = h("div", { class: "code-bar" }, h("span", { text: language || "text" }), navigator.clipboard ? copy : null);
    parent.append(h("div", { class: "code-block" }, bar, h("pre", { tabindex: "0" }, this.#code)));
  }

  closedBy(line) {
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
