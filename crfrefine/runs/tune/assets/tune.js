// The page: asks for a case, sends its parameters when they change, and shows the answers.
import { CHANGED, ask, attempt, fill, find, findAll, hasEnded, make, showEnd, tell }
  from "./page.js";
import { keep, mayEnd, readAhead, refreshCases, showState, startCases } from "./cases.js";
import { buildLabels, filterLabels, pick, showAllLabels, toggleChosen } from "./labels.js";
import { changeWindow, chooseWindows, setRange, setShown, slideWindow, takeWindow, turn }
  from "./look.js";
import { Plane } from "./plane.js";
import { buildControls } from "./sliders.js";
import { parameters, set, state, watch } from "./store.js";

const count = (value) => value.toLocaleString("en");
const percent = (value) => (value === null ? "–" : (100 * value).toFixed(2));

let planes = [];
const askCase = (name, sent) => ask(`case/${state.number}/${name}`, sent);
const largePlane = () => planes.find((plane) => plane.node.classList.contains("main"));
const showPlanes = () => planes.forEach((plane) => plane.load());
watch("place version modality", showPlanes);
watch("window isSmooth opacity since shown hidden", () => planes.forEach((plane) => plane.paint()));
watch("tool size shape", () => planes.forEach((plane) => plane.paintOver()));

// ---- The case

async function openCase(number) {
  const former = planes.indexOf(largePlane());
  const windowName = find("window").selectedOptions[0]?.textContent;
  planes = [];
  set({ number });
  const about = await askCase("describe");
  const { grid, labels, modalities, place, spacing, strokes } = about;
  const modality = Math.min(state.modality, modalities.length - 1);
  set({ about, labels, modality, place, result: null, version: state.version + 1 });
  wholeSeconds = Infinity;
  document.title = `${about.case} – crfrefine tune`;
  find("case").textContent = about.case;
  const steps = spacing.map((step) => Number(step.toPrecision(3)));
  find("grid").textContent = `${grid.join("×")} voxels of ${steps.join("×")} mm`;
  const presets = about.presets.map((name) => [name, name || "as opened"]);
  if (!find("preset").length) fill(find("preset"), presets, "", CHANGED);
  fill(find("modality"), modalities.map((name, order) => [order, name]), modality);
  for (const node of findAll(".dice")) node.hidden = !about.has_reference;
  find("reference-choice").hidden = !about.has_reference;
  find("whole").hidden = !about.is_large;
  Object.assign(find("save"), { hidden: about.output === null, title: about.output ?? "" });
  showNotes(about.notes);
  buildLabels();
  showStrokes(strokes);
  planes = about.planes.map((spec) => new Plane(spec, host));
  find("planes").replaceChildren(...planes.map((plane) => plane.node));
  enlarge(planes[former] ?? planes[0]);
  chooseWindows(windowName);
  showPlanes();
  await refine();
}

// Cover the planes while another case opens; a stroke that is being drawn ends.
function cover(name) {
  leaving = state.number;
  for (const plane of planes) plane.finish();
  find("planes").inert = true;
  Object.assign(find("opening"), { textContent: `Opening ${name} …`, hidden: false });
}

function uncover() {
  const isLeft = leaving !== state.number;
  leaving = null;
  find("planes").inert = false;
  find("opening").hidden = true;
  if (!isLeft) refine();
}

function enlarge(plane) {
  for (const other of planes) other.node.classList.toggle("main", other === plane);
}

function showNotes(notes) {
  find("notes").hidden = !notes.length;
  const items = notes.map((textContent) => make("li", { textContent }));
  find("notes").querySelector("ul").replaceChildren(...items);
}

// What is under the pointer: place, intensity, and labels.
function tellUnder(under) {
  const { about, labels, modality } = state;
  const name = (label) => labels[label - 1]?.name ?? "background";
  const value = (number) => `${Number(number.toPrecision(5))} ${about.units[modality]}`.trim();
  find("under").textContent = under ? [under.place.map((at) => at + 1).join(", "),
    value(under.value), name(under.refined),
    under.network === under.refined ? "" : `network: ${name(under.network)}`,
  ].filter(Boolean).join(" · ") : "";
  pointed = under;
}
let pointed = null;

// ---- Parameters: the page sends all of them with a counter; the newest state wins

let counter = 0;
let leaving = null; // the case that another one is to replace: it is refined no more
let running = null;
let wholeSeconds = Infinity;
let saving = Promise.resolve(true);
let edits = Promise.resolve(true);
let numUnsent = 0; // of edits that the program has not confirmed

// Refine the newest state, first in a box; promise "", or why it was refused.
function refine() {
  counter = Math.max(counter + 1, Date.now()); // Later than those of a tab opened before.
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
  // The whole of a large case is refined when somebody asks for it, or saves it.
  if (!why && !state.result?.is_whole && !state.about.is_large) compute(true);
  return why;
}

async function compute(isWhole) {
  if (hasEnded() || state.number === leaving) return "";
  const [sent, number] = [counter, state.number];
  showStatus(isWhole ? "the whole case follows …" : "computing …");
  try {
    const asked = { ...parameters(), counter: sent, place: state.place, is_whole: isWhole };
    const answer = await askCase("refine", asked);
    if (number !== state.number || (isWhole && sent !== counter)) return "";
    if (answer.is_stale) showStatus("Another tab has the page now; a change here takes it back.");
    else await showAnswer(answer);
    return "";
  } catch (error) {
    if (sent === counter && number === state.number && !hasEnded()) {
      tell(error.message);
      showStatus("", true);
      showPlanes();
    }
    return error.message;
  }
}

async function showAnswer(answer) {
  tell("");
  showText(answer.toml);
  if (find("sliders").dataset.preset !== state.preset) {
    find("sliders").dataset.preset = state.preset;
    buildControls(find("sliders"), answer.controls, change);
  }
  const { result } = answer;
  Object.assign(state, { result, version: state.version + 1 });
  const isWhole = Boolean(result?.is_whole);
  const first = state.drawnOn; // The plane that somebody draws on comes first.
  if (isWhole) state.drawnOn = null;
  await first?.load();
  performance.mark(isWhole ? "whole" : "provisional");
  if (result) showResult();
  if (!first || isWhole || wholeSeconds > 2) showPlanes();
  if (isWhole) {
    wholeSeconds = result.seconds;
    refreshCases(); // Saved cases may be older than the parameters now.
  }
  showStatus("", isWhole || state.about.is_large);
}

// Take a value; promise "", or why it was refused: then the former value applies again.
async function change(key, value) {
  const former = state.changes[key];
  set({ changes: { ...state.changes, [key]: value } });
  find("preset").value = CHANGED; // Then each preset can be chosen again.
  const why = await refine();
  if (!why.startsWith(`${key}:`) || state.changes[key] !== value) return "";
  const changes = { ...state.changes, [key]: former };
  if (former === undefined) delete changes[key];
  set({ changes });
  refine();
  return why;
}

// ---- Strokes

// Draw, undo or redo after the edits before, then refine; promise whether it is done.
function edit(name, sent) {
  performance.mark("edit");
  const { number } = state;
  const mark = crypto.randomUUID(); // It may be sent twice, and is done once.
  numUnsent += 1;
  const done = edits.then(() => ask(`case/${number}/${name}`, { ...sent, mark }));
  edits = attempt(done.then((strokes) => {
    tell("");
    showState(number, strokes.state);
    if (number !== state.number) return;
    showStrokes(strokes);
    state.version += 1;
    refine();
  })).finally(() => { numUnsent -= 1; });
  return edits;
}

function showStrokes(strokes) {
  state.strokes = strokes;
  const voxels = strokes.drawn === 1 ? "voxel" : "voxels";
  find("saved-case").textContent = `${count(strokes.drawn)} ${voxels} drawn`;
  find("undo").disabled = !strokes.can_undo;
  find("redo").disabled = !strokes.can_redo;
  find("problem").hidden = !strokes.problem;
  find("problem-text").textContent = strokes.problem;
  find("first-stroke").hidden = strokes.drawn > 0;
}

// Save the case, then what was asked for meanwhile.
async function saveCase() {
  await edits;
  find("saved-case").textContent = "saving …";
  const { number } = state;
  const sent = counter;
  saving = attempt(askCase("save-case", parameters()).then(async (answer) => {
    const { result, saved, strokes } = answer;
    tell("");
    if (number === state.number) {
      if (state.about.is_large && result && sent === counter) await showAnswer(answer);
      showStrokes(strokes);
      find("saved-case").textContent = `saved to ${saved}`;
    }
    return refreshCases();
  }));
  if (!(await saving)) showStrokes(state.strokes);
}

// Write strokes again that a full disk did not take.
async function keepAgain() {
  await keep();
  showStrokes((await askCase("describe")).strokes);
}

// End the program. The page ends before the server goes, so that nothing more is asked of it.
async function end() {
  await saving;
  if (!(await mayEnd())) return;
  showEnd();
  ask("end", {}).catch(() => {});
}

// ---- Results

function showText(toml) {
  find("toml").textContent = toml;
  find("saved").textContent = "";
}

function showStatus(text, isDone = false) {
  if (hasEnded()) return;
  const { result } = state;
  document.body.dataset.state = isDone ? "done" : "computing";
  if (isDone) document.body.dataset.number = String(counter);
  const where = result?.is_whole ? "Whole case" : "Provisional, in the frame";
  const facts = result ? `${count(result.voxels_changed)} voxels changed` : "";
  const whole = result ? `${where}: ${facts}, ${result.seconds.toFixed(2)} s` : "";
  find("status").textContent = [whole, text].filter(Boolean).join("; ");
}

function showResult() {
  const { about, result } = state;
  const { converged, device, filters, is_whole: isWhole, num_iterations: steps } = result;
  find("scores").tBodies[0].replaceChildren(...result.labels.map(scoreRow));
  find("scores-caption").textContent = isWhole ? "Whole case" : "In the frame only";
  showNotes([...about.notes, ...(result.notes ?? [])]);
  const where = device === "cpu" ? "" : `; on ${device}`;
  const ending = `${converged ? "converged" : "not converged"}; ${filters.join("; ")}${where}`;
  find("steps").textContent = `${steps} step${steps === 1 ? "" : "s"}, ${ending}`;
}

function scoreRow({ label, region, before, after, dice_before: was, dice_after: is }) {
  const isHidden = !state.about.has_reference;
  const cell = (textContent, kind = "") =>
    make("td", { className: `number ${kind}`, textContent, hidden: kind && isHidden });
  const gain = was === null || is === null || Math.abs(is - was) < 5e-5 ? 0 : Math.sign(is - was);
  const dice = ["▼ ", "", "▲ "][gain + 1] + percent(is);
  return make("tr", { className: region === undefined ? "" : "region" },
    make("td", {}, region ?? state.labels[label - 1].name), cell(percent(was), "dice"),
    cell(dice, `dice ${["worse", "", "better"][gain + 1]}`), cell(count(before)),
    cell(count(after)));
}

// ---- What people press

const save = () => attempt(askCase("save", parameters()).then(({ toml, saved }) => {
  tell("");
  showText(toml);
  find("saved").textContent = `saved to ${saved}`;
}));

function choosePreset(preset) {
  delete find("sliders").dataset.preset;
  set({ preset, changes: {} });
  refine();
}

const host = {
  draw: (stroke) => edit("draw", stroke), edited: () => edits,
  tellEmpty: () => tell("Nothing is drawn: no intensity there is in the range."),
  changeWindow, cover, enlarge, openCase, tellUnder, uncover,
};
const actions = {
  click: {
    whole: () => compute(true), "all-labels": () => showAllLabels(true), "no-labels": () => showAllLabels(false),
    save, "save-case": saveCase, undo: () => edit("undo", {}), redo: () => edit("redo", {}),
    exchange: () => enlarge(planes[(planes.indexOf(largePlane()) + 1) % planes.length]),
    closer: () => largePlane().zoomByKey(true), farther: () => largePlane().zoomByKey(false),
    fit: () => largePlane().fit(), end: () => attempt(end()),
    "keep-again": () => attempt(keepAgain()),
  },
  change: {
    modality: ({ value }) => { set({ modality: Number(value) }); chooseWindows(); },
    window: ({ value }) => takeWindow(state.about.windows[state.modality][value]),
    since: ({ value }) => set({ since: value }),
    preset: ({ value }) => choosePreset(value),
    smooth: ({ checked }) => set({ isSmooth: checked }),
    shape: ({ value }) => set({ shape: value }),
    limit: setRange, lowest: setRange, highest: setRange,
  },
  input: {
    level: slideWindow, width: slideWindow, filter: filterLabels,
    opacity: ({ valueAsNumber }) => set({ opacity: valueAsNumber / 100 }),
    size: ({ valueAsNumber }) => set({ size: valueAsNumber || 1 }),
  },
};
for (const name of ["network", "refined", "reference", "strokes"]) {
  actions.change[`show-${name}`] = ({ checked }) => setShown(name, checked);
  setShown(name, find(`show-${name}`).checked);
}
for (const [type, of] of Object.entries(actions)) {
  for (const [id, act] of Object.entries(of)) {
    find(id).addEventListener(type, ({ currentTarget }) => act(currentTarget));
  }
}

// Keys that press no button.
function resize(step) {
  find("size")[step]();
  set({ size: find("size").valueAsNumber });
}
const keys = { "[": () => resize("stepDown"), "]": () => resize("stepUp"), h: toggleChosen,
  c: () => turn("modality"), b: () => turn("shape"), "/": () => find("filter").focus(),
  p: () => { if (pointed) pick(pointed.refined); } };

document.addEventListener("keydown", (event) => {
  const isCommand = (event.ctrlKey || event.metaKey) && !event.getModifierState("AltGraph");
  const target = /** @type {Element} */ (event.target);
  const isWritten = target.closest("input[type=number], input[type=text], pre, dialog");
  let key = event.key.toLowerCase();
  if (key === "z" && event.shiftKey) key = "y";
  if (isCommand ? !"zys".includes(key) : !find("keys").checked || key.length > 1) return;
  if ((isWritten && !(isCommand && key === "s")) || (event.altKey && !"[]".includes(key))) return;
  const [node] = findAll(`[data-key="${CSS.escape(key)}"]`);
  const act = keys[key] ?? (node?.checkVisibility() && !node.disabled ? () => node.click() : null);
  if (!act || key === " ") return;
  event.preventDefault(); // A select would take the letter, and the browser Ctrl+S.
  act();
});
window.addEventListener("beforeunload", (event) => {
  if ((numUnsent || state.strokes.problem) && !hasEnded()) event.preventDefault();
});

attempt(ask("cases").then(async (list) => {
  const isCorrecting = list.folder.is_used;
  document.body.dataset.mode = isCorrecting ? "correct" : "choose";
  find("results").open = !isCorrecting;
  find("controls").open = !isCorrecting;
  startCases(host, list);
  await openCase(list.open);
  refreshCases();
  readAhead();
}));
