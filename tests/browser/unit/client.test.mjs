import assert from "node:assert/strict";
import { test } from "node:test";
import { Api } from "../../../src/transports/ui/api.js";
import { ConversationClient } from "../../../src/transports/ui/client.js";
import { closeVerdict } from "../../../src/transports/ui/reconnect.js";
import { entity, fetchOf, ManualClock, settle, socketClass } from "./fakes.mjs";

const SNAPSHOT = { convId: "c1", version: "100", epoch: "e1", more: false, entities: [entity("u1", 100, { role: "user", text: "hi" })] };

const CHANNELS = ["control", "sem", "timeline"];

function setUp({ answer = () => ({ body: SNAPSHOT }), token = null } = {}) {
  const clock = new ManualClock();
  const { FakeSocket, sockets } = socketClass();
  const { fetch, requests } = fetchOf(answer);
  const seen = { statuses: [], events: [], states: [], resets: 0, problems: [], profiles: [] };
  const client = new ConversationClient({
    api: new Api("http://host/prefix/", { fetch, token }),
    convId: "c1",
    env: { WebSocket: FakeSocket, setTimeout: clock.setTimeout, clearTimeout: clock.clearTimeout, random: () => 0.5 },
    handlers: {
      onStatus: (status) => seen.statuses.push(status),
      onEvent: (event) => seen.events.push(event.seq),
      onState: (one) => seen.states.push(one.id),
      onReset: () => (seen.resets += 1),
      onProblem: (text) => seen.problems.push(text),
      onProfile: (name) => seen.profiles.push(name),
    },
  });
  return { client, clock, sockets, requests, seen };
}

async function live({ channels = CHANNELS, ...options } = {}) {
  const all = setUp(options);
  await all.client.start();
  const [socket] = all.sockets;
  socket.hello({ from: "100", channels });
  socket.control("ws.caught_up", { seq: "100" });
  return { ...all, socket };
}

test("the snapshot's version and epoch are where the socket starts, below the mount prefix", async () => {
  const { sockets, seen, requests } = await live();
  assert.equal(requests[0].url.pathname, "/prefix/api/timeline");
  assert.equal(sockets[0].url.href, "ws://host/prefix/ws?conv_id=c1&profile=default&since=100&epoch=e1");
  assert.deepEqual(seen.states, ["u1"]);
  assert.deepEqual(seen.statuses.map((status) => status.state), ["connecting", "catching_up", "live"]);
});

test("a snapshot of several pages starts the socket at the first page's version", async () => {
  const { sockets, seen } = await live({
    answer: ({ url }) => {
      const second = url.searchParams.get("after_position") === "5";
      const entities = second ? [entity("b", 7)] : [entity("a", 5)];
      return { body: { version: second ? "130" : "120", epoch: "e1", more: !second, entities } };
    },
  });
  assert.equal(sockets[0].url.searchParams.get("since"), "120");
  assert.deepEqual(seen.states, ["a", "b"]);
});

test("a conversation that does not exist yet starts empty, from the beginning", async () => {
  const { sockets } = await live({ answer: () => ({ status: 404, body: {} }) });
  assert.equal(sockets[0].url.searchParams.get("since"), "0");
  assert.equal(sockets[0].url.searchParams.has("epoch"), false);
});

test("duplicates are dropped, a gap reconnects at once from the last event taken", async () => {
  const { socket, sockets, seen, clock } = await live();
  socket.event(110, 100);
  socket.event(110, 100);
  socket.event(130, 120);
  assert.deepEqual(seen.events, ["110"]);
  assert.equal(socket.closedWith, 1000);
  await clock.advance(0);
  assert.equal(sockets[1].url.searchParams.get("since"), "110");
  sockets[1].hello({ from: "110" });
  sockets[1].event(120, 110);
  sockets[1].event(130, 120);
  assert.deepEqual(seen.events, ["110", "120", "130"]);
});

test("frames of a socket that was given up are not listened to", async () => {
  const { socket, seen } = await live();
  socket.event(130, 120);
  socket.event(110, 100);
  assert.deepEqual(seen.events, []);
});

test("a gap that the server cannot fill ends in a new start from its state", async () => {
  const { sockets, clock, requests, seen } = await live();
  sockets[0].event(130, 120);
  for (const index of [1, 2]) {
    await clock.advance(5_000);
    sockets[index].hello({ from: "100" });
    sockets[index].event(130, 120);
  }
  await clock.advance(5_000);
  assert.equal(requests.length, 2);
  assert.equal(seen.resets, 2);
});

test("ws.through moves the resume position though nothing was shown", async () => {
  const { socket, sockets, clock } = await live();
  socket.control("ws.through", { seq: "150" });
  socket.event(170, 150);
  socket.drop();
  await clock.advance(1_000);
  assert.equal(sockets[1].url.searchParams.get("since"), "170");
});

test("the store is away: a status, with the connection kept and the position where it is, until it is back", async () => {
  const { socket, seen, client, sockets } = await live();
  socket.control("ws.notice", { level: "warning", code: "store-away", message: "wait" });
  const away = seen.statuses.at(-1);
  assert.deepEqual([away.state, away.storeAway, away.message], ["live", true, "wait"]);
  socket.control("ws.notice", { level: "info", code: "of another version", message: "news" });
  assert.equal(seen.statuses.at(-1), away, "what is not understood changes nothing");
  socket.control("ws.notice", { level: "info", code: "store-back", message: "back" });
  const back = seen.statuses.at(-1);
  assert.deepEqual([back.state, back.storeAway, back.message], ["live", false, ""]);
  assert.equal(client.last, 100n);
  assert.equal(sockets.length, 1);
});

test("a new connection knows nothing of an outage that the last one was told of", async () => {
  const { socket, seen, sockets, clock } = await live();
  socket.control("ws.notice", { level: "warning", code: "store-away", message: "wait" });
  socket.drop();
  await clock.advance(1_000);
  sockets[1].hello({ from: "100" });
  assert.equal(seen.statuses.at(-1).storeAway, false);
});

test("ws.reset voids everything and goes on from the server's position, even a lower one", async () => {
  const { socket, seen, client } = await live();
  socket.control("ws.reset", { reason: "epoch", epoch: "e2", oldestSeq: "40", from: "50" });
  assert.equal(seen.resets, 2);
  socket.state(entity("u9", 50, {}));
  socket.control("ws.caught_up", { seq: "50" });
  socket.event(60, 50);
  assert.deepEqual(seen.events, ["60"]);
  assert.equal(client.epoch, "e2");
  assert.equal(client.last, 60n);
});

test("a reset that names no position accepts what comes until it is caught up", async () => {
  const { socket, seen, sockets } = await live();
  socket.control("ws.reset", { reason: "expired", epoch: "e2" });
  socket.event(60, 55);
  socket.control("ws.caught_up", { seq: "60" });
  socket.event(90, 80);
  assert.deepEqual(seen.events, ["60"]);
  assert.equal(sockets.length, 1);
  assert.equal(socket.closedWith, 1000, "linked again: this was a gap");
});

test("a changed profile is replayed from the connection's start, on top of its own state", async () => {
  const { socket, sockets, seen, client, clock } = await live({
    answer: (_, number) => ({ body: number === 1 ? SNAPSHOT : { ...SNAPSHOT, version: "120" } }),
  });
  socket.drop();
  socket.event(105, 100);
  await clock.advance(1_000);
  sockets[1].hello({ from: "100" });
  sockets[1].event(110, 100);
  sockets[1].control("ws.caught_up", { seq: "110" });
  client.setProfile("debug");
  assert.deepEqual(sockets[1].sent.at(-1), { type: "ws.profile", profile: "debug", since: "100" });
  assert.equal(client.profile, "default", "not before the server agrees");
  sockets[1].event(115, 110);
  sockets[1].control("ws.profile", { profile: "debug", from: "100", channels: CHANNELS });
  assert.deepEqual(seen.profiles, ["debug"]);
  sockets[1].event(105, 100, "debug.note");
  sockets[1].control("ws.caught_up", { seq: "115" });
  sockets[1].event(125, 115);
  await settle();
  assert.deepEqual(seen.events, ["110", "115", "105", "125"]);
  assert.equal(seen.resets, 2);
  assert.equal(client.state, "live");
});

test("a state that is older than what the old profile had shown is not taken: it would lack the difference", async () => {
  const { socket, seen, client, clock, requests } = await live();
  socket.event(110, 100);
  client.setProfile("debug");
  socket.control("ws.profile", { profile: "debug", from: "100", channels: CHANNELS });
  await settle();
  assert.equal(seen.resets, 1);
  await clock.advance(1_000);
  assert.equal(requests.length, 3);
  assert.equal(seen.resets, 2, "a new start takes it, and every event after it");
});

test("frames of a changed profile wait for its state, and come after it", async () => {
  const asked = [];
  const answer = ({ url }, number) => {
    if (number === 1) return { body: SNAPSHOT };
    return new Promise((resolve) => asked.push(() => resolve({ body: { ...SNAPSHOT, version: "130", entities: [entity(url.searchParams.get("profile"), 130)] } })));
  };
  const { socket, seen, client, sockets, clock } = await live({ answer });
  socket.event(110, 100);
  client.setProfile("debug");
  socket.control("ws.profile", { profile: "debug", from: "100", channels: CHANNELS });
  socket.event(105, 100, "debug.note");
  client.setProfile("text");
  socket.control("ws.caught_up", { seq: "120" });
  socket.control("ws.profile", { profile: "text", from: "100", channels: CHANNELS });
  socket.event(140, 100);
  socket.control("ws.caught_up", { seq: "140" });
  await settle();
  assert.deepEqual([seen.events, seen.resets, client.profile], [["110"], 1, "debug"]);
  asked[0]();
  await settle();
  assert.deepEqual([seen.events, seen.resets, client.profile], [["110", "105"], 2, "text"]);
  assert.deepEqual(seen.states, ["u1", "debug"]);
  asked[1]();
  await settle();
  assert.deepEqual([seen.events, seen.resets, client.state], [["110", "105", "140"], 3, "live"]);
  assert.deepEqual(seen.states, ["u1", "debug", "text"]);
  assert.equal(client.last, 140n);
  await clock.advance(1_000);
  assert.equal(sockets.length, 1);
});

test("a changed profile whose state cannot be read starts over", async () => {
  let broken = false;
  const { socket, sockets, clock, client, seen } = await live({
    answer: () => (broken ? { status: 500, body: { detail: "no luck" } } : { body: SNAPSHOT }),
  });
  broken = true;
  client.setProfile("debug");
  socket.control("ws.profile", { profile: "debug", from: "100", channels: CHANNELS });
  socket.control("ws.caught_up", { seq: "100" });
  await settle();
  assert.equal(seen.statuses.at(-1).message, "no luck");
  broken = false;
  await clock.advance(1_000);
  assert.equal(sockets[1].url.searchParams.get("profile"), "debug");
  assert.equal(seen.resets, 2, "the new view's own state");
});

test("a goodbye is heard while frames wait for the state", async () => {
  const { socket, clock, client, seen, sockets } = await live({ answer: (_, number) => (number === 1 ? { body: SNAPSHOT } : new Promise(() => {})) });
  client.setProfile("debug");
  socket.control("ws.profile", { profile: "debug", from: "100", channels: CHANNELS });
  socket.control("ws.bye", { reason: "drain", retryAfterMs: 3210, reconnect: true });
  socket.drop(1012);
  assert.equal(seen.statuses.at(-1).retryInMs, 3210);
  await clock.advance(4_000);
  assert.equal(sockets.length, 1, "the state of the new view is asked for first");
});

test("a gap among the frames that waited for the state ends the connection: nothing behind it counts", async () => {
  const { socket, sockets, clock, client, seen } = await live();
  client.setProfile("debug");
  socket.control("ws.profile", { profile: "debug", from: "100", channels: CHANNELS });
  socket.event(130, 120);
  socket.control("ws.caught_up", { seq: "130" });
  await settle();
  assert.notEqual(client.state, "live");
  await clock.advance(0);
  assert.equal(sockets[1].url.searchParams.get("since"), "100");
  assert.deepEqual(seen.events, []);
});

test("a client that is stopped leaves the profile to whoever stopped it", async () => {
  const { client, seen } = await live();
  client.setProfile("debug");
  client.stop();
  assert.deepEqual(seen.profiles, []);
});

for (const [what, send, from] of [
  ["ws.dropped", (socket) => socket.control("ws.dropped", { count: 7, seq: "150" }), "150"],
  ["ws.reset", (socket) => socket.control("ws.reset", { reason: "expired", epoch: "e1", from: "150" }), "150"],
]) {
  test(`${what} in a view without entities: they are read over HTTP, and the position is raised`, async () => {
    const answer = (_, number) => ({ body: number === 1 ? SNAPSHOT : { ...SNAPSHOT, version: "160", entities: [entity("whole", 160)] } });
    const { socket, seen, client, clock, sockets } = await live({ answer, channels: ["sem"] });
    socket.event(110, 100);
    send(socket);
    socket.event(155, Number(from));
    socket.event(170, 155);
    assert.deepEqual(seen.events, ["110"]);
    await settle();
    assert.deepEqual(seen.events, ["110", "155", "170"], "the store knows which of them are in the state already");
    assert.deepEqual(seen.states, ["u1", "whole"]);
    assert.equal(client.last, 170n);
    await clock.advance(1_000);
    assert.equal(sockets.length, 1);
  });
}

test("ws.dropped raises the position; the entities come over the socket", async () => {
  const { socket, sockets, seen, clock, requests } = await live();
  socket.event(110, 100);
  socket.control("ws.dropped", { count: 3, seq: "150" });
  socket.event(160, 140); // links below what was skipped
  assert.deepEqual(seen.events, ["110", "160"]);
  socket.control("ws.dropped", { count: 3, seq: "190" });
  socket.control("ws.dropped", { count: 1, seq: "170" });
  socket.drop();
  await clock.advance(1_000);
  assert.equal(sockets[1].url.searchParams.get("since"), "190", "raised, never lowered");
  assert.equal(requests.length, 1);
});

test("a refused profile stays what it was, and says why", async () => {
  const { socket, seen, client } = await live();
  client.setProfile("secret");
  socket.control("ws.error", { code: "not-permitted", message: "profile 'secret' needs a permission" });
  assert.equal(client.profile, "default");
  assert.deepEqual(seen.problems, ["profile 'secret' needs a permission"]);
});

test("a profile that was asked for when the connection broke is asked for again, from its own state", async () => {
  const { socket, sockets, clock, client, requests } = await live();
  client.setProfile("debug");
  client.setProfile("text");
  socket.control("ws.profile", { profile: "debug", from: "100" });
  socket.drop();
  await clock.advance(1_000);
  assert.equal(requests.at(-1).url.searchParams.get("profile"), "text");
  assert.equal(sockets[1].url.searchParams.get("profile"), "text");
  assert.equal(client.profile, "text");
});

test("a profile chosen while the page waits to come back is the next connection's, with its own state", async () => {
  const { socket, sockets, clock, client, requests, seen } = await live();
  socket.event(110, 100);
  socket.drop();
  client.setProfile("debug");
  assert.deepEqual(seen.profiles, ["debug"]);
  await clock.advance(1_000);
  assert.equal(requests.length, 2, "what it shows of the past is asked for anew");
  assert.equal(requests[1].url.searchParams.get("profile"), "debug");
  assert.equal(sockets[1].url.searchParams.get("profile"), "debug");
  assert.equal(seen.resets, 2);
});

test("a profile chosen before ws.hello takes the place of the one that was being connected", async () => {
  const { client, sockets, requests } = setUp();
  await client.start();
  sockets[0].readyState = 1; // open, not greeted
  client.setProfile("text");
  await settle();
  assert.equal(sockets[0].closedWith, 1000);
  assert.equal(requests[1].url.searchParams.get("profile"), "text");
  assert.equal(sockets[1].url.searchParams.get("profile"), "text");
  sockets[0].onmessage({ data: '{"event": {"type": "ws.hello", "data": {}}}' });
  assert.equal(client.state, "connecting", "the old one is not listened to");
});

test("a profile chosen while the snapshot is read: that of the old one is not used", async () => {
  const waiting = [];
  const answer = ({ url }, number) => new Promise((resolve) => {
    waiting.push(() => resolve({ body: { ...SNAPSHOT, entities: [entity(`${url.searchParams.get("profile")}-${number}`, 100)] } }));
  });
  const { client, sockets, seen } = setUp({ answer });
  client.start();
  await settle();
  client.setProfile("text");
  await settle();
  for (const go of waiting) go();
  await settle();
  assert.deepEqual(seen.states, ["text-2"]);
  assert.deepEqual(sockets.map((socket) => socket.url.searchParams.get("profile")), ["text"]);
});

test("a profile chosen while disconnected and refused: the one before stays, and the page says why", async () => {
  const problem = { status: 403, body: { detail: "profile 'secret' needs a permission" } };
  const { socket, sockets, clock, client, seen } = await live({
    answer: ({ url }) => (url.searchParams.get("profile") === "secret" ? problem : { body: SNAPSHOT }),
  });
  socket.drop();
  client.setProfile("secret");
  await clock.advance(1_000);
  assert.equal(client.profile, "default");
  assert.deepEqual(seen.profiles, ["secret", "default"]);
  assert.deepEqual(seen.problems, ["profile 'secret' needs a permission"]);
  assert.equal(sockets.at(-1).url.searchParams.get("profile"), "default");
});

test("a page that stopped because of its profile starts again with another", async () => {
  const problem = { status: 400, body: { detail: "there is no profile 'nonsense'" } };
  const { client, sockets, seen } = setUp({
    answer: ({ url }) => (url.searchParams.get("profile") === "nonsense" ? problem : { body: SNAPSHOT }),
  });
  client.setProfile("nonsense");
  await client.start();
  assert.equal(seen.statuses.at(-1).state, "stopped");
  client.setProfile("default");
  await client.start();
  assert.equal(sockets[0].url.searchParams.get("profile"), "default");
});

// -- a connection that ends before it has caught up --

const hydrates = (socket) => socket.url.searchParams.get("hydrate") === "1";

test("a cut before ws.caught_up asks for the whole state again, until it has been there", async () => {
  const { client, sockets, clock } = setUp();
  await client.start();
  assert.equal(hydrates(sockets[0]), false, "the snapshot is the state");
  sockets[0].hello({ from: "100" });
  sockets[0].event(110, 100);
  sockets[0].drop();
  await clock.advance(1_000);
  assert.deepEqual([hydrates(sockets[1]), sockets[1].url.searchParams.get("since")], [true, "110"]);
  sockets[1].drop(); // not greeted at all
  await clock.advance(1_000);
  assert.equal(hydrates(sockets[2]), true);
  sockets[2].hello({ from: "110" });
  sockets[2].control("ws.caught_up", { seq: "120" });
  sockets[2].drop();
  await clock.advance(1_000);
  assert.deepEqual([hydrates(sockets[3]), sockets[3].url.searchParams.get("since")], [false, "120"]);
});

for (const [what, send] of [
  ["ws.reset", (socket) => socket.control("ws.reset", { reason: "expired", epoch: "e1", from: "150" })],
  ["a reset that names no position", (socket) => socket.control("ws.reset", { reason: "expired", epoch: "e1" })],
  ["ws.profile", async (socket) => {
    socket.control("ws.profile", { profile: "debug", from: "50", channels: CHANNELS });
    await settle(); // its snapshot is there, the entities that changed since are not
  }],
]) {
  test(`a cut between ${what} and ws.caught_up asks for the whole state`, async () => {
    const { socket, sockets, clock } = await live();
    await send(socket);
    socket.state(entity("a", 50));
    socket.drop();
    await clock.advance(1_000);
    assert.equal(hydrates(sockets[1]), true);
  });
}

test("a gap while catching up asks for the whole state, too", async () => {
  const { client, sockets, clock } = setUp();
  await client.start();
  sockets[0].hello({ from: "100" });
  sockets[0].event(130, 120);
  await clock.advance(0);
  assert.equal(hydrates(sockets[1]), true);
});

test("the epoch of a greeting is not taken before the reset that goes with it: a cut in between would hide it", async () => {
  const { socket, sockets, clock, client } = await live();
  socket.drop();
  await clock.advance(1_000);
  sockets[1].hello({ epoch: "e2", from: "5" });
  sockets[1].drop();
  await clock.advance(1_000);
  assert.equal(sockets[2].url.searchParams.get("epoch"), "e1");
  sockets[2].hello({ epoch: "e2", from: "5" });
  sockets[2].control("ws.reset", { reason: "epoch", epoch: "e2", from: "5" });
  assert.equal(client.epoch, "e2");
});

test("back-off doubles to a limit, keeps at least half, and starts over when live again", async () => {
  const { sockets, clock, seen } = await live();
  const waits = [];
  sockets[0].drop();
  for (let index = 1; index <= 9; index += 1) {
    waits.push(seen.statuses.at(-1).retryInMs);
    await clock.advance(waits.at(-1));
    sockets[index].drop();
  }
  assert.deepEqual(waits, [300, 600, 1200, 2400, 4800, 9600, 19200, 22500, 22500]);
  await clock.advance(30_000);
  sockets.at(-1).hello({});
  sockets.at(-1).control("ws.caught_up", { seq: "100" });
  sockets.at(-1).drop();
  assert.equal(seen.statuses.at(-1).retryInMs, 300);
});

test("ws.bye: its delay is kept exactly, and reconnect=false is final", async () => {
  const first = await live();
  first.socket.control("ws.bye", { reason: "drain", retryAfterMs: 3210, reconnect: true });
  first.socket.drop(1012);
  assert.equal(first.seen.statuses.at(-1).retryInMs, 3210);

  const second = await live();
  second.socket.control("ws.bye", { reason: "the conversation was erased", retryAfterMs: 0, reconnect: false });
  second.socket.drop(1000);
  await second.clock.advance(100_000);
  assert.equal(second.sockets.length, 1);
  assert.equal(second.seen.statuses.at(-1).state, "stopped");
  assert.match(second.seen.statuses.at(-1).message, /erased/);
});

test("done, and yet asked back by ws.bye: it comes back", async () => {
  const { socket, sockets, clock } = await live();
  socket.control("ws.bye", { reason: "moved", retryAfterMs: 700, reconnect: true });
  socket.drop(1000);
  await clock.advance(700);
  assert.equal(sockets.length, 2);
});

for (const [code, comesBack] of [[1000, false], [1001, true], [1002, false], [1007, false], [1006, true], [1008, false], [1009, true], [1012, true], [4401, false], [4403, false], [4404, false], [4408, true], [4429, true], [4500, true]]) {
  test(`close code ${code} ${comesBack ? "is tried again" : "stops, with a message"}`, async () => {
    const { socket, sockets, clock, seen } = await live();
    socket.drop(code);
    if (code === 4429) assert.ok(seen.statuses.at(-1).retryInMs > 5_000);
    await clock.advance(60_000);
    assert.equal(sockets.length > 1, comesBack);
    if (!comesBack) assert.notEqual(seen.statuses.at(-1).message, "");
  });
}

test("a silent socket is pinged, and given up when no frame comes", async () => {
  const { socket, sockets, clock } = await live();
  await clock.advance(25_000);
  assert.deepEqual(socket.sent, [{ type: "ws.ping", data: {} }]);
  socket.control("ws.pong", {});
  await clock.advance(25_000);
  assert.equal(socket.sent.length, 2);
  await clock.advance(11_000);
  assert.equal(socket.closedWith, 1000);
  assert.equal(sockets.length, 2);
});

test("a server that accepts but never greets is given up", async () => {
  const { client, sockets, clock } = setUp();
  await client.start();
  await clock.advance(16_000);
  assert.equal(sockets.length, 2);
});

test("when the network is said to be back, waiting ends at once", async () => {
  const { client, socket, sockets, clock } = await live();
  socket.drop();
  client.wake();
  await clock.advance(0);
  assert.equal(sockets.length, 2);
});

test("handshakes that keep failing are explained by the HTTP answer", async () => {
  let refuse = false;
  const answer = () => (refuse ? { status: 403, body: { type: "urn:x:not-permitted", detail: "profile 'debug' needs the permission 'debug'" } } : { body: SNAPSHOT });
  const { client, sockets, clock, seen } = setUp({ answer });
  await client.start();
  refuse = true;
  sockets[0].drop();
  await clock.advance(5_000);
  sockets[1].drop();
  await clock.advance(5_000);
  assert.equal(sockets.length, 2);
  assert.equal(seen.statuses.at(-1).state, "stopped");
  assert.match(seen.statuses.at(-1).message, /needs the permission/);
});

test("without a token no sub-protocol is offered; with one it is sent both ways", async () => {
  const open = await live();
  assert.deepEqual(open.sockets[0].protocols, []);
  const closed = await live({ token: "abc" });
  assert.deepEqual(closed.sockets[0].protocols, ["conversation.v1", "bearer.abc"]);
  assert.equal(closed.requests[0].headers.authorization, "Bearer abc");
});

test("a frame that cannot be read is reported and disturbs nothing", async () => {
  const { socket, seen } = await live();
  for (const data of ["not json", "null", "[]", '{"event":{"type":"llm.delta","seq":1,"prev":"0"}}']) socket.onmessage({ data });
  assert.equal(seen.problems.length, 4);
  socket.event(110, 100);
  assert.deepEqual(seen.events, ["110"]);
});

test("after stop nothing comes back, whatever was under way", async () => {
  const { client, sockets, clock } = setUp();
  const starting = client.start();
  client.stop();
  await starting;
  await settle();
  await clock.advance(100_000);
  assert.equal(sockets.length, 0);
  assert.equal(clock.nextInMs, null);
});

test("a server that sends no codes below 3000 is understood", () => {
  assert.deepEqual(closeVerdict(4008, "why"), closeVerdict(1008, "why"));
  assert.deepEqual(closeVerdict(4013), closeVerdict(1013));
  assert.equal(closeVerdict(4008).stop, true);
  assert.equal(closeVerdict(4012).stop, false);
});
