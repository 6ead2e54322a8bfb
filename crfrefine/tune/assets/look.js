// What is seen of a plane, and which intensities are drawn on: windows and ranges.
import { fill, find } from "./page.js";
import { set, state, watch } from "./store.js";

const windows = () => state.about.windows[state.modality];

// A window that was chosen by its name, or by hand, stays for the next case.
export function chooseWindows(name) {
  const same = Math.max(0, windows().findIndex((one) => one.name === name));
  fill(find("window"), windows().map((one, order) => [order, one.name]), same);
  const { low, high } = windows()[1] ?? windows()[0];
  const step = (high - low) / 1000;
  Object.assign(find("level"), { min: low, max: high, step });
  Object.assign(find("width"), { min: step, max: high - low, step });
  if (name === "other") set({ level: state.level });
  else takeWindow();
}

export function takeWindow() {
  const { low, high } = windows()[find("window").value];
  set({ level: (low + high) / 2, width: high - low });
}

// Pixels to the right widen the window; pixels down raise the level, which darkens the picture.
export function changeWindow(byX, byY) {
  const { level, width } = state;
  set({ level: level + (width * byY) / 200, width: width * Math.exp(byX / 200) });
}

watch("level width", () => {
  const { level, width } = state;
  find("level").value = level;
  find("width").value = width;
  const same = windows().findIndex(({ low, high }) =>
    level === (low + high) / 2 && width === high - low);
  find("window").value = same < 0 ? "other" : same;
});

// The range of intensities that are drawn on begins with the window.
watch("limit", () => {
  const { level, limit, width } = state;
  find("range").disabled = !limit;
  if (find("lowest").value) return;
  const [low, high] = [level - width / 2, level + width / 2].map((at) => Number(at.toPrecision(4)));
  find("lowest").value = low;
  find("highest").value = high;
  set({ lowest: low, highest: high });
});
