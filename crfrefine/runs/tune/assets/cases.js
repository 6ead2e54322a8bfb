// The cases of a folder: their states, the next and the previous one, and where strokes are kept.
import { ask, attempt, fill, find, make, tell } from "./page.js";
import { parameters, state, watch } from "./store.js";

const ORDERS = [["name", "name"], ["-1", "largest change first"], ["1", "smallest change first"]];
const STATES = { outdated: "older than the parameters" };
const WAIT = 700; // milliseconds between looks while changes are counted
let nextLook = 0; // the timer of the next look
let reviews = Promise.resolve();
let numReviews = 0; // on their way
let page = null;
let list = { open: 0, cases: [], folder: {} };
let at = 0; // the case that was opened, or could not be
let counted = ""; // the parameters for which changes were counted

// The numbers of the cases in the order that was chosen; those without a count come last.
function ordered() {
  const numbers = [...list.cases.keys()];
  const sign = Number(find("order").value);
  if (Number.isNaN(sign)) return numbers;
  const value = (number) => sign * (list.cases[number].changed ?? sign * Infinity);
  return numbers.sort((one, other) => value(one) - value(other) || one - other);
}

const withState = (...states) => list.cases.filter((one) => states.includes(one.state)).length;

function showCases(answer) {
  list = answer;
  const order = ordered();
  const place = order.indexOf(at);
  find("cases").hidden = list.cases.length < 2;
  find("next-case").disabled = place === list.cases.length - 1;
  find("previous-case").disabled = place === 0;
  find("case-count").textContent =
    `${order.indexOf(list.open) + 1} of ${list.cases.length}, ${withState("saved")} saved`;
  showEntries(order);
  find("order").ariaBusy = String(list.is_counting);
  showFolder();
  clearTimeout(nextLook);
  if (list.is_counting || list.is_saving) nextLook = setTimeout(refreshCases, WAIT);
}

// Change the entries in place: the one that has the focus keeps it.
function showEntries(order) {
  const entries = find("case-list");
  while (entries.children.length < order.length) {
    const button = make("button", { type: "button" }, make("span", {}),
      make("span", { className: "review" }), make("span", {}),
      make("span", { className: "count" }));
    button.addEventListener("click", () => go(Number(button.dataset.number)));
    entries.append(make("li", {}, button));
  }
  order.forEach((number, place) => {
    const { name, state: word, review, note, changed, is_counted: isCounted } = list.cases[number];
    const words =
      changed === null ? "cannot be refined" : `${changed.toLocaleString("en")} changed`;
    const button = entries.children[place].firstChild;
    const texts = [name, review === "to do" ? "" : review, STATES[word] ?? word,
      isCounted ? words : ""];
    texts.forEach((text, part) => { button.children[part].textContent = text; });
    button.children[2].className = `state ${word}`;
    button.title = note;
    button.dataset.number = number;
    button.ariaCurrent = number === list.open ? "true" : null;
  });
}

function showFolder() {
  const { folder, is_saving: isSaving, refused } = list;
  const numOpen = withState("corrected", "outdated");
  find("folder").textContent = folder.is_used
    ? `Strokes are kept in ${folder.path}.`
    : "Strokes are kept nowhere: they are gone when the program ends.";
  find("keep").textContent = `Keep them in ${folder.path}`;
  find("keep").hidden = folder.is_used;
  find("save-case").hidden = !folder.is_used;
  find("review").hidden = !folder.is_used;
  find("save-all").hidden = !folder.is_used || !numOpen;
  find("save-all").textContent =
    isSaving ? `Saving, ${numOpen} left …` : `Save all, ${numOpen} not saved`;
  find("save-all").disabled = Boolean(isSaving);
  if (refused) tell(refused);
  // Another case is being opened, or has a state and a note that the program does not know yet.
  if (list.open !== state.number || numReviews) return;
  const { review, note } = list.cases[list.open];
  find("review-state").value = review;
  if (document.activeElement !== find("note")) find("note").value = note;
}

export const refreshCases = () => attempt(ask("cases", parameters()).then(showCases));

// Take the new state of a case, which a stroke has given it.
export function showState(number, word) {
  list.cases[number].state = word;
  showCases({ ...list, refused: "" });
}

// Keep strokes in files from now on, or write those again that a full disk did not take.
export const keep = () => attempt(ask("keep", {}).then(showCases));

// Ask before strokes are gone; promise whether the program may end.
export async function mayEnd() {
  await page.edited();
  await reviews;
  await refreshCases();
  if (!list.folder.num_lost) return true;
  const choice = await choose();
  if (choice === "keep") return (await keep()) && !list.folder.num_lost;
  return choice === "discard";
}

function choose() {
  const dialog = find("lost");
  const { num_lost: number, path } = list.folder;
  find("lost-count").textContent = number === 1 ? "a case" : `${number} cases`;
  find("keep-and-end").textContent = `Keep them in ${path}, then end`;
  dialog.returnValue = "stay"; // also that of the Escape key
  dialog.showModal();
  find("keep-and-end").focus();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
  });
}

// The case that follows in the order by so many, undefined at an end.
const neighbor = (by) => ordered()[ordered().indexOf(at) + by];

export function readAhead() {
  const number = neighbor(1);
  if (number !== undefined) ask("read-ahead", { number }).catch(() => {}); // Opening reports it.
}

// Open a case. What was drawn before goes to its case, and nothing can be drawn until it is there.
async function go(number) {
  find("case-menu").open = false;
  if (number === undefined || (number === list.open && number === at)) return;
  page.cover(list.cases[number].name);
  await page.edited();
  at = number; // A damaged case is passed by: the next one follows it.
  const isOpen = await attempt(ask("open", { number }).then(showCases));
  if (isOpen && (await attempt(page.openCase(number)))) {
    tell("");
    readAhead();
  }
  await refreshCases();
  page.uncover();
}

function orderCases() {
  const present = JSON.stringify(parameters());
  const isKnown = counted === present && list.cases.every((one) => one.is_counted);
  if (find("order").value === "name" || isKnown) {
    showCases(list);
    return;
  }
  counted = present;
  attempt(ask("count-changes", parameters()).then(refreshCases));
}

// Send the state and the note of the case after those before, which would replace them otherwise.
function review() {
  const sent = { number: state.number, review: find("review-state").value,
    note: find("note").value };
  numReviews += 1;
  reviews = attempt(reviews.then(() => ask("review", sent))).then(() => {
    numReviews -= 1;
    return refreshCases();
  });
}

// `host` opens cases, and says which strokes are on their way: see tune.js.
export function startCases(host, answer) {
  page = host;
  at = answer.open;
  fill(find("order"), ORDERS, "name");
  const clicks = { keep,
    "next-case": () => go(neighbor(1)), "previous-case": () => go(neighbor(-1)),
    "save-all": () => attempt(ask("save-all", parameters()).then(showCases)) };
  for (const [id, act] of Object.entries(clicks)) find(id).addEventListener("click", act);
  find("order").addEventListener("change", orderCases);
  find("review-state").addEventListener("change", review);
  find("note").addEventListener("change", review);
  watch("preset changes", orderCases);
  const menu = find("case-menu");
  menu.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape" || !menu.open) return;
    menu.open = false;
    menu.firstElementChild.focus();
  });
  document.addEventListener("pointerdown", ({ target }) => {
    if (!menu.contains(target)) menu.open = false;
  });
  showCases(answer);
}
