// The state of the page, in one object, and what follows when a part of it changes.
import { findAll } from "./page.js";

const watchers = [];

// Each control of the page with `data-state` has an entry of its own, too.
/** @type {any} */
export const state = {
  number: 0, // of the open case
  leaving: null, // the case that another one is to replace
  list: { open: 0, cases: [], folder: {} }, // of the cases
  at: 0, // the case that was opened, or could not be
  about: null, // what the program says of the case once
  place: [], // the voxel under the crosshair, upright
  under: null, // what is under the pointer
  measured: 0, // mm between the ends of the ruler
  labels: [], // of the case, each with its label, name and color
  version: 0, // of the labels: it rises with each edit and with each result
  result: null, // the facts of the newest one
  strokes: { drawn: 0, can_undo: false, can_redo: false },
  values: {}, // of the parameters of the case, by their keys, which the program keeps
  preset: "case", changes: {}, // what was chosen, and the program has not confirmed yet
  large: 0, // number of the plane that is shown large
  level: 0, width: 1, // of the intensities between black and white
  hidden: new Set(), // labels
  tool: "", // "" is the crosshair, "hand" moves the picture; else the value that is drawn
};

// Call a function after changes of any of the entries, whose names are separated by spaces.
export const watch = (names, act) => watchers.push({ names: names.split(" "), act });

export function set(changes) {
  Object.assign(state, changes);
  const isChanged = (name) => name in changes;
  for (const { names, act } of watchers) if (names.some(isChanged)) act();
}

export const parameters = () => ({ preset: state.preset, changes: state.changes });
export const isChosen = () => state.preset !== "case" || Object.keys(state.changes).length > 0;

// Keep no longer what the program has confirmed, or refused.
export function forgetChosen({ preset, changes }) {
  const rest = Object.entries(state.changes).filter(([key, value]) => changes[key] !== value);
  set({ preset: state.preset === preset ? "case" : state.preset,
    changes: Object.fromEntries(rest) });
}

function valueOf({ type, checked, value, valueAsNumber }) {
  if (type === "checkbox") return checked;
  return type === "number" || type === "range" ? valueAsNumber : value;
}

// Take the values of the controls, now and whenever they change.
export function bindControls() {
  for (const node of findAll("[data-state]:not([type=radio])")) {
    state[node.dataset.state] = valueOf(node);
  }
  for (const type of ["input", "change"]) {
    document.addEventListener(type, ({ target }) => {
      const node = /** @type {any} */ (target);
      if (node.dataset.state) set({ [node.dataset.state]: valueOf(node) });
    }, true);
  }
}
