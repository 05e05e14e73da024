// The two options and their sliders: default, range, and the conversion between position and value.

import {NINES, nines} from "./units.js";

export const scales = {};

// Fills them in from the response of /v1/eadaprune/config.
export function setScales({effective, configured, reference}) {
  const lowest = Math.ceil((reference.min_target + 5e-5) * 1000) / 1000; // the server's bounds are rounded
  const highest = Math.floor((reference.max_target - 5e-5) * 1000) / 1000;
  scales.target = {
    start: effective.target ?? Math.min(Math.max(reference.kept, lowest), highest),
    min: lowest,
    max: highest,
    step: 0.001,
    value: (position) => position,
    position: (value) => value,
  };
  const {energy_floor: floor, energy_ceiling: ceiling} = configured;
  const end = ceiling === null || ceiling === 1 ? NINES + 0.05 : nines(ceiling);
  scales.energy = {
    start: effective.enabled ? effective.energy : 1,
    min: nines(floor ?? 0.5),
    max: end,
    step: "any",
    value: (position) => {
      if (position >= end) return ceiling ?? 1;
      return Math.max(Number((1 - Number((10 ** -position).toPrecision(3))).toFixed(7)), floor ?? 0);
    },
    position: (value) => (value === 1 ? end : nines(value)),
  };
}
