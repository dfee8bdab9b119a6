// JSON whose integers keep their digits. A JavaScript number has 53 bits: 2512292042121000001 would become …000, and a
// person would approve another number than the one that the tool gets.

// Where a number can begin, so not at the digits of a seq, which are a text.
const MANY_DIGITS = /(?:^|[[:,\s-])\d{16}/;
const TEXT_OR_NUMBER = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;

/** An integer beyond 53 bits. As a number it is the nearest one that there is; as a text it has all its digits. */
export class LongInteger extends Number {
  constructor(digits) {
    super(digits);
    this.digits = digits;
  }

  toString() {
    return this.digits;
  }
}

/** As `JSON.parse`, with a `LongInteger` for each integer that a number cannot hold. */
export function parseJson(text) {
  const value = JSON.parse(text);
  if (!MANY_DIGITS.test(text)) return value;
  const mark = freshMark();
  let found = false;
  const marked = text.replace(TEXT_OR_NUMBER, (token) => {
    if (!/^-?\d+$/.test(token) || Number.isSafeInteger(Number(token))) return token;
    found = true;
    return `"${mark}${token}"`;
  });
  if (!found) return value;
  return JSON.parse(marked, (_, one) => {
    return typeof one === "string" && one.startsWith(mark) ? new LongInteger(one.slice(mark.length)) : one;
  });
}

/** As `JSON.stringify(value, null, indent)`; a `LongInteger` is written with all its digits. */
export function writeJson(value, indent) {
  const mark = freshMark();
  let found = false;
  const written = JSON.stringify(value, (_, one) => {
    if (!(one instanceof LongInteger)) return one;
    found = true;
    return mark + one.digits;
  }, indent);
  return found ? written.replace(new RegExp(`"${mark}(-?\\d+)"`, "g"), "$1") : written;
}

// No text of others begins with it: they cannot guess it.
function freshMark() {
  return `integer-${Math.random().toString(36).slice(2)}${Math.random().toString(36).slice(2)}:`;
}
