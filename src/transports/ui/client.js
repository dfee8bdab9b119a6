// Follows one conversation: snapshot over HTTP, then the WebSocket, for as long as it takes. No DOM in here.

import { ApiProblem } from "./api.js";
import { Cursor, parseSeq } from "./cursor.js";
import { parseJson } from "./json.js";
import { backOffMs, closeVerdict } from "./reconnect.js";
import { readSnapshot } from "./snapshot.js";
import { Timers } from "./timers.js";

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
  #incomplete = false; // greeted and not caught up: some of the state that was on its way may be missing
  #held = null; // frames that wait for the state before them, null: none does
  #showsState = false; // entities come over the socket, too
  #asked = []; // views asked for on this connection and not answered yet
  #granted = null; // the last view that the server agreed to
  #turn = 0; // counts tries: what was begun in an earlier one is of no interest any more
  #timers;

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
    this.#timers = new Timers(this.#env);
    this.convId = convId;
    this.profile = profile;
    this.state = "stopped";
    this.epoch = null;
    /** Where this connection began: a changed view is replayed from here. */
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

  /** Change the view: in place where connected, otherwise with the next connection, which one under way makes room for. */
  setProfile(profile) {
    if (this.#greeted && this.#socket?.readyState === OPEN) {
      this.#asked.push(profile);
      this.#socket.send(JSON.stringify({ type: "ws.profile", profile, since: String(this.origin) }));
      return;
    }
    const other = profile !== this.profile;
    this.#startOverWith(profile);
    if (other && this.#running && this.state === "connecting") this.#again();
  }

  /** What this view shows of the past another one may have hidden: it starts from its own state. */
  #startOverWith(profile) {
    if (profile !== this.profile) this.#resync = true;
    this.profile = profile;
    this.#on.onProfile(profile);
  }

  /** The network came back, or the page is looked at again: do not wait, and do not trust a silent socket. */
  wake() {
    if (this.#running && this.state === "waiting") {
      this.#attempt = 0;
      this.#timers.after("retry", 0, () => this.#again());
    } else this.probe();
  }

  /** Find out soon whether the connection is alive, for example when the browser reports to be offline. */
  probe() {
    if (this.#greeted) this.#ping(PROBE_WITHIN_MS);
  }

  // -- coming and going ---------------------------------------------------------------------------------------------

  async #again() {
    this.#hangUp();
    const turn = this.#turn;
    this.#status("connecting");
    const asking = this.#failedHandshakes >= FAILED_HANDSHAKES_BEFORE_ASKING;
    try {
      if (this.#resync) await this.#hydrate(turn);
      else if (asking) await this.#api.get("api/timeline", { conv_id: this.convId, profile: this.profile, limit: 1 });
    } catch (error) {
      if (turn !== this.#turn) return;
      const final = error instanceof ApiProblem && [400, 401, 403, 422].includes(error.status);
      if (final && error.status !== 401 && this.#granted !== null && this.#granted !== this.profile) {
        this.#on.onProblem(error.message); // as in place: a view that is refused leaves the one before
        this.#startOverWith(this.#granted);
        await this.#again();
      } else if (final) this.stop(error.message, { signIn: error.status === 401 });
      else if (asking && error.status === 404) this.#connect();
      else this.#retry(error.message, error.retryAfterMs ?? 0);
      return;
    }
    if (turn === this.#turn) this.#connect();
  }

  async #hydrate(turn) {
    const { version, epoch, entities } = await readSnapshot(this.#api, this.convId, this.profile);
    if (turn !== this.#turn) return;
    this.#showState(entities);
    this.epoch = epoch;
    this.#cursor.moveTo(version);
    this.#incomplete = false;
  }

  #showState(entities) {
    this.#on.onReset();
    for (const entity of entities) this.#on.onState(entity, null);
    this.#resync = false;
  }

  /** Read the state, as of `atLeast` or later, in the middle of a connection. Frames that come meanwhile are taken after it. */
  async #stateAnew(atLeast) {
    const turn = this.#turn;
    this.#held = [];
    this.#resync = true; // also where the connection ends before it is there
    try {
      const { version, entities } = await readSnapshot(this.#api, this.convId, this.profile);
      if (turn !== this.#turn) return;
      if (version < atLeast) throw new Error("The state is older than what is known already.");
      this.#showState(entities);
    } catch (error) {
      if (turn !== this.#turn) return;
      this.#hangUp();
      this.#retry(error.message, error.retryAfterMs ?? 0);
      return;
    }
    const held = this.#held;
    this.#held = null;
    for (const text of held) if (turn === this.#turn) this.#receive(text);
  }

  #connect() {
    const socket = new this.#env.WebSocket(this.#socketUrl(), this.#subProtocols());
    this.#socket = socket;
    this.origin = this.#cursor.last;
    socket.onmessage = (message) => this.#socket === socket && this.#receive(message.data);
    socket.onclose = (close) => this.#socket === socket && this.#closed(close.code, close.reason);
    socket.onerror = () => {}; // `close` follows and says as much as a browser may know
    this.#timers.after("hello", HELLO_WITHIN_MS, () => this.#closed(4408, "no greeting"));
  }

  #socketUrl() {
    const url = new URL("ws", this.#api.base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.searchParams.set("conv_id", this.convId);
    url.searchParams.set("profile", this.profile);
    url.searchParams.set("since", String(this.#cursor.last));
    if (this.epoch !== null) url.searchParams.set("epoch", this.epoch);
    if (this.#incomplete) url.searchParams.set("hydrate", "1");
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
    const done = code === 1000 && bye?.reconnect === true ? false : verdict.stop;
    if (done || bye?.reconnect === false) {
      this.stop(verdict.text || bye?.reason || "The server ended the connection.", { signIn: verdict.signIn });
    } else this.#retry(bye?.reason ?? verdict.text, bye?.retryAfterMs ?? verdict.leastMs, bye !== null);
  }

  // exactly: the server chose this client's own delay, so that they do not come back all at once.
  #retry(message, leastMs, exactly = false) {
    const own = backOffMs(this.#attempt, this.#env.random);
    const delay = exactly && leastMs > 0 ? leastMs : leastMs + own;
    this.#attempt += 1;
    this.#status("waiting", { message, retryInMs: delay });
    this.#timers.after("retry", delay, () => this.#again());
  }

  #hangUp() {
    const socket = this.#socket;
    this.#turn += 1;
    this.#socket = null;
    this.#greeted = false;
    this.#held = null;
    this.#bye = null;
    this.#storeAway = "";
    this.#timers.cancelAll();
    const asked = this.#asked.at(-1);
    this.#asked = [];
    if (asked !== undefined && this.#running) this.#startOverWith(asked); // the answer is lost; the next connection asks again
    // Browsers complain in the console about closing a socket that is still connecting.
    if (socket?.readyState === CONNECTING) socket.onopen = () => socket.close(1000);
    else if (socket?.readyState === OPEN) socket.close(1000);
  }

  // -- frames -------------------------------------------------------------------------------------------------------

  #receive(text) {
    this.#timers.cancel("pong");
    let event;
    try {
      event = parseJson(text).event;
      if (typeof event?.type !== "string") throw new TypeError("no event type");
      if (this.#held !== null && event.type !== "ws.bye") return void this.#held.push(text);
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
    if (this.#gaps.count === 1) this.#timers.after("retry", 0, () => this.#again());
    else this.#retry("Something was missing; fetching it.", 0);
  }

  #control(event) {
    const data = event.data ?? {};
    switch (event.type) {
      case "ws.hello": this.#hello(data); break;
      case "ws.through": this.#cursor.through(parseSeq(data.seq)); break;
      case "ws.dropped": this.#dropped(data); break;
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
    this.#timers.cancel("hello");
    this.#incomplete = true;
    this.#sees(data);
    this.#granted = this.profile;
    // Another life of the log than the one that was asked for: `ws.reset` says so, and until then it is not ours.
    this.epoch ??= data.epoch ?? null;
    this.#status("catching_up");
    this.#timers.after("ping", PING_EVERY_MS, () => this.#ping(PONG_WITHIN_MS));
  }

  #caughtUp(data) {
    this.#cursor.caughtUp(parseSeq(data.seq));
    this.#incomplete = false;
    this.#attempt = 0;
    this.#status("live");
  }

  #reset(data) {
    this.epoch = data.epoch ?? this.epoch;
    if (data.from === undefined) this.#cursor.unlink();
    else this.#cursor.moveTo(parseSeq(data.from));
    this.origin = this.#cursor.last;
    this.#incomplete = true;
    this.#on.onReset();
    this.#status("catching_up");
    // A view without entities gets the events that there still are: what was before them is in no frame.
    if (!this.#showsState) this.#stateAnew(this.#cursor.last);
  }

  #sees({ channels }) {
    this.#showsState = Array.isArray(channels) && channels.includes("timeline");
  }

  // The profile's own policy for slow clients: events were skipped on purpose. What they would have told has to come from
  // somewhere, or there would be a hole in the middle of an answer: over the socket, if the view has entities.
  #dropped(data) {
    this.#cursor.through(parseSeq(data.seq));
    if (!this.#showsState) this.#stateAnew(this.#cursor.last);
  }

  // What the new view shows of the past since `origin`, and the old one did not, follows: `from` is before `last`. What the
  // old one showed may look otherwise in the new one, or not be in it at all: its state is its own.
  #profileChanged(data) {
    // Answers come in the order of the questions. Those before this one were refused, or it would not be its turn.
    this.#asked.splice(0, this.#asked.indexOf(data.profile) + 1);
    this.profile = this.#granted = data.profile ?? this.profile;
    const known = this.#cursor.last;
    if (data.from !== undefined) this.#cursor.moveTo(parseSeq(data.from));
    this.#incomplete = true;
    this.#sees(data);
    this.#on.onProfile(this.profile);
    this.#status("catching_up");
    this.#stateAnew(known);
  }

  #refused(data) {
    if (this.#asked.shift() !== undefined) this.#on.onProfile(this.profile);
    this.#on.onProblem(data.message ?? data.code ?? "The server refused a message of this page.");
  }

  #noticed(data) {
    if (data.code === "store-away") this.#storeAway = data.message ?? data.code;
    else if (data.code === "store-back") this.#storeAway = "";
    else return;
    this.#status(this.state);
  }

  // -- alive, and how it stands --------------------------------------------------------------------------------------

  #ping(withinMs) {
    if (this.#socket?.readyState !== OPEN) return;
    this.#socket.send(JSON.stringify({ type: "ws.ping", data: {} }));
    // Any frame counts as an answer. A socket that stays silent is dead, whatever its readyState says.
    this.#timers.after("pong", withinMs, () => this.#closed(1006, "The server does not answer."));
    this.#timers.after("ping", PING_EVERY_MS, () => this.#ping(PONG_WITHIN_MS));
  }

  #status(state, more = {}) {
    this.state = state;
    const storeAway = this.#storeAway !== "";
    this.#on.onStatus({ state, message: this.#storeAway, retryInMs: null, signIn: false, storeAway, ...more });
  }
}
