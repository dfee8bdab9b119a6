// Text that grows by appending. Readers take only what is new to them, so that a long answer costs its length once.

export class GrowingText {
  #pieces = [];
  #joined = null;
  /** Changes whenever the text was replaced instead of appended to: readers must start over. */
  generation = 0;
  length = 0;

  constructor(text = "") {
    this.append(text);
  }

  get pieceCount() {
    return this.#pieces.length;
  }

  append(piece) {
    if (piece === "") return;
    this.#pieces.push(piece);
    this.length += piece.length;
    this.#joined = null;
  }

  /** Make this the whole text. The usual case, that it continues the present one, is an append. */
  assign(text) {
    const present = this.toString();
    if (text.startsWith(present)) {
      this.append(text.slice(present.length));
      return;
    }
    this.#pieces = [];
    this.#joined = null;
    this.length = 0;
    this.generation += 1;
    this.append(text);
  }

  /** Return what was appended after the first `count` pieces. */
  since(count) {
    return this.#pieces.slice(count).join("");
  }

  toString() {
    this.#joined ??= this.#pieces.join("");
    return this.#joined;
  }
}
