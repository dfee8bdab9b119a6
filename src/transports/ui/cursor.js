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
  // The server rebuilds the state without having said from where: until it has, nothing links to `last`.
  #unlinked = false;

  /** Go to `seq`, forwards or back: the server, or a snapshot, says that what follows links to it. */
  moveTo(seq) {
    this.last = seq;
    this.#unlinked = false;
  }

  /** What we hold is void and the place to go on from unknown, until `caughtUp`. */
  unlink() {
    this.last = 0n;
    this.#unlinked = true;
  }

  /** Judge an event frame and, if it is taken, move on: "take", "duplicate" or "gap". */
  judge(seq, prev) {
    if (seq <= this.last) return "duplicate";
    if (prev > this.last && !this.#unlinked) return "gap";
    this.last = seq;
    return "take";
  }

  /** Everything up to `seq` is decided for this connection: delivered, or hidden by its view. */
  through(seq) {
    if (seq > this.last) this.last = seq;
  }

  /** The backlog is delivered, live from `seq`. */
  caughtUp(seq) {
    this.#unlinked = false;
    this.through(seq);
  }
}
