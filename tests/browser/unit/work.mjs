// Counts what a piece of the page's code does, instead of how long it takes: how often each of its blocks ran (V8 counts
// that precisely), how many characters the built-in searches looked at, and what was put into the document.

import inspector from "node:inspector";
import { work as built } from "./dom.mjs";

const session = new inspector.Session();
session.connect();

function post(method, parameters) {
  let answer;
  session.post(method, parameters, (error, result) => {
    if (error) throw new Error(error.message);
    answer = result;
  });
  return answer;
}

post("Profiler.enable");
post("Profiler.startPreciseCoverage", { callCount: true, detailed: true });

// What each built-in is charged with: (this, arguments, result, where an expression began to search).
const found = (text, [, from = 0], at) => (at < 0 ? text.length - from : at - from);
const whole = (text) => text.length;
const COSTS = [
  [String.prototype, "indexOf", found],
  [String.prototype, "lastIndexOf", (text, given, at) => text.length - at],
  [String.prototype, "startsWith", (text, [what]) => what.length],
  [String.prototype, "slice", (text, given, part) => part.length],
  ...["includes", "split", "trim", "trimStart", "trimEnd", "replaceAll", "matchAll"].map((name) => [String.prototype, name, whole]),
  // What an expression that does not match has looked at is not told: at worst, all that was left.
  [RegExp.prototype, "exec", (expression, [text], match, from) => (match === null ? text.length : match.index + match[0].length) - from],
];

/** Return how much work `run` is, in the modules whose address ends with one of `modules`. */
export function workOf(run, modules) {
  let searched = 0;
  let nested = false;
  for (const entry of COSTS) {
    const [prototype, name, cost] = entry;
    const original = prototype[name];
    entry.original = original;
    prototype[name] = function counted(...given) {
      if (nested) return original.apply(this, given);
      nested = true;
      try {
        const from = this.global || this.sticky ? this.lastIndex : 0;
        const result = original.apply(this, given);
        searched += cost(this, given, result, from) + 1;
        return result;
      } finally {
        nested = false;
      }
    };
  }
  post("Profiler.takePreciseCoverage"); // forgets what was before
  built.nodes = built.chars = 0;
  try {
    run();
  } finally {
    for (const { 0: prototype, 1: name, original } of COSTS) prototype[name] = original;
  }
  let steps = 0;
  for (const { url, functions } of post("Profiler.takePreciseCoverage").result) {
    if (!modules.some((name) => url.endsWith(name))) continue;
    for (const { ranges } of functions) for (const { count } of ranges) steps += count;
  }
  return steps + searched + built.nodes + built.chars;
}
