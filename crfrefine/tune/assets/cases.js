// The list of cases: their states, the next and the previous one, and where strokes are kept.
import { ask, attempt, clone, find, findAll, tell, write } from "./page.js";
import { allSent, isSending, send, sendKept } from "./sending.js";
import { set, state, watch } from "./store.js";

const STATES = { outdated: "older than the parameters" };
const WAIT = 700; // milliseconds between looks while changes are counted
const TYPED = 500; // milliseconds after which a note is sent that is being typed
let nextLook = 0; // the timer of the next look

// The numbers of the cases in the order that was chosen; those without a count come last.
function ordered() {
  const { cases } = state.list;
  const numbers = [...cases.keys()];
  const sign = Number(state.order);
  if (Number.isNaN(sign)) return numbers;
  const value = (number) => sign * (cases[number].changed ?? sign * Infinity);
  return numbers.sort((one, other) => value(one) - value(other) || one - other);
}

// What is to be done with a case, the lowest first; NaN means that it is done.
function rankOf({ review: word, state: kind }) {
  if (word === "to discuss") return 2;
  if (word === "done" || kind === "saved") return NaN;
  return kind === "untouched" ? 0 : 1;
}

// Whether the list shows a case: by its name or note, and by its state.
function isListed(number) {
  const one = state.list.cases[number];
  const text = `${one.name} ${one.note}`.toLowerCase();
  const kinds = ["", one.state, one.review, Number.isNaN(rankOf(one)) ? "" : "not done"];
  const words = state.caseWords.toLowerCase().split(" ");
  return kinds.includes(state.caseKind) && words.every((word) => text.includes(word));
}

// The cases behind the open one in the order, then those before it.
function following() {
  const order = ordered();
  const place = order.indexOf(state.at);
  return { before: order.slice(0, place), behind: order.slice(place + 1) };
}

// The next case that the list shows, or with -1 the previous one; undefined at an end.
export function neighbor(by) {
  const { before, behind } = following();
  return by > 0 ? behind.find(isListed) : before.findLast(isListed);
}

// The next case to do, from the open one on and then from the first one: those that nobody has
// touched come before corrected ones that are not saved; undefined if all others are done.
export function nextToDo() {
  const { before, behind } = following();
  const rank = (number) => rankOf(state.list.cases[number]);
  const toDo = [...behind, ...before].filter((number) => rank(number) >= 0);
  return toDo.toSorted((one, other) => rank(one) - rank(other))[0];
}

const withState = (...states) =>
  state.list.cases.filter((one) => states.includes(one.state)).length;

function showCases() {
  const { cases, folder, is_counting: isCounting, is_saving: isSaving, open, refused } = state.list;
  const order = ordered();
  find("cases").hidden = cases.length < 2;
  find("next-case").disabled = neighbor(1) === undefined;
  find("previous-case").disabled = neighbor(-1) === undefined;
  find("to-do-case").disabled = nextToDo() === undefined;
  find("case-count").textContent =
    `${order.indexOf(open) + 1} of ${cases.length}, ${withState("saved")} saved`;
  const listed = order.filter(isListed);
  find("listed").textContent =
    listed.length < order.length ? `${listed.length} of ${order.length} listed` : "";
  // The entries are changed in place: the one that has the focus keeps it.
  const entries = find("case-list");
  while (entries.children.length < order.length) entries.append(clone("case-entry").node);
  order.forEach((number, place) => showEntry(entries.children[place], number));
  find("order").ariaBusy = String(isCounting);
  document.body.dataset.kept = folder.is_used;
  for (const node of findAll(".path")) node.textContent = folder.path;
  find("problem-text").textContent = folder.problem;
  const numOpen = withState("corrected");
  const numOld = withState("outdated");
  find("save-all").hidden = cases.length < 2;
  find("save-all").textContent =
    isSaving ? `Saving, ${numOpen} left …` : `Save all (${numOpen})`;
  find("save-anew").hidden = !numOld || cases.length < 2;
  find("save-anew").textContent = `Save ${numOld} anew with the last parameters`;
  find("save-all").title = `${numOpen} not saved`;
  find("save-all").disabled = isSaving || !numOpen;
  find("save-anew").disabled = isSaving;
  if (refused) tell(refused);
  clearTimeout(nextLook);
  if (isCounting || isSaving) nextLook = setTimeout(refreshCases, WAIT);
  else if (state.order !== "name" && !cases.every((one) => one.is_counted)) {
    attempt(ask("count-changes", { preset: "page", changes: {} }).then(refreshCases));
  }
  // Another case is being opened, or has a state and a note that the program does not know yet.
  if (open !== state.number || isSending()) return;
  const { review, note } = cases[open];
  find("review-state").value = review;
  if (document.activeElement !== find("note")) find("note").value = note;
}

function showEntry(entry, number) {
  const { name, state: word, review, note, changed, is_counted: isCounted } =
    state.list.cases[number];
  entry.hidden = !isListed(number);
  const shown = JSON.stringify([number, number === state.list.open, state.list.cases[number]]);
  if (entry.dataset.shown === shown) return; // Hundreds of entries take long.
  entry.dataset.shown = shown;
  const button = entry.firstChild;
  let counts = isCounted ? "cannot be refined" : "";
  if (Number.isInteger(changed)) counts = `${changed.toLocaleString("en")} changed`;
  write(button, name, review === "to do" ? "" : review, STATES[word] ?? word, counts);
  button.children[2].className = `state ${word}`;
  button.title = note;
  button.value = number;
  button.ariaCurrent = number === state.list.open ? "true" : null;
}

// Ask for the list, or for something that changes it.
const takeList = (answer) => attempt(answer.then((list) => set({ list })));
export const refreshCases = () => takeList(ask("cases"));
export function changeCases(name, sent) {
  tell(""); // What is still wrong then, the answer says.
  return takeList(send(name, sent));
}
// Keep strokes in files from now on, or write those again that a full disk did not take.
export const keep = () => changeCases("keep", {});

// Take the new state of a case, which a stroke has given it.
export function showState(number, { problem, state: word }) {
  state.list.cases[number].state = word;
  set({ list: { ...state.list, folder: { ...state.list.folder, problem }, refused: "" } });
}

// Ask before strokes are gone; promise whether the program may end.
export async function mayEnd() {
  await allSent();
  await refreshCases();
  const { num_lost: number } = state.list.folder;
  if (!number) return true;
  find("lost-count").textContent = number === 1 ? "a case" : `${number} cases`;
  const dialog = find("lost");
  dialog.returnValue = "stay"; // also that of the Escape key
  dialog.showModal();
  await new Promise((done) => { dialog.addEventListener("close", done, { once: true }); });
  if (dialog.returnValue !== "keep") return dialog.returnValue === "discard";
  return (await keep()) && !state.list.folder.num_lost;
}

export function readAhead() {
  const number = nextToDo() ?? neighbor(1);
  if (number !== undefined) ask("read-ahead", { number }).catch(() => {}); // Opening reports it.
}

// Send the state or the note of the case; null leaves what another tab may have changed.
function changeReview(changed) {
  const { list, number } = state;
  takeList(sendKept("review",
    { number, case: list.cases[number].name, review: null, note: null, ...changed }));
}
export const review = () => changeReview({ review: find("review-state").value });

let typing = 0; // the timer of a note that is being typed

export function typeNote() {
  clearTimeout(typing);
  typing = setTimeout(keepNote, TYPED);
}

export function keepNote() {
  clearTimeout(typing);
  if (typing) changeReview({ note: find("note").value });
  typing = 0;
}

watch("list at order caseWords caseKind", showCases);
