// The cases of a folder: their states, the next and the previous one, and where strokes are kept.
import { ask, attempt, fill, find, make, tell } from "./page.js";

const ORDERS = [["name", "name"], ["-1", "largest change first"], ["1", "smallest change first"]];
const WAIT = 700; // milliseconds between looks while changes are counted
let page = null;
let cases = [];
let open = 0;
let folder = {};
const STATES = { outdated: "older than the parameters" };

// The numbers of the cases in the order that was chosen; those without a count come last.
function ordered() {
  const numbers = [...cases.keys()];
  const sign = Number(find("order").value);
  if (Number.isNaN(sign)) return numbers;
  const value = (number) => sign * (cases[number].changed ?? sign * Infinity);
  return numbers.sort((one, other) => value(one) - value(other) || one - other);
}

export function showCases(list) {
  ({ open, cases, folder } = list);
  const order = ordered();
  const at = order.indexOf(open);
  const numSaved = cases.filter(({ state }) => state === "saved").length;
  find("cases").hidden = cases.length < 2;
  find("next-case").disabled = at === cases.length - 1;
  find("previous-case").disabled = at === 0;
  find("case-count").textContent = `${at + 1} of ${cases.length}, ${numSaved} saved`;
  find("case-list").replaceChildren(...order.map(entry));
  find("order").ariaBusy = String(list.is_counting);
  showFolder(list);
  if (list.is_counting || list.is_saving) setTimeout(refreshCases, WAIT);
}

function showFolder({ is_saving: isSaving, refused }) {
  const numOpen = cases.filter(({ state }) => state === "corrected" || state === "outdated").length;
  find("folder").textContent = folder.is_used
    ? `Strokes are kept in ${folder.path}.`
    : "Strokes are kept nowhere: they are gone when the program ends.";
  find("keep").textContent = `Keep them in ${folder.path}`;
  find("keep").hidden = folder.is_used;
  find("save-case").hidden = !folder.is_used;
  find("save-all").hidden = !folder.is_used || !numOpen;
  find("save-all").textContent =
    isSaving ? `Saving, ${numOpen} left …` : `Save all ${numOpen} not saved`;
  find("save-all").disabled = isSaving;
  if (refused) tell(refused);
}

export const refreshCases = () => attempt(ask("cases", page.parameters()).then(showCases));

// Take the new state of a case, which a stroke or a result has given it.
export function showState(number, state) {
  cases[number].state = state;
  showCases({ open, cases, folder });
}

// Keep strokes in files from now on, or write those again that a full disk did not take.
export const keep = () => attempt(ask("keep", {}).then(showCases));

// Ask before strokes are gone; promise whether the program may end.
export async function mayEnd() {
  await page.edited();
  const list = await ask("cases", page.parameters());
  showCases(list);
  if (!folder.num_lost) return true;
  const choice = await choose();
  if (choice === "keep") return (await keep()) && !folder.num_lost;
  return choice === "discard";
}

function entry(number) {
  const { name, state, changed, is_counted: isCounted } = cases[number];
  const words = changed === null ? "cannot be refined" : `${changed.toLocaleString("en")} changed`;
  const button = make("button", { type: "button", onclick: () => go(number) },
    make("span", {}, name), make("span", { className: `state ${state}` }, STATES[state] ?? state),
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

// Open a case. What was drawn before goes to its case, and nothing can be drawn until it is there.
async function go(number) {
  if (number === undefined || number === open) return;
  page.cover(cases[number].name);
  await page.edited();
  const isOpen = await attempt(ask("open", { number }).then(showCases));
  if (isOpen && (await attempt(page.openCase(number)))) {
    readAhead();
    refreshCases();
  }
  page.uncover();
}

function choose() {
  const dialog = find("lost");
  find("lost-count").textContent = folder.num_lost === 1 ? "a case" : `${folder.num_lost} cases`;
  find("keep-and-end").textContent = `Keep them in ${folder.path}, then end`;
  dialog.returnValue = "stay"; // also that of the Escape key
  dialog.showModal();
  find("keep-and-end").focus();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
  });
}

// `host` opens cases, and says which strokes are on their way: see tune.js.
export function startCases(host, list) {
  page = host;
  fill(find("order"), ORDERS, "name");
  find("order").addEventListener("change", async () => {
    const isKnown = find("order").value === "name" || cases.every((one) => one.is_counted);
    if (!isKnown) await ask("count-changes", page.parameters());
    refreshCases();
  });
  find("keep").addEventListener("click", keep);
  find("save-all").addEventListener("click", () =>
    attempt(ask("save-all", page.parameters()).then(showCases)));
  find("next-case").addEventListener("click", () => go(neighbor(1)));
  find("previous-case").addEventListener("click", () => go(neighbor(-1)));
  showCases(list);
}
