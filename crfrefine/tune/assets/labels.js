// The list of labels: what is drawn, and which labels are seen. The form has both.
import { BACKGROUND } from "./drawing.js";
import { clone, find, findAll } from "./page.js";
import { set, state } from "./store.js";

const MAX_KEYS = 9; // labels with a key of their own

const tools = () => findAll("[name=brush]");
const eyes = () => findAll(".eye");

// Build the list for a case; the tool of the former case stays chosen if this one has it.
export function buildLabels() {
  const drawn = state.labels.filter(({ label }) => label !== BACKGROUND);
  find("brushes").replaceChildren(...drawn.map(({ label, name, color }) => {
    const { node, eye, swatch, title, tool } = clone("label-row");
    tool.value = label;
    if (label <= MAX_KEYS) tool.dataset.key = label;
    swatch.style.background = color;
    title.textContent = name;
    Object.assign(eye, { value: label, ariaLabel: `show ${name}` });
    eye.checked = !state.hidden.has(label);
    return node;
  }));
  (tools().find(({ value }) => value === state.tool) ?? tools()[0]).click();
  filterLabels();
}

export function filterLabels() {
  const words = find("filter").value.toLowerCase().split(" ");
  for (const row of find("brushes").children) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
}

// Keys in the filter: Enter takes the first label that is found, Tab reaches it, and Escape shows
// all of them again.
export function pressInFilter(event) {
  const found = tools().find((tool) => tool.closest(".label")?.checkVisibility());
  if (!["Enter", "Escape", "Tab"].includes(event.key) || event.shiftKey) return;
  if (event.key === "Tab" && !found) return;
  event.preventDefault();
  if (event.key === "Tab") return void found.focus();
  if (event.key === "Enter") found?.click();
  find("filter").value = "";
  set({ filter: "" });
  find("filter").blur();
}

export function takeEyes() {
  const closed = eyes().filter(({ checked }) => !checked);
  set({ hidden: new Set(closed.map(({ value }) => Number(value))) });
}

export function showAllLabels(isShown) {
  for (const eye of eyes()) eye.checked = isShown;
  takeEyes();
}

export const toggleChosen = () => eyes().find(({ value }) => value === state.tool)?.click();

// Take the label under the pointer; background is a tool.
export function pick() {
  if (!state.under) return;
  const value = String(state.under.refined || BACKGROUND);
  const tool = tools().find((one) => one.value === value);
  if (!tool) return;
  if (tool.closest(".label")?.hidden) {
    find("filter").value = "";
    filterLabels();
  }
  tool.click();
  tool.scrollIntoView({ block: "nearest" });
}
