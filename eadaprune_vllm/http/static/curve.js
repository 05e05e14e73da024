// The energy of the first k tokens. Both axes are logarithmic, because useful thresholds are close to 1.

import {$} from "./server.js";
import {nines} from "./units.js";

const HEIGHT = 190;

function node(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

const budget = (image) => image.kept_tokens - image.newline_tokens;

// Draws the curve of an image, where its threshold meets it, and where that of another decision about it does.
export function draw(image, other) {
  const {curve, energy_threshold: threshold, visual_tokens: all} = image;
  const [left, right, top, bottom] = [62, $("curve").clientWidth - 8, 10, HEIGHT - 42];
  const energyAt = (each) =>
    each.spectral_energy ?? each.span_energy ?? curve.findLast(([tokens]) => tokens <= budget(each))[1];
  const marked = other ? [other, image] : [image];
  const shown = [...marked.map((each) => each.energy_threshold), ...curve.map(([, energy]) => energy)];
  const most = Math.max(1, Math.ceil(Math.max(...shown.filter((energy) => energy < 1).map(nines), 0)));
  const x = (tokens) => left + ((right - left) * Math.log(tokens)) / Math.log(Math.max(all, 2));
  const y = (energy) => bottom - ((bottom - top) * Math.min(nines(energy), most)) / most;
  const parts = [];
  const label = (text, x, y, anchor, kind = "", more = {}) =>
    parts.push(node("text", {x, y, "text-anchor": anchor, class: kind, ...more}, text));
  const line = (kind, x1, x2, y1, y2) => parts.push(node("line", {class: kind, x1, x2, y1, y2}));
  for (let digits = 0; digits <= most; digits++) {
    const energy = 1 - 10 ** -digits;
    line("grid", left, right, y(energy), y(energy));
    label(energy.toFixed(digits), left - 6, y(energy) + 4, "end");
  }
  for (let tokens = 1; x(tokens) < right - 40; tokens *= 10) label(tokens, x(tokens), bottom + 17, "middle");
  label(all, right, bottom + 17, "end");
  label("tokens, most energy first", (left + right) / 2, HEIGHT - 6, "middle");
  label("energy", 11, (top + bottom) / 2, "middle", "", {transform: `rotate(-90 11 ${(top + bottom) / 2})`});
  const points = curve.map(([tokens, energy]) => `${x(tokens).toFixed(1)} ${y(energy).toFixed(1)}`);
  parts.push(node("path", {class: "line", d: `M${points.join("L")}`}));
  line("mark", left, right, y(threshold), y(threshold));
  for (const each of marked) {
    const tokens = budget(each);
    const kind = each === image ? "at" : "other";
    line(`mark ${kind}`, x(tokens), x(tokens), top, bottom);
    parts.push(node("circle", {class: kind, cx: x(tokens), cy: y(energyAt(each)), r: 4.5}));
    // On the side with room for the number: away from the other, or else from the axis.
    const before = other ? tokens < budget(each === image ? other : image) : x(tokens) > left + 60;
    label(tokens, x(tokens) + (before ? -7 : 7), bottom - 6, before ? "end" : "start", kind);
  }
  $("curve").replaceChildren(...parts);
  $("curve").setAttribute("aria-label", `Energy over tokens: ${energyAt(image)} at ${budget(image)} of ${all}`);
}
