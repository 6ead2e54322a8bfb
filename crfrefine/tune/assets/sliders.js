// The controls of the parameters: a slider and a field for each number.
import { clone } from "./page.js";
import { state } from "./store.js";

// From the place of a slider, 0 to 1, to the value, and back.
const power = ({ is_fine: isFine }) => (isFine ? 3 : 1);
const valueAt = (control, place) => Number(
  (control.low + (control.high - control.low) * place ** power(control)).toPrecision(3));
const placeOf = (control, value) => Math.max(
  0, (value - control.low) / (control.high - control.low)) ** (1 / power(control));

const takers = new WeakMap(); // what shows another value in a control

// Show the value that the program has in a control, unless another one was chosen meanwhile.
export const takeValue = (node, { key, value }) =>
  key in state.changes || takers.get(node)(value);

// Build a control. change(key, value) sends a value, a list whole, and promises "", or why it was
// refused.
export function buildControl(control, change) {
  const { is_whole: isWhole, key, low, high, place, title, unit } = control;
  const name = place === null ? key : `${key}.${place}`;
  const ariaLabel = unit ? `${title}, ${unit}` : title;
  let applied = place === null ? control.value : control.value[place];
  const { node, code, field, range, words, wrong } = clone("slider");
  words.textContent = ariaLabel;
  code.textContent = key;
  wrong.id = `wrong-${name}`;
  field.setAttribute("aria-describedby", wrong.id);
  Object.assign(field, { step: isWhole ? 1 : "any", value: applied });
  field.ariaLabel = `${ariaLabel}, value`;
  const scale = isWhole ? { min: low, max: high, step: 1 } : { min: 0, max: 1, step: "any" };
  Object.assign(range, { name, ariaLabel, ...scale });
  const show = (value) => Object.assign(range,
    { value: isWhole ? value : placeOf(control, value), ariaValueText: String(value) });
  const send = (value) => {
    if (place === null) return change(key, value);
    return change(key, (state.changes[key] ?? state.values[key]).with(place, value));
  };
  // A number that does not apply stays in its field, marked, with the one that does.
  const mark = (why) => {
    field.ariaInvalid = String(Boolean(why));
    wrong.textContent = why && `${why}; ${applied} still applies`;
    wrong.hidden = !why;
    if (why) show(applied);
  };
  const put = async (value) => {
    mark("");
    show(value);
    const why = Number.isFinite(value) ? await send(value) : "expected a number";
    if (!why) applied = value;
    else if (Object.is(field.valueAsNumber, value)) mark(why.replace(`${key}: `, ""));
  };
  range.addEventListener("input", () => {
    field.value = isWhole ? range.value : valueAt(control, range.valueAsNumber);
    put(field.valueAsNumber);
  });
  field.addEventListener("change", () => put(field.valueAsNumber));
  show(applied);
  takers.set(node, (values) => {
    applied = place === null ? values : values[place];
    if (node.contains(document.activeElement) || field.ariaInvalid === "true") return;
    field.value = applied;
    show(applied);
  });
  return node;
}
