// Sends messages: in order, each exactly once, however often it takes. No DOM in here.

import { ApiProblem, freshKey } from "./api.js";
import { backOffMs } from "./reconnect.js";

const TRIES = 6;
// Refused for now, not for good: draining, too fast, or the first copy of this very request is still being decided.
const WORTH_WAITING = new Set(["idempotency-pending", "limit-exceeded", "unavailable", "store-unavailable"]);

export class Outbox {
  #api;
  #convId;
  #on;
  #env;
  #unsent = new Map(); // key -> {text, engineProfile}
  #chain = Promise.resolve();
  #closed = false;
  #storeAway = false;
  #tryNow = () => {};

  /** on: onAdded(key, text), onState(key, delivery, more), as `EntityStore` has them. env: setTimeout, random. */
  constructor({ api, convId, on, env = {} }) {
    this.#api = api;
    this.#convId = convId;
    this.#on = on;
    this.#env = { setTimeout: (call, ms) => globalThis.setTimeout(call, ms), random: Math.random, key: freshKey, ...env };
  }

  /** Queue a message behind those before it. Returns its idempotency key. */
  send(text, engineProfile = null) {
    const key = this.#env.key();
    this.#unsent.set(key, { text, engineProfile });
    this.#on.onAdded(key, text);
    this.#enqueue(key);
    return key;
  }

  /** Try a failed message again, under the same key: if the first try got through after all, nothing happens twice. */
  retry(key) {
    if (!this.#unsent.has(key)) return;
    this.#on.onState(key, "sending");
    this.#enqueue(key);
  }

  /** Give a failed message up. Returns its text. */
  discard(key) {
    const text = this.#unsent.get(key)?.text ?? "";
    this.#unsent.delete(key);
    return text;
  }

  /** While the server's store is away no message is given up; when it is back, the one that waits is tried at once. */
  storeAway(away) {
    const back = this.#storeAway && !away;
    this.#storeAway = away;
    if (back) this.#tryNow();
  }

  /** Send nothing more, for example because another conversation is shown. */
  close() {
    this.#closed = true;
  }

  #enqueue(key) {
    this.#chain = this.#chain.then(() => this.#deliver(key));
  }

  async #deliver(key) {
    const { text, engineProfile } = this.#unsent.get(key);
    const path = engineProfile === null ? "chat" : `chat/${encodeURIComponent(engineProfile)}`;
    let tries = 0;
    for (let attempt = 0; ; attempt += 1) {
      try {
        const body = { prompt: text, conv_id: this.#convId };
        const answer = await this.#api.post(path, body, { "idempotency-key": key });
        this.#unsent.delete(key);
        const queuePosition = answer.body.queue_position ?? undefined;
        this.#on.onState(key, answer.status === 202 ? "queued" : "accepted", { queuePosition });
        return;
      } catch (error) {
        const hopeless = error instanceof ApiProblem && !WORTH_WAITING.has(error.code) && error.status < 502;
        const noStore = error.code === "store-unavailable";
        // What exactly is wrong with it is for whoever runs the server.
        const why = noStore ? "the server cannot reach its store" : error.message;
        tries = noStore && this.#storeAway ? 0 : tries + 1;
        if (hopeless || tries >= TRIES || this.#closed) {
          this.#on.onState(key, "failed", { error: why });
          return;
        }
        this.#on.onState(key, "retrying", { error: why });
        const wait = Math.max(error.retryAfterMs ?? 0, backOffMs(attempt, this.#env.random));
        await new Promise((resolve) => {
          this.#tryNow = resolve;
          this.#env.setTimeout(resolve, wait);
        });
      }
    }
  }
}
