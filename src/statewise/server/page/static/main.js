// The page: what happens when something is sent, clicked or pressed.

import { actions } from "./actions.js";
import { answer } from "./answering.js";
import { forgetKey, get, hasKey, onKeyNeeded } from "./api.js";
import { Chart } from "./chart.js";
import { askKey, setUpDialogs } from "./dialogs.js";
import { announce, byId } from "./dom.js";
import { bytes, plural } from "./format.js";
import { Live } from "./live.js";
import { LiveAnswer, showPath } from "./messages.js";
import { say, trying } from "./notice.js";
import { Sessions } from "./sessions.js";
import { setUpSettings } from "./settings.js";
import { Tree, described } from "./tree.js";

const LOADING_MS = 1000;
const SETTLE_MS = 150; // between two looks at a session whose answer was stopped
const SETTLE_TRIES = 20;

const input = byId("input");
const chart = new Chart();
const live = new Live();
const tree = new Tree(showSelected, act);
let sessions = null;
let info = null;
let writing = null; // the answer that is being written: {id, controller, live}

// Showing

function showAll() {
  const roots = sessions.forest;
  const path = sessions.path(sessions.currentId, roots);
  const numbers = new Map([...sessions.known.values()].map(({ id, number }) => [id, number]));
  tree.show(roots, path, numbers);
  showSelected(tree.selected);
  showPath(path, sessions.figures);
  if (writing?.live && writing.id === sessions.currentId) writing.live.attach();
  chart.show(info, path);
  const { current } = sessions;
  byId("branch").textContent = current?.data
    ? `Branch ${current.number} · ${plural(current.data.num_tokens, "token")} · ${bytes(current.data.bytes)} of state`
    : "";
  byId("no-tree").hidden = roots.length > 0;
  byId("node-actions").hidden = !roots.length;
}

/** The same, with the end of the branch selected, where the reader is now. */
function showAtEnd() {
  tree.selected = null;
  showAll();
}

function showSelected(node) {
  byId("node-about").textContent = node ? described(node) : "";
  const here = node?.owners.includes(sessions.currentId);
  const isTip = node?.tips.length > 0;
  enable("fork", node);
  enable("rewind", node && node.end < endOf(node), "This branch ends here");
  enable("open", node && !here);
  enable("name", isTip && node.end > 0, "Only the end of a branch can be named: fork here first");
  enable("pin", node?.end > 0);
  enable("export", node?.end > 0);
  enable("remove", isTip, "Choose the end of a branch");
}

function endOf(node) {
  return sessions.known.get(sessions.ownerOf(node))?.data?.num_tokens ?? 0;
}

function enable(action, can, why = "") {
  const button = document.querySelector(`[data-act="${action}"]`);
  button.disabled = !can;
  button.title = can ? button.dataset.tip : why || button.dataset.tip;
}

// Asking

async function send(question) {
  if (writing || !info || !question.trim()) return;
  const controller = new AbortController();
  writing = { id: null, controller, live: null };
  busy(true);
  input.value = "";
  const done = await trying(() => converse(question, controller));
  if (!done) input.value ||= question;
  writing = null;
  busy(false);
  if (done) showAtEnd();
  else showAll();
}

async function converse(question, controller) {
  const session = sessions.current ?? (await sessions.begin());
  const before = session.data.num_tokens;
  writing.id = session.id;
  const shown = (writing.live = new LiveAnswer(question));
  shown.attach();
  let figures = null;
  try {
    figures = await answer(session, question, controller.signal, (text) => shown.add(text));
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    figures = { note: "stopped" };
  } finally {
    shown.end();
    await settled(session, before, shown.text !== "").catch(() => {});
  }
  const end = sessions.path(session.id).at(-1);
  if (end && session.data.num_tokens > before) sessions.measured(end.key, figures);
  announce(figures.note === "stopped" ? "Stopped." : `Answer: ${shown.text}`);
  return session.data.num_tokens > before || shown.text !== "";
}

/** Look at the session again until an answer has become part of it. */
async function settled(session, before, hasText) {
  for (let tries = 0; tries < SETTLE_TRIES; tries += 1) {
    await sessions.refresh(session.id);
    if (!hasText || session.data.num_tokens > before) return;
    await new Promise((resolve) => setTimeout(resolve, SETTLE_MS));
  }
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  if (!is && document.activeElement === document.body) input.focus();
}

function stop() {
  writing?.controller.abort();
}

// The tree's actions

async function act(action) {
  const node = tree.selected;
  if (action === "actions") {
    document.querySelector("#node-actions button:not(:disabled)")?.focus();
    return;
  }
  const button = document.querySelector(`[data-act="${action}"]`);
  if (!node || button.disabled) return;
  if (action === "remove" && writing?.id === sessions.tipOf(node)) stop();
  const done = await trying(() => actions[action](sessions, node));
  if (done === undefined) return;
  if (done.stays) showAll();
  else showAtEnd();
  say(done.said);
  // A button that the action has switched off would take the focus with it.
  if (button.disabled && document.activeElement === document.body) byId("tree").querySelector('[tabindex="0"]')?.focus();
}

async function takeIn(file) {
  await trying(async () => {
    const session = await sessions.importFile(file);
    showAtEnd();
    say(`Taken in as branch ${session.number}, ${plural(session.data.num_tokens, "token")}; nothing was computed.`);
  });
}

// Setting up

function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("[data-view-button]")) {
    const is = button.dataset.viewButton === name;
    if (is) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  chart.draw();
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(input.value);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(input.value);
    }
  });
  byId("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && writing && !document.querySelector("dialog[open]")) stop();
  });
  byId("new").addEventListener("click", () => {
    sessions.open(null);
    view("chat");
    say("");
    showAtEnd();
    input.focus();
  });
  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => send(button.dataset.example));
  }
  for (const button of document.querySelectorAll("[data-act]")) {
    button.dataset.tip = button.title;
    button.addEventListener("click", () => act(button.dataset.act));
  }
  for (const button of document.querySelectorAll("[data-view-button]")) {
    button.addEventListener("click", () => view(button.dataset.viewButton));
  }
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) await takeIn(file);
    event.target.value = "";
  });
  byId("forget-key").addEventListener("click", () => {
    forgetKey();
    location.reload();
  });
}

/** The model's facts, as soon as it is loaded. */
async function whenLoaded() {
  for (;;) {
    try {
      return await get("v1/statewise/info");
    } catch (error) {
      if (error.code !== "overloaded") throw error;
      say("The model is being loaded…");
      await new Promise((resolve) => setTimeout(resolve, LOADING_MS));
    }
  }
}

async function begin() {
  setUpSettings();
  setUpDialogs();
  onKeyNeeded(askKey);
  listen();
  view("chat");
  sessions = new Sessions();
  await trying(async () => {
    info = await whenLoaded();
    say("");
    byId("model").textContent = info.model;
    byId("model-about").textContent = `${info.architecture}, ${info.dtype}`;
    document.title = `${info.model} · Statewise`;
    const lost = await sessions.restore();
    showAll();
    if (lost) say(`${plural(lost, "branch", "branches")} of this page ${lost === 1 ? "is" : "are"} no longer on the server.`);
    byId("send").disabled = false;
    byId("forget-key").hidden = !hasKey();
    document.body.dataset.ready = "true";
    if (matchMedia("(min-width: 760px)").matches) input.focus();
  });
  live.start();
}

begin();
