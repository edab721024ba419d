// The conversation as it reads: questions, answers, and what each answer took.

import { byId, el } from "./dom.js";
import { count, milliseconds, plural, rate, spoken } from "./format.js";
import { show } from "./prose.js";

const NAMES = { user: "You", assistant: "Answer", system: "System prompt", tool: "Tool" };
const NEAR_END = 80; // pixels: who has scrolled up further than this is left where they are

const log = byId("messages");
const scroller = byId("scroller");

/** Show the nodes of a path. `figures` are those of turns, by key. */
export function showPath(path, figures) {
  const articles = [];
  for (const node of path) {
    node.messages.forEach((message, index) => {
      const last = index === node.messages.length - 1;
      articles.push(article(message, last ? figures[node.key] : null));
    });
    if (!node.messages.length && node.turn >= 0) articles.push(silent(node));
  }
  log.replaceChildren(...articles);
  const empty = path.every((node) => node.turn < 0);
  byId("empty").hidden = !empty;
  log.hidden = empty;
  toEnd(true);
}

/** An answer that is being written: put text behind it, say what went wrong, end it. */
export class LiveAnswer {
  constructor(question) {
    this.text = "";
    this.question = article({ role: "user", content: question }, null);
    this.article = article({ role: "assistant", content: "" }, null);
    this.article.classList.add("writing");
    this.holder = this.article.querySelector(".text");
    this.frame = 0;
  }

  /** Show it behind what is shown. */
  attach() {
    byId("empty").hidden = true;
    log.hidden = false;
    log.append(this.question, this.article);
    log.setAttribute("aria-busy", "true");
    toEnd(true);
  }

  add(text) {
    this.text += text;
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      show(this.holder, this.text);
      toEnd(false);
    });
  }

  end() {
    cancelAnimationFrame(this.frame);
    show(this.holder, this.text);
    this.article.classList.remove("writing");
    log.setAttribute("aria-busy", "false");
  }
}

function article(message, figures) {
  const role = NAMES[message.role] ? message.role : "tool";
  const holder = el("div", { class: "text" });
  show(holder, spoken(message));
  return el(
    "article",
    { class: `message ${role}`, "aria-label": NAMES[role] },
    role === "system" || role === "tool" ? el("p", { class: "role" }, NAMES[role]) : null,
    holder,
    figures ? footer(figures) : null,
  );
}

function silent(node) {
  const tokens = node.end - (node.parent?.end ?? 0);
  return el("p", { class: "note" }, `A turn of ${plural(tokens, "token")} without messages: it was sent as text or token ids.`);
}

function footer(figures) {
  const parts = [];
  if (figures.prompt) parts.push(reuse(figures));
  if (figures.first) parts.push(el("span", {}, `first token ${milliseconds(figures.first)}`));
  if (figures.rate) parts.push(el("span", {}, `${rate(figures.rate)} tokens/s`));
  if (figures.completion) parts.push(el("span", {}, plural(figures.completion, "token")));
  if (figures.note) parts.push(el("span", { class: "warn" }, figures.note));
  return el("p", { class: "figures" }, ...parts);
}

function reuse({ cached, prompt }) {
  const fill = el("span", { class: "fill" });
  fill.style.width = `${(100 * cached) / prompt}%`;
  return el(
    "span",
    { class: "reuse", title: "Tokens of the prompt whose state was found in a checkpoint and not computed again" },
    el("span", { class: "bar", "aria-hidden": "true" }, fill),
    `reused ${count(cached)} of ${plural(prompt, "token")}`,
  );
}

function toEnd(always) {
  const left = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  if (always || left < NEAR_END) scroller.scrollTop = scroller.scrollHeight;
}
