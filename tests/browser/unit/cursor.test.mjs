import assert from "node:assert/strict";
import { test } from "node:test";
import { Cursor, parseSeq } from "../../../src/transports/ui/cursor.js";

test("neighbours near 2^61 are told apart, which Number cannot do", () => {
  const cursor = new Cursor();
  const first = parseSeq("2305843009213693952");
  const second = parseSeq("2305843009213693953");
  assert.equal(Number(first), Number(second));
  cursor.moveTo(first);
  assert.equal(cursor.judge(first, 0n), "duplicate");
  assert.equal(cursor.judge(second, first), "take");
  assert.equal(cursor.last, second);
});

test("a frame is taken, dropped or proves a gap by its seq and prev alone", () => {
  const cursor = new Cursor();
  cursor.moveTo(10n);
  assert.equal(cursor.judge(10n, 5n), "duplicate");
  assert.equal(cursor.judge(20n, 10n), "take");
  assert.equal(cursor.judge(30n, 15n), "take", "a prev before the last one is no gap");
  assert.equal(cursor.judge(50n, 40n), "gap");
  assert.equal(cursor.last, 30n, "a gap moves nothing");
});

test("ws.through raises the position, and never lowers it", () => {
  const cursor = new Cursor();
  cursor.through(40n);
  assert.equal(cursor.judge(50n, 40n), "take");
  cursor.through(45n);
  assert.equal(cursor.last, 50n);
});

test("unlinked, until caught up, order counts but links do not", () => {
  const cursor = new Cursor();
  cursor.moveTo(100n);
  cursor.unlink();
  assert.equal(cursor.judge(7n, 6n), "take", "the new log counts lower than the old one");
  assert.equal(cursor.judge(7n, 6n), "duplicate");
  cursor.caughtUp(9n);
  assert.equal(cursor.judge(20n, 15n), "gap");
});

test("what is no decimal string is refused", () => {
  for (const value of [1, null, undefined, "", "1.5", "-1", "0x10", "1".repeat(21), {}]) {
    assert.throws(() => parseSeq(value), TypeError);
  }
});
