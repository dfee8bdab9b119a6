import assert from "node:assert/strict";
import { test } from "node:test";
import { depthOf, elementsOf, installDocument } from "./dom.mjs";
import { workOf } from "./work.mjs";

installDocument();
const { inlineNodes } = await import("../../../src/transports/ui/inline.js");
const { MarkdownStream } = await import("../../../src/transports/ui/markdown.js");
const MODULES = ["markdown.js", "inline.js", "emphasis.js", "table.js", "code.js", "direction.js", "dom.js"].map((name) => `/ui/${name}`);

function draw(text, { size = Infinity, finish = true } = {}) {
  const root = document.createElement("div");
  const stream = new MarkdownStream(root);
  for (let at = 0; at < text.length; at += size) stream.append(text.slice(at, at + size));
  if (finish) stream.end();
  return root;
}

/** The tree as text, to compare two of them. */
function outline(node) {
  if (node.nodeType === 3) return node.textContent;
  const shown = { ...node.attributes, href: node.href };
  const marks = Object.entries(shown).filter(([, value]) => value !== undefined).map(([name, value]) => ` ${name}=${value}`);
  let inside = "";
  for (const child of node.childNodes) inside += outline(child);
  return `<${node.localName}${marks.join("")}>${inside}</${node.localName}>`;
}

function count(text, pattern) {
  return text.match(pattern)?.length ?? 0;
}

/** Numbers that look random and are the same in each run (mulberry32). */
function dice(seed) {
  let state = seed;
  return (sides) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % sides;
  };
}

// -- the cost ---------------------------------------------------------------------------------------------------------

const PATTERNS = {
  "bold that never ends": "**a ",
  "bold that only ends": "a** ",
  "emphasis that never ends": "*a ",
  "emphasis and bold in turns": "*a **b ",
  "ends and beginnings": "a*b_c**d__ ",
  "both at once": "x*y",
  "asterisks": "*",
  "asterisks with blanks": "* ",
  "underscores": "_",
  "underscores at words": " _a",
  "index after index": "}_i = \\sum_{j",
  "nested emphasis": "*(",
  "backticks": "`",
  "backticks with text": "`a",
  "double backticks": "``a`",
  "tildes": "~",
  "tildes with text": "~~a",
  "brackets": "[",
  "brackets both ways": "[]",
  "closing brackets": "]",
  "links that never end": "[a](",
  "links in links": "[a](https://e.org/[",
  "parentheses in an address": "[a](https://e.org/(",
  "addresses in addresses": "](http://x",
  "brackets that all get the same address": "[[[](https://e.org)",
  "links": "[a](https://e.org) ",
  "pictures": "![a](https://e.org) ",
  "addresses": "https://e.org/a ",
  "addresses without a blank": "http://[",
  "an address and its punctuation": "https://e.org/)))]].,",
  "pipes": "|",
  "pipes with blanks": "| ",
  "cells": "| **a ",
  "escaped pipes": "\\|",
  "quotes": "> ",
  "lines of quotes": "> a\n",
  "quotes in quotes": ">",
  "list items": "- a\n",
  "list items in one line": "- ",
  "nested list items": "- a\n  - b\n    - c\n",
  "numbers": "1. a\n7. b\n",
  "heads": "# a\n",
  "number signs": "#",
  "rules": "---\n",
  "dashes": "-",
  "tags": "<a href=\"x\">",
  "open tags": "<a <b ",
  "comments": "<!--",
  "entities": "&amp;",
  "backslashes": "\\",
  "formulas": "\\(a_i\\) ",
  "formulas that never end": "\\(a ",
  "formulas that never end either": "\\[a ",
  "ends of formulas": "\\] ",
  "dollars": "$a_i",
  "double dollars": "$$",
  "dollars with a blank": "$ ",
  "fences": "```\n",
  "fences with tildes": "~~~a`\n",
  "carriage returns": "\r",
  "blank lines": "\n",
  "lines": "a\n",
  "lines of bold": "**a\n",
  "blanks": " ",
  "blanks and lines": "   \n",
  "tabs": "\t",
  "rows": "| a | b |\n",
  "rows and lines": "| a |\n|---|\n",
  "rows with everything": "| **a `b [c](d | _e |\n",
  "emoji": "**😀",
  "words": "word ",
  "one word": "word",
};

/** [name, what to do with a text, the text of n characters, that of 2n] */
function* costCases() {
  const streamed = (size) => (text) => draw(text, { size });
  const inline = (open) => (text) => inlineNodes(text, { open });
  for (const [name, unit] of Object.entries(PATTERNS)) {
    const of = (chars, before = "", after = "") => before + unit.repeat(Math.ceil(chars / unit.length)) + after;
    const both = (chars, ...around) => [of(chars, ...around), of(2 * chars, ...around)];
    yield [name, streamed(Infinity), ...both(8000)];
    yield [`${name}, and all ends last`, streamed(Infinity), ...both(8000, "", " **`_])\\)$$")];
    yield [`${name} in a row`, streamed(Infinity), ...both(1500, "| h |\n|---|\n| ", " |")];
    yield [`${name} in code`, streamed(Infinity), ...both(4000, "```\n")];
    yield [`${name} in a list`, streamed(Infinity), ...both(4000, "- ")];
    yield [`${name} in a formula`, streamed(Infinity), ...both(4000, "$$\n")];
    yield [`${name}, within one block`, inline(false), ...both(8000)];
    yield [`${name}, within one block that grows`, inline(true), ...both(8000)];
    yield [`${name} behind all beginnings`, inline(false), ...both(8000, "**a *b _c __d `e [f \\(g $$h ")];
    yield [`${name}, in small pieces`, streamed(7), ...both(2000)];
  }
}

test("twice the text is twice the work, whatever it is made of", () => {
  for (const [, run, text] of costCases()) run(text.slice(0, 300)); // blocks are counted exactly from then on
  const faults = [];
  for (const [name, run, short, long] of costCases()) {
    const once = workOf(() => run(short), MODULES);
    const twice = workOf(() => run(long), MODULES);
    // In small pieces the end of the last block, 1000 characters at most, is drawn again with each.
    const most = name.endsWith("pieces") ? 3000 : 150;
    if (twice > 2.4 * once + 5000 || twice > most * long.length) {
      faults.push(`${name}: ${once} steps for ${short.length} characters, ${twice} for ${long.length}`);
    }
  }
  assert.deepEqual(faults, []);
});

test("a row of 60,000 characters is no more work than 60,000 other characters", () => {
  const row = (text) => workOf(() => draw(`| h |\n|---|\n| ${text} |`), MODULES);
  assert.ok(row("**a ".repeat(15_000)) < 100 * 60_000);
  assert.ok(workOf(() => inlineNodes("**a ".repeat(15_000)), MODULES) < 100 * 60_000);
});

test("what is nested ten thousand times is not nested so in the document", () => {
  for (const unit of ["*(", "**a *b ", "> ", "- ", "[", "_a *b __c "]) {
    assert.ok(depthOf(draw(unit.repeat(10_000))) < 12, unit);
    assert.ok(depthOf(draw(unit.repeat(10_000), { finish: false })) < 12, unit);
  }
  assert.ok(depthOf(draw(`${"*a (".repeat(5000)}${")b*".repeat(5000)}`)) < 12);
});

// -- nothing gets lost ------------------------------------------------------------------------------------------------

const MARKS = ["*", "**", "***", "_", "__", "`", "``", "~~", "|", "\\", "$", "$$", "(", ")", "[", "]", "](", "{", "}", "^", "<", ">", "#", "+", "-", "=", "!", ":", "&"];
const WORDS = ["a", "Word", "x", "i", "2", "37", "é", "重点", "。", "😀", "https://e.org/a_b", "http://", " ", " ", " ", "  ", ", ", ". "];
const LINES = ["\n", "\n\n", "\n- ", "\n  - ", "\n3. ", "\n> ", "\n# ", "\n| ", " |\n", "\n```\n", "\n|---|\n", "\n\\[\n", "\n\\]\n", "\n$$\n", "\r\n", "\n---\n", "\n        ", " ".repeat(90)];

function inlineText(roll, length) {
  let text = "w";
  for (let part = 0; part < length; part += 1) text += roll(2) === 0 ? MARKS[roll(MARKS.length)] : WORDS[roll(WORDS.length)];
  return text;
}

function anyText(roll, length) {
  let text = "";
  for (let part = 0; part < length; part += 1) text += roll(4) === 0 ? LINES[roll(LINES.length)] : inlineText(roll, 1 + roll(4));
  return text;
}

/** Letters, digits of words and everything else that is markup nowhere. */
function unmarked(text) {
  return text.replace(/[^\p{L}\p{Extended_Pictographic}。&%^={}]/gu, "");
}

/** What a person sees or can click on: the text, and the addresses that links have instead of it. */
function visible(root) {
  return root.textContent + [...elementsOf(root)].filter((one) => one.localName === "a").map((one) => one.title).join("");
}

test("whatever the text: each character that is no markup is on the page, in order", () => {
  const roll = dice(1);
  for (let round = 0; round < 6000; round += 1) {
    const text = anyText(roll, 1 + roll(30)).replaceAll("](", "] ("); // addresses stand elsewhere: next test
    const size = [1, 2, 5, 40, 1e9][roll(5)];
    // The label of a block of code without a language.
    const shown = elementsOf(draw(text, { size }));
    const labels = [...shown].filter((one) => one.className === "code-bar" && one.textContent === "text").length;
    let seen = unmarked(draw(text, { size }).textContent);
    for (let label = 0; label < labels; label += 1) seen = seen.replace("text", "");
    assert.equal(seen, unmarked(text), JSON.stringify(text));
  }
});

test("within a line, even marks are only gone where they have become something", () => {
  const roll = dice(2);
  for (let round = 0; round < 6000; round += 1) {
    const text = inlineText(roll, 1 + roll(40)).replaceAll("\\", "").replaceAll("](", "] (");
    const root = document.createElement("div");
    root.append(inlineNodes(text));
    const tags = (name) => [...elementsOf(root)].filter((one) => one.localName === name).length;
    assert.equal(count(text, /[*_]/g) - count(root.textContent, /[*_]/g), 2 * tags("em") + 4 * tags("strong"), JSON.stringify(text));
    assert.equal(root.textContent.replace(/[*_`\s]/g, ""), text.replace(/[*_`\s]/g, ""), JSON.stringify(text));
    const ticks = count(text, /`/g) - count(root.textContent, /`/g);
    assert.ok(tags("code") === 0 ? ticks === 0 : ticks >= 2 * tags("code"), JSON.stringify(text));
  }
});

test("a link keeps its words on the page and its address in the link", () => {
  const roll = dice(3);
  for (let round = 0; round < 2000; round += 1) {
    const text = inlineText(roll, 1 + roll(30)).replace(/\]/g, "](https://e.org/q)");
    const root = document.createElement("div");
    root.append(inlineNodes(text));
    const links = [...elementsOf(root)].filter((one) => one.title === "https://e.org/q").length;
    const words = (shown) => unmarked(shown.replaceAll("https://e.org/q", ""));
    assert.equal(words(root.textContent), words(text), JSON.stringify(text));
    assert.ok(links <= count(text, /\]\(/g));
  }
});

test("in whatever pieces a text arrives, the end is the same", () => {
  const roll = dice(4);
  for (let round = 0; round < 3000; round += 1) {
    const text = anyText(roll, 1 + roll(25));
    const whole = outline(draw(text)).replace(/\s+/g, " ");
    for (const size of [1, 3, 50]) assert.equal(outline(draw(text, { size })).replace(/\s+/g, " "), whole, JSON.stringify([size, text]));
  }
});

for (const [text, shown] of [
  ["the sum \\(a_i * b_i\\) and \\(c_j * d\\)", null],
  ["\\[\nx_i = 2 * y_i\n- z_i * 3\n# 4\n\\]\nand **so** on", "\\[x_i = 2 * y_i- z_i * 3# 4\\]and so on"],
  ["$$\n\\begin{a}\n| 1 | 2 |\n\\\\\n$$", "$$\\begin{a}| 1 | 2 |\\\\$$"],
  ["in a line \\[a_{i} * b_{j}\\] too, and $x_i$, $y_i * z_i$", null],
  ["$5 and $6 are *not* formulas", "$5 and $6 are not formulas"],
  ["}_i = \\sum_{j} x_j and (a)_i + (b)_j", null],
  ["2**3 + 4**5 and 2*3*4, x**2 + y**2, (a+b)**2 * (c)**2, 2**(n+1)**k", null],
  ["f(*args, **kwargs) and g(*args, **kwargs)", null],
  ["snake_case_name, _private, (x)_i and x_{i}, a__b", null],
  ["a _word_ and __two__ and _private_name_ too", "a word and two and private_name too"],
  ["|x + y| <= |x|", null],
  ["|x|", null],
  ["|| a ||", null],
  ["***x***", "x"],
  ["**这是重点。**然后", "这是重点。然后"],
  ["这是**重点**内容", "这是重点内容"],
  ["**Note:**text", "Note:text"],
  ["[**bold** and `code`](https://e.org)", "bold and code"],
  ["\\(unclosed and \\) too", null],
  ["1986. A year", "A year"],
]) {
  test(`on the page: ${text.slice(0, 60)}`, () => {
    for (const size of [1, Infinity]) assert.equal(draw(text, { size }).textContent, shown ?? text);
  });
}
