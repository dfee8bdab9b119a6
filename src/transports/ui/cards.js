// How each kind of entity looks. A card is {element, update(entity, context)}; update is called whenever it changed.

import { direct } from "./direction.js";
import { beginning, errorText, h, icon, setText, showValue } from "./dom.js";
import { MarkdownStream } from "./markdown.js";

// A result of megabytes would freeze the page, and nobody reads it here.
const SHOWN_VALUE_CHARS = 20_000;

const makers = new Map();

/** Draw entities of `kind` with what `make(actions)` returns. For plugins' widgets; the last one to ask wins. */
export function registerCard(kind, make) {
  makers.set(kind, make);
}

/**
 * Make the card of an entity. actions: approve(callId), deny(callId), retry(key), discard(key).
 * context of `update`: {open: more is expected, run: the entity of its run or undefined}.
 */
export function makeCard(entity, actions) {
  return (makers.get(entity.kind) ?? otherCard)(actions, entity);
}

/** Gives a reader of a growing text only what is new; `restart` is called where the text was replaced. */
class TextFollower {
  #generation = -1;
  #taken = 0;

  /** Returns whether anything was new. */
  follow(text, { restart, append }) {
    if (text.generation !== this.#generation) {
      this.#generation = text.generation;
      this.#taken = 0;
      restart();
    }
    if (this.#taken === text.pieceCount) return false;
    append(text.since(this.#taken));
    this.#taken = text.pieceCount;
    return true;
  }
}

// -- messages ---------------------------------------------------------------------------------------------------------

registerCard("message", (actions, entity) => (entity.props.role === "user" ? userCard(actions) : assistantCard()));

function userCard(actions) {
  const body = h("div", { class: "bubble", dir: "auto" });
  const note = h("p", { class: "note", hidden: true });
  const buttons = h("span", { class: "note-actions", hidden: true });
  const element = h("article", { class: "card message user", "aria-label": "You" }, body, note, buttons);
  const update = ({ text, props, local }) => {
    setText(body, text.toString());
    const said = local ? deliveryNote(props) : props.withdrawn === true ? "Taken back before its turn" : "";
    note.hidden = said === "";
    setText(note, said);
    note.classList.toggle("bad", props.delivery === "failed");
    buttons.hidden = props.delivery !== "failed";
    if (!buttons.hidden && buttons.childElementCount === 0) {
      const button = (label, call) => h("button", { type: "button", class: "quiet", text: label, on: { click: call } });
      buttons.append(
        button("Try again", () => actions.retry(props.idempotencyKey)),
        button("Take back", () => actions.discard(props.idempotencyKey)),
      );
    }
  };
  return { element, update };
}

function deliveryNote({ delivery, error, queuePosition }) {
  switch (delivery) {
    case "sending": return "Sending…";
    case "retrying": return `Not sent yet: ${errorText(error)}. Trying again…`;
    case "queued": return queuePosition === undefined ? "Queued" : `Queued, number ${queuePosition} in line`;
    case "failed": return `Not sent. ${errorText(error)}`;
    default: return "";
  }
}

function assistantCard() {
  const author = h("span", { class: "author", text: "Assistant" });
  const head = h("header", { class: "card-head" }, author);
  const body = h("div", { class: "prose" });
  const note = h("p", { class: "note", hidden: true });
  const element = h("article", { class: "card message assistant", "aria-label": "Assistant" }, head, body, note);
  const follower = new TextFollower();
  let markdown;
  let ended = false;
  const update = ({ text, props }, { open, run }) => {
    setText(author, props.model ? `Assistant · ${props.model}` : "Assistant");
    const grew = follower.follow(text, {
      restart() {
        body.replaceChildren();
        markdown = new MarkdownStream(body);
        ended = false;
      },
      append: (piece) => markdown.append(piece),
    });
    if (grew) ended = false;
    if (!open && !ended) markdown.end();
    ended = !open;
    element.classList.toggle("streaming", open);
    // Read out as a whole when it is complete, not word by word.
    element.setAttribute("aria-busy", String(open));
    const said = open ? "" : endNote(props, run);
    note.hidden = said === "";
    setText(note, said);
    // A model that only calls tools says nothing: its message is there, but there is nothing to see.
    element.hidden = text.length === 0 && said === "";
  };
  return { element, update };
}

function endNote({ partial, finishReason, streaming }, run) {
  const cut = partial === true || streaming === true;
  if (cut && run?.props.status === "cancelled") return "Stopped here. The answer is incomplete.";
  if (cut) return "The answer is incomplete.";
  if (finishReason === "length") return "Cut off at the model's length limit.";
  if (finishReason === "content_filter") return "Cut off by the provider's content filter.";
  return "";
}

// -- thinking ---------------------------------------------------------------------------------------------------------

registerCard("thinking", () => {
  const label = h("span", { text: "Thinking…" });
  const body = h("div", { class: "thinking-text" });
  let directed = false;
  const details = h("details", {}, h("summary", {}, icon("thought"), label), body);
  const element = h("section", { class: "card thinking", "aria-label": "Reasoning" }, details);
  const follower = new TextFollower();
  const update = ({ text }, { open }) => {
    setText(label, open ? "Thinking…" : "Thought");
    element.classList.toggle("streaming", open);
    follower.follow(text, {
      restart() {
        body.replaceChildren();
        directed = false;
      },
      append(piece) {
        body.append(piece);
        directed ||= direct(body, piece);
      },
    });
  };
  return { element, update };
});

// -- tool calls -------------------------------------------------------------------------------------------------------

const TOOL_STATUS = {
  running: ["Running", "busy"],
  awaiting_approval: ["Needs approval", "ask"],
  approved: ["Approved", "busy"],
  denied: ["Denied", "off"],
  done: ["Done", "good"],
  error: ["Failed", "bad"],
};

registerCard("tool_call", (actions, entity) => {
  const name = h("code", { class: "tool-name" });
  const status = h("span", { class: "chip" });
  const input = valueBlock("Input");
  const result = valueBlock("Result");
  const failure = h("p", { class: "note bad", hidden: true });
  const approve = h("button", { type: "button", class: "primary small", text: "Approve" });
  const deny = h("button", { type: "button", class: "small", text: "Deny" });
  const decision = h("div", { class: "decision", hidden: true }, approve, deny);
  const summary = h("summary", {}, icon("tool"), name, status);
  const details = h("details", {}, summary, input.element, result.element);
  const element = h("section", { class: "card tool", "aria-label": "Tool call" }, details, failure, decision);

  const decide = (act) => async () => {
    approve.disabled = deny.disabled = true;
    try {
      await act(entity.id);
    } finally {
      approve.disabled = deny.disabled = false;
    }
  };
  approve.addEventListener("click", decide(actions.approve));
  deny.addEventListener("click", decide(actions.deny));

  let asked = false;
  const update = ({ props, text }, { ended }) => {
    const over = ended && !["done", "error", "denied"].includes(props.status);
    const [words, tone] = over ? ["Not finished", "off"] : (TOOL_STATUS[props.status] ?? [String(props.status ?? ""), "off"]);
    setText(name, props.name || "tool");
    setText(status, words);
    status.dataset.tone = tone;
    element.setAttribute("aria-label", `Tool call ${props.name ?? ""}: ${words}`);
    input.show(text.length > 0 ? text.toString() : props.input);
    result.show(props.result);
    failure.hidden = props.error === undefined;
    setText(failure, errorText(props.error));
    const asks = props.status === "awaiting_approval" && !over;
    // Whoever decides has to see on what: opened once, and then left as the reader wants it.
    if (asks && !asked) details.open = true;
    asked ||= asks;
    const focused = decision.contains(document.activeElement);
    decision.hidden = !asks;
    if (focused && !asks) summary.focus();
  };
  return { element, update };
});

/** A labelled JSON value that is drawn only when it changed. */
function valueBlock(label) {
  const code = h("code", { dir: "auto" });
  const element = h("div", { class: "value", hidden: true }, h("span", { class: "value-label", text: label }), h("pre", { tabindex: "0" }, code));
  let shown;
  const show = (value) => {
    if (value === shown) return;
    shown = value;
    element.hidden = value === undefined;
    const text = value === undefined ? "" : showValue(value);
    const cut = text.length > SHOWN_VALUE_CHARS;
    setText(code, cut ? `${beginning(text, SHOWN_VALUE_CHARS)}…\n(${text.length} characters in all)` : text);
  };
  return { element, show };
}

// -- runs -------------------------------------------------------------------------------------------------------------

registerCard("run", () => {
  const title = h("strong", {});
  const detail = h("span", { class: "run-detail", dir: "auto" });
  const element = h("section", { class: "card run", "aria-label": "Run" }, title, detail);
  const update = ({ props }) => {
    const [tone, words, more] = runWords(props);
    element.hidden = words === "";
    element.dataset.tone = tone;
    setText(title, words);
    setText(detail, more);
  };
  return { element, update };
});

function runWords({ status, position, error }) {
  switch (status) {
    case "queued": return ["calm", "Queued", position === undefined ? "waits for its turn" : `number ${position} in line`];
    case "failed": return ["bad", "The answer failed", errorText(error) || "The server gave no reason."];
    case "cancelled": return ["calm", "Stopped", ""];
    case "interrupted": return ["warn", "Interrupted", errorText(error) || "The server stopped while it was answering. Send the message again."];
    default: return ["calm", "", ""]; // running is shown at the end of the page, finished by the answer itself
  }
}

// -- everything else --------------------------------------------------------------------------------------------------

registerCard("agent_mode", () => {
  const text = h("span", { dir: "auto" });
  const element = h("section", { class: "card aside", "aria-label": "Agent mode" }, text);
  return { element, update: ({ props }) => setText(text, `Mode: ${props.mode ?? props.name ?? showValue(props)}`) };
});

// A log line is no part of what was said; the event lane shows it.
registerCard("log", () => ({ element: h("section", { class: "card", hidden: true }), update() {} }));

function otherCard(actions, entity) {
  const value = valueBlock(entity.kind);
  const details = h("details", {}, h("summary", {}, h("code", { text: entity.kind })), value.element);
  return { element: h("section", { class: "card other", "aria-label": entity.kind }, details), update: ({ props }) => value.show(props) };
}
