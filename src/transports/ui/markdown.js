// A small Markdown for text that is still arriving. Every character is read once: what is finished stays as it is in the
// DOM, only the end of the last block is drawn again.

import { CodeBlock, MAX_FENCE_CHARS } from "./code.js";
import { direct } from "./direction.js";
import { h } from "./dom.js";
import { inlineNodes } from "./inline.js";
import { beginsRow, isRow, makesTable, MAX_ROW_CHARS, maybeDelimiter, TableBlock } from "./table.js";

// The part of a paragraph that is drawn again with each piece is at most this long; emphasis does not reach across.
const TAIL_CHARS = 1000;
// A line beginning that could still become several things is held back, but not for ever. What is decided by a whole line
// (a fence, a rule) is longer than this in no case, so that it does not matter in which pieces the line arrives.
const HELD_CHARS = MAX_FENCE_CHARS;

// Of a trimmed line that is not complete.
const UNDECIDED = /^(?:#{1,6}|[-*+_\s]*|\d{1,9}[.)]?|`{1,2}|~{1,2}|[`~]{3}.*|>)$/;
const FENCE = /^(\s*)(`{3,}|~{3,})([^`]*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const HEADING = /^ {0,3}(#{1,6})\s+/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const QUOTE = /^ {0,3}>\s?/;
const MAX_LIST_DEPTH = 6;
// Formulas that stand by themselves may have several lines, in which a - or # is what it is.
const FORMULA_MARKS = [["\\[", "\\]"], ["$$", "$$"]];

/** Draws Markdown into an element as its text arrives. */
export class MarkdownStream {
  #root;
  #held = ""; // the beginning of a line that cannot be judged yet
  #heldRow = false;
  #midLine = false;
  #blank = true; // the line before was empty: what follows is a new paragraph
  #inline = null; // the block that text is being added to
  #fence = null;
  #head = null; // a row that becomes the head of a table, if the line after it is one of dashes
  #table = null;
  #lists = []; // open lists, outermost first: {element, item, indent, ordered, start, number}

  /** root: an empty element that this object fills from now on. */
  constructor(root) {
    this.#root = root;
  }

  /** Add the next piece of the text. */
  append(piece) {
    if (this.#heldRow && this.#held.length + piece.length <= MAX_ROW_CHARS && !piece.includes("\n")) {
      this.#held += piece; // a row is looked at when it is complete
      return;
    }
    const text = this.#held + piece;
    this.#held = "";
    this.#heldRow = false;
    let at = 0;
    while (at < text.length) {
      const newline = text.indexOf("\n", at);
      const complete = newline >= 0;
      const segment = withoutReturn(text.slice(at, complete ? newline : text.length));
      const fence = this.#fence;
      if (this.#midLine) this.#continueLine(segment);
      else if (!complete && this.#undecided(segment)) {
        // More blanks than that mean nothing more, but what comes after them does.
        this.#heldRow = this.#fence === null && beginsRow(segment);
        this.#held = this.#fence === null && !this.#heldRow ? segment.slice(0, HELD_CHARS) : segment;
        break;
      } else this.#startLine(segment, complete);
      this.#midLine = !complete;
      if (complete && fence === this.#fence) fence?.write("\n"); // not for the lines that open and close the block
      if (complete) this.#endLine();
      at = complete ? newline + 1 : text.length;
    }
    this.#inline?.draw(true);
    this.#fence?.flush();
  }

  /** The text is complete. */
  end() {
    const held = this.#held;
    this.#held = "";
    this.#heldRow = false;
    if (held !== "") this.#startLine(held, true);
    this.#dropHead();
    this.#closeInline();
    this.#fence?.flush();
    this.#fence = null;
    this.#lists = [];
    this.#midLine = false;
  }

  #undecided(segment) {
    if (this.#fence !== null) return segment.length <= HELD_CHARS && /^[`~]*$/.test(segment.trim());
    const begun = segment.trim();
    if (this.#inline?.verbatim) return begun === "";
    if (beginsRow(segment)) return segment.length <= MAX_ROW_CHARS;
    if (this.#head !== null && maybeDelimiter(segment)) return true;
    return begun.length <= HELD_CHARS && UNDECIDED.test(begun);
  }

  #continueLine(segment) {
    if (this.#fence !== null) this.#fence.write(segment);
    else if (this.#inline !== null) this.#inline.write(segment);
    else this.#startText(segment); // nothing that is written may get lost, whatever ended its block
  }

  #endLine() {
    if (this.#fence !== null || this.#inline === null) return;
    this.#inline.endLine();
    if (!this.#inline.formulaEnded) return;
    this.#closeInline();
    this.#blank = true;
  }

  // complete: the line is whole; if not, it is decided what it begins, or it is too long to wait for its end.
  #startLine(line, complete) {
    if (this.#fence !== null) {
      if (complete && this.#fence.closedBy(line)) {
        this.#fence.flush();
        this.#fence = null;
        this.#blank = true;
      } else this.#fence.write(this.#fence.unindented(line));
      return;
    }
    if (this.#head !== null && complete && makesTable(this.#head, line)) {
      this.#startTable(line);
      return;
    }
    this.#dropHead();
    if (line.trim() === "") {
      this.#closeInline();
      this.#table = null;
      this.#blank = true;
      return;
    }
    if (this.#inline?.verbatim) {
      this.#inline.write(`\n${line}`);
      return;
    }
    if (complete && isRow(line)) {
      if (this.#table !== null) this.#table.add(line);
      else this.#head = line;
      return;
    }
    this.#table = null;
    if (!this.#startBlock(line, complete)) this.#startText(line);
    this.#blank = false;
  }

  #startBlock(line, complete) {
    let found;
    const short = complete && line.length <= HELD_CHARS;
    if (short && (found = FENCE.exec(line))) {
      this.#closeInline();
      this.#fence = new CodeBlock(this.#container(found[1].length), found);
    } else if ((found = HEADING.exec(line))) {
      this.#closeLists();
      // Below the page's own headings, so that the outline of the page stays right.
      const level = Math.min(6, found[1].length + 2);
      this.#openInline(h(`h${level}`), line.slice(found[0].length));
      this.#inline.ownLine = true;
    } else if (short && RULE.test(line)) {
      this.#closeLists();
      this.#root.append(h("hr"));
    } else if ((found = ITEM.exec(line))) this.#startItem(found, line.slice(found[0].length));
    else if ((found = QUOTE.exec(line))) this.#startQuote(line.slice(found[0].length).trimStart());
    else return false;
    return true;
  }

  #startTable(line) {
    const head = this.#head;
    this.#head = null;
    this.#closeInline();
    this.#table = new TableBlock(this.#container(head.length - head.trimStart().length), head, line);
    this.#blank = true; // the table is its own block: what follows it is none of its text
  }

  /** The row was only a line with pipes. */
  #dropHead() {
    const head = this.#head;
    this.#head = null;
    if (head === null) return;
    this.#startText(head);
    this.#blank = false;
  }

  #startText(line) {
    const continues = this.#inline !== null && !this.#blank && !this.#inline.ownLine;
    if (continues) {
      this.#inline.write(`\n${line.trimStart()}`);
      return;
    }
    this.#closeInline();
    const indent = line.length - line.trimStart().length;
    this.#openInline(h("p"), line.trimStart(), this.#container(indent));
  }

  #startItem([, space, marker], content) {
    this.#closeInline();
    const indent = space.replace(/\t/g, "    ").length;
    const number = Number.parseInt(marker, 10);
    const ordered = !Number.isNaN(number);
    while (this.#lists.length > 0 && indent < this.#lists.at(-1).indent) this.#lists.pop();
    let list = this.#lists.at(-1);
    if (list !== undefined && indent >= list.indent + 2 && this.#lists.length < MAX_LIST_DEPTH) list = undefined;
    else if (list !== undefined && list.ordered !== ordered) {
      this.#lists.pop();
      list = undefined;
    }
    // Who writes 1. 1. 1. leaves the counting to us; any other number is meant, a year for example. It begins a list of its
    // own: browsers take long over many items that have a number each.
    if (list?.ordered && number !== list.start && number !== list.number + 1) {
      this.#lists.pop();
      list = undefined;
    }
    if (list === undefined) {
      const parent = this.#lists.at(-1)?.item ?? this.#root;
      const element = h(ordered ? "ol" : "ul", { start: ordered && number !== 1 ? number : null });
      parent.append(element);
      list = { element, item: null, indent, ordered, start: number, number: number - 1 };
      this.#lists.push(list);
    }
    list.number += 1;
    list.item = h("li");
    list.element.append(list.item);
    // The direction is the item's, for its bullet too: a paragraph with one of its own would not count for it.
    this.#openInline(h("p"), content, list.item, list.item);
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
    const quote = last?.localName === "blockquote" && !this.#blank ? last : h("blockquote");
    const text = h("p");
    this.#openInline(text, content, quote, quote === last ? text : quote);
    if (quote !== last) this.#root.append(quote);
    this.#inline.quote = true;
  }

  /** Where a block of this indentation belongs: the list item it is under, or the root. */
  #container(indent) {
    while (this.#lists.length > 0 && indent < this.#lists.at(-1).indent + 2) this.#lists.pop();
    return this.#lists.at(-1)?.item ?? this.#root;
  }

  /** directed: the element that has the direction of this text. */
  #openInline(element, text, parent = this.#root, directed = element) {
    parent.append(element);
    this.#inline = new InlineBlock(element, directed);
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
  #directed; // the element that has the direction of this block, null once that is settled
  #tail = "";
  #lastSettled = null; // the child nodes up to this one are final
  #formulaEnd = null; // what ends the formula that this block is, if it is one of several lines
  #last = ""; // the last character of a formula: its end may come in two pieces
  formulaEnded = false;

  constructor(element, directed) {
    this.#element = element;
    this.#directed = directed;
  }

  /** Inside of a formula of several lines: what comes is no Markdown until its end or a blank line. */
  get verbatim() {
    return this.#formulaEnd !== null;
  }

  /** A line is complete: see whether this block is a formula, and whether that goes on. */
  endLine() {
    if (this.verbatim || this.ownLine || this.quote || this.#lastSettled !== null) return;
    const [begin, end] = FORMULA_MARKS.find(([mark]) => this.#tail.startsWith(mark)) ?? [];
    if (begin === undefined || this.#tail.includes("\n") || this.#tail.includes(end, begin.length)) return;
    const first = this.#tail;
    this.#tail = "";
    this.#replaceTail(inlineNodes(""));
    this.#formulaEnd = end;
    this.#appendVerbatim(begin); // of $$ the end looks the same: it is looked for behind the beginning
    this.#writeVerbatim(first.slice(begin.length));
  }

  #writeVerbatim(text) {
    if ((this.#last + text).includes(this.#formulaEnd)) this.formulaEnded = true;
    this.#last = text.slice(-1);
    this.#appendVerbatim(text);
  }

  #appendVerbatim(text) {
    this.#direct(text, true);
    text.split("\n").forEach((line, index) => {
      if (index > 0) this.#element.append(h("br"));
      if (line !== "") this.#element.append(line);
    });
    this.#lastSettled = this.#element.lastChild;
  }

  write(text) {
    if (this.verbatim) {
      this.#writeVerbatim(text);
      return;
    }
    this.#tail += text;
    const line = this.#tail.lastIndexOf("\n") + 1;
    let settled = line > 0 && isBalanced(this.#tail.slice(0, line)) ? this.#settle(this.#tail.slice(0, line)) : 0;
    while (this.#tail.length - settled > TAIL_CHARS) {
      settled += this.#settle(upToCut(this.#tail.slice(settled, settled + TAIL_CHARS)));
    }
    if (settled > 0) this.#tail = this.#tail.slice(settled);
  }

  /** Draw the beginning of the tail for good; return its length. */
  #settle(text) {
    this.#replaceTail(inlineNodes(text), true);
    this.#lastSettled = this.#element.lastChild;
    return text.length;
  }

  draw(open) {
    this.#replaceTail(inlineNodes(this.#tail, { open }));
  }

  #replaceTail(nodes, settled = false) {
    this.#direct(nodes, settled);
    while (this.#element.lastChild !== this.#lastSettled) this.#element.lastChild.remove();
    this.#element.append(nodes);
  }

  #direct(added, settled) {
    if (this.#directed === null) return;
    if (direct(this.#directed, added.textContent ?? added) && settled) this.#directed = null;
  }
}

/** Nothing that began in this text can end after it. Errs towards no, which only means to draw it again. */
function isBalanced(text) {
  return ["*", "_", "`", "$"].every((mark) => text.split(mark).length % 2 === 1) && !/\[|\\\(/.test(text);
}

function withoutReturn(line) {
  return line.endsWith("\r") ? line.slice(0, -1) : line;
}

/** The part of a text to settle where it has to be cut: up to a blank if there is one, never to inside a character. */
function upToCut(text) {
  const blank = text.lastIndexOf(" ");
  if (blank > text.length / 2) return text.slice(0, blank + 1);
  const code = text.charCodeAt(text.length - 1);
  return code >= 0xd800 && code <= 0xdbff ? text.slice(0, -1) : text;
}
