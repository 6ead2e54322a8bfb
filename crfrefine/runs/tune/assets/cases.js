// The cases of a folder: their states, the next and the previous one, and what is not saved yet.
import { ask, attempt, fill, find, make } from "./page.js";

const ORDERS = [["name", "name"], ["-1", "largest change first"], ["1", "smallest change first"]];
const WAIT = 700; // milliseconds between looks while changes are counted
let page = null;
let cases = [];
let open = 0;

// The numbers of the cases in the order that was chosen; those without a count come last.
function ordered() {
  const numbers = [...cases.keys()];
  const sign = Number(find("order").value);
  if (Number.isNaN(sign)) return numbers;
  const value = (number) => sign * (cases[number].changed ?? sign * Infinity);
  return numbers.sort((one, other) => value(one) - value(other) || one - other);
}

export function showCases(list) {
  ({ open, cases } = list);
  const order = ordered();
  const at = order.indexOf(open);
  const numSaved = cases.filter(({ state }) => state === "saved").length;
  find("cases").hidden = cases.length < 2;
  find("next-case").disabled = at === cases.length - 1;
  find("previous-case").disabled = at === 0;
  find("case-count").textContent = `${at + 1} of ${cases.length}, ${numSaved} saved`;
  find("case-list").replaceChildren(...order.map(entry));
  find("order").ariaBusy = String(list.is_counting);
  if (list.is_counting) setTimeout(refreshCases, WAIT);
}

export const refreshCases = () => attempt(ask("cases").then(showCases));

function entry(number) {
  const { name, state, changed, is_counted: isCounted } = cases[number];
  const words = changed === null ? "cannot be refined" : `${changed.toLocaleString("en")} changed`;
  const button = make("button", { type: "button", onclick: () => go(number) },
    make("span", {}, name), make("span", { className: `state ${state}` }, state),
    make("span", { className: "count" }, isCounted ? words : ""));
  if (number === open) button.setAttribute("aria-current", "true");
  return make("li", {}, button);
}

// The case that follows in the order by so many, undefined at an end.
const neighbor = (by) => ordered()[ordered().indexOf(open) + by];

export function readAhead() {
  const number = neighbor(1);
  if (number !== undefined) ask("read-ahead", { number }).catch(() => {}); // Opening reports it.
}

// Open a case; if strokes of the present one are not saved, ask what becomes of them.
async function go(number) {
  if (number === undefined || number === open) return;
  await page.edited();
  if (page.isUnsaved()) {
    const choice = await choose();
    if (choice === "stay" || (choice === "save" && !(await page.saveCase()))) return;
  }
  const isOpen = await attempt(ask("open", { number }).then(showCases));
  if (isOpen && (await attempt(page.openCase(number)))) readAhead();
}

function choose() {
  const dialog = find("unsaved");
  find("unsaved-case").textContent = cases[open].name;
  find("save-and-open").hidden = find("save-case").hidden;
  dialog.returnValue = "stay"; // also that of the Escape key
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
  });
}

// `host` opens and saves cases, and says whether strokes are not saved: see tune.js.
export function startCases(host, list) {
  page = host;
  fill(find("order"), ORDERS, "name");
  find("order").addEventListener("change", async () => {
    const isKnown = find("order").value === "name" || cases.every((one) => one.is_counted);
    if (!isKnown) await ask("count-changes", page.parameters());
    refreshCases();
  });
  find("next-case").addEventListener("click", () => go(neighbor(1)));
  find("previous-case").addEventListener("click", () => go(neighbor(-1)));
  showCases(list);
}
