// When to come back after a connection ended, and when not to.

const BASE_MS = 400;
const CEILING_MS = 30_000;

// Close codes of the protocol. stop: coming back would end the same way. text: for people, where it is not obvious.
// leastMs: the server is short of something, so do not hurry.
const CLOSE_CODES = new Map([
  [1000, { stop: true }],
  [1001, {}],
  [1002, { stop: true, text: "The server could not read what this page sent." }],
  [1007, { stop: true, text: "The server could not read what this page sent." }],
  [1008, { stop: true, text: "The server refused what this page sent." }],
  [1009, {}],
  [1012, {}],
  [1013, { leastMs: 1_000 }],
  [4401, { stop: true, signIn: true, text: "The access token is missing, expired or invalid." }],
  [4403, { stop: true, text: "You may not read this conversation with this profile." }],
  [4404, { stop: true, text: "This conversation does not exist." }],
  [4408, {}],
  [4429, { leastMs: 5_000 }],
  [4500, { leastMs: 1_000 }],
]);

// Added to a code below 3000 by servers that send no other ones.
const STAND_IN = 3000;

/** Say what a close code means: {stop, signIn, text, leastMs}; codes that are not in the table are worth another try. */
export function closeVerdict(code, reason = "") {
  const known = CLOSE_CODES.get(code) ?? CLOSE_CODES.get(code - STAND_IN) ?? {};
  return {
    stop: known.stop ?? false,
    signIn: known.signIn ?? false,
    text: known.text ? (reason ? `${known.text} (${reason})` : known.text) : reason,
    leastMs: known.leastMs ?? 0,
  };
}

/**
 * Return how long to wait before try number `attempt` (0 is the first), in milliseconds. Doubling up to half a minute; at
 * least half of it is kept and the rest drawn by lot, so that the clients of a restarted server do not come as one wave.
 */
export function backOffMs(attempt, random = Math.random) {
  const ceiling = Math.min(CEILING_MS, BASE_MS * 2 ** Math.min(attempt, 16));
  return ceiling / 2 + (random() * ceiling) / 2;
}
