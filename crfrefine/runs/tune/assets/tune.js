// The page: asks for the case, sends its parameters when they change, and shows the answers.
import { make, Plane } from "./planes.js";
import { buildControls } from "./sliders.js";

const find = (id) => document.getElementById(id);
const page = { place: [], grid: [], spacing: [], modality: 0, version: 0, shown: new Set(), hidden: new Set(), drawn: null, hasEnded: false,
  move: (place) => { page.place = place; drawAll(); }, draw: (stroke) => edit("draw", stroke),
  brush: () => ({ ...document.querySelector("[name=brush]:checked").brush, size: find("size").valueAsNumber || 1 }) };
const CHANGED = "changed", SHOWN = ["network", "refined", "reference", "changes", "strokes"];
let planes = [], about = null, result = null;

async function ask(address, sent) {
  const how = sent === undefined ? {} : { method: "POST", body: JSON.stringify(sent) };
  const answer = await fetch(address, how).catch((error) => { showEnd(); throw error; }), content = await answer.json();
  if (!answer.ok) throw new Error(content.error ?? answer.statusText);
  return content;
}

const tell = (text) => Object.assign(find("error"), { textContent: text, hidden: !text });
const swatch = (color) => make("span", { className: "swatch", style: `background: ${color}` });

// ---- The case
function showCase() {
  Object.assign(page, { place: about.place, grid: about.grid, spacing: about.spacing });
  find("case").textContent = about.case;
  find("grid").textContent = `${about.grid.join("×")} voxels of ${about.spacing.map((step) => Number(step.toPrecision(3))).join("×")} mm`;
  options(find("preset"), [...about.presets.map((name) => [name, name || "as opened"]), [CHANGED, CHANGED]], "");
  find("preset").lastElementChild.hidden = true;
  options(find("modality"), about.modalities.map((name, place) => [String(place), name]), String(page.modality));
  find("reference-choice").hidden = !about.has_reference;
  for (const node of document.querySelectorAll("#scores .dice")) node.hidden = !about.has_reference;
  find("save").hidden = about.output === null;
  find("save").title = about.output ?? "";
  showNotes(about.notes);
  const own = about.labels.filter(({ label }) => label !== 255).map(({ label, name, color }) => [String(label), name, label, color]);
  for (const [key, name, value, color] of [["m", "crosshair", null, "transparent"], ...own, ["0", "background", 255, "#fff"], ["e", "erase", 0, "#888"]]) {
    const box = make("input", { type: "radio", name: "brush", checked: value === null, brush: { value, color } });
    box.dataset.key = key;
    find("brushes").append(make("label", { className: "choice" }, box, swatch(color), name));
  }
  showStrokes(about.strokes);
  planes = about.planes.map((spec) => new Plane(spec, page));
  find("planes").replaceChildren(...planes.map((plane) => plane.node));
}

function showNotes(notes) {
  find("notes").hidden = !notes.length;
  find("notes").querySelector("ul").replaceChildren(...notes.map((text) => make("li", { textContent: text })));
}

const options = (select, pairs, chosen) => {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
  select.value = chosen;
};

// Draw the planes, first the one that somebody has drawn on: of a frame only that one, if the whole case follows soon.
const drawAll = async () => {
  const first = page.drawn, drawsAll = !first || result?.is_whole || wholeSeconds > 2;
  page.drawn = null;
  await first?.draw();
  if (drawsAll) planes.forEach((plane) => { if (plane !== first) plane.draw(); });
};

// ---- Parameters: the page keeps them, and sends all of them with a counter; the newest state wins
let preset = "", changes = {}, counter = 0, running = null, wholeSeconds = Infinity;
const showText = (toml) => { find("toml").textContent = toml; find("saved").textContent = ""; };

// Refine the newest state, first in the frame; promise "", or why it was refused. A state that came meanwhile follows.
function refine() {
  counter = Math.max(counter + 1, Date.now());  // Later than those of a tab that was opened before.
  running ??= (async () => {
    let sent, why;
    do {
      sent = counter;
      why = await compute(false);
    } while (sent !== counter);
    running = null;
    if (!why && !result?.is_whole) compute(true);
    return why;
  })();
  return running;
}

// Draw or undo after the edits before, then refine.
let edits = Promise.resolve();
const edit = (name, sent) => (edits = edits.then(() => ask(name, sent))
  .then((strokes) => { showStrokes(strokes); refine(); return true; }, (error) => { tell(error.message); return false; })
  .finally(() => { page.version += 1; }));

const showStrokes = ({ drawn, can_undo: canUndo }) => {
  find("saved-case").textContent = `${count(drawn)} voxel${drawn === 1 ? "" : "s"} drawn`;
  find("undo").disabled = !canUndo;
};

async function compute(isWhole) {
  if (page.hasEnded) return "";
  const sent = counter;
  showStatus(isWhole ? "the whole case follows …" : "computing …");
  try {
    const answer = await ask("refine", { counter: sent, preset, changes, place: page.place, is_whole: isWhole });
    if (isWhole && sent !== counter) return "";
    if (answer.is_stale) {
      showStatus("Another tab has the page now; a change here takes it back.");
      drawAll();
      return "";
    }
    tell("");
    showText(answer.toml);
    if (find("sliders").dataset.preset !== preset) {
      find("sliders").dataset.preset = preset;
      buildControls(find("sliders"), answer.controls, change);
    }
    result = answer.result;
    if (isWhole) wholeSeconds = result.seconds;
    page.version += 1;
    if (result) showResult();
    drawAll();
    showStatus("", result?.is_whole);
    return "";
  } catch (error) {
    if (sent === counter && !page.hasEnded) {
      tell(error.message);
      showStatus("", true);
      drawAll();
    }
    return error.message;
  }
}

// Take a value; promise "", or why it was refused: then the former value applies again.
async function change(key, value) {
  const former = changes[key];
  changes = { ...changes, [key]: value };
  find("preset").value = CHANGED;  // Then each preset can be chosen again.
  const why = await refine();
  if (!why.startsWith(`${key}:`) || changes[key] !== value) return "";
  changes = { ...changes, [key]: former };
  if (former === undefined) delete changes[key];
  refine();
  return why;
}

// ---- Results
function showEnd() {
  page.hasEnded = true;
  document.body.dataset.state = "ended";
  find("status").textContent = "The program has ended; this page can be closed.";
  for (const node of document.querySelectorAll("button, input, select")) node.disabled = true;
  find("planes").inert = true;  // No other planes can come.
}

function showStatus(text, isDone = false) {
  if (page.hasEnded) return;
  document.body.dataset.state = isDone ? "done" : "computing";
  const where = result?.is_whole ? "Whole case" : "In the frame", parts = text ? [text] : [];
  if (result) parts.unshift(`${where}: ${count(result.voxels_changed)} voxels changed, ${result.seconds.toFixed(2)} s`);
  find("status").textContent = parts.join("; ");
  if (isDone) document.body.dataset.number = counter;
}

const percent = (value) => (value === null ? "–" : (100 * value).toFixed(2));
const count = (value) => value.toLocaleString("en");

function showResult() {
  const rows = result.labels.map((row) => {
    const label = about.labels[row.label - 1];
    const box = make("input", { type: "checkbox", checked: !page.hidden.has(row.label) });
    box.addEventListener("change", () => { page.hidden[box.checked ? "delete" : "add"](row.label); drawAll(); });
    const gain = row.dice_before === null || row.dice_after === null ? 0 : row.dice_after - row.dice_before;
    const mark = Math.abs(gain) < 5e-5 ? "" : gain > 0 ? "▲ " : "▼ ";
    const after = make("td", { className: `number dice ${mark ? (gain > 0 ? "better" : "worse") : ""}`, textContent: mark + percent(row.dice_after) });
    const dice = [make("td", { className: "number dice", textContent: percent(row.dice_before) }), after];
    for (const cell of dice) cell.hidden = !about.has_reference;
    const name = row.region === undefined ? make("label", {}, box, swatch(label.color), label.name) : row.region;
    return make("tr", { className: row.region === undefined ? "" : "region" }, make("td", {}, name), ...dice,
      make("td", { className: "number", textContent: count(row.before) }), make("td", { className: "number", textContent: count(row.after) }));
  });
  find("scores").tBodies[0].replaceChildren(...rows);
  find("scores-caption").textContent = `Labels, ${result.is_whole ? "whole case" : "in the frame only"}`;
  showNotes([...about.notes, ...(result.notes ?? [])]);
  const steps = `${result.num_iterations} step${result.num_iterations === 1 ? "" : "s"}`;
  const device = result.device === "cpu" ? "" : `; on ${result.device}`;
  find("steps").textContent = `${steps}, ${result.converged ? "converged" : "not converged"}; ${result.filters.join("; ")}${device}`;
}

// ---- What people press
for (const name of SHOWN) {
  const box = find(`show-${name}`), choose = () => { page.shown[box.checked ? "add" : "delete"](name); drawAll(); };
  box.addEventListener("change", choose);
  choose();
}
document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase(), isPlain = !event.ctrlKey && !event.metaKey, node = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (!(isPlain || (key === "z" && !event.shiftKey)) || event.altKey || event.target.closest("input[type=number], select, pre")) return;
  if (key === "[" || key === "]") find("size")[key === "[" ? "stepDown" : "stepUp"]();
  if (node && !node.disabled && node.checkVisibility()) node.click();
});
for (const [id, isShown] of [["all-labels", true], ["no-labels", false]]) {
  find(id).addEventListener("click", () => {
    page.hidden = new Set(isShown ? [] : about.labels.map(({ label }) => label));
    for (const box of find("scores").querySelectorAll("input")) box.checked = isShown;
    drawAll();
  });
}
find("modality").addEventListener("change", () => { page.modality = Number(find("modality").value); drawAll(); });
find("preset").addEventListener("change", () => {
  [preset, changes] = [find("preset").value, {}];
  delete find("sliders").dataset.preset;
  refine();
});
for (const id of ["save", "save-case"]) {
  find(id).addEventListener("click", () => edits.then(() => ask(id, { preset, changes })).then(
    (answer) => { showText(answer.toml); find(id.replace("save", "saved")).textContent = `saved to ${answer.saved}`; }, (error) => tell(error.message)));
}
find("undo").addEventListener("click", () => edit("undo", {}).then(drawAll));
// The page ends before the server goes, so that nothing more is asked of it.
find("end").addEventListener("click", () => { showEnd(); ask("end", {}).catch(() => {}); });
window.addEventListener("resize", drawAll);

ask("describe").then((described) => { about = described; showCase(); refine(); }, (error) => tell(error.message));
