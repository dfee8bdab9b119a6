// Clients from npm, following a conversation by the rule of the protocol. Run by test_third_party_clients.py:
//   node third_party_clients.mjs FOLDER_WITH_NODE_MODULES KIND BASE_URL CONV_ID
// Prints one JSON object per line: {frame} as it came, {gap}, {open}, {close}, {error}. Lives until it is ended.
import { createRequire } from "node:module";

const [folder, kind, base, conversation] = process.argv.slice(2);
const load = createRequire(`${folder}/package.json`);
const print = (value) => process.stdout.write(JSON.stringify(value) + "\n");

let last = 0n; // 64-bit: numbers of JavaScript would make two neighbours equal
let epoch = "";

function take(text) {
  const { event } = JSON.parse(text);
  if (event.type === "ws.hello") epoch = event.data.epoch;
  if (event.type === "ws.through" && BigInt(event.data.seq) > last) last = BigInt(event.data.seq);
  if (event.prev !== undefined) {
    if (BigInt(event.seq) <= last) return;
    if (BigInt(event.prev) > last) return print({ gap: event });
    last = BigInt(event.seq);
  }
  print({ frame: event });
}

const query = () => `conv_id=${conversation}&since=${last}` + (epoch ? `&epoch=${epoch}` : "");
const socketUrl = () => `${base.replace("http", "ws")}ws?${query()}`;

if (kind === "ws") {
  const WebSocket = load("ws");
  const client = new WebSocket(socketUrl(), ["conversation.v1"]);
  client.on("open", () => {
    print({ open: client.protocol });
    client.send(JSON.stringify({ type: "ws.ping", data: { from: "ws" } }));
  });
  client.on("message", (data, binary) => (binary ? print({ error: "binary" }) : take(String(data))));
  client.on("close", (code) => print({ close: code }));
  client.on("error", (error) => print({ error: String(error) }));
  client.on("unexpected-response", (_, response) => {
    let body = "";
    response.on("data", (chunk) => (body += chunk));
    response.on("end", () => print({ refused: response.statusCode, problem: JSON.parse(body) }));
  });
} else if (kind === "reconnecting-websocket") {
  const Reconnecting = load("reconnecting-websocket");
  const options = { WebSocket: load("ws"), minReconnectionDelay: 50, maxReconnectionDelay: 200 };
  const client = new Reconnecting(async () => socketUrl(), ["conversation.v1"], options);
  client.addEventListener("open", () => print({ open: client.protocol }));
  client.addEventListener("message", (message) => take(message.data));
  client.addEventListener("close", (event) => {
    print({ close: event.code });
    client.send(JSON.stringify({ type: "ws.ping", data: "said while down" })); // goes out before hello is read
  });
} else if (kind === "eventsource") {
  const { EventSource } = load("eventsource");
  const client = new EventSource(`${base}sse?${query()}`); // one URL for good: it resumes by Last-Event-ID
  client.onopen = () => print({ open: "sse" });
  client.onmessage = (message) => {
    if (!message.data) print({ error: "an event without data" });
    const { event } = JSON.parse(message.data);
    if (event.prev !== undefined && message.lastEventId !== event.seq) print({ error: `id ${message.lastEventId}` });
    take(message.data);
  };
  client.onerror = (error) => print({ close: error.code ?? 0, state: client.readyState });
} else {
  throw new Error(`unknown kind ${kind}`);
}
