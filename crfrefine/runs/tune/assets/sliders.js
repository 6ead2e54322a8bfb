// The controls of the parameters: a slider and a field for each number.
import { make } from "./page.js";

// From the place of a slider, 0 to 1, to the value, and back.
const power = ({ is_fine: isFine }) => (isFine ? 3 : 1);
const valueAt = (control, place) => Number(
  (control.low + (control.high - control.low) * place ** power(control)).toPrecision(3));
const placeOf = (control, value) => Math.max(
  0, (value - control.low) / (control.high - control.low)) ** (1 / power(control));

// Put controls into a node. change(key, value) sends a value, a list whole, and promises "", or why
// it was refused.
export function buildControls(parent, controls, change) {
  const inLists = controls.filter(({ place }) => place !== null);
  const lists = new Map(inLists.map(({ key, value }) => [key, value]));
  const send = async ({ key, place }, value) => {
    if (place === null) return change(key, value);
    const former = lists.get(key);
    lists.set(key, former.with(place, value));
    const why = await change(key, lists.get(key));
    if (why) lists.set(key, lists.get(key).with(place, former[place]));
    return why;
  };
  parent.replaceChildren(...controls.map((control) => slider(control, send)));
}

function slider(control, send) {
  const { is_whole: isWhole, key, low, high, place, title, unit } = control;
  const name = place === null ? key : `${key}.${place}`;
  let applied = place === null ? control.value : control.value[place];
  const ariaLabel = unit ? `${title}, ${unit}` : title;
  const scale = isWhole ? { min: low, max: high, step: 1 } : { min: 0, max: 1, step: "any" };
  const range = make("input", { type: "range", name, ariaLabel, ...scale });
  const field = make("input", { type: "number", step: isWhole ? 1 : "any", value: applied,
    ariaLabel: `${ariaLabel}, value` });
  const wrong = make("p", { className: "wrong", id: `wrong-${name}`, role: "alert", hidden: true });
  field.setAttribute("aria-describedby", wrong.id);
  const show = (value) => Object.assign(range,
    { value: isWhole ? value : placeOf(control, value), ariaValueText: String(value) });
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
    const why = Number.isFinite(value) ? await send(control, value) : "expected a number";
    if (!why) applied = value;
    else if (Object.is(field.valueAsNumber, value)) mark(why.replace(`${key}: `, ""));
  };
  range.addEventListener("input", () => {
    field.value = isWhole ? Number(range.value) : valueAt(control, Number(range.value));
    put(field.valueAsNumber);
  });
  field.addEventListener("change", () => put(field.valueAsNumber));
  show(applied);
  const words = make("span", {}, ariaLabel, make("code", {}, key));
  const head = make("div", { className: "name" }, words, field);
  return make("div", { className: "slider" }, head, range, wrong);
}
