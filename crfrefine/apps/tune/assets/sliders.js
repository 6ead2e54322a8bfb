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

// Put controls into a node. change(key, value) sends a value, a list whole, and promises "", or why it was refused.
export function buildControls(parent, controls, change) {
  const lists = new Map(controls.filter((control) => Array.isArray(control.value)).map((control) => [control.key, [...control.value]]));
  const send = (control, value) => {
    const list = lists.get(control.key);
    if (!list) return change(control.key, value);
    list[control.place] = value;
    return change(control.key, [...list]);
  };
  const restore = (control, value) => { if (lists.has(control.key)) lists.get(control.key)[control.place] = value; };
  parent.replaceChildren(...controls.map((control) => (control.choices ? choice(control, change) : slider(control, send, restore))));
}

function title(control) {
  const words = control.unit ? `${control.title}, ${control.unit}` : control.title;
  return [words, make("span", {}, words, make("code", {}, control.key))];
}

function choice(control, change) {
  const select = make("select", { name: control.key }, ...control.choices.map((text) => make("option", { value: text, textContent: text })));
  select.value = control.value;
  select.addEventListener("change", () => change(control.key, select.value));
  return make("div", { className: "slider" }, make("label", { className: "name" }, title(control)[1], select));
}

function slider(control, send, restore) {
  let applied = Array.isArray(control.value) ? control.value[control.place] : control.value;
  const isWhole = control.scale === "whole", name = control.place === null ? control.key : `${control.key}.${control.place}`;
  const range = make("input", { type: "range", name, min: isWhole ? control.low : 0, max: isWhole ? control.high : STEPS, step: isWhole ? 1 : "any" });
  const field = make("input", { type: "number", step: isWhole ? 1 : "any", value: applied });
  const wrong = make("p", { className: "wrong", id: `wrong-${name}`, hidden: true }), [words, node] = title(control);
  wrong.setAttribute("role", "alert");
  range.setAttribute("aria-label", words);
  field.setAttribute("aria-label", `${words}, value`);
  field.setAttribute("aria-describedby", wrong.id);
  const place = (value) => {
    range.value = placeOf(control, value);
    range.setAttribute("aria-valuetext", String(value));
  };
  // A number that does not apply stays in its field, marked, with the one that does.
  const mark = (why) => {
    field.setAttribute("aria-invalid", String(Boolean(why)));
    wrong.textContent = why && `${why}; ${applied} still applies`;
    wrong.hidden = !why;
  };
  const refuse = (why) => {
    mark(why);
    place(applied);
    restore(control, applied);
  };
  const put = async (value) => {
    mark("");
    place(value);
    const why = await send(control, value);
    if (why === "") applied = value;
    else if (field.valueAsNumber === value) refuse(why.replace(`${control.key}: `, ""));
  };
  range.addEventListener("input", () => {
    field.value = valueAt(control, Number(range.value));
    put(field.valueAsNumber);
  });
  field.addEventListener("change", () => {
    if (Number.isFinite(field.valueAsNumber)) put(field.valueAsNumber);
    else refuse("expected a number");
  });
  place(applied);
  return make("div", { className: "slider" }, make("div", { className: "name" }, node, field), range, wrong);
}
