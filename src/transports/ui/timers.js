// Timers with names: one of each name at a time.

export class Timers {
  #env;
  #pending = new Map(); // name -> id

  /** env: setTimeout and clearTimeout. */
  constructor(env) {
    this.#env = env;
  }

  /** Call `call` in `ms` milliseconds, in place of what was pending under this name. */
  after(name, ms, call) {
    this.cancel(name);
    const run = () => {
      this.#pending.delete(name);
      call();
    };
    this.#pending.set(name, this.#env.setTimeout(run, ms));
  }

  cancel(name) {
    if (!this.#pending.has(name)) return;
    this.#env.clearTimeout(this.#pending.get(name));
    this.#pending.delete(name);
  }

  cancelAll() {
    for (const name of [...this.#pending.keys()]) this.cancel(name);
  }
}
