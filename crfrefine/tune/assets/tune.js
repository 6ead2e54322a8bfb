// The page: opens a case, sends its parameters and strokes when they change, and shows the answers.
import { ask, attempt, clone, fill, find, findAll, hasEnded, isLost, tell, watchAnswers, write }
  from "./page.js";
import { changeCases, keep, keepNote, mayEnd, neighbor, nextToDo, readAhead, refreshCases, review,
  showState, typeNote } from "./cases.js";
import { buildLabels, filterLabels, pick, pressInFilter, showAllLabels, takeEyes, toggleChosen }
  from "./labels.js";
import { chooseWindows, takeWindow } from "./look.js";
import { BACKGROUND } from "./drawing.js";
import { Plane, resize } from "./plane.js";
import { allSent, isSending, sendKept, sendRest } from "./sending.js";
import { buildControl, takeValue } from "./sliders.js";
import { buildSides, jump, strokeAt, strokeBetween } from "./tools.js";
import { bindControls, forgetChosen, isChosen, parameters, set, state, watch } from "./store.js";

const PRESETS = { "": "as opened", page: "chosen last" };
const count = (value) => value.toLocaleString("en");
const percent = (value) => (value === null ? "–" : (100 * value).toFixed(2));

let planes = [];
let counter = 0; // of the states that were sent; the newest one counts
let newest = 0; // the number that the program has given to the last one
let running = null;
let saving = null;

// The program that is started again may have the case under another number.
const ofCase = (sent, number = state.number) => ({ ...sent, case: state.list.cases[number].name });
const askCase = (name, sent) => ask(`case/${state.number}/${name}`, ofCase(sent));
const largePlane = () => planes.find((plane) => plane.spec.number === state.large);
const showPlanes = () => planes.forEach((plane) => plane.load());
const finishStrokes = () => planes.forEach((plane) => plane.finish());
watch("place version modality", showPlanes);
watch("level width", () => planes.forEach((plane) => plane.drawGray()));
watch("tool shape size", () => planes.forEach((plane) => plane.arrange()));
watch("since hidden", () => planes.forEach((plane) => plane.drawLabels()));
watch("modality", () => chooseWindows());
watch("filter", filterLabels);
watch("opacity", () => {
  document.body.style.setProperty("--opacity", `${state.opacity}%`);
  document.body.classList.toggle("is-filled", state.opacity > 0);
});
watch("large", () => planes.forEach(({ parts, spec }) =>
  parts.node.classList.toggle("main", spec.number === state.large)));

// ---- The case

// Open a case. What was drawn before goes to its case, and nothing can be drawn until it is there.
async function go(number) {
  find("case-panel").hidePopover();
  const { at, list, number: leaving } = state;
  if (number === undefined || (number === list.open && number === at)) return;
  finishStrokes();
  keepChosen();
  keepNote();
  const focused = planes.findIndex(({ parts }) => parts.overlay === document.activeElement);
  find("planes").inert = true;
  find("opening").textContent = `Opening ${list.cases[number].name} …`;
  set({ leaving, at: number }); // A damaged case is passed by: the next one follows it.
  if ((await changeCases("open", { number })) && (await attempt(openCase(number)))) readAhead();
  if (number !== state.at) return; // Another one was chosen meanwhile.
  await refreshCases();
  find("planes").inert = false;
  planes[focused]?.parts.overlay.focus();
  find("opening").textContent = "";
  set({ leaving: null });
  if (state.number !== leaving) return;
  const { textContent: why } = find("error");
  await refine();
  tell(why); // The answer has taken it away.
}

async function openCase(number) {
  const windowName = state.about && find("window").selectedOptions[0].textContent;
  // Until the case is known, strokes go to the one that is shown.
  const about = await ask(`case/${number}/describe`).catch((error) => ({ error }));
  if (number !== state.at) return; // Nobody is told why it could not be opened.
  if (about.error) throw about.error;
  const { grid, labels, modalities, place, spacing, strokes } = about;
  document.body.classList.toggle("has-reference", about.has_reference);
  document.title = `${about.case} – crfrefine tune`;
  find("case").textContent = about.case;
  const steps = spacing.map((step) => Number(step.toPrecision(3)));
  find("grid").textContent = `${grid.join("×")} voxels of ${steps.join("×")} mm`;
  const presets = about.presets.map((name) => [name, PRESETS[name] ?? name]);
  if (find("preset").length < 2) fill(find("preset"), presets, "");
  const modality = Math.min(state.modality || 0, modalities.length - 1);
  fill(find("modality"), modalities.map((name, order) => [order, name]), modality);
  Object.assign(find("save"), { hidden: about.output === null, title: about.output ?? "" });
  find("between").hidden = grid.length < 3;
  find("notes-text").textContent = about.notes.join("\n");
  const version = state.version + 1;
  Object.assign(state, { number, about, labels, modality, place, result: null, version,
    preset: "case", changes: {} });
  delete find("sliders").dataset.keys;
  buildLabels();
  showStrokes(strokes);
  planes = about.planes.map((spec) => new Plane(spec, (stroke) => edit("draw", stroke, number)));
  find("planes").replaceChildren(...planes.map((plane) => plane.parts.node));
  buildSides(planes);
  set({ large: (largePlane() ?? planes[0]).spec.number });
  find("main").inert = false;
  document.body.inert = false;
  chooseWindows(windowName);
  showPlanes();
  await refine();
}

// What is under the pointer: place, intensity, and labels.
watch("under", () => {
  const { about, labels, modality, under } = state;
  const name = (label) => labels.find((one) => one.label === label)?.name ?? "background";
  find("under").textContent = "";
  if (!under) return;
  const value = `${Number(under.value.toPrecision(5))} ${about.units[modality]}`.trim();
  const words = [under.place.map((at) => at + 1).join(", "), value, name(under.refined)];
  if (under.network !== under.refined) words.push(`network: ${name(under.network)}`);
  find("under").textContent = words.join(" · ");
});

// ---- Results

// Refine the newest state, first in a box; promise "", or why it was refused.
function refine() {
  counter += 1;
  running ??= refineNewest();
  return running;
}

async function refineNewest() {
  let sent, why;
  do {
    sent = counter;
    why = await compute(false);
  } while (sent !== counter);
  running = null;
  await Promise.all(planes.map(({ loading }) => loading)); // The whole would delay them.
  // The whole of a large case is refined when somebody asks for it, or saves it.
  if (!why && sent === counter && !state.result?.is_whole && !state.about.is_large) compute(true);
  return why;
}

async function compute(isWhole) {
  const { number, place } = state;
  const isLeft = () => number !== state.number || number === state.leaving;
  if (hasEnded() || isLeft()) return "";
  const sent = counter;
  const chosen = parameters();
  showStatus(isWhole ? "the whole case follows …" : "computing …");
  try {
    const answer = await askCase("refine",
      { ...chosen, counter: newest, place, is_whole: isWhole });
    if (number !== state.number) return "";
    newest = answer.counter ?? newest;
    forgetChosen(chosen);
    if (isLeft() || (isWhole && sent !== counter)) return "";
    if (answer.is_stale) {
      showStatus("Another tab has the page now; a change here takes it back.");
      showPlanes();
    } else showAnswer(answer);
    return "";
  } catch (error) {
    if (sent === counter && !isLeft() && !hasEnded()) {
      tell(error.message);
      showStatus("", true);
      showPlanes();
    }
    return error.message;
  }
}

function showAnswer(answer) {
  const { controls, result, toml } = answer;
  tell("");
  find("toml").textContent = toml;
  find("saved").textContent = "";
  showControls(controls);
  state.about.is_large = answer.is_large; // The program knows it once it has refined the whole.
  find("whole").hidden = !answer.is_large;
  set({ result, version: state.version + 1 });
  if (result) showResult();
  if (result?.is_whole) refreshCases(); // Saved cases may be older than the parameters now.
  showStatus("", result?.is_whole || state.about.is_large);
}

// Show the parameters that the program has. The controls stay: one of them may have the focus.
function showControls(controls) {
  const sliders = find("sliders");
  const keys = controls.map(({ key, place }) => `${key} ${place}`).join();
  state.values = Object.fromEntries(controls.map(({ key, value }) => [key, value]));
  if (sliders.dataset.keys !== keys) {
    sliders.dataset.keys = keys;
    sliders.replaceChildren(...controls.map((control) => buildControl(control, change)));
  } else controls.forEach((control, order) => takeValue(sliders.children[order], control));
}

// Take a value; promise "", or why it was refused: then the former value applies again.
async function change(key, value) {
  set({ changes: { ...state.changes, [key]: value } });
  find("preset").selectedIndex = 0; // Then each preset can be chosen again.
  const why = await refine();
  if (!why.startsWith(`${key}:`) || state.changes[key] !== value) return "";
  forgetChosen({ preset: "", changes: { [key]: value } });
  refine();
  return why;
}

// Give the program what was chosen and is not refined with yet, before the case is left.
function keepChosen() {
  if (isChosen()) attempt(sendKept(`case/${state.number}/choose`, ofCase(parameters())));
}

function showStatus(text, isDone = false) {
  if (hasEnded()) return;
  document.body.dataset.state = isDone ? "done" : "computing";
  if (isDone) document.body.dataset.number = String(counter);
  find("doing").textContent = text;
}

function showResult() {
  const { about, result } = state;
  const { converged, device, filters, is_whole: isWhole, num_iterations: steps } = result;
  find("scores").tBodies[0].replaceChildren(...result.labels.map(scoreRow));
  const kind = isWhole ? "Whole case" : "Provisional, in the frame";
  find("scores-caption").textContent = kind;
  const changed = count(result.voxels_changed);
  find("facts").textContent = `${kind}: ${changed} voxels changed, ${result.seconds.toFixed(2)} s`;
  find("notes-text").textContent = [...about.notes, ...result.notes].join("\n");
  const where = device === "cpu" ? "" : `; on ${device}`;
  const ending = `${converged ? "converged" : "not converged"}; ${filters.join("; ")}${where}`;
  find("steps").textContent = `${steps} step${steps === 1 ? "" : "s"}, ${ending}`;
}

function scoreRow({ label, region, before, after, dice_before: was, dice_after: is }) {
  const row = clone("score").node;
  const gain = was === null || is === null || Math.abs(is - was) < 5e-5 ? 0 : Math.sign(is - was);
  const dice = ["▼ ", "", "▲ "][gain + 1] + percent(is);
  row.classList.toggle("region", region !== undefined);
  row.children[2].classList.add(["worse", "same", "better"][gain + 1]);
  const known = state.labels.find((one) => one.label === label)?.name;
  const name = region ?? known ?? `label ${label}`; // Another program may have drawn a label.
  return write(row, name, percent(was), dice, count(before), count(after));
}

// ---- Strokes

// Draw, undo or redo, then refine; promise whether it is done. Or look what another tab has done.
function edit(name, sent, number = state.number) {
  const mark = crypto.randomUUID(); // It may be sent twice, and is done once.
  return attempt(sendKept(`case/${number}/${name}`, ofCase({ ...sent, mark }, number)).then(
    (strokes) => {
    const isKnown = strokes.step === state.strokes.step
      && strokes.toml === find("toml").textContent;
    if (name === "look" && isKnown) return;
    tell("");
    showState(number, strokes);
    if (number === state.number) takeStrokes(strokes);
  }));
}

// Show strokes, and refine with them.
function takeStrokes(strokes) {
  showStrokes(strokes);
  state.version += 1;
  refine();
}

const draw = (stroke) => stroke && edit("draw", stroke);

function showStrokes(strokes) {
  state.strokes = strokes;
  const voxels = strokes.drawn === 1 ? "voxel" : "voxels";
  find("saved-case").textContent = `${count(strokes.drawn)} ${voxels} drawn`;
  find("undo").disabled = !strokes.can_undo;
  find("redo").disabled = !strokes.can_redo;
  find("first-stroke").hidden = strokes.drawn > 0;
}

// Save the case, then what was asked for meanwhile.
async function saveCase() {
  keepNote();
  await allSent();
  find("saved-case").textContent = "saving …";
  const { number } = state;
  const sent = counter;
  saving = attempt(askCase("save-case", parameters()).then((answer) => {
    tell("");
    if (number === state.number) {
      if (answer.result && sent === counter) showAnswer(answer); // perhaps of another tab's values
      if (answer.strokes.step !== state.strokes.step) takeStrokes(answer.strokes); // of others
      find("saved-case").textContent = `saved to ${answer.saved}`;
    }
    return refreshCases();
  }));
  if (!(await saving)) showStrokes(state.strokes);
}

// End the program. The page ends with this request, so that nothing more is asked of it.
async function end() {
  keepNote();
  await saving;
  if (!(await mayEnd())) return;
  ask("end", {}).catch(() => {});
  showStatus("The program has ended; this page can be closed.");
  document.body.dataset.state = "ended";
  document.body.inert = true;
}

// ---- What people press

const save = () => attempt(askCase("save", parameters()).then(({ toml, saved }) => {
  tell("");
  find("toml").textContent = toml;
  find("saved").textContent = `saved to ${saved}`;
}));

function choosePreset({ target }) {
  delete find("sliders").dataset.keys;
  set({ preset: target.value, changes: {} });
  refine();
}

function showNextPlane() {
  const next = (planes.indexOf(largePlane()) + 1) % planes.length;
  set({ large: planes[next].spec.number });
}

// What follows from the controls of the page without `data-state`, by their ids.
const actions = {
  "previous-case": () => go(neighbor(-1)), "next-case": () => go(neighbor(1)),
  "to-do-case": () => go(nextToDo()),
  "case-list": ({ target }) => go(Number(target.closest("button").value)),
  keep, "save-all": () => changeCases("save-all", parameters()), "save-case": saveCase,
  "save-anew": () => changeCases("save-anew", parameters()),
  whole: () => compute(true), "keep-again": keep,
  undo: () => edit("undo", {}), redo: () => edit("redo", {}),
  between: () => draw(strokeBetween(largePlane())),
  "remove-island": () => draw(strokeAt(largePlane(), "island", BACKGROUND)),
  "keep-island": () => draw(strokeAt(largePlane(), "others", BACKGROUND)),
  "next-island": () => jump("Island"),
  "next-change": () => jump("Change", -1),
  exchange: showNextPlane, closer: () => largePlane().zoom(1.25),
  farther: () => largePlane().zoom(0.8), fit: () => largePlane().fit(),
  "all-labels": () => showAllLabels(true), "no-labels": () => showAllLabels(false),
  brushes: takeEyes, window: takeWindow, preset: choosePreset,
  "review-state": review, note: () => { typeNote(); keepNote(); },
  save, end: () => attempt(end()),
};
for (const [id, act] of Object.entries(actions)) {
  const node = find(id);
  const isPressed = ["BUTTON", "OL"].includes(node.tagName);
  node.addEventListener(isPressed ? "click" : "change", act);
}

// Press a control by its key: a select takes its next option.
function press(node) {
  if (node.tagName === "SELECT") {
    node.selectedIndex = (node.selectedIndex + 1) % node.length;
    node.dispatchEvent(new Event("change"));
  } else if (node.type === "text") node.focus();
  else node.click();
}

const keys = { "[": () => resize("stepDown"), "]": () => resize("stepUp"),
  h: toggleChosen, p: pick };

find("filter").addEventListener("keydown", pressInFilter);
document.addEventListener("keydown", (event) => {
  if (document.body.inert || (event.repeat && !"zy[]+-".includes(event.key))) return;
  const drawn = planes.filter(({ stroke }) => stroke);
  if (event.key === "Escape") drawn.forEach((plane) => plane.cancel());
  if (drawn.length && !".,".includes(event.key)) return; // A stroke would jump, or be lost.
  const isCommand = (event.ctrlKey || event.metaKey) && !event.getModifierState("AltGraph");
  const target = /** @type {Element} */ (event.target);
  const isWritten = target.closest("input[type=number], input[type=text], pre, dialog");
  let key = event.key.toLowerCase();
  if (key === "z" && event.shiftKey) key = "y";
  if (isCommand ? !"zys".includes(key) : !find("keys").checked || key.length > 1) return;
  if ((isWritten && !(isCommand && key === "s")) || (event.altKey && !"[]".includes(key))) return;
  const [node] = findAll(`[data-key="${CSS.escape(key)}"]`);
  const isUsable = node?.checkVisibility() && !node.disabled && !node.closest("[inert]");
  const act = keys[key] ?? (isUsable ? () => press(node) : null);
  if (!act || key === " ") return;
  event.preventDefault(); // A select would take the letter, and the browser Ctrl+S.
  act();
});
window.addEventListener("focus", () => {
  if (document.body.inert || !state.about) return;
  edit("look", {});
  refreshCases(); // Another tab may have noted something.
});
window.addEventListener("pagehide", keepNote);
window.addEventListener("beforeunload", (event) => {
  finishStrokes();
  keepChosen();
  keepNote();
  // What is on its way arrives, or is sent by the next page.
  const isWaiting = isSending() && isLost();
  if ((isWaiting || state.list.folder.problem) && !hasEnded()) event.preventDefault();
});

// The program may have been started again, with another case open.
window.addEventListener("reconnected", async () => {
  if (!state.about || state.leaving !== null) return;
  await allSent();
  await refreshCases();
  const { about, list, number } = state;
  const same = list.cases.findIndex(({ name }) => name === about.case);
  if (same < 0) return;
  if (same === number && list.open === same) edit("look", {});
  else {
    set({ at: NaN });
    go(same);
  }
});

watchAnswers();
bindControls();
find("note").addEventListener("input", typeNote);
attempt(ask("cases").then(async (list) => {
  const isCorrecting = list.folder.is_used;
  document.body.dataset.mode = isCorrecting ? "correct" : "choose";
  find("results").open = !isCorrecting;
  find("controls").open = !isCorrecting;
  set({ list, at: list.open });
  sendRest();
  await allSent();
  await openCase(list.open).catch((error) => {
    find("main").inert = true; // Another case may be opened, or the program ended.
    document.body.inert = false;
    throw error;
  });
  readAhead();
}));
