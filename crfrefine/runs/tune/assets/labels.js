// The tools and the list of labels: what is drawn, and which labels are seen.
import { BACKGROUND } from "./drawing.js";
import { find, make, swatch } from "./page.js";
import { set, state, watch } from "./store.js";

/** @type {[string, string, number|null, string][]} key, name, value and look */
const TOOLS = [["m", "crosshair", null, "crosshair"], ["v", "move", null, "hand"],
  ["0", "background", BACKGROUND, "hatched"], ["e", "erase", 0, "crossed"]];
const COLORS = { hatched: "#fff", crossed: "#888" };
const MAX_KEYS = 9; // labels with a key of their own

function choice(tool, key, attributes, ...content) {
  const box = make("input", { type: "radio", name: "brush", tool, ...attributes });
  if (key) box.dataset.key = key;
  box.addEventListener("change", () => set({ tool }));
  return make("label", { className: "choice" }, box, ...content);
}

// Build both for a case; the tool of the former case stays chosen if this one has it.
export function buildLabels() {
  const { labels, tool: former } = state;
  const isFormer = ({ value, isHand }) => value === former.value && isHand === former.isHand;
  find("tools").replaceChildren(...TOOLS.map(([key, name, value, look]) => {
    const tool = { value, color: COLORS[look] ?? "transparent", isHand: key === "v" };
    return choice(tool, key, { checked: isFormer(tool) }, swatch("", look), name);
  }));
  const drawn = labels.filter(({ label }) => label !== BACKGROUND);
  find("brushes").replaceChildren(...drawn.map(({ label, name, color }) => {
    const tool = { value: label, color, isHand: false };
    const key = label <= MAX_KEYS ? String(label) : "";
    const row = choice(tool, key, { checked: isFormer(tool) }, swatch(color), name);
    // The list is one stop of the Tab key: a key shows and hides the chosen label, too.
    const eye = make("input", { type: "checkbox", tabIndex: -1, className: "eye",
      ariaLabel: `show ${name}`, title: "Show (H)", checked: !state.hidden.has(label) });
    eye.addEventListener("change", () => showLabel(label, eye.checked));
    const node = make("div", { className: "label" }, row, eye);
    node.dataset.label = label;
    return node;
  }));
  filterLabels();
}

// The label on the list with a number, undefined if there is none.
const rowOf = (label) => find("brushes").querySelector(`[data-label="${label}"]`);

export function filterLabels() {
  const words = find("filter").value.toLowerCase().split(" ");
  for (const row of find("brushes").children) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
}

function showLabel(label, isShown) {
  const hidden = new Set(state.hidden);
  hidden[isShown ? "delete" : "add"](label);
  set({ hidden });
}

export const showAllLabels = (isShown) =>
  set({ hidden: new Set(isShown ? [] : state.labels.map(({ label }) => label)) });

export function toggleChosen() {
  const { hidden, tool: { value } } = state;
  if (rowOf(value)) showLabel(value, hidden.has(value));
}

// Take the label at a voxel of the picture; background is a tool.
export function pick(label) {
  const box = label ? rowOf(label)?.querySelector("[type=radio]") : find("tools").querySelector(
    '[data-key="0"]');
  if (!box) return;
  if (label && rowOf(label).hidden) {
    find("filter").value = "";
    filterLabels();
  }
  box.click();
  box.scrollIntoView({ block: "nearest" });
}

watch("hidden", () => {
  for (const row of find("brushes").children) {
    row.querySelector(".eye").checked = !state.hidden.has(Number(row.dataset.label));
  }
});
