// Which * and _ are marks, and what they enclose. The rule is CommonMark's, with three exceptions that keep what people
// write: operators (2**3, f(*a, *b)), indices (x_i, \sum_{i}) and text without blanks between words (**重点。**内容).

const MAX_DEPTH = 4;
const BLANK = /\s/;
const PUNCTUATION = /[!-/:-@[-`{-~\u2010-\u2027\u2030-\u205e¡§«¶·»¿]/;
const WITHOUT_BLANKS = /[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\uffef\ud840-\ud87f]/;
const CLOSING = /[.:!?)\]}”’»%]/;
const BEFORE_OPERATOR = /[A-Za-z0-9)\]]/;
const AFTER_OPERATOR = /[A-Za-z0-9(]/;
const CALCULATING = /[0-9()\]]/;
// An underscore is a mark only at the edge of a word; brackets and braces behind a word belong to an index.
const BEFORE_UNDERSCORE = /[\s([{<"'“‘«¿¡*~–—/>-]/;
const AFTER_UNDERSCORE = /[\s.,:;!?)\]}>"'”’»*~–—/…-]/;

/** Judge the run of one character from `at` to `end`: {mark, length, opens, closes}. */
export function markOf(text, at, end) {
  const mark = text[at];
  const before = text[at - 1] ?? "\n";
  const after = text[end] ?? "\n";
  const edges = mark === "_" ? edgesOfUnderscore(before, after) : edgesOfAsterisk(before, after);
  return { mark, length: end - at, ...edges };
}

function edgesOfUnderscore(before, after) {
  return {
    opens: BEFORE_UNDERSCORE.test(before) && !BLANK.test(after) && !/[{}^]/.test(after),
    closes: AFTER_UNDERSCORE.test(after) && !BLANK.test(before),
  };
}

function edgesOfAsterisk(before, after) {
  const beforeBlank = BLANK.test(before);
  const afterBlank = BLANK.test(after);
  const beforeMark = PUNCTUATION.test(before);
  const afterMark = PUNCTUATION.test(after);
  const operator = BEFORE_OPERATOR.test(before) && AFTER_OPERATOR.test(after);
  if (operator && (CALCULATING.test(before) || CALCULATING.test(after))) return { opens: false, closes: false };
  return {
    opens: !operator && !afterBlank && (!afterMark || beforeBlank || beforeMark || WITHOUT_BLANKS.test(before)),
    closes: !beforeBlank && (!beforeMark || afterBlank || afterMark || CLOSING.test(before) || WITHOUT_BLANKS.test(after)),
  };
}

/**
 * Builds nodes from pieces: strings, nodes, marks, and the ends of links. What a mark or a link has begun is a frame on a
 * stack; what closes takes the frames above its own along, as the characters that they turn out to be.
 */
export class Emphasis {
  #frames = [{ nodes: [], inner: 0 }];
  #floor = 1; // frames below are out of reach: outside of the link, or nested too deeply already
  #searched = new Map(); // kind of mark -> no frame below this one can be its other end

  add(piece) {
    if (typeof piece === "string" || piece.nodeType !== undefined) push(this.#frames.at(-1), piece);
    else if (piece.mark !== undefined) this.#mark(piece);
    else if (piece.closes !== undefined) this.#endLink();
    else if (piece.link === null) push(this.#frames.at(-1), piece.bracket);
    else {
      this.#frames.push({ link: piece.link, nodes: [], inner: 0, floor: this.#floor });
      this.#floor = this.#frames.length;
    }
  }

  /** Return the nodes. open: a double mark that is not closed yet will be. */
  end(open) {
    const [base, ...rest] = this.#frames;
    let into = base;
    let depth = 0;
    const elements = [];
    for (const frame of rest) {
      const strong = open && frame.left >= 2 && frame.nodes.length > 0 && depth + frame.inner < MAX_DEPTH;
      push(into, frame.mark.repeat(strong ? frame.left - 2 : frame.left));
      if (strong) {
        const element = document.createElement("strong");
        push(into, element);
        into = { nodes: [] };
        elements.push([element, into]);
        depth += 1;
      }
      for (const node of frame.nodes) push(into, node);
    }
    for (const [element, { nodes }] of elements) for (const node of nodes) element.append(node);
    return base.nodes;
  }

  #mark({ mark, length, opens, closes }) {
    let left = length;
    while (closes && left > 0) {
      const kind = `${mark}${opens}${length % 3}`;
      const index = this.#opener(mark, length, opens, kind);
      if (index < 0) break;
      const frame = this.#takeAbove(index);
      const size = left >= 2 && frame.left >= 2 ? 2 : 1;
      const element = document.createElement(size === 2 ? "strong" : "em");
      for (const node of frame.nodes) element.append(node);
      left -= size;
      frame.left -= size;
      frame.nodes = [element];
      frame.inner += 1;
      if (frame.left === 0) this.#pop();
    }
    if (left === 0) return;
    if (opens) this.#frames.push({ mark, left, whole: length, both: closes, nodes: [], inner: 0 });
    else push(this.#frames.at(-1), mark.repeat(left));
  }

  /** The frame that such a mark closes, -1 for none. What was searched in vain is not searched again. */
  #opener(mark, length, opens, kind) {
    const lowest = Math.max(this.#floor, this.#searched.get(kind) ?? 0);
    let inner = 0;
    for (let index = this.#frames.length - 1; index >= lowest; index -= 1) {
      const frame = this.#frames[index];
      inner = Math.max(inner, frame.inner);
      if (inner >= MAX_DEPTH) {
        this.#floor = index + 1; // whatever began here or before would be nested too deeply
        return -1;
      }
      // CommonMark's rule of three: of marks that could be both, ** and * do not end one another.
      const three = (opens || frame.both) && (frame.whole + length) % 3 === 0 && length % 3 !== 0;
      if (frame.mark === mark && !three) return index;
    }
    this.#searched.set(kind, this.#frames.length);
    return -1;
  }

  /** Make the frames above `index` a part of it. */
  #takeAbove(index) {
    const frame = this.#frames[index];
    for (let above = index + 1; above < this.#frames.length; above += 1) {
      const { mark, left, nodes, inner } = this.#frames[above];
      push(frame, mark.repeat(left));
      for (const node of nodes) push(frame, node);
      frame.inner = Math.max(frame.inner, inner);
    }
    this.#shrink(index + 1);
    return frame;
  }

  /** The last frame is finished: what it has become belongs to the one below. */
  #pop() {
    const frame = this.#frames.at(-1);
    this.#shrink(this.#frames.length - 1);
    const below = this.#frames.at(-1);
    for (const node of frame.nodes) push(below, node);
    below.inner = Math.max(below.inner, frame.inner);
  }

  #shrink(height) {
    this.#frames.length = height;
    for (const [kind, lowest] of this.#searched) if (lowest > height) this.#searched.set(kind, height);
  }

  #endLink() {
    let index = this.#frames.length - 1;
    while (this.#frames[index].link === undefined) index -= 1;
    const frame = this.#takeAbove(index);
    for (const node of frame.nodes) frame.link.append(node);
    frame.nodes = [frame.link];
    frame.inner += 1;
    this.#floor = frame.floor;
    this.#pop();
  }
}

function push(frame, node) {
  const { nodes } = frame;
  if (node === "") return;
  if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes[nodes.length - 1] += node;
  else nodes.push(node);
}
