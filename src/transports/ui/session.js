// One open conversation: its connection, its entities, its cards, its outgoing messages.

import { h } from "./dom.js";
import { ConversationClient } from "./client.js";
import { Outbox } from "./outbox.js";
import { EntityStore } from "./store.js";
import { TimelineView } from "./view.js";

export class Session {
  /**
   * page: what the session needs of the page around it: timeline (element), lane, scroll, announce(text), onStatus(status),
   * onProfile(name), onProblem(text), onBusy(busy), onSeq(seq), putBack(text).
   */
  constructor({ api, convId, profile, page }) {
    this.api = api;
    this.convId = convId;
    this.page = page;
    this.store = new EntityStore({ onChange: (change) => this.view.changed(change) });
    this.view = new TimelineView({
      root: page.timeline,
      store: this.store,
      announce: page.announce,
      empty: emptyState(),
      afterDraw: () => {
        page.onBusy(this.store.isBusy());
        page.onSeq(this.client.last);
        page.scroll.follow();
      },
      actions: {
        approve: (callId) => this.act("approve_tools", { call_ids: [callId] }),
        deny: (callId) => this.act("deny_tools", { call_ids: [callId] }),
        retry: (key) => this.outbox.retry(key),
        discard: (key) => {
          this.store.dropEcho(key);
          page.putBack(this.outbox.discard(key));
        },
      },
    });
    this.outbox = new Outbox({
      api,
      convId,
      on: {
        onAdded: (key, text) => this.store.addEcho(key, text),
        onState: (key, delivery, more) => this.store.updateEcho(key, delivery, more),
      },
    });
    this.client = new ConversationClient({ api, convId, profile, handlers: this.#handlers() });
    this.view.schedule();
    this.client.start();
  }

  #handlers() {
    const { page } = this;
    let settled = false;
    return {
      onStatus: (status) => {
        // What was there before this page is not news.
        if (status.state === "live" && !settled) {
          settled = true;
          this.view.settle();
        }
        this.outbox.storeAway(status.storeAway);
        page.onStatus(status);
      },
      onReset: () => {
        settled = false;
        this.store.clear();
      },
      onState: (entity, event) => {
        this.store.mergeState(entity);
        if (event !== null) page.lane.add(event);
      },
      onEvent: (event) => {
        this.store.applyEvent(event);
        page.lane.add(event);
        page.onSeq(this.client.last);
      },
      onControl: (event) => {
        page.lane.add(event);
        if (event.type === "ws.notice" && event.data?.message) page.announce(event.data.message);
        page.onSeq(this.client.last);
      },
      onProfile: page.onProfile,
      onProblem: page.onProblem,
    };
  }

  send(text, engineProfile) {
    this.outbox.send(text, engineProfile);
    this.page.scroll.toEnd();
  }

  stop() {
    return this.act("cancel", {});
  }

  /** Ask for an action on the conversation; what it changes arrives as events, here and in every other window. */
  async act(name, body) {
    try {
      await this.api.post(`api/conversations/${encodeURIComponent(this.convId)}/actions/${name}`, body);
    } catch (error) {
      this.page.onProblem(error.message);
    }
  }

  close() {
    this.outbox.close();
    this.client.stop();
    this.view.dispose();
  }
}

function emptyState() {
  return h("div", { class: "empty", hidden: true },
    h("h2", { text: "Nothing said yet" }),
    h("p", { text: "Write a message below. Every window that is open on this conversation follows it live." }));
}
