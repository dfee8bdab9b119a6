// The message box: grows with its text, knows its keys, and leaves input methods alone.

const MAX_HEIGHT_PX = 220;

export class Composer {
  #form;
  #prompt;
  #send;
  #stop;

  /** onSend(text), onStop(): what the person wants. */
  constructor({ form, prompt, send, stop, onSend, onStop }) {
    this.#form = form;
    this.#prompt = prompt;
    this.#send = send;
    this.#stop = stop;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(onSend);
    });
    prompt.addEventListener("input", () => this.#fit());
    prompt.addEventListener("keydown", (event) => {
      // Enter that ends a composition (Chinese, Japanese, Korean …) chooses a word; 229 is what Safari says then.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.#submit(onSend);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing && !this.#stop.hidden) onStop();
    });
    stop.addEventListener("click", onStop);
    this.#fit();
  }

  /** Show the Stop button while something is being answered. */
  setBusy(busy) {
    if (this.#stop.hidden === !busy) return;
    const focused = document.activeElement === this.#stop;
    this.#stop.hidden = !busy;
    if (focused) this.focus();
  }

  focus() {
    this.#prompt.focus({ preventScroll: true });
  }

  /** Put a text back to be changed; what is being written is kept below it. */
  putBack(text) {
    this.#prompt.value = this.#prompt.value === "" ? text : `${text}\n${this.#prompt.value}`;
    this.#fit();
    this.focus();
  }

  #submit(onSend) {
    const text = this.#prompt.value.trim();
    if (text === "") return;
    this.#prompt.value = "";
    this.#fit();
    this.focus();
    onSend(text);
  }

  #fit() {
    this.#send.disabled = this.#prompt.value.trim() === "";
    this.#prompt.style.height = "auto";
    this.#prompt.style.height = `${Math.min(this.#prompt.scrollHeight, MAX_HEIGHT_PX)}px`;
  }
}
