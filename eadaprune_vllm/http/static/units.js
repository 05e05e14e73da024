// Numbers as people read them.

export const NINES = 5; // no thresholds between 0.99999 and 1

export const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
export const nines = (energy) => Math.min(-Math.log10(Math.max(1 - energy, 10 ** -NINES)), NINES);
export const rounded = (energy) => (energy === null ? "not computed" : Number(energy.toFixed(6)));

// The option of a field "eadaprune" that the page sets.
export const label = (field) => Object.entries(field).filter(([name]) => name !== "enabled").flat().join(" ");

export function bytes(count) {
  let unit = 0;
  for (; count >= 1024 && unit < 3; unit++) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${["B", "KiB", "MiB", "GiB"][unit]}`;
}
