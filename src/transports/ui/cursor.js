// The client's rule of the wire protocol: which event frames to take, which to drop, and when something is missing.

/** Return a 64-bit number of the protocol (a string of decimal digits) as BigInt; anything else is refused. */
export function parseSeq(value) {
  if (typeof value !== "string" || !/^\d{1,20}$/.test(value)) {
    throw new TypeError(`"${String(value).slice(0, 40)}" is no sequence number: a string of decimal digits is required`);
  }
  return BigInt(value);
}

/**
 * The place of one client in one conversation. Sequence numbers are near 2^61: always BigInt, never Number, which would
 * make neighbours equal.
 */
export class Cursor {
  /** The seq of the last event frame taken, or of the snapshot that the client started from. */
  last = 0n;
  /** The state is being sent anew, until `caughtUp`. */
  rebased = false;
  // Set while the server rebuilds or replays for us: then it has told us itself that `prev` does not link to `last`.
  #replayAfter = null;

  /** Start (again) after `seq`. */
  moveTo(seq) {
    this.last = seq;
    this.rebased = false;
    this.#replayAfter = null;
  }

  /** The state was dropped, the server sends everything anew: nothing we hold is comparable any more. */
  rebase() {
    this.last = 0n;
    this.rebased = true;
    this.#replayAfter = 0n;
  }

  /** The view grew and its newly visible past after `seq` follows, older than `last`. */
  expectReplay(seq) {
    this.#replayAfter = seq;
  }

  /** Judge an event frame and, if it is taken, move on: "take", "duplicate" or "gap". */
  judge(seq, prev) {
    if (this.#replayAfter !== null) {
      if (seq <= this.#replayAfter) return "duplicate";
      this.#replayAfter = seq;
      if (seq > this.last) this.last = seq;
      return "take";
    }
    if (seq <= this.last) return "duplicate";
    if (prev > this.last) return "gap";
    this.last = seq;
    return "take";
  }

  /** Everything up to `seq` is decided for this connection (`ws.through`). */
  through(seq) {
    if (seq > this.last) this.last = seq;
  }

  /** The backlog is delivered (`ws.caught_up`): from here on frames link to each other again. */
  caughtUp(seq) {
    this.#replayAfter = null;
    this.rebased = false;
    this.through(seq);
  }
}
