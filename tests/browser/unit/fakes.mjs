// Stand-ins for what surrounds the client: a clock that only moves when told to, a server's end of a socket, an HTTP server.

/** Timers by hand: `advance` runs what is due, in order. */
export class ManualClock {
  now = 0;
  #timers = new Map();
  #next = 1;

  setTimeout = (call, ms) => {
    const id = this.#next++;
    this.#timers.set(id, { at: this.now + ms, call });
    return id;
  };

  clearTimeout = (id) => this.#timers.delete(id);

  /** How long until the next timer, null if there is none. */
  get nextInMs() {
    const times = [...this.#timers.values()].map((timer) => timer.at - this.now);
    return times.length === 0 ? null : Math.min(...times);
  }

  async advance(ms) {
    const end = this.now + ms;
    for (;;) {
      const due = [...this.#timers].filter(([, timer]) => timer.at <= end).sort((a, b) => a[1].at - b[1].at)[0];
      if (due === undefined) break;
      this.#timers.delete(due[0]);
      this.now = Math.max(this.now, due[1].at);
      due[1].call();
      await settle();
    }
    this.now = end;
    await settle();
  }
}

/** Let everything that waits on resolved promises run. */
export async function settle() {
  for (let turn = 0; turn < 20; turn += 1) await new Promise((resolve) => setImmediate(resolve));
}

/** A WebSocket whose other end is the test. `sockets` lists all that were opened. */
export function socketClass() {
  const sockets = [];
  class FakeSocket {
    constructor(url, protocols) {
      this.url = new URL(url);
      this.protocols = protocols;
      this.readyState = 0;
      this.sent = [];
      sockets.push(this);
    }

    send(text) {
      this.sent.push(JSON.parse(text));
    }

    close(code) {
      this.closedWith = code;
      this.readyState = 3;
    }

    // -- the server's side --

    control(type, data) {
      this.readyState = 1;
      this.onmessage({ data: JSON.stringify({ sem: true, event: { type, id: "cx", channel: "control", data } }) });
    }

    hello(data = {}) {
      const channels = ["control", "sem", "timeline"];
      this.control("ws.hello", { epoch: "e1", seq: "0", recovered: true, channels, ...data });
    }

    event(seq, prev, type = "llm.delta", data = {}, id = "m1") {
      const event = { type, id, seq: String(seq), prev: String(prev), channel: "sem", data };
      this.onmessage({ data: JSON.stringify({ sem: true, event }) });
    }

    state(entity) {
      const event = { type: "timeline.upsert", id: entity.id, seq: entity.version, channel: "timeline", data: { entity } };
      this.onmessage({ data: JSON.stringify({ sem: true, event }) });
    }

    drop(code = 1006, reason = "") {
      this.readyState = 3;
      this.onclose({ code, reason });
    }
  }
  return { FakeSocket, sockets };
}

/** A `fetch` that answers with what `answer(request)` returns: {status, body, headers}, or throws like a dead network. */
export function fetchOf(answer) {
  const requests = [];
  const fetch = async (url, { method, headers, body }) => {
    const request = { url: new URL(url), method, headers, body: body === undefined ? undefined : JSON.parse(body) };
    requests.push(request);
    const { status = 200, body: json = {}, headers: more = {} } = await answer(request, requests.length);
    return new Response(JSON.stringify(json), { status, headers: { "content-type": "application/json", ...more } });
  };
  return { fetch, requests };
}

export function entity(id, version, props = {}, more = {}) {
  return { id, kind: "message", createdAtMs: 1, updatedAtMs: 2, version: String(version), position: String(version), props, ...more };
}
