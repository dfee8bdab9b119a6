// The chat page: wires the address bar, the controls and one session together.

import { Api, freshKey } from "./api.js";
import { registerCard } from "./cards.js";
import { Composer } from "./composer.js";
import * as dom from "./dom.js";
import { EventLane } from "./lane.js";
import { StickyScroll } from "./scroll.js";
import { Session } from "./session.js";

const { h, setText } = dom;
const byId = (id) => document.getElementById(id);
const TOKEN_STORE = "broker-token";

// -- address bar ------------------------------------------------------------------------------------------------------

function newConversationId() {
  return `c-${freshKey().replaceAll("-", "").slice(0, 12)}`;
}

function readAddress() {
  const query = new URLSearchParams(location.search);
  return { convId: query.get("conv_id"), profile: query.get("profile") || "default", engine: query.get("engine") };
}

function addressOf({ convId, profile, engine }) {
  const url = new URL(location.href);
  url.search = "";
  url.hash = "";
  url.searchParams.set("conv_id", convId);
  url.searchParams.set("profile", profile);
  if (engine) url.searchParams.set("engine", engine);
  return url.href;
}

/** A token may come as `#token=…`: a fragment is sent to no server. It leaves the address bar at once. */
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(TOKEN_STORE, given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return sessionStorage.getItem(TOKEN_STORE);
}

// -- the page ---------------------------------------------------------------------------------------------------------

function metaContent(name) {
  return document.querySelector(`meta[name="${name}"]`)?.content ?? "";
}

const api = new Api(new URL(metaContent("broker-api-base") || "./", location.href).href, { token: takeToken() });
const address = readAddress();
let session = null;
let laneWanted = null; // null: the profile decides

const lane = new EventLane({ list: byId("lane-list"), count: byId("lane-count") });
const scroll = new StickyScroll({ scroller: byId("scroller"), button: byId("jump") });
const composer = new Composer({
  form: byId("composer"), prompt: byId("prompt"), send: byId("send"), stop: byId("stop"),
  onSend: (text) => session.send(text, chosenEngine()),
  onStop: () => session.stop(),
});

const page = {
  timeline: byId("timeline"),
  lane,
  scroll,
  announce: (text) => byId("announcer").replaceChildren(h("p", { text })),
  putBack: (text) => composer.putBack(text),
  onStatus: showStatus,
  onProfile(profile) {
    address.profile = profile;
    showAddress();
    showProfile();
  },
  onProblem: (text) => showBanner(text),
  onBusy: (busy) => composer.setBusy(busy),
  onSeq: (seq) => setText(byId("last-seq"), String(seq)),
};

function openConversation() {
  session?.close();
  hideBanner();
  lane.clear();
  showProfile();
  setText(byId("conversation-id"), address.convId);
  document.title = `${address.convId} · Conversation`;
  session = new Session({ api, convId: address.convId, profile: address.profile, page });
  scroll.toEnd();
  composer.focus();
}

function showAddress() {
  history.replaceState(null, "", addressOf(address));
  byId("second-window").href = addressOf(address);
}

// -- connection and problems ------------------------------------------------------------------------------------------

const STATUS_WORDS = {
  connecting: "Connecting",
  catching_up: "Catching up",
  live: "Live",
  waiting: "Reconnecting",
  stopped: "Disconnected",
};

function showStatus({ state, message, signIn, storeAway }) {
  const offline = state === "waiting" && navigator.onLine === false;
  byId("connection").dataset.state = offline ? "offline" : storeAway ? "store-away" : state;
  byId("connection").title = message;
  setText(byId("connection-text"), offline ? "Offline" : storeAway ? "Store away" : STATUS_WORDS[state]);
  // To be read without a mouse; spoken it was when the notice came.
  setText(byId("notice"), storeAway ? message : "");
  byId("notice").hidden = !storeAway;
  if (state === "stopped" && message !== "") showBanner(message, { signIn, retry: !signIn });
  else if (state === "live") byId("banner-retry").hidden || hideBanner();
}

function showBanner(text, { signIn = false, retry = false } = {}) {
  setText(byId("banner-text"), text);
  byId("sign-in").hidden = !signIn;
  byId("banner-retry").hidden = !retry;
  byId("banner").hidden = false;
  if (signIn) byId("token").focus();
}

function hideBanner() {
  byId("banner").hidden = true;
}

byId("banner-close").addEventListener("click", () => {
  hideBanner();
  composer.focus();
});
byId("banner-retry").addEventListener("click", openConversation);
byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  api.token = byId("token").value.trim();
  sessionStorage.setItem(TOKEN_STORE, api.token);
  byId("token").value = "";
  openConversation();
  loadChoices();
});

window.addEventListener("online", () => session?.client.wake());
window.addEventListener("offline", () => session?.client.probe());
window.addEventListener("pageshow", (event) => event.persisted && session?.client.wake());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  session?.client.wake();
  session?.view.schedule();
});

// -- choices ----------------------------------------------------------------------------------------------------------

/** Lists come as they are or wrapped in an object of one list. */
function listIn(body) {
  return Array.isArray(body) ? body : (Object.values(body ?? {}).find(Array.isArray) ?? []);
}

function fillSelect(select, items, chosen) {
  const names = items.map((item) => item.name);
  if (chosen && !names.includes(chosen)) items = [...items, { name: chosen }];
  select.replaceChildren(...items.map(({ name, description }) => h("option", { value: name, title: description, text: name })));
  if (chosen) select.value = chosen;
}

let profiles = [];
let engines = [];

async function loadChoices() {
  try {
    profiles = listIn((await api.get("api/profiles")).body);
    engines = listIn((await api.get("api/engine-profiles")).body);
  } catch {
    // The connection says what is wrong with the server; the choices are there as far as they are known.
  }
  showProfile();
  fillSelect(byId("engine"), engines, engines.length > 1 ? address.engine || defaultEngine() : null);
  byId("engine-choice").hidden = engines.length < 2;
}

function defaultEngine() {
  return (engines.find((engine) => engine.default === true) ?? engines[0])?.name;
}

function chosenEngine() {
  return engines.length > 1 ? byId("engine").value : address.engine;
}

function showProfile() {
  fillSelect(byId("profile"), profiles, address.profile);
  const chosen = profiles.find((profile) => profile.name === address.profile);
  byId("profile").title = chosen?.description ?? "";
  showLane(laneWanted ?? address.profile === "debug");
}

function showLane(visible) {
  byId("lane").hidden = !visible;
  byId("events-toggle").setAttribute("aria-expanded", String(visible));
}

byId("profile").addEventListener("change", (event) => {
  laneWanted = null;
  session.client.setProfile(event.target.value);
  session.client.start(); // of use where the server had refused the one before
});
byId("engine").addEventListener("change", (event) => {
  address.engine = event.target.value;
  showAddress();
});
byId("events-toggle").addEventListener("click", () => {
  laneWanted = byId("lane").hidden;
  showLane(laneWanted);
});
byId("lane-clear").addEventListener("click", () => lane.clear());
byId("new-conversation").addEventListener("click", () => {
  address.convId = newConversationId();
  history.pushState(null, "", addressOf(address));
  showAddress();
  openConversation();
});
window.addEventListener("popstate", () => {
  const wanted = readAddress();
  if (wanted.convId === address.convId && wanted.profile === address.profile) return;
  Object.assign(address, wanted);
  address.convId ??= newConversationId();
  showAddress();
  openConversation();
});
document.querySelector(".skip-link").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment would become a part of the address that people share
  composer.focus();
});

// -- plugins ----------------------------------------------------------------------------------------------------------

/** A widget's module exports `makeCard(actions, dom)`, which returns a card as in cards.js; `dom` is this page's dom.js. */
async function loadWidgets() {
  for (const { module, entity_kinds: kinds = [] } of JSON.parse(metaContent("broker-widgets") || "[]")) {
    try {
      const { makeCard } = await import(new URL(module, location.href).href);
      for (const kind of kinds) registerCard(kind, (actions, entity) => makeCard(actions, dom, entity));
    } catch (error) {
      showBanner(`The widget ${module} could not be loaded: ${error.message}`);
    }
  }
}

address.convId ??= newConversationId();
showAddress();
await loadWidgets();
openConversation();
loadChoices();
