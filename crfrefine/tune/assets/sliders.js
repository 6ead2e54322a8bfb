// The controls of the parameters: a slider and a field for each number, a list for each choice.
import { make } from "./planes.js";

const STEPS = 1000;
const rounded = (value) => Number(value.toPrecision(3));

// From the place of a slider, 0 to STEPS, to the value, and back.
function valueAt(control, place) {
  const share = place / STEPS, { low, high } = control;
  if (control.scale === "whole") return place;
  if (control.scale === "log") return rounded(low * (high / low) ** share);
  if (control.scale === "cubic") return rounded(high * share ** 3);
  return rounded(low + (high - low) * share);
}

function placeOf(control, value) {
  const { low, high } = control;
  if (control.scale === "whole") return value;
  if (control.scale === "log") return (STEPS * Math.log(Math.max(value, low) / low)) / Math.log(high / low);
  if (control.scale === "cubic") return STEPS * Math.cbrt(Math.max(value, 0) / high);
  return (STEPS * (value - low)) / (high - low);
}

// Put controls into a node. onChange(key, value) hears of every change; entries of a list come with their whole list.
export function buildControls(parent, controls, onChange) {
  const lists = new Map(controls.filter((control) => Array.isArray(control.value)).map((control) => [control.key, [...control.value]]));
  const send = (control, value) => {
    if (!lists.has(control.key)) { onChange(control.key, value); return; }
    lists.get(control.key)[control.place] = value;
    onChange(control.key, [...lists.get(control.key)]);
  };
  parent.replaceChildren(...controls.map((control) => (control.choices ? choice(control, onChange) : slider(control, send))));
}

function choice(control, onChange) {
  const select = make("select", { name: control.key }, ...control.choices.map((text) => make("option", { value: text, textContent: text })));
  select.value = control.value;
  select.addEventListener("change", () => onChange(control.key, select.value));
  return make("div", { className: "slider" }, make("label", { className: "name" }, control.title, select));
}

function slider(control, send) {
  const value = Array.isArray(control.value) ? control.value[control.place] : control.value;
  const isWhole = control.scale === "whole", name = control.place === null ? control.key : `${control.key}.${control.place}`;
  const range = make("input", { type: "range", name, min: isWhole ? control.low : 0, max: isWhole ? control.high : STEPS, step: isWhole ? 1 : "any" });
  const field = make("input", { type: "number", step: isWhole ? 1 : "any", value });
  const words = control.unit ? `${control.title}, ${control.unit}` : control.title;
  range.value = placeOf(control, value);
  range.setAttribute("aria-label", words);
  range.setAttribute("aria-valuetext", String(value));
  field.setAttribute("aria-label", `${words}, value`);
  range.addEventListener("input", () => {
    const chosen = valueAt(control, Number(range.value));
    field.value = chosen;
    range.setAttribute("aria-valuetext", String(chosen));
    send(control, chosen);
  });
  field.addEventListener("change", () => {
    if (field.value === "" || !Number.isFinite(field.valueAsNumber)) return;
    range.value = placeOf(control, field.valueAsNumber);
    send(control, field.valueAsNumber);
  });
  const unit = make("span", { className: "unit", textContent: control.unit ? ` ${control.unit}` : "" });
  return make("div", { className: "slider", title: control.key }, make("div", { className: "name" }, make("span", { textContent: control.title }), make("span", {}, field, unit)), range);
}
