// Follows one conversation: snapshot over HTTP, then the WebSocket, for as long as it takes. No DOM in here.

import { ApiProblem } from "./api.js";
import { Cursor, parseSeq } from "./cursor.js";
import { backOffMs, closeVerdict } from "./reconnect.js";
import { readSnapshot } from "./snapshot.js";

const PING_EVERY_MS = 25_000;
const PONG_WITHIN_MS = 10_000;
const PROBE_WITHIN_MS = 4_000;
const HELLO_WITHIN_MS = 15_000;
// So many times the same gap in a row, and the server evidently cannot fill it: start again from its state.
const GAPS_BEFORE_RESYNC = 3;
// A refused handshake looks like a broken network to a browser. After so many, ask over HTTP, which tells the reason.
const FAILED_HANDSHAKES_BEFORE_ASKING = 2;
const CONNECTING = 0;
const OPEN = 1;

/**
 * What a caller may listen to; all optional.
 *
 * onStatus({state, message, retryInMs, signIn, storeAway}): state is connecting, catching_up, live, waiting or stopped;
 * storeAway: the server says that it can neither store nor show anything new at present.
 * onReset(): everything known is void, the state follows. onState(entity, event): the newest version of an entity.
 * onEvent(event): the next event, exactly once, in order. onControl(event): a `ws.…` frame, after it was acted upon.
 * onProfile(name): the view is now this one. onProblem(text): something was refused, the connection goes on.
 */
const NO_HANDLERS = {
  onStatus() {}, onReset() {}, onState() {}, onEvent() {}, onControl() {}, onProfile() {}, onProblem() {},
};

export class ConversationClient {
  #api;
  #on;
  #env;
  #cursor = new Cursor();
  #socket = null;
  #greeted = false;
  #running = false;
  #resync = true;
  #attempt = 0;
  #failedHandshakes = 0;
  #gaps = { at: null, count: 0 };
  #bye = null;
  #storeAway = "";
  #askedProfile = null;
  #timers = new Map();

  /**
   * api: an `Api`. profile: the view to start with. handlers: see above. env: WebSocket, setTimeout, clearTimeout and
   * random; the platform's own unless replaced.
   */
  constructor({ api, convId, profile = "default", handlers = {}, env = {} }) {
    this.#api = api;
    this.#on = { ...NO_HANDLERS, ...handlers };
    this.#env = {
      WebSocket: globalThis.WebSocket,
      setTimeout: (call, ms) => globalThis.setTimeout(call, ms),
      clearTimeout: (id) => globalThis.clearTimeout(id),
      random: Math.random,
      ...env,
    };
    this.convId = convId;
    this.profile = profile;
    this.state = "stopped";
    this.epoch = null;
    /** What the hydrated state stands for: a changed view is replayed from here. */
    this.origin = 0n;
  }

  /** The seq of the last event taken, BigInt. */
  get last() {
    return this.#cursor.last;
  }

  /** Hydrate, connect, and stay connected until `stop`. Resolves when the first try is under way. */
  async start() {
    if (this.#running) return;
    this.#running = true;
    await this.#again();
  }

  /** Close and stay closed. */
  stop(message = "", { signIn = false } = {}) {
    this.#running = false;
    this.#hangUp();
    this.#status("stopped", { message, signIn });
  }

  /** Change the view: in place where connected, otherwise from the next connection on. */
  setProfile(profile) {
    if (this.#greeted && this.#socket?.readyState === OPEN) {
      this.#askedProfile = profile;
      this.#socket.send(JSON.stringify({ type: "ws.profile", profile, since: String(this.origin) }));
    } else {
      this.profile = profile;
      this.#on.onProfile(profile);
    }
  }

  /** The network came back, or the page is looked at again: do not wait, and do not trust a silent socket. */
  wake() {
    if (this.#running && this.state === "waiting") {
      this.#attempt = 0;
      this.#after("retry", 0, () => this.#again());
    } else this.probe();
  }

  /** Find out soon whether the connection is alive, for example when the browser reports to be offline. */
  probe() {
    if (this.#greeted) this.#ping(PROBE_WITHIN_MS);
  }

  // -- coming and going ---------------------------------------------------------------------------------------------

  async #again() {
    this.#hangUp();
    this.#status("connecting");
    const asking = this.#failedHandshakes >= FAILED_HANDSHAKES_BEFORE_ASKING;
    try {
      if (this.#resync) await this.#hydrate();
      else if (asking) await this.#api.get("api/timeline", { conv_id: this.convId, profile: this.profile, limit: 1 });
    } catch (error) {
      const final = error instanceof ApiProblem && [400, 401, 403, 422].includes(error.status);
      if (!this.#running) return;
      if (final) this.stop(error.message, { signIn: error.status === 401 });
      else if (asking && error.status === 404) this.#connect();
      else this.#retry(error.message, error.retryAfterMs ?? 0);
      return;
    }
    if (this.#running && this.#socket === null) this.#connect();
  }

  async #hydrate() {
    const { version, epoch, entities } = await readSnapshot(this.#api, this.convId, this.profile);
    if (!this.#running) return;
    this.#on.onReset();
    for (const entity of entities) this.#on.onState(entity, null);
    this.epoch = epoch;
    this.origin = version;
    this.#cursor.moveTo(version);
    this.#resync = false;
  }

  #connect() {
    const socket = new this.#env.WebSocket(this.#socketUrl(), this.#subProtocols());
    this.#socket = socket;
    socket.onmessage = (message) => this.#socket === socket && this.#receive(message.data);
    socket.onclose = (close) => this.#socket === socket && this.#closed(close.code, close.reason);
    socket.onerror = () => {}; // `close` follows and says as much as a browser may know
    this.#after("hello", HELLO_WITHIN_MS, () => this.#closed(4408, "no greeting"));
  }

  #socketUrl() {
    const url = new URL("ws", this.#api.base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.searchParams.set("conv_id", this.convId);
    url.searchParams.set("profile", this.profile);
    url.searchParams.set("since", String(this.#cursor.last));
    if (this.epoch !== null) url.searchParams.set("epoch", this.epoch);
    return url.href;
  }

  // Without a token no sub-protocol is offered: a browser fails the connection when the server selects none of those.
  #subProtocols() {
    return this.#api.token ? ["conversation.v1", `bearer.${this.#api.token}`] : [];
  }

  #closed(code, reason) {
    const bye = this.#bye;
    if (!this.#greeted) this.#failedHandshakes += 1;
    this.#hangUp();
    if (!this.#running) return;
    const verdict = closeVerdict(code, reason);
    if (verdict.stop || bye?.reconnect === false) {
      this.stop(verdict.text || bye?.reason || "The server ended the connection.", { signIn: verdict.signIn });
    } else this.#retry(bye?.reason ?? verdict.text, bye?.retryAfterMs ?? verdict.leastMs, bye !== null);
  }

  // exactly: the server chose this client's own delay, so that they do not come back all at once.
  #retry(message, leastMs, exactly = false) {
    const own = backOffMs(this.#attempt, this.#env.random);
    const delay = exactly && leastMs > 0 ? leastMs : leastMs + own;
    this.#attempt += 1;
    this.#status("waiting", { message, retryInMs: delay });
    this.#after("retry", delay, () => this.#again());
  }

  #hangUp() {
    const socket = this.#socket;
    this.#socket = null;
    this.#greeted = false;
    this.#bye = null;
    this.#storeAway = "";
    for (const name of [...this.#timers.keys()]) this.#cancel(name);
    if (this.#askedProfile !== null) {
      this.profile = this.#askedProfile; // the answer is lost; the next connection asks again
      this.#askedProfile = null;
      this.#on.onProfile(this.profile);
    }
    // Browsers complain in the console about closing a socket that is still connecting.
    if (socket?.readyState === CONNECTING) socket.onopen = () => socket.close(1000);
    else if (socket?.readyState === OPEN) socket.close(1000);
  }

  // -- frames -------------------------------------------------------------------------------------------------------

  #receive(text) {
    this.#cancel("pong");
    let event;
    try {
      event = JSON.parse(text).event;
      if (typeof event?.type !== "string") throw new TypeError("no event type");
      if (event.seq === undefined) return this.#control(event);
      if (event.prev === undefined) return this.#on.onState(event.data?.entity ?? null, event);
      this.#event(event, parseSeq(event.seq), parseSeq(event.prev));
    } catch (error) {
      this.#on.onProblem(`A frame could not be used: ${error.message}`);
    }
  }

  #event(event, seq, prev) {
    const verdict = this.#cursor.judge(seq, prev);
    if (verdict === "take") this.#on.onEvent(event);
    else if (verdict === "gap") this.#gap();
  }

  #gap() {
    const at = this.#cursor.last;
    this.#gaps = { at, count: this.#gaps.at === at ? this.#gaps.count + 1 : 1 };
    this.#resync = this.#gaps.count >= GAPS_BEFORE_RESYNC;
    this.#hangUp();
    if (this.#gaps.count === 1) this.#after("retry", 0, () => this.#again());
    else this.#retry("Something was missing; fetching it.", 0);
  }

  #control(event) {
    const data = event.data ?? {};
    switch (event.type) {
      case "ws.hello": this.#hello(data); break;
      case "ws.through":
      case "ws.dropped": // the profile's own policy for slow clients: skipped on purpose, and said so
        this.#cursor.through(parseSeq(data.seq));
        break;
      case "ws.caught_up": this.#caughtUp(data); break;
      case "ws.reset": this.#reset(data); break;
      case "ws.profile": this.#profileChanged(data); break;
      case "ws.error": this.#refused(data); break;
      case "ws.bye": this.#bye = data; break;
      case "ws.notice": this.#noticed(data); break;
    }
    this.#on.onControl(event);
  }

  #hello(data) {
    this.#greeted = true;
    this.#failedHandshakes = 0;
    this.#cancel("hello");
    this.epoch = data.epoch ?? this.epoch;
    this.#status("catching_up");
    this.#after("ping", PING_EVERY_MS, () => this.#ping(PONG_WITHIN_MS));
  }

  #caughtUp(data) {
    this.#cursor.caughtUp(parseSeq(data.seq));
    this.#attempt = 0;
    this.#status("live");
  }

  #reset(data) {
    this.epoch = data.epoch ?? this.epoch;
    if (data.from === undefined) this.#cursor.unlink();
    else this.#cursor.moveTo(parseSeq(data.from));
    this.origin = this.#cursor.last;
    this.#on.onReset();
    this.#status("catching_up");
  }

  // What the new view shows of the past since `origin`, and the old one did not, follows: `from` is before `last`.
  #profileChanged(data) {
    this.profile = data.profile ?? this.#askedProfile ?? this.profile;
    this.#askedProfile = null;
    if (data.from !== undefined) this.#cursor.moveTo(parseSeq(data.from));
    if (data.stateAnew) this.#on.onReset(); // entities look different now: what is known of them is void
    this.#on.onProfile(this.profile);
  }

  #refused(data) {
    if (this.#askedProfile !== null) {
      this.#askedProfile = null;
      this.#on.onProfile(this.profile);
    }
    this.#on.onProblem(data.message ?? data.code ?? "The server refused a message of this page.");
  }

  #noticed(data) {
    if (data.code === "store-away") this.#storeAway = data.message ?? data.code;
    else if (data.code === "store-back") this.#storeAway = "";
    else return;
    this.#status(this.state);
  }

  // -- timers -------------------------------------------------------------------------------------------------------

  #ping(withinMs) {
    if (this.#socket?.readyState !== OPEN) return;
    this.#socket.send(JSON.stringify({ type: "ws.ping", data: {} }));
    // Any frame counts as an answer. A socket that stays silent is dead, whatever its readyState says.
    this.#after("pong", withinMs, () => this.#closed(1006, "The server does not answer."));
    this.#after("ping", PING_EVERY_MS, () => this.#ping(PONG_WITHIN_MS));
  }

  #after(name, ms, call) {
    this.#cancel(name);
    const run = () => {
      this.#timers.delete(name);
      call();
    };
    this.#timers.set(name, this.#env.setTimeout(run, ms));
  }

  #cancel(name) {
    if (!this.#timers.has(name)) return;
    this.#env.clearTimeout(this.#timers.get(name));
    this.#timers.delete(name);
  }

  #status(state, more = {}) {
    this.state = state;
    const storeAway = this.#storeAway !== "";
    this.#on.onStatus({ state, message: this.#storeAway, retryInMs: null, signIn: false, storeAway, ...more });
  }
}
