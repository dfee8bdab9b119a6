// Which way a text runs: as its first letter does, like dir="auto". A browser looks for that letter in the whole element
// again with each piece that is added, which makes a long text without letters slow; here each piece is looked at once.

const LETTER = /[\p{L}\u061c\u200e\u200f]/u;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\u200f\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

/** Return "ltr" or "rtl", null where nothing in `text` has a direction. */
export function directionOf(text) {
  const letter = LETTER.exec(text)?.[0];
  return letter === undefined ? null : RIGHT_TO_LEFT.test(letter) ? "rtl" : "ltr";
}

/** Give `element` the direction of `text`. Returns whether it has one; without, that of what is around it holds. */
export function direct(element, text) {
  const direction = directionOf(text);
  if (direction === null) element.removeAttribute("dir");
  else element.setAttribute("dir", direction);
  return direction !== null;
}
