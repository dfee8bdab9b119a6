// ws on Node: each event is sent to each subscriber of a conversation in a loop.
//     node node_ws.js PORT CONTROL_PORT
"use strict";
const net = require("node:net");
const { WebSocketServer } = require("ws");

const FILLER = "x".repeat(83);
const subscribers = new Map();
const server = new WebSocketServer({ port: Number(process.argv[2]), host: "127.0.0.1", perMessageDeflate: false, backlog: 4096 });

server.on("connection", (socket, request) => {
  const name = request.url.slice(request.url.lastIndexOf("/") + 1);
  if (!subscribers.has(name)) subscribers.set(name, new Set());
  subscribers.get(name).add(socket);
  socket.on("close", () => subscribers.get(name).delete(socket));
});

function publish(name, number) {
  const at = "@T" + String(process.hrtime.bigint()).padStart(19, "0");
  const id = "n" + String(number).padStart(9, "0");
  const text = JSON.stringify({ sem: true, event: { type: "note.said", id, channel: "sem", data: { at, text: FILLER } } });
  for (const socket of subscribers.get(name) ?? []) socket.send(text);
}

const pause = (ms) => new Promise((done) => (ms > 0 ? setTimeout(done, ms) : setImmediate(done)));

async function run(conversations, messages, rate) {
  const begin = performance.now();
  let published = 0;
  for (let number = 0; number < messages; number++)
    for (let conversation = 0; conversation < conversations; conversation++) {
      await pause(rate ? begin + (published / rate) * 1000 - performance.now() : 0);
      publish("c" + String(conversation).padStart(4, "0"), number);
      published++;
    }
  return (performance.now() - begin) / 1000;
}

net.createServer((control) => {
  control.on("data", async (line) => {
    const [conversations, messages, rate] = String(line).split(" ").slice(1).map(Number);
    control.write(`DONE ${(await run(conversations, messages, rate)).toFixed(6)} 0\n`);
  });
}).listen(Number(process.argv[3]), "127.0.0.1");
