// Tokens against bytes: what this conversation takes, beside what a cache of keys and values would.

import { byId, el, svg } from "./dom.js";
import { bytes, count, plural } from "./format.js";

const HEIGHT = 210;
const MARGIN = { left: 58, right: 14, top: 12, bottom: 30 };
const LEAST_TOKENS = 128;

const holder = byId("chart");

export class Chart {
  constructor() {
    this.info = null;
    this.points = []; // [{tokens, bytes}] of the current branch, rising
    this.whole = false; // the whole context, or what there is of it
    new ResizeObserver(() => this.draw()).observe(holder);
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => {
        this.whole = button.dataset.zoom === "whole";
        for (const one of document.querySelectorAll("[data-zoom]")) {
          one.setAttribute("aria-pressed", String(one === button));
        }
        this.draw();
      });
    }
  }

  show(info, path) {
    if (!info) return;
    this.info = info;
    this.points = path.filter((node) => node.end && node.bytes).map((node) => ({ tokens: node.end, bytes: node.bytes }));
    this.tokens = path.at(-1)?.end ?? 0;
    this.draw();
    this.tell();
  }

  /** Bytes of the state behind so many tokens, as the blocks are laid out. */
  state(tokens) {
    const { record_bytes: record, page_bytes: page, page_size: size } = this.info;
    return record + Math.ceil(tokens / size) * page;
  }

  get lines() {
    const { kv_bytes_per_token_if_all_softmax: all, own_attention: own } = this.info;
    const lines = [{ kind: "all", perToken: all }];
    if (own.bytes_per_token !== all) lines.push({ kind: "own", perToken: own.bytes_per_token });
    return lines;
  }

  draw() {
    const width = holder.clientWidth;
    if (!this.info || width < 120) return;
    const limit = this.info.max_model_len;
    const most = this.whole || !this.tokens ? limit : Math.min(limit, nice(Math.max(LEAST_TOKENS, 1.25 * this.tokens)));
    const top = Math.max(this.state(most), ...this.lines.map((line) => line.perToken * most)) * 1.06;
    const x = (tokens) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * tokens) / most;
    const y = (amount) => HEIGHT - MARGIN.bottom - ((HEIGHT - MARGIN.top - MARGIN.bottom) * amount) / top;
    const drawing = svg("svg", { width, height: HEIGHT, role: "img", "aria-labelledby": "chart-title chart-now" });
    axes(drawing, { width, most, top, x, y });
    for (const { kind, perToken } of this.lines) {
      drawing.append(svg("path", { class: `line ${kind}`, d: `M${x(0)} ${y(0)}L${x(most)} ${y(perToken * most)}` }));
    }
    const steps = this.staircase(most, x, y);
    drawing.append(svg("path", { class: "area", d: `${steps}V${y(0)}H${x(0)}Z` }), svg("path", { class: "line state", d: steps }));
    for (const point of this.points) {
      drawing.append(svg("circle", { class: "point", cx: x(point.tokens), cy: y(point.bytes), r: 3.5 }));
    }
    if (this.tokens) {
      const now = { x1: x(this.tokens), x2: x(this.tokens), y1: y(0), y2: MARGIN.top, class: "now" };
      drawing.prepend(svg("line", now));
      drawing.append(svg("circle", { class: "point last", cx: x(this.tokens), cy: y(this.state(this.tokens)), r: 5.5 }));
    }
    holder.replaceChildren(drawing);
    holder.dataset.tokens = this.tokens;
    holder.dataset.points = this.points.length;
  }

  staircase(most, x, y) {
    const size = this.info.page_size * Math.max(1, Math.ceil(most / this.info.page_size / 200));
    let path = `M${x(0)} ${y(this.state(0))}`;
    for (let tokens = 0; tokens < most; tokens += size) {
      path += `V${y(this.state(Math.min(most, tokens + size)))}H${x(Math.min(most, tokens + size))}`;
    }
    return path;
  }

  /** The same in words and in a table. */
  tell() {
    const { kv_bytes_per_token_if_all_softmax: all, own_attention: own, layers } = this.info;
    const { tokens } = this;
    byId("chart-now").textContent = tokens
      ? `${plural(tokens, "token")}: ${bytes(this.state(tokens))} of state; a KV cache would hold ${bytes(all * tokens)}.`
      : `Nothing said yet. At ${plural(this.info.max_model_len, "token")}, the whole context:`;
    const at = tokens || this.info.max_model_len;
    byId("legend-state").textContent = bytes(this.state(at));
    byId("legend-all").textContent = bytes(all * at);
    byId("legend-own").textContent = bytes(own.bytes_per_token * at);
    byId("legend-own-row").hidden = own.bytes_per_token === all;
    const linear = layers.filter((layer) => layer.scope === "record").length;
    byId("how-state").textContent =
      `${count(linear)} of ${count(layers.length)} layers are linear: one record of ${bytes(this.info.record_bytes)} holds the ` +
      `whole past. The others fill pages of ${bytes(this.info.page_bytes)}, one for every ${count(this.info.page_size)} tokens. ` +
      `Dots are checkpoints of this branch.`;
    byId("how-all").textContent =
      `KV cache: every layer keeps the keys and values of all its heads in ${this.info.dtype}, ${bytes(all)} a token. ` +
      `No such model is run; the number is computed from this one's shape.`;
    byId("how-own").textContent = `Own attention everywhere: ${own.description}, ${bytes(own.bytes_per_token)} a token.`;
    byId("table").replaceChildren(
      ...this.points.map((point) =>
        el(
          "tr",
          {},
          el("td", {}, count(point.tokens)),
          el("td", {}, bytes(point.bytes)),
          el("td", {}, bytes(all * point.tokens)),
          el("td", {}, bytes(own.bytes_per_token * point.tokens)),
        ),
      ),
    );
  }
}

function axes(drawing, { width, most, top, x, y }) {
  for (const amount of ticks(top, 4, 1024)) {
    drawing.append(
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(amount), y2: y(amount) }),
      svg("text", { x: MARGIN.left - 8, y: y(amount) + 4, "text-anchor": "end" }, bytes(amount)),
    );
  }
  for (const tokens of ticks(most, 4, 10)) {
    const anchor = x(tokens) > width - 40 ? "end" : "middle";
    const label = tokens === 0 ? "0 tokens" : count(tokens);
    drawing.append(svg("text", { x: tokens === 0 ? MARGIN.left : x(tokens), y: HEIGHT - 10, "text-anchor": tokens === 0 ? "start" : anchor }, label));
  }
}

/** About `number` round values from 0 up to `top`; round in powers of `base`. */
function ticks(top, number, base) {
  const unit = base === 1024 ? 1024 ** Math.floor(Math.log(top) / Math.log(1024)) : 1;
  const step = round(top / unit / number) * unit;
  return Array.from({ length: Math.floor(top / step) + 1 }, (_, index) => index * step);
}

/** The next of 1, 2, 2.5, 5 times a power of ten. */
function round(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].find((factor) => factor * power >= value) * power;
}

/** A round number of tokens, at least `value`. */
function nice(value) {
  const power = 2 ** Math.floor(Math.log2(value));
  return [1, 1.25, 1.5, 1.75, 2].find((factor) => factor * power >= value) * power;
}
