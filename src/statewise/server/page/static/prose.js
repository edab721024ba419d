// A model's text as elements: paragraphs as they are, and fenced code as code. Nothing else is interpreted.

import { el } from "./dom.js";

const FENCE = /^```([\w+#.-]*)[^\S\n]*$/;

/** The parts of a text: [{code: bool, language, text}]. A fence that nobody has closed yet reaches to the end. */
export function parts(text) {
  const found = [];
  let lines = [];
  let language = null;
  const end = () => {
    const joined = lines.join("\n");
    if (language !== null || joined.trim()) found.push({ code: language !== null, language, text: joined });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    if (fence && (language === null || !fence[1])) {
      end();
      language = language === null ? fence[1] : null;
    } else lines.push(line);
  }
  end();
  return found;
}

/** Replace the content of `holder`. */
export function show(holder, text) {
  if (!text.includes("```")) {
    // The usual case, at every token: one text node that grows.
    if (holder.firstChild?.nodeName === "P" && holder.childNodes.length === 1) holder.firstChild.textContent = text;
    else holder.replaceChildren(el("p", {}, text));
    return;
  }
  holder.replaceChildren(
    ...parts(text).map(({ code, language, text: content }) =>
      code
        ? el("pre", { tabindex: 0, role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, el("code", {}, content))
        : el("p", {}, content.replace(/^\n+|\n+$/g, "")),
    ),
  );
}
