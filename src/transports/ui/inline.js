// The inside of a line of Markdown as DOM nodes: code, strong, emphasis, links, line breaks. Nothing else is markup.
//
// Two passes, each over every character once: the text becomes pieces (what cannot be split is one: code, a formula, an
// address), then the pieces become nodes. Nothing here may look ahead without remembering what it found: a model's text
// can repeat any mark ten thousand times. Where Markdown is in doubt, the text stays as it was written.

import { Emphasis, markOf } from "./emphasis.js";

const SPECIAL = /[\\`*_[\]$\n]|https?:\/\//g;
const ADDRESS_END = /[\s<>"'`\\]|$/g;
const SCHEME = /^https?:\/\//i;
// Without ( and ): nobody needs them escaped, and \( \) are the marks of a formula.
const ESCAPABLE = /[\\`*_[\]{}#+.!~>|-]/;
const FORMULA = /[\\^_{}=]/;
const MAX_ADDRESS_CHARS = 2048;

/**
 * Return the nodes of `text` as a fragment. open: the text still grows, so what is not closed yet will be: show it as it
 * will look, instead of flashing asterisks.
 */
export function inlineNodes(text, { open = false } = {}) {
  const emphasis = new Emphasis();
  for (const piece of new Pieces(text, open).read()) emphasis.add(piece);
  const out = document.createDocumentFragment();
  for (const node of emphasis.end(open)) out.append(node);
  return out;
}

/** Splits a text into strings, finished nodes, marks of emphasis, and the two ends of links. */
class Pieces {
  #text;
  #open;
  #pieces = [];
  #brackets = []; // where an open [ stands in #pieces
  #nextOf = new Map(); // what was looked for -> where it comes next
  #ticks = null; // length of a run of backticks -> where such runs begin, those to come last
  #parens = null; // where a ( stands -> where its ) does
  #noAddressBefore = 0;

  constructor(text, open) {
    this.#text = text;
    this.#open = open;
  }

  read() {
    const text = this.#text;
    let at = 0;
    while (at < text.length) {
      SPECIAL.lastIndex = at;
      const found = SPECIAL.exec(text);
      if (found === null) break;
      this.#put(text.slice(at, found.index));
      at = this.#special(found.index, found[0]);
    }
    this.#put(text.slice(at));
    return this.#pieces;
  }

  #put(piece) {
    if (piece !== "") this.#pieces.push(piece);
  }

  /** Read what begins at `at` with `mark`; return where to go on. */
  #special(at, mark) {
    switch (mark) {
      case "\n": this.#put(element("br")); return at + 1;
      case "\\": return this.#backslash(at);
      case "`": return this.#code(at);
      case "$": return this.#dollar(at);
      case "[": return this.#bracket(at);
      case "]": return this.#closeBracket(at);
      case "*":
      case "_": {
        const end = this.#endOfRun(at);
        this.#put(markOf(this.#text, at, end));
        return end;
      }
      default: return this.#address(at, mark);
    }
  }

  #endOfRun(at) {
    let end = at + 1;
    while (this.#text[end] === this.#text[at]) end += 1;
    return end;
  }

  /** Where `what` comes next, -1 for nowhere. Asked for ever later places only: remembered, it costs the text once. */
  #next(what, from) {
    let at = this.#nextOf.get(what);
    if (at === undefined || (at >= 0 && at < from)) {
      at = this.#text.indexOf(what, from);
      this.#nextOf.set(what, at);
    }
    return at;
  }

  /** Put a part of the text as it stands. */
  #verbatim(from, end) {
    const lines = this.#text.slice(from, end).split("\n");
    lines.forEach((line, index) => {
      if (index > 0) this.#put(element("br"));
      this.#put(line);
    });
    return end;
  }

  #backslash(at) {
    const next = this.#text[at + 1] ?? "";
    if (next === "(" || next === "[") {
      const close = this.#next(next === "(" ? "\\)" : "\\]", at + 2);
      // \[x\](address) is a link that somebody did not want.
      if (close >= 0 && (next === "(" || this.#text[close + 2] !== "(")) return this.#verbatim(at, close + 2);
      if (close < 0 && this.#open) return this.#verbatim(at, this.#text.length);
    }
    if (!ESCAPABLE.test(next)) {
      this.#put("\\");
      return at + 1;
    }
    this.#put(next);
    return at + 2;
  }

  #dollar(at) {
    const text = this.#text;
    if (text[at + 1] === "$") {
      const close = this.#next("$$", at + 2);
      if (close >= 0) return this.#verbatim(at, close + 2);
      if (this.#open) return this.#verbatim(at, text.length);
      this.#put("$$");
      return at + 2;
    }
    const close = this.#next("$", at + 1);
    const line = this.#next("\n", at + 1);
    // Prices have dollars too: a formula has neither blanks inside its marks nor a number after them.
    const fits = close > at + 1 && (line < 0 || close < line) && !/[\s\d]/.test(text[at + 1]) && !/\s/.test(text[close - 1]);
    if (fits && !/\d/.test(text[close + 1] ?? "") && FORMULA.test(text.slice(at + 1, close))) return this.#verbatim(at, close + 1);
    this.#put("$");
    return at + 1;
  }

  #code(at) {
    const text = this.#text;
    const from = this.#endOfRun(at);
    const close = this.#closingTicks(from, from - at);
    if (close < 0 && !this.#open) {
      this.#put(text.slice(at, from));
      return from;
    }
    const end = close < 0 ? text.length : close;
    const padded = end - from > 2 && text[from] === " " && text[end - 1] === " ";
    this.#put(element("code", padded ? text.slice(from + 1, end - 1) : text.slice(from, end)));
    return close < 0 ? end : end + from - at;
  }

  #closingTicks(from, length) {
    if (this.#ticks === null) {
      this.#ticks = new Map();
      for (let at = this.#text.indexOf("`", from); at >= 0; ) {
        const end = this.#endOfRun(at);
        if (!this.#ticks.has(end - at)) this.#ticks.set(end - at, []);
        this.#ticks.get(end - at).push(at);
        at = this.#text.indexOf("`", end);
      }
      for (const places of this.#ticks.values()) places.reverse();
    }
    const places = this.#ticks.get(length) ?? [];
    while (places.length > 0 && places.at(-1) < from) places.pop();
    return places.at(-1) ?? -1;
  }

  #bracket(at) {
    this.#brackets.push(this.#pieces.length);
    this.#put({ bracket: "[", link: null });
    return at + 1;
  }

  // A picture is a link too: loading it would tell a stranger's server who reads this conversation.
  #closeBracket(at) {
    const index = this.#brackets.pop();
    const found = index === undefined ? null : this.#destination(at + 1);
    if (found === null) {
      this.#put("]");
      return at + 1;
    }
    this.#pieces[index].link = found.link;
    if (index === this.#pieces.length - 1) this.#put(found.address); // nothing to click on otherwise
    for (let inside = index + 1; inside < this.#pieces.length; inside += 1) {
      const { localName, textContent } = this.#pieces[inside];
      if (localName === "a") this.#pieces[inside] = textContent;
    }
    this.#put({ closes: this.#pieces[index] });
    this.#brackets = []; // a link in a link is none
    return found.end;
  }

  #destination(at) {
    const text = this.#text;
    if (text[at] !== "(") return null;
    this.#parens ??= pairs(text);
    const close = this.#parens.get(at);
    if (close === undefined || close - at > MAX_ADDRESS_CHARS) return null;
    const address = text.slice(at + 1, close);
    const link = linkTo(address);
    return link === null ? null : { link, address, end: close + 1 };
  }

  #address(at, scheme) {
    if (at >= this.#noAddressBefore) {
      ADDRESS_END.lastIndex = at;
      const whole = ADDRESS_END.exec(this.#text).index;
      let end = whole;
      while (".,;:!?)]*_".includes(this.#text[end - 1])) end -= 1;
      const address = this.#text.slice(at, end);
      const link = linkTo(address);
      if (link !== null) {
        link.append(address);
        this.#put(link);
        return end;
      }
      this.#noAddressBefore = whole;
    }
    this.#put(scheme);
    return at + scheme.length;
  }
}

/** Which ( belongs to which ), as far as there is no blank between them: addresses have none. */
function pairs(text) {
  const found = new Map();
  let open = [];
  for (const { 0: mark, index } of text.matchAll(/[()\s]/g)) {
    if (mark === "(") open.push(index);
    else if (mark !== ")") open = [];
    else if (open.length > 0) found.set(open.pop(), index);
  }
  return found;
}

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

/** Return an empty link, null for anything but http and https: a model's text may ask for javascript:, data: or file:. */
function linkTo(address) {
  if (!SCHEME.test(address)) return null;
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  const link = document.createElement("a");
  link.href = url.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  link.title = url.href;
  return link;
}
