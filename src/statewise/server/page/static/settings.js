// What every request asks for besides its messages. Fields that are left empty are not sent.

import { byId, remember, remembered } from "./dom.js";

const STORED = "statewise.settings";
const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "seed",
  "presence_penalty",
  "frequency_penalty",
  "repetition_penalty",
];
const FIELDS = [...NUMBERS, "stop_at", "system"];
const DEFAULTS = { temperature: "0" };

export function setUpSettings() {
  const stored = { ...DEFAULTS, ...remembered("localStorage", STORED, {}) };
  for (const name of FIELDS) {
    const field = byId(name);
    field.value = stored[name] ?? "";
    field.addEventListener("change", keep);
  }
  byId("reset-settings").addEventListener("click", () => {
    for (const name of FIELDS) byId(name).value = DEFAULTS[name] ?? "";
    keep();
  });
}

function keep() {
  remember("localStorage", STORED, Object.fromEntries(FIELDS.map((name) => [name, byId(name).value])));
}

/** The fields of a request. */
export function sampling() {
  const fields = {};
  for (const name of NUMBERS) {
    const value = byId(name).valueAsNumber;
    if (!Number.isNaN(value)) fields[name] = value;
  }
  const stop = byId("stop_at").value.split("\n").filter((line) => line);
  if (stop.length) fields.stop = stop;
  return fields;
}

/** The messages that a new conversation begins with. */
export function systemMessages() {
  const content = byId("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}
