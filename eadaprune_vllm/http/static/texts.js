// What people copy: a request, or the flags of a server.

import {apiKey, COMPLETIONS, url} from "./server.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a shell

function serialized(field, yes = "true") {
  return `{${Object.entries(field).map(([key, value]) => `"${key}": ${value === true ? yes : value}`).join(", ")}}`;
}

// By kind: the text for a picture {name, type}, a model's name and the field "eadaprune".
export const texts = {
  curl({name, type}, model, field) {
    const here = (value) => JSON.stringify(value).replace(/[\\$`]/g, "\\$&"); // in a here-document
    const key = apiKey() ? ' -H "Authorization: Bearer $OPENAI_API_KEY"' : "";
    return `image="data:${type};base64,$(base64 < ${quoted(name)} | tr -d '\\n')"
curl ${quoted(url(COMPLETIONS))} -H "Content-Type: application/json"${key} -d @- <<END
{"model": ${here(model)}, "messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "$image"}},
  {"type": "text", "text": "What is in the picture?"}]}],
 "eadaprune": ${serialized(field)}}
END`;
  },
  python({name, type}, model, field) {
    const key = apiKey() ? "" : ', api_key="none"';
    return `import base64
from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(url("v1"))}${key})
with open(${JSON.stringify(name)}, "rb") as file:
    image = base64.b64encode(file.read()).decode()
answer = client.chat.completions.create(
    model=${JSON.stringify(model)},
    messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": f"data:${type};base64,{image}"}},
        {"type": "text", "text": "What is in the picture?"},
    ]}],
    extra_body={"eadaprune": ${serialized(field, "True")}},
)
print(answer.choices[0].message.content, answer.usage.prompt_tokens)`;
  },
  // A server's own target ends before that of a request, so beyond there is the threshold of the decision, if there is one.
  flags(picture, model, field, {max_default_target: most}, image) {
    const beyond = field.target > most && image?.target === field.target;
    const {enabled, ...option} = beyond ? {enabled: field.enabled, energy: image.energy_threshold} : field;
    const flags = Object.entries(option).map(([key, value]) => ` --eadaprune-${key} ${value}`);
    return `vllm serve MODEL --plugin eadaprune${enabled ? " --eadaprune-enabled" : ""}${flags.join("")}`;
  },
};
