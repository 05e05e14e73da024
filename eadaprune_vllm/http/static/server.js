// The server: its addresses, its API key, its errors.

const KEY = "eadaprune-key"; // in sessionStorage, which ends with the tab

export const COMPLETIONS = "v1/chat/completions";
export const $ = (id) => document.getElementById(id);
export const url = (path) => new URL(path, document.baseURI).href;
export const apiKey = () => sessionStorage.getItem(KEY);
export const setApiKey = (key) => sessionStorage.setItem(KEY, key);

export async function call(path, settings = {}) {
  const key = apiKey();
  const headers = {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
  let response;
  try {
    response = await fetch(url(path), {...settings, headers});
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not respond.");
  }
  if (response.status === 401) {
    $("keyed").hidden = false;
    $("key").focus();
    throw new Error(key ? "The server rejects this API key." : "This server needs an API key.");
  }
  const body = await response.json().catch(() => null);
  if (!response.ok || !body) {
    throw new Error(body?.error?.message ?? `The server responds with ${response.status} ${response.statusText}.`);
  }
  return body;
}

export const post = (path, body, settings) => call(path, {...settings, method: "POST", body: JSON.stringify(body)});
