// What can be done at a node of the tree. Each returns what to say; `stays`: the node stays selected.

import { askName } from "./dialogs.js";
import { bytes } from "./format.js";

const GONE_MS = 60_000; // by then a download has begun

export const actions = {
  async fork(sessions, node) {
    const made = await sessions.fork(node);
    return { said: `Branch ${made.number} begins here. What follows elsewhere stays as it is.` };
  },

  async rewind(sessions, node) {
    await sessions.rewind(node);
    return { said: "Gone back. What you send now is said here." };
  },

  open(sessions, node) {
    sessions.open(sessions.ownerOf(node));
    return { said: "", stays: true };
  },

  async name(sessions, node) {
    const name = await askName();
    if (name === null) return { said: "", stays: true };
    await sessions.name(node, name);
    return { said: `Named “${name}”.`, stays: true };
  },

  async pin(sessions, node) {
    await sessions.pin(node);
    return { said: "The state is kept for an hour, before all that is not pinned.", stays: true };
  },

  async export(sessions, node) {
    const file = await sessions.exported(node);
    download(file, `conversation-${node.end}-tokens.state`);
    return { said: `Exported ${bytes(file.size)}.`, stays: true };
  },

  async remove(sessions, node) {
    const id = sessions.tipOf(node);
    const { number } = sessions.known.get(id);
    await sessions.remove(id);
    return { said: `Branch ${number} is deleted.` };
  },
};

function download(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), GONE_MS);
}
