// The page: asks for a case, sends its parameters when they change, and shows the answers.
import { CHANGED, ask, attempt, fill, find, hasEnded, make, showEnd, swatch, tell }
  from "./page.js";
import { keep, mayEnd, readAhead, refreshCases, showState, startCases } from "./cases.js";
import { BACKGROUND } from "./drawing.js";
import { Plane } from "./plane.js";
import { buildControls } from "./sliders.js";

const count = (value) => value.toLocaleString("en");
const percent = (value) => (value === null ? "–" : (100 * value).toFixed(2));

// The state of the page. `version` is that of the labels, `number` that of the case; `since` is
// what changes are shown against: "", "network" or "former", the labels before the last stroke.
const page = {
  number: 0, place: [], grid: [], modality: 0, version: 0, labels: [], opacity: 0, since: "",
  shown: new Set(), hidden: new Set(), window: { low: 0, high: 1 }, drawnOn: null,
  brush: () => ({ value: null, ...find("brushes").querySelector(":checked")?.brush,
    size: find("size").valueAsNumber || 1 }),
  move: (place) => { page.place = place; showPlanes(); },
  draw: (stroke) => edit("draw", stroke),
  edited: () => edits,
  parameters: () => ({ preset, changes }),
  openCase, cover, uncover, changeWindow, enlarge,
};
let planes = [];
let about = null;
let result = null;
const askCase = (name, sent) => ask(`case/${page.number}/${name}`, sent);
const showPlanes = () => planes.forEach((plane) => plane.load());
const paintPlanes = () => planes.forEach((plane) => plane.paint());
const largePlane = () => planes.find((plane) => plane.node.classList.contains("main"));

// ---- The case

async function openCase(number) {
  const former = planes.indexOf(largePlane());
  page.number = number;
  about = await askCase("describe");
  const { place, grid, labels, modalities, spacing } = about;
  Object.assign(page, { place, grid, labels, version: page.version + 1 });
  page.modality = Math.min(page.modality, modalities.length - 1);
  [result, wholeSeconds] = [null, Infinity];
  document.title = `${about.case} – crfrefine tune`;
  find("case").textContent = about.case;
  const steps = spacing.map((step) => Number(step.toPrecision(3)));
  find("grid").textContent = `${grid.join("×")} voxels of ${steps.join("×")} mm`;
  const presets = about.presets.map((name) => [name, name || "as opened"]);
  if (!find("preset").length) fill(find("preset"), presets, "", CHANGED);
  fill(find("modality"), modalities.map((name, order) => [order, name]), page.modality);
  for (const node of document.querySelectorAll(".dice")) node.hidden = !about.has_reference;
  find("reference-choice").hidden = !about.has_reference;
  Object.assign(find("save"), { hidden: about.output === null, title: about.output ?? "" });
  showNotes(about.notes);
  showBrushes();
  showStrokes(about.strokes);
  planes = about.planes.map((spec) => new Plane(spec, page));
  find("planes").replaceChildren(...planes.map((plane) => plane.node));
  enlarge(planes[former] ?? planes[0]);
  chooseWindows();
  showPlanes();
  await refine();
}

// Cover the planes while another case opens; a stroke that is being drawn ends.
function cover(name) {
  for (const plane of planes) plane.finish();
  find("planes").inert = true;
  find("opening").textContent = `Opening ${name} …`;
  find("opening").hidden = false;
}

function uncover() {
  find("planes").inert = false;
  find("opening").hidden = true;
}

function enlarge(plane) {
  for (const other of planes) other.node.classList.toggle("main", other === plane);
  paintPlanes();
}

function showBrushes() {
  const former = page.brush();
  const drawn = about.labels.filter(({ label }) => label !== BACKGROUND);
  const labels = drawn.map(({ label, name, color }) => [String(label), name, label, color]);
  const tools = [["m", "crosshair", null, "transparent"], ["v", "move", null, "transparent"],
    ...labels, ["0", "background", BACKGROUND, "#fff"], ["e", "erase", 0, "#888"]];
  find("brushes").replaceChildren(...tools.map(([key, name, value, color]) => {
    const brush = { value, color, isHand: key === "v" };
    const checked = value === former.value && brush.isHand === Boolean(former.isHand);
    const box = make("input", { type: "radio", name: "brush", checked, brush });
    box.dataset.key = key;
    return make("label", { className: "choice" }, box, swatch(color), name);
  }));
}

function showNotes(notes) {
  find("notes").hidden = !notes.length;
  const items = notes.map((textContent) => make("li", { textContent }));
  find("notes").querySelector("ul").replaceChildren(...items);
}

// ---- Window and level

function chooseWindows() {
  const windows = about.windows[page.modality];
  fill(find("window"), windows.map(({ name }, order) => [order, name]), 0, "other");
  const { low, high } = windows[1] ?? windows[0];
  const step = (high - low) / 1000;
  Object.assign(find("level"), { min: low, max: high, step });
  Object.assign(find("width"), { min: step, max: high - low, step });
  setWindow((windows[0].low + windows[0].high) / 2, windows[0].high - windows[0].low);
}

function setWindow(level, width) {
  page.window = { low: level - width / 2, high: level + width / 2 };
  [find("level").value, find("width").value] = [level, width];
  paintPlanes();
}

// Pixels to the right widen the window; pixels down raise the level, which darkens the picture.
function changeWindow(byX, byY) {
  const { low, high } = page.window;
  find("window").value = CHANGED;
  setWindow((low + high) / 2 + ((high - low) * byY) / 200, (high - low) * Math.exp(byX / 200));
}

// ---- Parameters: the page sends all of them with a counter; the newest state wins

let preset = "";
let changes = {};
let counter = 0;
let running = null;
let wholeSeconds = Infinity;
let edits = Promise.resolve();
let saving = Promise.resolve();
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
  if (!why && !result?.is_whole) compute(true);
  return why;
}

async function compute(isWhole) {
  if (hasEnded()) return "";
  const [sent, number] = [counter, page.number];
  showStatus(isWhole ? "the whole case follows …" : "computing …");
  try {
    const state = { ...page.parameters(), counter: sent, place: page.place, is_whole: isWhole };
    const answer = await askCase("refine", state);
    if (number !== page.number || (isWhole && sent !== counter)) return "";
    if (answer.is_stale) showStatus("Another tab has the page now; a change here takes it back.");
    else await showAnswer(answer);
    return "";
  } catch (error) {
    if (sent === counter && number === page.number && !hasEnded()) {
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
  if (find("sliders").dataset.preset !== preset) {
    find("sliders").dataset.preset = preset;
    buildControls(find("sliders"), answer.controls, change);
  }
  result = answer.result;
  page.version += 1;
  const isWhole = Boolean(result?.is_whole);
  const first = page.drawnOn; // The plane that somebody draws on comes first.
  if (isWhole) page.drawnOn = null;
  await first?.load();
  performance.mark(isWhole ? "whole" : "provisional");
  if (result) showResult();
  if (!first || isWhole || wholeSeconds > 2) showPlanes();
  if (isWhole) {
    wholeSeconds = result.seconds;
    refreshCases(); // Saved cases may be older than the parameters now.
  }
  showStatus("", isWhole);
}

// Take a value; promise "", or why it was refused: then the former value applies again.
async function change(key, value) {
  const former = changes[key];
  changes = { ...changes, [key]: value };
  find("preset").value = CHANGED; // Then each preset can be chosen again.
  const why = await refine();
  if (!why.startsWith(`${key}:`) || changes[key] !== value) return "";
  changes = { ...changes, [key]: former };
  if (former === undefined) delete changes[key];
  refine();
  return why;
}

// ---- Strokes

// Draw, undo or redo after the edits before, then refine; promise whether it is done.
function edit(name, sent) {
  performance.mark("edit");
  const { number } = page;
  const mark = crypto.randomUUID(); // It may be sent twice, and is done once.
  numUnsent += 1;
  const done = edits.then(() => ask(`case/${number}/${name}`, { ...sent, mark }));
  edits = attempt(done.then((strokes) => {
    showState(number, strokes.state);
    if (number !== page.number) return;
    showStrokes(strokes);
    page.version += 1;
    refine();
  })).finally(() => { numUnsent -= 1; });
  return edits;
}

function showStrokes(strokes) {
  about.strokes = strokes;
  const voxels = strokes.drawn === 1 ? "voxel" : "voxels";
  find("saved-case").textContent = `${count(strokes.drawn)} ${voxels} drawn`;
  find("undo").disabled = !strokes.can_undo;
  find("redo").disabled = !strokes.can_redo;
  find("problem").hidden = !strokes.problem;
  find("problem-text").textContent = strokes.problem;
}

// Save the case, then what was asked for meanwhile.
async function saveCase() {
  await edits;
  find("saved-case").textContent = "saving …";
  const { number } = page;
  saving = attempt(askCase("save-case", page.parameters()).then(({ strokes, saved }) => {
    tell("");
    if (number === page.number) {
      showStrokes(strokes);
      find("saved-case").textContent = `saved to ${saved}`;
    }
    return refreshCases();
  }));
  if (!(await saving)) showStrokes(about.strokes);
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
  document.body.dataset.state = isDone ? "done" : "computing";
  if (isDone) document.body.dataset.number = counter;
  const where = result?.is_whole ? "Whole case" : "Provisional, in the frame";
  const facts = result ? `${count(result.voxels_changed)} voxels changed` : "";
  const whole = result ? `${where}: ${facts}, ${result.seconds.toFixed(2)} s` : "";
  find("status").textContent = [whole, text].filter(Boolean).join("; ");
}

function showResult() {
  const { converged, device, filters, is_whole: isWhole, num_iterations: steps } = result;
  find("scores").tBodies[0].replaceChildren(...result.labels.map(scoreRow));
  find("scores-caption").textContent = `Labels, ${isWhole ? "whole case" : "in the frame only"}`;
  showNotes([...about.notes, ...(result.notes ?? [])]);
  const where = device === "cpu" ? "" : `; on ${device}`;
  const ending = `${converged ? "converged" : "not converged"}; ${filters.join("; ")}${where}`;
  find("steps").textContent = `${steps} step${steps === 1 ? "" : "s"}, ${ending}`;
}

function scoreRow({ label, region, before, after, dice_before: was, dice_after: is }) {
  const cell = (textContent, kind = "") =>
    make("td", { className: `number ${kind}`, textContent, hidden: kind && !about.has_reference });
  const gain = was === null || is === null || Math.abs(is - was) < 5e-5 ? 0 : Math.sign(is - was);
  const dice = ["▼ ", "", "▲ "][gain + 1] + percent(is);
  let name = region;
  if (region === undefined) {
    const box = make("input", { type: "checkbox", checked: !page.hidden.has(label) });
    box.addEventListener("change", () => {
      page.hidden[box.checked ? "delete" : "add"](label);
      paintPlanes();
    });
    const { color, name: title } = about.labels[label - 1];
    name = make("label", {}, box, swatch(color), title);
  }
  return make("tr", { className: region === undefined ? "" : "region" }, make("td", {}, name),
    cell(percent(was), "dice"), cell(dice, `dice ${["worse", "", "better"][gain + 1]}`),
    cell(count(before)), cell(count(after)));
}

// ---- What people press

function setShown(name, isShown) {
  page.shown[isShown ? "add" : "delete"](name);
  paintPlanes();
}

function showLabels(isShown) {
  page.hidden = new Set(isShown ? [] : page.labels.map(({ label }) => label));
  for (const box of find("scores").querySelectorAll("input")) box.checked = isShown;
  paintPlanes();
}

const save = () => attempt(askCase("save", page.parameters()).then(({ toml, saved }) => {
  showText(toml);
  find("saved").textContent = `saved to ${saved}`;
}));

function choosePreset(name) {
  [preset, changes] = [name, {}];
  delete find("sliders").dataset.preset;
  refine();
}

function slideWindow() {
  find("window").value = CHANGED;
  setWindow(find("level").valueAsNumber, find("width").valueAsNumber);
}

const actions = {
  click: {
    "all-labels": () => showLabels(true), "no-labels": () => showLabels(false), save,
    "save-case": saveCase, undo: () => edit("undo", {}), redo: () => edit("redo", {}),
    exchange: () => enlarge(planes[(planes.indexOf(largePlane()) + 1) % planes.length]),
    closer: () => largePlane().zoomByKey(true), farther: () => largePlane().zoomByKey(false),
    fit: () => largePlane().fit(),
    end: () => attempt(end()), "keep-again": () => attempt(keepAgain()),
  },
  change: {
    modality: ({ value }) => { page.modality = Number(value); chooseWindows(); showPlanes(); },
    window: ({ value }) => {
      const { low, high } = about.windows[page.modality][value];
      setWindow((low + high) / 2, high - low);
    },
    since: ({ value }) => { page.since = value; paintPlanes(); },
    preset: ({ value }) => choosePreset(value),
  },
  input: {
    level: slideWindow, width: slideWindow,
    opacity: ({ valueAsNumber }) => { page.opacity = valueAsNumber / 100; paintPlanes(); },
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

document.addEventListener("keydown", (event) => {
  const isField = event.target.closest("input[type=number], select, pre, dialog");
  let key = event.key.toLowerCase();
  if (key === "z" && event.shiftKey) key = "y";
  if (event.altKey || isField || ((event.ctrlKey || event.metaKey) && !"zy".includes(key))) return;
  if (key === "[" || key === "]") find("size")[key === "[" ? "stepDown" : "stepUp"]();
  const node = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (node && !node.disabled && node.checkVisibility()) node.click();
});
window.addEventListener("beforeunload", (event) => {
  if ((numUnsent || about?.strokes.problem) && !hasEnded()) event.preventDefault();
});

attempt(ask("cases").then(async (list) => {
  startCases(page, list);
  await openCase(list.open);
  refreshCases();
  readAhead();
}));
