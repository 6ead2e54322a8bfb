// What is seen of a plane, and which intensities are drawn on: windows, contours, ranges.
import { CHANGED, fill, find } from "./page.js";
import { set, state } from "./store.js";

// A window that was chosen by its name, or by hand, stays for the next case.
export function chooseWindows(name) {
  const windows = state.about.windows[state.modality];
  const same = windows.findIndex((one) => one.name === name);
  fill(find("window"), windows.map((one, order) => [order, one.name]), Math.max(0, same), "other");
  const all = windows[1] ?? windows[0];
  const step = (all.high - all.low) / 1000;
  Object.assign(find("level"), { min: all.low, max: all.high, step });
  Object.assign(find("width"), { min: step, max: all.high - all.low, step });
  if (name === "other") find("window").value = CHANGED;
  else takeWindow(windows[Math.max(0, same)]);
}

export const takeWindow = ({ low, high }) => setWindow((low + high) / 2, high - low);

function setWindow(level, width) {
  set({ window: { low: level - width / 2, high: level + width / 2 } });
  [find("level").value, find("width").value] = [level, width];
}

// Pixels to the right widen the window; pixels down raise the level, which darkens the picture.
export function changeWindow(byX, byY) {
  const { low, high } = state.window;
  find("window").value = CHANGED;
  setWindow((low + high) / 2 + ((high - low) * byY) / 200, (high - low) * Math.exp(byX / 200));
}

export function slideWindow() {
  find("window").value = CHANGED;
  setWindow(find("level").valueAsNumber, find("width").valueAsNumber);
}

export function setRange() {
  const isLimited = find("limit").checked;
  for (const id of ["lowest", "highest"]) find(id).disabled = !isLimited;
  if (isLimited && !find("lowest").value) {
    const { low, high } = state.window;
    find("lowest").value = Number(low.toPrecision(4));
    find("highest").value = Number(high.toPrecision(4));
  }
  const [low, high] = [find("lowest").valueAsNumber, find("highest").valueAsNumber];
  set({ range: isLimited && low <= high ? { low, high } : null });
}

export function setShown(name, isShown) {
  const shown = new Set(state.shown);
  shown[isShown ? "add" : "delete"](name);
  set({ shown });
}

// The next option of a select, after the last one the first.
export function turn(id) {
  const select = find(id);
  select.selectedIndex = (select.selectedIndex + 1) % select.length;
  select.dispatchEvent(new Event("change"));
}
