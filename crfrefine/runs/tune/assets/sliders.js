// The controls of the parameters: a slider and a field for each number.
import { make } from "./page.js";

// From the place of a slider, 0 to 1, to the value, and back.
const power = ({ is_fine }) => (is_fine ? 3 : 1);
const valueAt = (control, place) => Number((control.low + (control.high - control.low) * place ** power(control)).toPrecision(3));
const placeOf = (control, value) => Math.max(0, (value - control.low) / (control.high - control.low)) ** (1 / power(control));

// Put controls into a node. change(key, value) sends a value, a list whole, and promises "", or why it was refused.
export function buildControls(parent, controls, change) {
  const lists = new Map(controls.filter(({ place }) => place !== null).map(({ key, value }) => [key, value]));
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
  const { key, is_whole: isWhole } = control, name = control.place === null ? key : `${key}.${control.place}`;
  let applied = control.place === null ? control.value : control.value[control.place];
  const words = control.unit ? `${control.title}, ${control.unit}` : control.title;
  const scale = isWhole ? { min: control.low, max: control.high, step: 1 } : { min: 0, max: 1, step: "any" };
  const range = make("input", { type: "range", name, ariaLabel: words, ...scale });
  const field = make("input", { type: "number", step: isWhole ? 1 : "any", value: applied, ariaLabel: `${words}, value` });
  const wrong = make("p", { className: "wrong", id: `wrong-${name}`, role: "alert", hidden: true });
  field.setAttribute("aria-describedby", wrong.id);
  const show = (value) => Object.assign(range, { value: isWhole ? value : placeOf(control, value), ariaValueText: String(value) });
  // A number that does not apply stays in its field, marked, with the one that does.
  const mark = (why) => {
    field.ariaInvalid = String(Boolean(why));
    Object.assign(wrong, { textContent: why && `${why}; ${applied} still applies`, hidden: !why });
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
  return make("div", { className: "slider" }, make("div", { className: "name" }, make("span", {}, words, make("code", {}, key)), field), range, wrong);
}
