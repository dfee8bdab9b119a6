import assert from "node:assert/strict";
import { test } from "node:test";
import { GrowingText } from "../../../src/transports/ui/growing.js";

test("a reader gets only what is new", () => {
  const text = new GrowingText("ab");
  const seen = text.pieceCount;
  text.append("cd");
  text.append("");
  text.append("ef");
  assert.equal(text.since(seen), "cdef");
  assert.equal(text.toString(), "abcdef");
  assert.equal(text.length, 6);
});

test("a longer version of the same text is an append, another text a new generation", () => {
  const text = new GrowingText("ab");
  text.assign("abc");
  assert.equal(text.generation, 0);
  assert.equal(text.since(1), "c");
  text.assign("x");
  assert.equal(text.generation, 1);
  assert.equal(text.toString(), "x");
});
