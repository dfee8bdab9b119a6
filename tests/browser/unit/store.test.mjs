import assert from "node:assert/strict";
import { test } from "node:test";
import { EntityStore } from "../../../src/transports/ui/store.js";
import { entity } from "./fakes.mjs";

function event(seq, type, id, data = {}, prev = seq - 1) {
  return { type, id, seq: String(seq), prev: String(prev), channel: "sem", data };
}

function play(store, ...events) {
  return events.map((one) => store.applyEvent(one));
}

const ids = (store) => store.list().map((one) => one.id);
const textOf = (store, id) => store.get(id).text.toString();

test("event frames alone make the whole conversation", () => {
  const store = new EntityStore();
  play(
    store,
    event(1, "user.message", "u1", { text: "hi", idempotencyKey: "k" }),
    event(2, "run.queued", "x", { runId: "r1", position: 1 }),
    event(3, "run.started", "y", { runId: "r1" }),
    event(4, "llm.thinking.start", "m1-thinking", { runId: "r1" }),
    event(5, "llm.thinking.delta", "m1-thinking", { delta: "hm", runId: "r1" }),
    event(6, "llm.thinking.final", "m1-thinking", { text: "hm.", runId: "r1" }),
    event(7, "tool.start", "t1", { id: "t1", name: "sum", input: {}, runId: "r1" }),
    event(8, "tool.delta", "t1", { patch: { inputTextDelta: '{"a"' } }),
    event(9, "tool.delta", "t1", { patch: { inputTextDelta: ":1}" } }),
  );
  assert.equal(textOf(store, "t1"), '{"a":1}');
  play(
    store,
    event(10, "tool.delta", "t1", { patch: { input: { a: 1 } } }),
    event(11, "tool.approval_requested", "t1", { id: "t1", name: "sum", input: { a: 1 } }),
    event(12, "tool.approved", "t1", { id: "t1", by: "ann" }),
    event(13, "tool.result", "t1", { result: 3 }),
    event(14, "tool.done", "t1", { id: "t1" }),
    event(15, "llm.start", "m1", { role: "assistant", runId: "r1" }),
    event(16, "llm.delta", "m1", { delta: "Hel", runId: "r1" }),
    event(17, "llm.delta", "m1", { delta: "lo", runId: "r1" }),
  );
  assert.ok(store.isBusy());
  assert.ok(store.isOpen(store.get("m1")));
  play(store, event(18, "llm.final", "m1", { text: "Hello", finishReason: "stop" }), event(19, "run.finished", "z", { runId: "r1" }));
  assert.deepEqual(ids(store), ["u1", "r1", "m1-thinking", "t1", "m1"]);
  assert.deepEqual(store.get("t1").props, { name: "sum", input: { a: 1 }, status: "done", runId: "r1", approvedBy: "ann", result: 3 });
  assert.equal(textOf(store, "t1"), "");
  assert.equal(textOf(store, "m1"), "Hello");
  assert.equal(store.isBusy(), false);
});

test("a view of answers only, joined in the middle, makes a message of the first delta", () => {
  const store = new EntityStore();
  play(store, event(7, "llm.delta", "m1", { delta: "lo" }));
  assert.equal(store.get("m1").props.role, "assistant");
  assert.ok(store.isBusy(), "there is no run in this view, but a growing text");
  play(store, event(8, "llm.final", "m1", { text: "Hello" }));
  assert.equal(textOf(store, "m1"), "Hello");
  assert.equal(store.isBusy(), false);
});

test("state frames alone make the whole conversation, by position and not by arrival", () => {
  const store = new EntityStore();
  store.mergeState(entity("b", 20, { role: "assistant", text: "two" }));
  store.mergeState(entity("a", 30, { role: "user", text: "one" }, { position: "10" }));
  assert.deepEqual(ids(store), ["a", "b"]);
});

test("a state without the text of an input takes that text away", () => {
  const store = new EntityStore();
  play(store, event(1, "tool.start", "t1", { id: "t1", name: "weather", input: {} }));
  play(store, event(2, "tool.delta", "t1", { patch: { inputTextDelta: '{"city": "Li' } }));
  const wire = { ...entity("t1", 3, { name: "weather", input: { city: "Lisbon" }, status: "running" }, { position: "1" }), kind: "tool_call" };
  assert.equal(store.mergeState(wire), true);
  assert.equal(textOf(store, "t1"), "");
});

test("the higher version wins; a delta counts only where it is newer than the state", () => {
  const store = new EntityStore();
  store.mergeState(entity("m1", 20, { role: "assistant", text: "Hello wor", streaming: true }, { position: "10" }));
  assert.deepEqual(play(store, event(19, "llm.delta", "m1", { delta: "wor" }), event(21, "llm.delta", "m1", { delta: "ld" }, 20)), [false, true]);
  assert.equal(textOf(store, "m1"), "Hello world");
  assert.equal(store.mergeState(entity("m1", 20, { text: "old" })), false);
  assert.equal(store.mergeState(entity("m1", 21, { role: "assistant", text: "Hello world", model: "x" })), true);
  assert.equal(store.get("m1").props.model, "x", "the server's fold of the same event replaces the page's own");
  assert.equal(store.mergeState(entity("m1", 21, { text: "again" })), false);
});

test("versions near 2^61 that are neighbours are told apart", () => {
  const store = new EntityStore();
  store.mergeState(entity("m1", "2305843009213693953", { text: "new" }));
  assert.equal(store.mergeState(entity("m1", "2305843009213693952", { text: "old" })), false);
});

test("a joined delta that reaches back before the state adds only what is new", () => {
  const store = new EntityStore();
  store.mergeState(entity("m1", 20, { role: "assistant", text: "Hello wor", streaming: true }, { position: "10" }));
  play(store, event(22, "llm.delta", "m1", { delta: "o world" }, 15));
  assert.equal(textOf(store, "m1"), "Hello world");
});

test("what comes after the end changes nothing", () => {
  const store = new EntityStore();
  play(store, event(1, "llm.delta", "m1", { delta: "a" }), event(2, "llm.final", "m1", { text: "ab" }));
  play(store, event(3, "tool.start", "t1", { name: "x", input: {} }), event(4, "tool.done", "t1", { error: "no" }));
  play(store, event(5, "run.failed", "r1", { runId: "r1", error: "no" }));
  const late = play(
    store,
    event(6, "llm.delta", "m1", { delta: "c" }),
    event(7, "tool.result", "t1", { result: 1 }),
    event(8, "run.started", "r1", { runId: "r1" }),
    event(9, "user.message", "t1", { text: "an id of another kind" }),
  );
  assert.deepEqual(late, [false, false, false, false]);
  assert.equal(textOf(store, "m1"), "ab");
  assert.equal(store.get("t1").props.status, "error");
  assert.equal(store.get("r1").props.status, "failed");
});

test("a denied tool call stays denied when it ends", () => {
  const store = new EntityStore();
  play(store, event(1, "tool.start", "t1", { name: "x" }), event(2, "tool.denied", "t1", { by: "ann" }), event(3, "tool.done", "t1", { error: "denied" }));
  assert.equal(store.get("t1").props.status, "denied");
});

test("a text that a dead process left open is closed by the end of its run", () => {
  const changed = [];
  const store = new EntityStore({ onChange: ({ entity: one }) => changed.push(one.id) });
  play(store, event(1, "run.started", "x", { runId: "r1" }), event(2, "llm.delta", "m1", { delta: "a", runId: "r1" }));
  assert.ok(store.isOpen(store.get("m1")));
  changed.length = 0;
  play(store, event(3, "run.interrupted", "y", { runId: "r1" }));
  assert.equal(store.isOpen(store.get("m1")), false);
  assert.deepEqual(changed, ["r1", "m1"], "its card is drawn again");
});

test("an echo gives way to the real message, by key, by event or state", () => {
  for (const arrive of [
    (store) => store.applyEvent(event(50, "user.message", "u1", { text: "hi", idempotencyKey: "k1" })),
    (store) => store.mergeState(entity("u1", 50, { role: "user", text: "hi", idempotencyKey: "k1" })),
    (store) => store.mergeState(entity("u1", 50, { role: "user", text: "hi" })),
  ]) {
    const store = new EntityStore();
    store.mergeState(entity("m0", 40, { role: "assistant", text: "before" }));
    store.addEcho("k1", "hi");
    assert.deepEqual(ids(store), ["m0", "echo-k1"]);
    arrive(store);
    assert.deepEqual(ids(store), ["m0", "u1"]);
  }
});

test("two echoes of the same words are settled one by one, in order", () => {
  const store = new EntityStore();
  store.addEcho("k1", "again");
  store.addEcho("k2", "again");
  store.mergeState(entity("u1", 50, { role: "user", text: "again" }));
  assert.deepEqual(ids(store), ["echo-k2", "u1"]);
});

test("a reset keeps what is still being sent", () => {
  const store = new EntityStore();
  store.mergeState(entity("m0", 40, {}));
  store.addEcho("k1", "hi");
  store.clear();
  assert.deepEqual(ids(store), ["echo-k1"]);
});

test("unknown events are not for the store", () => {
  const store = new EntityStore();
  assert.deepEqual(play(store, event(1, "planning.step", "p1", {}), event(2, "turn.snapshot", "t", {})), [false, false]);
  assert.equal(store.size, 0);
});

test("a prompt that waited takes its place when its run begins, by events and by state frames alike", () => {
  const store = new EntityStore();
  play(
    store,
    event(1, "user.message", "u1", { text: "one", runId: "r1" }),
    event(2, "run.started", "r1", { runId: "r1", messageId: "u1" }),
    event(3, "llm.final", "m1", { text: "first half", runId: "r1" }),
    event(4, "user.message", "u2", { text: "two", runId: "r2" }),
    event(5, "run.queued", "r2", { runId: "r2", messageId: "u2", position: 1 }),
    event(6, "user.message", "u3", { text: "three", runId: "r3" }),
    event(7, "run.cancelled", "r3", { runId: "r3", messageId: "u3", withdrawn: true }),
    event(8, "llm.final", "m2", { text: "second half", runId: "r1" }),
    event(9, "run.finished", "r1", { runId: "r1" }),
    event(10, "run.started", "r2", { runId: "r2", messageId: "u2", waited: true }),
    event(11, "llm.final", "m3", { text: "answer", runId: "r2" }),
  );
  assert.deepEqual(ids(store), ["u1", "r1", "m1", "u3", "r3", "m2", "r2", "u2", "m3"]);
  assert.equal(store.get("u3").props.withdrawn, true);
  const hydrated = new EntityStore();
  hydrated.mergeState(entity("m1", 3));
  hydrated.mergeState(entity("u2", 4));
  hydrated.mergeState(entity("m2", 8));
  assert.deepEqual(ids(hydrated), ["m1", "u2", "m2"]);
  hydrated.mergeState(entity("u2", 10));
  assert.deepEqual(ids(hydrated), ["m1", "m2", "u2"]);
});
