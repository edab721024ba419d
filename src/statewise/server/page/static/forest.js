// Sessions as a forest: what several of them begin with is one path, and they part where they differ.

import { digest, spoken } from "./format.js";

/**
 * The roots of all conversations. A node is the end of a turn:
 *   key, parent, children; end (tokens), turn (number, -1 for a root), messages (that the turn added);
 *   owners (sessions that it is part of), tips (sessions that end here), names;
 *   bytes (of the state here, null where nobody said), kept ({num_tokens, tier} of the checkpoint, or null).
 */
export function forest(sessions) {
  const roots = new Map();
  for (const session of sessions) {
    if (!roots.has(session.root)) roots.set(session.root, node(null, `root ${session.root}`, 0, -1, []));
    let here = roots.get(session.root);
    here.owners.push(session.id);
    for (const step of steps(session)) here = descend(here, session, step);
    here.tips.push(session.id);
    here.bytes ??= session.data.bytes;
  }
  return [...roots.values()];
}

/** The nodes of a session from its root to its end. */
export function pathOf(roots, id) {
  const path = [];
  let level = roots;
  for (;;) {
    const next = level.find((candidate) => candidate.owners.includes(id));
    if (!next) return path;
    path.push(next);
    level = next.tips.includes(id) ? [] : next.children;
  }
}

/**
 * The rows that are shown, from the top: each node with its lane, the open lanes that pass it by with the nodes ahead on
 * them, and whether it begins a branch. A question that was answered once is shown with its answer.
 */
export function rows(roots) {
  const found = [];
  for (const root of roots) walk(root, 0, [], false, found);
  return found;
}

function walk(first, lane, open, isBranch, found) {
  for (let here = first; here; ) {
    const question = foldsInto(here) ? here : null;
    if (question) here = here.children[0];
    const [trunk, ...branches] = here.children;
    found.push({ node: here, question, lane, open, isBranch, goesOn: Boolean(trunk) });
    branches.forEach((branch, index) => {
      const passing = { lane, ahead: [trunk, ...branches.slice(index + 1)] };
      walk(branch, lane + 1, [...open, passing], true, found);
    });
    isBranch = false;
    here = trunk;
  }
}

/** Whether a node is a question that needs no row of its own. */
function foldsInto(here) {
  if (here.turn < 0 || here.tips.length || here.names.length || here.children.length !== 1) return false;
  return here.messages.at(-1)?.role === "user" && here.children[0].messages[0]?.role === "assistant";
}

function steps(session) {
  const { turns, spoken: counts, messages } = session.data;
  let before = 0;
  return turns.map((end, turn) => {
    const upTo = Math.max(before, counts[turn] ?? 0);
    const added = messages.slice(before, upTo);
    before = upTo;
    return { end, turn, messages: added };
  });
}

function descend(parent, session, { end, turn, messages }) {
  const said = messages.length ? messages.map((one) => `${one.role}\0${spoken(one)}`).join("\0") : `turn of ${session.root}`;
  const key = digest(`${parent.key}\0${end}\0${said}`);
  let here = parent.children.find((child) => child.key === key);
  if (!here) {
    here = node(parent, key, end, turn, messages);
    parent.children.push(here);
  }
  here.owners.push(session.id);
  const { checkpoints, tree } = session.data;
  for (const [name, at] of Object.entries(checkpoints)) {
    if (at === end && !here.names.includes(name)) here.names.push(name);
  }
  // The last token of an answer is not computed before something follows it, so the state is kept in front of it.
  const kept = tree.filter((point) => point.num_tokens <= end && point.num_tokens > parent.end).at(-1);
  here.kept ??= kept ?? null;
  here.bytes ??= kept && end - kept.num_tokens <= 1 ? kept.bytes : null;
  return here;
}

function node(parent, key, end, turn, messages) {
  return { parent, key, end, turn, messages, children: [], owners: [], tips: [], names: [], bytes: null, kept: null };
}
