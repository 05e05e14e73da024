// What pruning keeps of a picture, as the server says.

import {ask, forget} from "./ask.js";
import {draw} from "./curve.js";
import {scales, setScales} from "./scales.js";
import {$, apiKey, call, COMPLETIONS, post, setApiKey, url} from "./server.js";
import {texts} from "./texts.js";
import {bytes, label, percent, rounded} from "./units.js";

const PAUSE = 150; // milliseconds without input before a preview is requested
const SAMPLES = ["photograph-astronaut.jpg", "photograph-coffee.jpg", "page-invoice.png", "chart-bars.png",
  "screen-desktop.png", "surface-wall.jpg"];

let config = null; // response of /v1/eadaprune/config
let picture = null; // {name, type, size, url} of what is shown
let found = null; // response of /v1/eadaprune/preview for it
let accepted = null; // the last field "eadaprune" that the server accepted
let pinned = null; // the image of a preview to compare with
let pending = null; // AbortController of the current request
let timer = 0; // of the next request
let taken = 0; // number of the last file that was taken

const checked = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;
const model = () => $("models").value;

// The request's field "eadaprune".
function optionsField() {
  const field = {[checked("option")]: Number($("value").value)};
  return config.effective.enabled ? field : {enabled: true, ...field};
}

// ---- the server

async function configure() {
  try {
    config = await call("v1/eadaprune/config");
  } catch (error) {
    return showError(error.message);
  }
  showError("");
  setScales(config);
  const {models, architecture, vllm_version: version, endpoints, reference} = config;
  document.querySelector("input[value=target]").disabled = scales.target.min >= scales.target.max;
  $("model").textContent = [...(models.length > 1 ? [] : models), architecture, `vLLM ${version}`].join(" · ");
  $("models").replaceChildren(...models.map((name) => new Option(name)));
  $("several").hidden = models.length < 2;
  $("asking").hidden = !endpoints.includes(`/${COMPLETIONS}`);
  const kinds = [...Object.entries(reference.kept_by_kind), ["all", reference.kept]];
  $("kinds").querySelector("table").replaceChildren(...kinds.map(([kind, share]) => {
    const row = $("kind").content.firstElementChild.cloneNode(true);
    const [name, bar, number] = row.cells;
    name.textContent = kind === "all" ? "on average" : `${kind}s`;
    bar.querySelector("div div").style.width = `${100 * share}%`;
    number.textContent = percent(share);
    return row;
  }));
  reset();
}

// Asks for a decision about ``file``, or the picture; without one, whether the server accepts the options.
async function preview(file = picture) {
  clearTimeout(timer);
  pending?.abort();
  pending = null;
  if (!config || $("value").value === "") return busy(false);
  const {signal} = (pending = new AbortController());
  const content = file ? [{type: "image_url", image_url: {url: file.url}}] : [];
  const field = optionsField();
  const body = {model: model(), messages: [{role: "user", content}], eadaprune: field, overlay: true};
  busy(Boolean(file));
  try {
    const answer = await post("v1/eadaprune/preview", body, {signal});
    if (signal.aborted) return;
    showError("");
    accepted = field;
    if (file && file !== picture) setPicture(file);
    found = file && answer;
    if (found) show();
    write();
    $("copy").disabled = false;
  } catch (error) {
    if (signal.aborted) return;
    showError(file && file !== picture ? `${file.name}: ${error.message}` : error.message);
  }
  busy(false);
}

function schedule() {
  $("copy").disabled = true;
  clearTimeout(timer);
  timer = setTimeout(preview, PAUSE);
}

// ---- output

function showError(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function busy(is) {
  const start = Date.now();
  clearInterval(busy.clock);
  $("picture").setAttribute("aria-busy", is);
  $("progress").hidden = true;
  if (!is) return;
  busy.clock = setInterval(() => {
    $("progress").textContent = `The server encodes and decides: ${Math.round((Date.now() - start) / 1000)} s`;
    $("progress").hidden = false;
  }, 1000);
}

// In words, what determined the budget, and where the slider moves to no effect.
function showBound({bound, spectral_energy: spectral, span_energy: span, kept_tokens: kept}) {
  const {min_share: share, min_tokens: tokens} = config.effective;
  const most = bound === "max_tokens";
  const held = bound && !most ? (spectral ?? span) : null; // no smaller threshold keeps fewer tokens
  $("bound").textContent = {
    min_share: `the smallest share, ${percent(share)}`,
    min_tokens: `the minimum, ${tokens} tokens`,
    max_tokens: `the maximum, ${kept} tokens`,
  }[bound] ?? "the threshold";
  $("meaning").textContent = most
    ? `max_tokens sets the budget: a larger value keeps the same ${kept} tokens.`
    : held ? `${bound} sets the budget: up to energy ${rounded(held)} the picture keeps these ${kept} tokens.` : "";
  const {min, max, position} = scales.energy;
  const idle = held && checked("option") === "energy" ? (position(held) - min) / (max - min) : 0;
  $("idle").style.width = `${100 * Math.min(Math.max(idle, 0), 1)}%`;
}

function show() {
  const {kept_tokens: kept, visual_tokens: all, kv_cache_bytes_saved: saved, tokens_saved, images: [image]} = found;
  $("shown").src = image.overlay;
  $("shown").alt = `${picture.name}; patches that are pruned are dark and grey`;
  $("caption").textContent = `${label(accepted)}: ${kept} of ${all}`;
  $("kept").textContent = kept;
  $("of").textContent = `of ${all} tokens kept`;
  $("share").textContent = percent(kept / all);
  $("bar").style.width = `${(100 * kept) / all}%`;
  $("bytes").textContent = bytes(saved) + (tokens_saved ? ` of ${bytes((saved / tokens_saved) * all)}` : "");
  $("threshold").textContent = image.energy_threshold;
  $("spectral").textContent = rounded(image.spectral_energy);
  $("span").textContent = rounded(image.span_energy);
  $("selector").textContent = image.selector;
  $("pin").hidden = false;
  showBound(image);
  drawCurve();
}

function drawCurve() {
  draw(found.images[0], pinned);
}

function pin() {
  pinned = pinned ? null : found.images[0];
  document.body.classList.toggle("comparing", Boolean(pinned));
  $("pin").textContent = pinned ? "Show one" : "Compare";
  $("pinned").hidden = !pinned;
  if (pinned) {
    const [image, caption] = $("pinned").children;
    image.src = $("shown").src;
    caption.textContent = $("caption").textContent;
    image.alt = `${picture.name} at ${caption.textContent}`;
    $("slider").focus();
  }
  drawCurve();
}

function write() {
  const shown = picture ?? {name: "picture.jpg", type: "image/jpeg"};
  $("text").textContent = texts[checked("text")](shown, model(), accepted, config.reference, found?.images[0]);
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("text").textContent);
  } catch { // there is no clipboard without HTTPS
    getSelection().selectAllChildren($("text"));
    document.execCommand("copy");
  }
  $("copy").textContent = $("said").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy", $("said").textContent = ""), 1500);
}

// ---- input

function choose(value = scales[checked("option")].start) {
  const scale = scales[checked("option")];
  for (const name of ["min", "max", "step"]) $("slider")[name] = scale[name];
  $("slider").value = scale.position(value);
  announce($("value").value = value);
  schedule();
}

// To the server's default.
function reset() {
  const {target, enabled} = config.effective;
  document.querySelector(`input[value=${target !== null && enabled ? "target" : "energy"}]`).checked = true;
  choose();
}

// The slider's value for screen readers.
function announce(value) {
  $("slider").setAttribute("aria-valuetext", `${checked("option")} ${value}`);
}

// Shows the file at once if this browser can; if not, when the server could read it.
async function take(file) {
  if (!file) return;
  const turn = ++taken;
  if (!/^image\/[\w.+-]+$/.test(file.type)) return showError(`${file.name} is not a picture.`);
  const read = new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
  try {
    const next = {name: file.name, type: file.type, size: file.size, url: await read};
    const bitmap = await createImageBitmap(file).catch(() => null);
    bitmap?.close();
    if (turn !== taken) return;
    if (bitmap) setPicture(next);
    preview(next);
  } catch (error) {
    showError(error.message);
  }
}

function setPicture(next) {
  if (pinned) pin();
  forget();
  found = null;
  picture = next;
  document.querySelector("main").classList.remove("empty");
  $("shown").src = picture.url;
  $("shown").alt = picture.name;
  $("pin").hidden = true;
  $("name").textContent = `${picture.name}, ${bytes(picture.size)}`;
  $("choose").textContent = "Choose another";
}

async function takeSample(name) {
  const response = await fetch(url(`eadaprune/${name}`)).catch(() => null);
  if (!response?.ok) return showError("The server does not respond.");
  const blob = await response.blob();
  take(new File([blob], name, {type: blob.type}));
}

$("samples").replaceChildren(...SAMPLES.map((name) => {
  const button = document.createElement("button");
  const image = new Image();
  image.src = url(`eadaprune/${name}`);
  image.alt = name.replace(/[-.](?=\w)/, ": ").replace(/\.\w+$/, "");
  button.type = "button";
  button.append(image);
  button.onclick = () => takeSample(name);
  return button;
}));
$("file").onchange = () => take($("file").files[0]);
$("choose").onclick = () => $("file").click();
$("pin").onclick = pin;
$("default").onclick = () => config && reset();
$("copy").onclick = copy;
$("models").onchange = schedule;
$("slider").oninput = () => {
  if (!config) return;
  announce($("value").value = scales[checked("option")].value(Number($("slider").value)));
  schedule();
};
$("value").oninput = () => {
  if (!config) return;
  $("slider").value = scales[checked("option")].position(Number($("value").value));
  announce($("value").value);
  schedule();
};
$("keyed").onsubmit = (event) => {
  event.preventDefault();
  setApiKey($("key").value);
  configure();
};
$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (accepted) ask(model(), picture, accepted);
};
for (const option of document.querySelectorAll("input[name=option]")) option.onchange = () => config && choose();
for (const text of document.querySelectorAll("input[name=text]")) text.onchange = () => accepted && write();
document.onpaste = (event) => take(event.clipboardData.files[0]);
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
};
document.ondragleave = (event) => event.relatedTarget || document.body.classList.remove("dragging");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files[0]);
};
onresize = () => found && drawCurve();
if (apiKey()) {
  $("keyed").hidden = false;
  $("key").value = apiKey();
}
configure();
