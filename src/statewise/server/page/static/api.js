// The server's API: one sentence for whatever goes wrong, and a key where one is asked for.

import { remember, remembered } from "./dom.js";

const KEY = "statewise.key";
const BUSY_TRIES = 20;
const BUSY_MS = 250;

export class ApiFailure extends Error {
  constructor(message, status = 0, code = null) {
    super(/[.!?…]$/.test(message) ? message : `${message}.`);
    this.status = status;
    this.code = code;
  }
}

let key = remembered("sessionStorage", KEY, null);
let ask = async () => null;
let asked = null; // the question that is on the screen, for all who wait for its answer

/** Who asks the reader for a key: gets whether one was refused, gives a key or null. */
export function onKeyNeeded(asker) {
  ask = asker;
}

export function hasKey() {
  return key !== null;
}

export function forgetKey() {
  key = null;
  remember("sessionStorage", KEY, null);
}

async function newKey() {
  asked ??= ask(key !== null).finally(() => (asked = null));
  const given = await asked;
  if (given === null) throw new ApiFailure("This needs an API key: reload the page to give one", 401, "invalid_api_key");
  key = given;
  remember("sessionStorage", KEY, key);
}

async function failure(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // something in between has answered
  }
  return new ApiFailure(
    error?.message ?? `The server answered with status ${response.status}`,
    response.status,
    error?.code ?? null,
  );
}

/**
 * The response to a request, which is a good one. `json` is sent as JSON, `body` as it is. With `quiet` no key is asked
 * for. Throws `ApiFailure`, and AbortError where `signal` says so.
 */
export async function request(method, path, { json, body, signal, quiet } = {}) {
  for (let tries = 0; ; ) {
    const used = key;
    const headers = {};
    if (used !== null) headers.Authorization = `Bearer ${used}`;
    if (json !== undefined) headers["Content-Type"] = "application/json";
    else if (body !== undefined) headers["Content-Type"] = "application/octet-stream";
    let response;
    try {
      const content = json === undefined ? body : JSON.stringify(json);
      response = await fetch(path, { method, headers, body: content, signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiFailure("The server cannot be reached");
    }
    if (response.ok) return response;
    if (response.status === 401 && !quiet) {
      if (key === used) await newKey();
      continue;
    }
    const failed = await failure(response);
    // The end of an answer that was stopped a moment ago.
    if (failed.code !== "session_in_use" || ++tries >= BUSY_TRIES) throw failed;
    await new Promise((resolve) => setTimeout(resolve, BUSY_MS));
  }
}

export async function get(path, options) {
  return (await request("GET", path, options)).json();
}

export async function post(path, json = {}) {
  return (await request("POST", path, { json })).json();
}

/** The events of a streamed answer. Throws `ApiFailure` for an event that tells of an error. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ApiFailure(event.error.message, 0, event.error.code);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiFailure("The connection to the server was lost");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
