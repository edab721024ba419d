// The tree of checkpoints: one row for each turn, drawn like a history with branches, walked with the arrow keys.

import { byId, el, svg } from "./dom.js";
import { bytes, count, plural, shortened, spoken } from "./format.js";
import { rows } from "./forest.js";

const ROW = 54; // pixels, as in the style sheet
const LANE = 18;
const LEFT = 14;
const MAX_LANE = 6;
const TIERS = { device: "on the device", host: "in host memory", disk: "on the disk" };

const holder = byId("tree");

export class Tree {
  /** `onSelect` gets a node; `onAct` the name of an action on the selected one. */
  constructor(onSelect, onAct) {
    this.onSelect = onSelect;
    this.onAct = onAct;
    this.rows = [];
    this.items = [];
    this.selected = null; // a node
    holder.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** Show a forest. `path` is the current branch, `numbers` those of the sessions, by id. */
  show(roots, path, numbers) {
    const focused = holder.contains(document.activeElement);
    const current = new Set(path);
    this.rows = rows(roots);
    this.selected = this.found(this.selected) ?? path.at(-1) ?? this.rows.at(-1)?.node ?? null;
    this.items = this.rows.map((row) => item(row, current, path.at(-1), numbers));
    this.items.forEach((one, index) => {
      one.addEventListener("click", () => this.select(index, true));
      one.addEventListener("dblclick", () => this.onAct("open"));
    });
    holder.replaceChildren(...this.items);
    this.mark();
    if (focused) this.items[this.index]?.focus();
  }

  select(index, focus) {
    this.selected = this.rows[index].node;
    this.mark();
    if (focus) this.items[index].focus();
    this.onSelect(this.selected);
  }

  /** Select a node of the current forest, such as where a new branch begins. */
  selectNode(node) {
    const index = this.rows.findIndex((row) => row.node === node);
    if (index >= 0) this.select(index, false);
  }

  get index() {
    return this.rows.findIndex((row) => row.node === this.selected);
  }

  found(node) {
    return node && this.rows.find((row) => row.node.key === node.key)?.node;
  }

  mark() {
    this.items.forEach((one, index) => {
      const is = index === this.index;
      one.setAttribute("aria-selected", String(is));
      one.tabIndex = is ? 0 : -1;
      if (is) one.scrollIntoView({ block: "nearest" });
    });
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const index = this.index;
    const { node, lane } = this.rows[index] ?? {};
    const moves = {
      ArrowDown: index + 1,
      ArrowUp: index - 1,
      Home: 0,
      End: this.rows.length - 1,
      ArrowLeft: this.rows.findLastIndex((row, at) => at < index && isAbove(row.node, node)),
      ArrowRight: this.rows.findIndex((row, at) => at > index && (row.lane > lane || isAbove(node, row.node))),
    };
    const acts = { f: "fork", r: "rewind", Enter: "actions", " ": "actions", Delete: "remove" };
    if (event.key in moves) {
      const to = moves[event.key];
      if (to >= 0 && to < this.rows.length) this.select(to, true);
    } else if (event.key in acts) this.onAct(acts[event.key]);
    else return;
    event.preventDefault();
  }
}

/** Whether one node lies on the way to another. */
function isAbove(first, node) {
  for (let here = node?.parent; here; here = here.parent) if (here === first) return true;
  return false;
}

function titles(row) {
  const { node, question } = row;
  if (node.turn < 0) return ["Start", "nothing said yet"];
  const asked = (question ?? node).messages.findLast((message) => message.role === "user");
  const answered = node.messages.findLast((message) => message.role === "assistant");
  if (asked) return [shortened(spoken(asked)), answered ? shortened(spoken(answered)) || "(empty)" : "not answered"];
  if (answered) return [shortened(spoken(answered)), "answer"];
  return [`Turn ${node.turn + 1}`, plural(node.end - (node.parent?.end ?? 0), "token")];
}

function item(row, current, tip, numbers) {
  const { node, lane } = row;
  const [title, subtitle] = titles(row);
  const tips = node.tips.map((id) =>
    el("span", { class: node === tip ? "chip here" : "chip" }, `branch ${numbers.get(id)}`),
  );
  const names = node.names.map((name) => el("span", { class: "chip name" }, shortened(name, 24)));
  const one = el(
    "div",
    {
      role: "treeitem",
      class: current.has(node) ? "row current" : "row",
      "aria-level": lane + 1,
      "aria-current": node === tip ? "step" : null,
    },
    gutter(row, current),
    el(
      "div",
      { class: "row-text" },
      el("div", { class: "row-title" }, el("span", { class: "ellipsis" }, title), ...names),
      el(
        "div",
        { class: "row-sub" },
        el("span", { class: "ellipsis" }, subtitle),
        ...tips,
        el("span", { class: "amount" }, node.end ? plural(node.end, "token") : ""),
      ),
    ),
  );
  one.style.setProperty("--gutter", `${width(lane)}px`);
  return one;
}

function x(lane) {
  return LEFT + LANE * Math.min(lane, MAX_LANE);
}

function width(lane) {
  return x(lane) + LEFT;
}

function gutter({ node, lane, open, isBranch, goesOn }, current) {
  const middle = ROW / 2;
  const drawing = svg("svg", { class: "gutter", width: width(lane), height: ROW, "aria-hidden": "true" });
  const line = (d, on) => drawing.append(svg("path", { d, class: on ? "edge on" : "edge" }));
  for (const passing of open) line(`M${x(passing.lane)} 0V${ROW}`, passing.ahead.some((one) => current.has(one)));
  if (isBranch) line(`M${x(lane - 1)} 0Q${x(lane - 1)} ${middle} ${x(lane)} ${middle}`, current.has(node));
  else if (node.parent) line(`M${x(lane)} 0V${middle}`, current.has(node));
  if (goesOn) line(`M${x(lane)} ${middle}V${ROW}`, node.children.some((child) => current.has(child)));
  const state = node.turn < 0 ? "start" : node.kept && node.end - node.kept.num_tokens <= 1 ? "kept" : "gone";
  const on = current.has(node) ? " on" : "";
  if (node.tips.length) drawing.append(svg("circle", { cx: x(lane), cy: middle, r: 9, class: `halo${on}` }));
  drawing.append(svg("circle", { cx: x(lane), cy: middle, r: 5, class: `dot ${state}${on}` }));
  return drawing;
}

/** What the page says of a node, in a line. */
export function described(node) {
  if (node.turn < 0) return "The empty start of the conversation";
  const behind = `${plural(node.end, "token")}${node.bytes ? ` · ${bytes(node.bytes)}` : ""}`;
  const left = node.kept ? node.end - node.kept.num_tokens : node.end - (node.parent?.end ?? 0);
  if (node.kept && left <= 1) return `${behind} · kept ${TIERS[node.kept.tier] ?? node.kept.tier}`;
  return `${behind} · not kept: ${count(left)} tokens are computed again`;
}
