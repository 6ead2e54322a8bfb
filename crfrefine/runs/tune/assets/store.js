// The state of the page, in one object, and what follows when a part of it changes.

/** @typedef {{label: number, name: string, color: string}} Label */
/** @typedef {{value: number|null, color: string, isHand: boolean}} Tool */

const watchers = [];

export const state = {
  number: 0, // of the open case
  about: null, // what the program says of the case once
  /** @type {number[]} */ place: [], // the voxel under the crosshair, upright
  /** @type {Label[]} */ labels: [],
  version: 0, // of the labels: it rises with each edit and with each result
  result: null, // the facts of the newest one
  strokes: { drawn: 0, can_undo: false, can_redo: false, problem: "" },
  preset: "", changes: {}, // the parameters
  // What is seen. `since` is what changes are shown against: "", "network", or "former", the labels
  // before the last stroke.
  modality: 0, window: { low: 0, high: 1 }, isSmooth: true, opacity: 0, since: "",
  shown: new Set(), hidden: new Set(),
  // What is drawn with. `shape` is "disk", "ball" or "outline"; `range` limits the intensities.
  /** @type {Tool} */ tool: { value: null, color: "transparent", isHand: false },
  size: 3, shape: "disk", range: null,
  drawnOn: null, // the plane of the last stroke, until its whole result is there
};

// Call a function after changes of any of the entries, whose names are separated by spaces.
export const watch = (names, act) => watchers.push({ names: names.split(" "), act });

export function set(changes) {
  Object.assign(state, changes);
  const isChanged = (name) => name in changes;
  for (const { names, act } of watchers) if (names.some(isChanged)) act();
}

export const parameters = () => ({ preset: state.preset, changes: state.changes });
