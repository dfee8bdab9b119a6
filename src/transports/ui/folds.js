// How event frames change entities: the page's own fold, for views that carry no state frames and to show each delta as it
// comes. The server's state frames stay authoritative; see store.js.

const RUN_STATUS = {
  "run.queued": "queued",
  "run.started": "running",
  "run.finished": "finished",
  "run.failed": "failed",
  "run.cancelled": "cancelled",
  "run.interrupted": "interrupted",
};

/** A run in one of these does not change any more. */
export const ENDED = new Set(["finished", "failed", "cancelled", "interrupted"]);
const TOOL_ENDED = new Set(["done", "error"]);

function text(value) {
  return typeof value === "string" ? value : "";
}

function set(entity, data, names) {
  for (const name of names) if (data[name] !== undefined && data[name] !== null) entity.props[name] = data[name];
}

// Every fold returns false for what came after the end of its entity: the server refuses it too.

const isNew = (entity) => entity.version === 0n;

/** Whether text may still arrive; an entity that this event creates is open by definition. */
function open(entity) {
  if (isNew(entity)) entity.props.streaming = true;
  return entity.props.streaming === true;
}

function start(entity, data) {
  if (!open(entity)) return false;
  if (entity.kind === "message") entity.props.role ??= "assistant";
  set(entity, data, entity.kind === "message" ? ["role", "model", "runId"] : ["model", "runId"]);
  return true;
}

function delta(entity, data, event) {
  const known = !isNew(entity);
  if (!start(entity, data)) return false;
  if (typeof data.cumulative === "string") entity.text.assign(data.cumulative);
  else if (known && !entity.folded && entity.version > BigInt(event.prev)) {
    entity.text.append(withoutOverlap(entity.text.toString(), text(data.delta)));
  } else entity.text.append(text(data.delta));
  return true;
}

/**
 * Return `piece` without what `present` already ends with. Only for a delta that was merged from several, some of which a
 * state frame brought before: then, and only then, the two overlap. What this guesses wrong, the final text sets right.
 */
function withoutOverlap(present, piece) {
  const tail = present.slice(-piece.length);
  for (let size = tail.length; size > 0; size -= 1) {
    if (piece.startsWith(tail.slice(-size))) return piece.slice(size);
  }
  return piece;
}

function final(entity, data) {
  if (!start(entity, data)) return false;
  set(entity, data, ["finishReason", "usage", "partial"]);
  if (typeof data.text === "string") entity.text.assign(data.text);
  delete entity.props.streaming;
  return true;
}

function userMessage(entity, data) {
  entity.props.role = "user";
  set(entity, data, ["attachments", "idempotencyKey", "runId"]);
  entity.text.assign(text(data.text));
  return true;
}

function tool(status, names) {
  return (entity, data) => {
    if (TOOL_ENDED.has(entity.props.status)) return false;
    set(entity, data, ["runId", ...names]);
    if (data.input !== undefined && names.includes("input")) entity.text.assign("");
    entity.props.status = status ?? entity.props.status ?? "running";
    return true;
  };
}

function toolDecision(status, who) {
  return (entity, data) => {
    if (TOOL_ENDED.has(entity.props.status)) return false;
    if (typeof data.by === "string") entity.props[who] = data.by;
    entity.props.status = status;
    return true;
  };
}

function toolDelta(entity, data) {
  if (TOOL_ENDED.has(entity.props.status)) return false;
  const { inputTextDelta, ...patch } = data.patch ?? {};
  entity.props.status ??= "running";
  if (typeof inputTextDelta === "string") entity.text.append(inputTextDelta);
  if (patch.input !== undefined) entity.text.assign(""); // complete now: the text that it was read from goes
  Object.assign(entity.props, patch);
  return true;
}

function toolDone(entity, data) {
  if (TOOL_ENDED.has(entity.props.status)) return false;
  set(entity, data, ["error"]);
  if (entity.props.status !== "denied") entity.props.status = entity.props.error === undefined ? "done" : "error";
  return true;
}

function run(status) {
  return (entity, data) => {
    if (ENDED.has(entity.props.status)) return false;
    delete entity.props.position;
    set(entity, data, ["idempotencyKey", "position", "error", "usage"]);
    entity.props.status = status;
    return true;
  };
}

function whole(entity, data) {
  entity.props = { ...data };
  return true;
}

const CALL = ["name", "input"];

/** The entity that an event is about: a run event's is its run. */
export function entityIdOf(event) {
  return event.type.startsWith("run.") ? (event.data?.runId ?? event.id) : event.id;
}

/** What an event of a run says of its prompt's message: {id, begins}; undefined where it says nothing. */
export function promptOf({ type, data }) {
  if (typeof data?.messageId !== "string") return undefined;
  if (type === "run.started" && data.waited === true) return { id: data.messageId, begins: true };
  if (type === "run.cancelled" && data.withdrawn === true) return { id: data.messageId, begins: false };
  return undefined;
}

/** By event type: the kind of entity that the event is about, and how it changes it. */
export const FOLDS = new Map([
  ["user.message", { kind: "message", fold: userMessage }],
  ["llm.start", { kind: "message", fold: start }],
  ["llm.delta", { kind: "message", fold: delta }],
  ["llm.final", { kind: "message", fold: final }],
  ["llm.thinking.start", { kind: "thinking", fold: start }],
  ["llm.thinking.delta", { kind: "thinking", fold: delta }],
  ["llm.thinking.final", { kind: "thinking", fold: final }],
  ["tool.start", { kind: "tool_call", fold: tool("running", CALL) }],
  ["tool.delta", { kind: "tool_call", fold: toolDelta }],
  ["tool.approval_requested", { kind: "tool_call", fold: tool("awaiting_approval", CALL) }],
  ["tool.approved", { kind: "tool_call", fold: toolDecision("approved", "approvedBy") }],
  ["tool.denied", { kind: "tool_call", fold: toolDecision("denied", "deniedBy") }],
  ["tool.result", { kind: "tool_call", fold: tool(null, ["result", "customKind"]) }],
  ["tool.done", { kind: "tool_call", fold: toolDone }],
  ["log", { kind: "log", fold: whole }],
  ["agent.mode", { kind: "agent_mode", fold: whole }],
  ...Object.entries(RUN_STATUS).map(([type, status]) => [type, { kind: "run", fold: run(status) }]),
]);
