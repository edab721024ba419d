// What the engine does, asked once a second while somebody can see it.

import { get } from "./api.js";
import { byId, svg } from "./dom.js";
import { bytes, count, plural, rate } from "./format.js";

const EVERY_MS = 1000;
const HISTORY = 60; // seconds
const WIDTH = 160; // of the drawing, in its own units
const HEIGHT = 36;

export class Live {
  constructor() {
    this.last = null; // the stats before these
    this.rates = [];
    this.timer = 0;
    document.addEventListener("visibilitychange", () => this.start());
  }

  start() {
    clearTimeout(this.timer);
    if (document.visibilityState === "visible") this.poll();
  }

  async poll() {
    try {
      this.show(await get("v1/statewise/stats", { quiet: true }));
    } catch (error) {
      this.last = null;
      phase("dead", error.message);
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.start(), EVERY_MS);
  }

  show(stats) {
    const words = { ready: "ready", loading: "loading the model…", dead: "the engine has stopped", closed: "shutting down" };
    phase(stats.phase, words[stats.phase] ?? stats.phase);
    if (stats.at === undefined) return;
    if (this.last && stats.at > this.last.at) {
      const made = stats.generated_tokens - this.last.generated_tokens;
      this.rates = [...this.rates, Math.max(0, made) / (stats.at - this.last.at)].slice(-HISTORY);
    }
    if (stats.at !== this.last?.at) this.last = stats;
    byId("live-rate").textContent = rate(this.rates.at(-1) ?? 0);
    byId("live-requests").textContent = `${count(stats.running)} running, ${count(stats.waiting)} waiting`;
    meter("records", stats.records);
    meter("pages", stats.pages);
    const tiers = Object.entries(stats.checkpoints).map(([tier, number]) => `${count(number)} ${tier}`);
    byId("live-checkpoints").textContent = tiers.join(", ") + (stats.disk_bytes ? ` (${bytes(stats.disk_bytes)})` : "");
    byId("live-reuse").textContent = stats.prompt_tokens
      ? `${Math.round((100 * stats.cached_tokens) / stats.prompt_tokens)}% of ${plural(stats.prompt_tokens, "prompt token")}`
      : "no prompts yet";
    this.draw();
  }

  draw() {
    const top = Math.max(1, ...this.rates);
    const step = WIDTH / (HISTORY - 1);
    const from = WIDTH - step * (this.rates.length - 1);
    const points = this.rates.map((value, at) => `${from + at * step} ${HEIGHT - 2 - ((HEIGHT - 6) * value) / top}`);
    if (points.length < 2) return;
    const d = `M${points.join("L")}`;
    byId("spark").replaceChildren(
      svg("path", { class: "area", d: `${d}V${HEIGHT}H${from}Z` }),
      svg("path", { class: "line state", d, "vector-effect": "non-scaling-stroke" }),
    );
  }
}

function phase(name, words) {
  byId("phase").dataset.phase = name;
  const said = byId("phase-words"); // read aloud at every change, so it is changed only when it is another
  if (said.textContent !== words) said.textContent = words;
}

function meter(name, { used, total }) {
  const bar = byId(`meter-${name}`);
  bar.setAttribute("aria-valuenow", used);
  bar.setAttribute("aria-valuemax", total);
  bar.firstElementChild.style.width = `${total ? Math.max(used ? 1.5 : 0, (100 * used) / total) : 0}%`;
  byId(`live-${name}`).textContent = `${count(used)} of ${count(total)}`;
}
