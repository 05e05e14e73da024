// A question about the picture, answered with every token and with those that are kept.

import {$, COMPLETIONS, post} from "./server.js";
import {label} from "./units.js";

const MAX_TOKENS = 128;
let asked = new AbortController();

function card(title) {
  const made = document.createElement("article");
  made.append(...["h2", "p", "small"].map((name) => document.createElement(name)));
  made.children[0].textContent = title;
  made.setAttribute("aria-busy", true);
  return made;
}

async function answer(shown, body, signal) {
  const [, text, tokens] = shown.children;
  try {
    const {choices: [{message}], usage} = await post(COMPLETIONS, body, {signal});
    text.textContent = message.content?.trim() || "(no text)";
    tokens.textContent = `${usage.prompt_tokens} tokens in the prompt`;
  } catch (error) {
    text.textContent = error.message;
    text.className = "bad";
  }
  shown.setAttribute("aria-busy", false);
}

// Both at the same time. ``field`` is the request's field "eadaprune".
export function ask(model, picture, field) {
  forget();
  const content = [
    {type: "image_url", image_url: {url: picture.url}},
    {type: "text", text: $("question").value},
  ];
  const body = {model, messages: [{role: "user", content}], max_tokens: MAX_TOKENS, temperature: 0};
  const both = [["Every token", {energy: 1}], [`Pruned, ${label(field)}`, field]];
  $("answers").replaceChildren(
    ...both.map(([title, eadaprune]) => {
      const shown = card(title);
      answer(shown, {...body, eadaprune}, asked.signal);
      return shown;
    }),
  );
}

// What was asked about another picture.
export function forget() {
  asked.abort();
  asked = new AbortController();
  $("answers").replaceChildren();
}
