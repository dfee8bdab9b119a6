// Keeps the newest in sight for as long as the reader is at the end, and leaves a reader who went back alone.

const NEAR_END_PX = 48;

export class StickyScroll {
  #scroller;
  #button;
  #sticky = true;

  /** scroller: the element that scrolls. button: brings the reader back to the end; hidden while there. */
  constructor({ scroller, button }) {
    this.#scroller = scroller;
    this.#button = button;
    scroller.addEventListener("scroll", () => this.#look(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    // The box itself changes height too: a growing message field, a phone's keyboard.
    new ResizeObserver(() => this.follow()).observe(scroller);
  }

  /** Go to the end and stay there. */
  toEnd() {
    this.#sticky = true;
    this.follow();
  }

  /** Something was drawn: follow it if the reader is at the end. */
  follow() {
    if (this.#sticky) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#show();
  }

  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    this.#sticky = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    this.#show();
  }

  #show() {
    this.#button.hidden = this.#sticky;
  }
}
