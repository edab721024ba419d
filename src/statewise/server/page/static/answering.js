// One answer: asked for, streamed, measured.

import { events, request } from "./api.js";
import { sampling, systemMessages } from "./settings.js";

const LEAST_MS = 50; // what comes in a shorter time came at once, and says nothing of the speed

/**
 * Ask in a session and pass on the text as it comes. Returns what the turn took:
 *   {prompt, cached, completion: tokens; first: ms until the first text; rate: tokens/s after it; note}.
 * Throws `ApiFailure`; AbortError where `signal` says so.
 */
export async function answer(session, question, signal, onText) {
  const messages = [{ role: "user", content: question }];
  if (!session.data.num_tokens) messages.unshift(...systemMessages());
  const json = {
    ...sampling(),
    messages,
    session_id: session.id,
    stream: true,
    stream_options: { include_usage: true },
  };
  const begin = performance.now();
  const response = await request("POST", "v1/chat/completions", { json, signal });
  const figures = {};
  let last = begin;
  for await (const event of events(response)) {
    for (const choice of event.choices) {
      const text = (choice.delta.reasoning_content ?? "") + (choice.delta.content ?? "");
      if (text) {
        last = performance.now();
        figures.first ??= last - begin;
        onText(text);
      }
      if (choice.finish_reason === "length") figures.note = "cut at the most tokens";
    }
    if (event.usage) {
      figures.prompt = event.usage.prompt_tokens;
      figures.cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
      figures.completion = event.usage.completion_tokens;
    }
  }
  const writing = last - begin - (figures.first ?? 0);
  if (writing >= LEAST_MS && figures.completion > 1) figures.rate = (1000 * (figures.completion - 1)) / writing;
  return figures;
}
