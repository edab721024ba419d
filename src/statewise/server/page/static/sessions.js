// The sessions that this page has begun: made, forked, gone back in, and found again after a reload.

import { ApiFailure, get, post, request } from "./api.js";
import { remember, remembered } from "./dom.js";
import { forest, pathOf } from "./forest.js";

const STORED = "statewise.sessions";
const PIN_S = 3600;

/** Sessions by id, each {id, root, number, data}; `data` is what the server says of it. */
export class Sessions {
  constructor() {
    const stored = remembered("sessionStorage", STORED, {});
    this.known = new Map((stored.sessions ?? []).map((session) => [session.id, { ...session, data: null }]));
    this.currentId = stored.current ?? null;
    this.figures = stored.figures ?? {}; // of turns, by the key of their node
    this.numbers = stored.numbers ?? 0;
  }

  get current() {
    return this.known.get(this.currentId) ?? null;
  }

  get forest() {
    return forest([...this.known.values()].filter((session) => session.data));
  }

  /** The nodes of a session; empty where there is none. */
  path(id, roots = this.forest) {
    return id ? pathOf(roots, id) : [];
  }

  /** Ask the server for all that the page remembers. Returns how many it has no more. */
  async restore() {
    let lost = 0;
    for (const id of [...this.known.keys()]) {
      try {
        await this.refresh(id);
      } catch (error) {
        if (error.code !== "session_not_found") throw error;
        this.forget(id);
        lost += 1;
      }
    }
    return lost;
  }

  async refresh(id) {
    const data = await get(`v1/sessions/${id}`);
    if (this.known.has(id)) this.known.get(id).data = data;
    this.store();
    return data;
  }

  async begin() {
    return this.add(await post("v1/sessions"));
  }

  async importFile(file) {
    const response = await request("POST", "v1/sessions/import", { body: file });
    return this.add(await response.json());
  }

  /** A branch that goes on from a node; the sessions that lead through the node stay as they are. */
  async fork(node) {
    const parent = this.known.get(this.ownerOf(node));
    const { data } = await post(`v1/sessions/${parent.id}/fork`, { n: 1 });
    const made = data[0];
    try {
      if (!node.tips.includes(parent.id)) await back(made.id, node);
    } catch (error) {
      await request("DELETE", `v1/sessions/${made.id}`);
      throw error;
    }
    this.add(made, parent.root);
    await this.refresh(made.id);
    return this.known.get(made.id);
  }

  /** Take the branch that leads through a node back to it. */
  async rewind(node) {
    const id = this.ownerOf(node);
    await back(id, node);
    await this.refresh(id);
    this.open(id);
  }

  async name(node, name) {
    const id = this.tipOf(node);
    await post(`v1/sessions/${id}/checkpoint`, { name });
    await this.refresh(id);
  }

  async pin(node) {
    await this.aside(node, (id) => post(`v1/sessions/${id}/pin`, { ttl: PIN_S }));
    await this.refresh(this.ownerOf(node));
  }

  /** The bytes of a file with the session up to a node. */
  async exported(node) {
    return this.aside(node, async (id) => (await request("GET", `v1/sessions/${id}/export`)).blob());
  }

  async remove(id) {
    try {
      await request("DELETE", `v1/sessions/${id}`);
    } catch (error) {
      if (!(error instanceof ApiFailure) || error.status !== 404) throw error;
    }
    this.forget(id);
  }

  open(id) {
    this.currentId = id;
    this.store();
  }

  /** Keep what a turn has taken, until its branch is forgotten. */
  measured(key, figures) {
    this.figures[key] = figures;
    this.store();
  }

  // Inside

  /** The session to act on for a node: the current one if it leads through it. */
  ownerOf(node) {
    return node.owners.includes(this.currentId) ? this.currentId : node.owners.at(-1);
  }

  /** The session that ends at a node: the current one if it does. */
  tipOf(node) {
    return node.tips.includes(this.currentId) ? this.currentId : node.tips[0];
  }

  add(data, root = data.id) {
    this.numbers += 1;
    const session = { id: data.id, root, number: this.numbers, data };
    this.known.set(data.id, session);
    this.open(data.id);
    return session;
  }

  forget(id) {
    this.known.delete(id);
    if (this.currentId === id) this.currentId = [...this.known.keys()].at(-1) ?? null;
    this.store();
  }

  /** Do something at a node with a session that ends there: one that does, or a fork that is gone afterwards. */
  async aside(node, action) {
    if (node.tips.length) return action(this.tipOf(node));
    const { data } = await post(`v1/sessions/${this.ownerOf(node)}/fork`, { n: 1 });
    try {
      await back(data[0].id, node);
      return await action(data[0].id);
    } finally {
      await request("DELETE", `v1/sessions/${data[0].id}`);
    }
  }

  store() {
    const sessions = [...this.known.values()].map(({ id, root, number }) => ({ id, root, number }));
    const { currentId: current, figures, numbers } = this;
    remember("sessionStorage", STORED, { sessions, current, figures, numbers });
  }
}

function back(id, node) {
  return post(`v1/sessions/${id}/rewind`, node.turn < 0 ? { to: 0 } : { turn: node.turn });
}
