// One line above all parts of the page: what was done, or what went wrong.

import { ApiFailure } from "./api.js";
import { byId } from "./dom.js";

const GONE_MS = 8000; // what was done is said for so long; an error stays

const box = byId("notice");
const line = byId("notice-text");
let timer = 0;

byId("notice-close").addEventListener("click", () => say(""));

export function say(message, isError = false) {
  clearTimeout(timer);
  box.hidden = !message;
  box.classList.toggle("error", isError);
  line.setAttribute("role", isError ? "alert" : "status");
  line.textContent = message;
  if (message && !isError) timer = setTimeout(() => say(""), GONE_MS);
}

/** The result of something that may fail. Says in one sentence what went wrong, and returns undefined then. */
export async function trying(work) {
  say("");
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    say(error instanceof ApiFailure ? error.message : `The page has failed: ${error.message}`, true);
    if (!(error instanceof ApiFailure)) console.error(error);
    return undefined;
  }
}
