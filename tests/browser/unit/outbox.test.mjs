import assert from "node:assert/strict";
import { test } from "node:test";
import { Api, freshKey } from "../../../src/transports/ui/api.js";
import { Outbox } from "../../../src/transports/ui/outbox.js";
import { fetchOf, ManualClock, settle } from "./fakes.mjs";

function setUp(answer) {
  const clock = new ManualClock();
  const { fetch, requests } = fetchOf(answer);
  const states = [];
  let keys = 0;
  const outbox = new Outbox({
    api: new Api("http://host/", { fetch }),
    convId: "c1",
    on: { onAdded: (key, text) => states.push([key, "added", text]), onState: (key, delivery, more) => states.push([key, delivery, more?.error ?? more?.queuePosition]) },
    env: { setTimeout: clock.setTimeout, random: () => 0.5, key: () => `k${(keys += 1)}` },
  });
  return { outbox, clock, requests, states };
}

test("a message goes to the chat route with its key", async () => {
  const { outbox, requests, states } = setUp(() => ({ body: { status: "started" } }));
  outbox.send("hi", "gpt/x");
  await settle();
  const [request] = requests;
  assert.equal(request.url.pathname, "/chat/gpt%2Fx");
  assert.deepEqual(request.body, { prompt: "hi", conv_id: "c1" });
  assert.equal(request.headers["idempotency-key"], "k1");
  assert.deepEqual(states.at(-1), ["k1", "accepted", undefined]);
});

test("no answer: the same request again under the same key", async () => {
  const { outbox, clock, requests, states } = setUp((request, count) => {
    if (count < 3) throw new TypeError("fetch failed");
    return { status: 202, body: { queue_position: 2 } };
  });
  outbox.send("hi");
  await settle();
  await clock.advance(10_000);
  assert.deepEqual(requests.map((request) => request.headers["idempotency-key"]), ["k1", "k1", "k1"]);
  assert.deepEqual(requests[2].body, requests[0].body);
  assert.deepEqual(states.at(-1), ["k1", "queued", 2]);
});

test("a later message waits for the earlier one", async () => {
  let release;
  const { outbox, requests } = setUp((request, count) => (count === 1 ? new Promise((resolve) => (release = () => resolve({}))) : {}));
  outbox.send("one");
  outbox.send("two");
  await settle();
  assert.equal(requests.length, 1);
  release();
  await settle();
  assert.deepEqual(requests.map((request) => request.body.prompt), ["one", "two"]);
});

test("a refusal is final, says why, and can be taken back", async () => {
  const { outbox, states, requests } = setUp(() => ({ status: 422, body: { type: "urn:x:invalid-fields", detail: "prompt is too long" } }));
  outbox.send("hi");
  await settle();
  assert.deepEqual(states.at(-1), ["k1", "failed", "prompt is too long"]);
  assert.equal(outbox.discard("k1"), "hi");
  outbox.retry("k1");
  await settle();
  assert.equal(requests.length, 1);
});

for (const [status, code] of [[409, "idempotency-pending"], [429, "limit-exceeded"], [503, "unavailable"], [502, "anything"]]) {
  test(`${status} ${code} is worth waiting for, at least as long as it says`, async () => {
    const { outbox, clock, requests, states } = setUp((request, count) =>
      count === 1 ? { status, body: { type: `urn:x:problem:${code}` }, headers: { "retry-after": "7" } } : {});
    outbox.send("hi");
    await settle();
    assert.equal(clock.nextInMs, 7_000);
    await clock.advance(7_000);
    assert.equal(requests.length, 2);
    assert.equal(states.at(-1)[1], "accepted");
  });
}

test("it gives up after some tries and can be tried again", async () => {
  let dead = true;
  const { outbox, clock, requests, states } = setUp(() => {
    if (dead) throw new TypeError("fetch failed");
    return {};
  });
  outbox.send("hi");
  await settle();
  await clock.advance(120_000);
  assert.equal(states.at(-1)[1], "failed");
  dead = false;
  outbox.retry("k1");
  await settle();
  assert.equal(states.at(-1)[1], "accepted");
  assert.equal(new Set(requests.map((request) => request.headers["idempotency-key"])).size, 1);
});

test("while the store is known to be away nothing is given up, and its return is not waited out", async () => {
  let dead = true;
  const away = { status: 503, body: { type: "urn:x:problem:store-unavailable", detail: "database /srv/x is locked" } };
  const { outbox, clock, requests, states } = setUp(() => (dead ? away : {}));
  outbox.storeAway(true);
  outbox.send("hi");
  await settle();
  await clock.advance(600_000);
  assert.ok(requests.length > 10);
  assert.deepEqual(states.at(-1), ["k1", "retrying", "the server cannot reach its store"]);
  dead = false;
  outbox.storeAway(false);
  await settle();
  assert.equal(states.at(-1)[1], "accepted");
});

test("a store that is away and nobody says so is given up like everything else", async () => {
  const { outbox, clock, states } = setUp(() => ({ status: 503, body: { type: "urn:x:problem:store-unavailable" } }));
  outbox.send("hi");
  await settle();
  await clock.advance(120_000);
  assert.equal(states.at(-1)[1], "failed");
});

test("keys are fresh also where the page is no secure context", () => {
  const insecure = { getRandomValues: (bytes) => globalThis.crypto.getRandomValues(bytes) };
  const keys = new Set([freshKey(insecure), freshKey(insecure), freshKey()]);
  assert.equal(keys.size, 3);
  for (const key of keys) assert.match(key, /^[0-9a-f-]{32,36}$/);
});
