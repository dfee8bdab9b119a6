// The HTTP side of the broker: JSON requests, problem details as errors. No DOM; works in browsers and in Node.

import { parseJson } from "./json.js";

/** The server answered, and the answer is no. `detail` is meant for people. */
export class ApiProblem extends Error {
  constructor({ status, type, title, detail, retryAfterMs }) {
    super(detail || title || `the server answered ${status}`);
    this.name = "ApiProblem";
    this.status = status;
    this.type = type || "about:blank";
    this.retryAfterMs = retryAfterMs ?? null;
  }

  /** The stable last part of the problem's type, such as "idempotency-pending". */
  get code() {
    return this.type.split(/[/#:]/).pop();
  }
}

/** No answer arrived: whether the request was carried out is unknown. */
export class NetworkFailure extends Error {
  constructor(cause) {
    super("the server cannot be reached");
    this.name = "NetworkFailure";
    this.cause = cause;
  }
}

function retryAfterMs(response) {
  const seconds = Number.parseFloat(response.headers.get("retry-after") ?? "");
  return Number.isFinite(seconds) ? seconds * 1000 : null;
}

async function problemOf(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // A proxy's HTML page or nothing at all: the status has to do.
  }
  if (body === null || typeof body !== "object") body = {};
  const text = (value) => (typeof value === "string" ? value : value === undefined ? undefined : JSON.stringify(value));
  return new ApiProblem({
    status: response.status,
    type: text(body.type),
    title: text(body.title) ?? response.statusText,
    detail: text(body.detail),
    retryAfterMs: retryAfterMs(response),
  });
}

export class Api {
  #fetch;

  /**
   * base: absolute URL of the API with a final slash. token: sent as `Authorization: Bearer`, null for none.
   * fetch: replaced in tests.
   */
  constructor(base, { token = null, fetch = globalThis.fetch, timeoutMs = 30_000 } = {}) {
    this.base = base;
    this.token = token;
    this.timeoutMs = timeoutMs;
    this.#fetch = fetch.bind(globalThis);
  }

  /** GET `path` with the defined ones of `query`. Rejects with ApiProblem or NetworkFailure. */
  get(path, query = {}) {
    return this.#request("GET", path, { query });
  }

  /** POST `body` as JSON. Rejects with ApiProblem or NetworkFailure. */
  post(path, body, headers = {}) {
    return this.#request("POST", path, { body, headers });
  }

  async #request(method, path, { query = {}, body, headers = {} }) {
    const url = new URL(path, this.base);
    for (const [name, value] of Object.entries(query)) {
      if (value !== undefined && value !== null) url.searchParams.set(name, value);
    }
    const all = { accept: "application/json", ...headers };
    if (body !== undefined) all["content-type"] = "application/json";
    if (this.token) all.authorization = `Bearer ${this.token}`;
    let response;
    try {
      response = await this.#fetch(url.href, {
        method,
        headers: all,
        body: body === undefined ? undefined : JSON.stringify(body),
        cache: "no-store",
        signal: AbortSignal.timeout(this.timeoutMs),
      });
    } catch (error) {
      throw new NetworkFailure(error);
    }
    if (!response.ok) throw await problemOf(response);
    try {
      return { status: response.status, body: parseJson(await response.text()) };
    } catch (error) {
      throw new NetworkFailure(error); // cut in the middle of the body: as good as no answer
    }
  }
}

/** Return a key that no other request has. Also where the page is not a secure context and `randomUUID` is missing. */
export function freshKey(crypto = globalThis.crypto) {
  if (typeof crypto.randomUUID === "function") return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
