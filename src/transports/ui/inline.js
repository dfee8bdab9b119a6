// The inside of a line of Markdown as DOM nodes: code, strong, emphasis, links, line breaks. Nothing else is markup.

const SPECIAL = /[\\`*_[\n]|https?:\/\//g;
const LINK = /!?\[([^\]\n]*)\]\(\s*([^\s()]*(?:\([^\s()]*\)[^\s()]*)*)\s*\)/y;
const BARE_URL = /https?:\/\/[^\s<>"'`\\]+/y;
const ESCAPABLE = /[\\`*_[\](){}#+.!~>|-]/;
const MAX_DEPTH = 4;

/**
 * Return the nodes of `text` as a fragment. open: the text still grows, so what is not closed yet will be: show it as it
 * will look, instead of flashing asterisks.
 */
export function inlineNodes(text, { open = false, depth = 0 } = {}) {
  const out = document.createDocumentFragment();
  let plain = "";
  let at = 0;
  const put = (node) => {
    if (plain !== "") out.append(plain);
    plain = "";
    out.append(node);
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (found === null) break;
    plain += text.slice(at, found.index);
    at = found.index;
    const read = READERS[text[at]](text, at, { open, depth });
    if (read === null) {
      plain += found[0];
      at += found[0].length;
    } else {
      if (typeof read.node === "string") plain += read.node;
      else put(read.node);
      at = read.end;
    }
  }
  plain += text.slice(at);
  if (plain !== "") out.append(plain);
  return out;
}

// A reader returns {node, end} for what begins at `at`, or null where it is only a character.
const READERS = {
  "\\": (text, at) => (ESCAPABLE.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null),
  "\n": (text, at) => ({ node: document.createElement("br"), end: at + 1 }),
  "`": readCode,
  "*": (text, at, how) => readMarked(text, at, text.startsWith("**", at) ? "**" : "*", how),
  _: (text, at, how) => (isWord(text[at - 1]) ? null : readMarked(text, at, text.startsWith("__", at) ? "__" : "_", how)),
  "[": readLink,
  h: readBareUrl,
};

function isWord(character) {
  return character !== undefined && /[\p{L}\p{N}_]/u.test(character);
}

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function readCode(text, at, { open }) {
  let ticks = 1;
  while (text[at + ticks] === "`") ticks += 1;
  const mark = "`".repeat(ticks);
  let close = text.indexOf(mark, at + ticks);
  while (close >= 0 && text[close + ticks] === "`") {
    while (text[close] === "`") close += 1;
    close = text.indexOf(mark, close);
  }
  if (close < 0 && !open) return { node: mark, end: at + ticks };
  const inside = text.slice(at + ticks, close < 0 ? text.length : close);
  const trimmed = /^ .*[^ ].* $/s.test(inside) ? inside.slice(1, -1) : inside;
  return { node: element("code", trimmed), end: close < 0 ? text.length : close + ticks };
}

function readMarked(text, at, mark, { open, depth }) {
  const from = at + mark.length;
  if (depth >= MAX_DEPTH || from >= text.length || /\s/.test(text[from])) return null;
  const close = findClose(text, from, mark);
  // A lone asterisk is too often just that: only the double mark is taken at its word before it is closed.
  if (close < 0 && !(open && mark.length === 2)) return null;
  const inside = text.slice(from, close < 0 ? text.length : close);
  if (inside === "" || /^[*_]+$/.test(inside)) return null;
  const node = element(mark.length === 2 ? "strong" : "em", inlineNodes(inside, { open: close < 0, depth: depth + 1 }));
  return { node, end: close < 0 ? text.length : close + mark.length };
}

function findClose(text, from, mark) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at + 1)) {
    const single = mark.length === 1;
    if (single && (text[at + 1] === mark || text[at - 1] === mark)) continue; // half of a double mark
    if (/\s/.test(text[at - 1]) || text[at - 1] === "\\") continue;
    if (mark[0] === "_" && isWord(text[at + mark.length])) continue;
    return at;
  }
  return -1;
}

function readLink(text, at, { depth }) {
  // A picture is a link too: loading it would tell a stranger's server who reads this conversation.
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  if (found === null) return null;
  const end = at + found[0].length;
  const label = found[1] === "" ? found[2] : found[1];
  const node = linkNode(found[2], depth < MAX_DEPTH ? withoutLinks(label) : label);
  return { node: node ?? found[0], end };
}

function withoutLinks(label) {
  return inlineNodes(label, { depth: MAX_DEPTH });
}

function readBareUrl(text, at, { depth }) {
  if (depth >= MAX_DEPTH) return null;
  BARE_URL.lastIndex = at;
  const found = BARE_URL.exec(text);
  if (found === null) return null;
  const url = found[0].replace(/[.,;:!?)\]*_]+$/, "");
  const node = linkNode(url, url);
  return node === null ? null : { node, end: at + url.length };
}

/** Return a link, null for anything but http and https: a model's text may ask for javascript:, data: or file:. */
function linkNode(address, content) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return null;
  const link = element("a", content);
  link.href = url.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  link.title = url.href;
  return link;
}
