// Two questions: which key, and which name.

import { byId } from "./dom.js";

/** The text that the reader gives, or null. */
function asked(dialog, field) {
  return new Promise((resolve) => {
    const end = () => resolve(dialog.returnValue === "given" && field.value.trim() ? field.value.trim() : null);
    dialog.returnValue = "";
    dialog.addEventListener("close", end, { once: true });
    dialog.showModal();
    field.focus();
  });
}

export function setUpDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close("given");
    });
    dialog.querySelector("[data-cancel]").addEventListener("click", () => dialog.close(""));
  }
}

export async function askKey(refused) {
  byId("key-refused").hidden = !refused;
  byId("key").value = "";
  const given = await asked(byId("key-dialog"), byId("key"));
  byId("key").value = "";
  return given;
}

export async function askName() {
  byId("name").value = "";
  return asked(byId("name-dialog"), byId("name"));
}
