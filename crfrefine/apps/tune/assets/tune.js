// The page: asks for the case, sends changes of parameters, and shows each newer result as it comes.
import { make, Plane } from "./planes.js";
import { buildControls } from "./sliders.js";

const find = (id) => document.getElementById(id);
const page = { place: [], grid: [], modality: 0, look: {}, colors: [], rgb: [], hidden: new Set(), box: null, move };
const CHANGED = "changed", LOOKS = { network: "n", refined: "r", reference: "l", changes: "c" };
let planes = [], about = null, number = 0, result = null, names = [], hasEnded = false;

async function ask(address, sent) {
  const how = sent === undefined ? {} : { method: "POST", body: JSON.stringify(sent) };
  const answer = await fetch(address, how), content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.error ?? answer.statusText), { status: answer.status });
  return content;
}

function tell(text) {
  find("error").textContent = text;
  find("error").hidden = !text;
}

// ---- Messages: one after the other; the newest change wins, also one of another tab

let queue = Promise.resolve(), numWaiting = 0;

// Send a message after the others; return "", or the text of an error.
function post(action, content, then) {
  numWaiting += 1;
  queue = queue.then(async () => {
    then(await ask(action, content()));
    tell("");
    return "";
  }).finally(() => {
    numWaiting -= 1;
    digest();
  }).catch((error) => error.message);
  return queue;
}

// ---- The case

function show(described) {
  const isFirst = about === null;
  about = described;
  options(find("preset"), [...about.presets.map((name) => [name, name || "as opened"]), [CHANGED, CHANGED]], about.is_as_opened ? "" : CHANGED);
  find("preset").lastElementChild.hidden = true;
  if (isFirst) showCase();
  take(about, true);
}

function showCase() {
  Object.assign(page, { place: about.place, grid: about.grid });
  for (const { label, color, name } of about.labels) {
    page.colors[label] = color;
    names[label] = name;
  }
  page.rgb = page.colors.map((color) => [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16)));
  find("case").textContent = about.case;
  find("grid").textContent = `${about.grid.join("×")} voxels of ${about.spacing.map((step) => Number(step.toPrecision(3))).join("×")} mm`;
  options(find("modality"), about.modalities.map((name, place) => [String(place), name]), String(page.modality));
  find("reference-choice").hidden = !about.has_reference;
  for (const node of document.querySelectorAll("#scores .dice")) node.hidden = !about.has_reference;
  find("save").hidden = about.output === null;
  find("save").title = about.output ?? "";
  showNotes(about.notes);
  find("status").textContent = "computing …";
  planes = about.planes.map((spec) => new Plane(spec, page));
  find("planes").replaceChildren(...planes.map((plane) => plane.node));
  loadAll();
}

function showNotes(notes) {
  find("notes").hidden = !notes.length;
  find("notes").querySelector("ul").replaceChildren(...notes.map((text) => make("li", { textContent: text })));
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
  select.value = chosen;
}

const loadAll = () => planes.forEach((plane) => plane.load());
const drawAll = () => planes.forEach((plane) => plane.draw());

function move(place) {
  const old = page.place;
  page.place = place;
  planes.forEach((plane) => {
    const { through } = plane.spec;
    if (through !== null && place[through] !== old[through]) plane.load();
    plane.draw();
  });
}

// ---- Parameters

// Take what the server says about the parameters; controls are built anew only if another hand changed them.
function take(parameters, isNew) {
  number = parameters.number;
  find("toml").textContent = parameters.toml;
  find("download").href = `data:text/plain;charset=utf-8,${encodeURIComponent(parameters.toml)}`;
  find("saved").textContent = "";
  if (!isNew) {
    find("preset").value = CHANGED;  // Then each of them can be chosen again.
    return;
  }
  buildControls(find("sliders"), parameters.controls, change);
}

const changes = new Map();  // not sent yet

// Send a value; return as `post`. Of several that wait for the same parameter, only the newest is sent.
function change(key, value) {
  const waits = changes.get(key);
  if (waits) {
    waits.value = value;
    return waits.answer;
  }
  const found = { value };
  changes.set(key, found);
  found.answer = post("change", () => {
    changes.delete(key);
    return { changes: { [key]: found.value }, place: page.place };
  }, (parameters) => take(parameters, parameters.number !== number + 1));
  return found.answer;
}

async function act(action, content, then) {
  const text = await post(action, () => content, then);
  if (text) tell(text);
}

// ---- Results

let news = null;

async function listen() {
  do {
    try { news = await ask(`news?after=${news?.version ?? 0}`); } catch { break; }
    digest();
  } while (!news.has_ended);
  hasEnded = true;
  document.body.dataset.state = "ended";
  find("status").textContent = "The program has ended; this page can be closed.";
  for (const node of document.querySelectorAll("button:not(#copy), input, select")) node.disabled = true;
  find("planes").inert = true;  // No other planes can come.
}

// Show what is new, unless it is of a state that this tab does not know yet: an answer brings it, or another tab made it.
function digest() {
  if (!news || hasEnded) return;
  if (news.number > number) {
    if (!numWaiting) post("describe", () => undefined, show);  // Another tab changed something.
    return;
  }
  if (news.error?.number === number) tell(news.error.text);
  if (news.result && news.result.serial !== result?.serial) {
    result = news.result;
    page.box = result.box;
    showResult();
    loadAll();
  }
  showStatus();
}

function showStatus() {
  const state = document.body.dataset, working = news.number < number ? "box" : news.working;
  state.number = result ? result.number : "";
  state.state = news.error ? "error" : working || "done";
  const parts = [];
  if (result) {
    const where = result.is_whole ? "Whole case" : "In the dashed frame";
    parts.push(`${where}: ${count(result.voxels_changed)} voxels changed, ${result.seconds.toFixed(2)} s`);
  }
  if (working) parts.push(working === "box" ? "computing …" : "the whole case follows …");
  find("status").textContent = parts.join("; ");
}

const percent = (value) => (value === null ? "–" : (100 * value).toFixed(2));
const count = (value) => value.toLocaleString("en");

function showResult() {
  const rows = result.labels.map((row) => {
    const box = make("input", { type: "checkbox", checked: !page.hidden.has(row.label) }), swatch = make("span", { className: "swatch" });
    swatch.style.background = page.colors[row.label];
    box.addEventListener("change", () => {
      if (box.checked) page.hidden.delete(row.label);
      else page.hidden.add(row.label);
      drawAll();
    });
    const gain = row.dice_before === null || row.dice_after === null ? 0 : row.dice_after - row.dice_before;
    const mark = Math.abs(gain) < 5e-5 ? "" : gain > 0 ? "▲ " : "▼ ";
    const after = make("td", { className: `number dice ${mark ? (gain > 0 ? "better" : "worse") : ""}`, textContent: mark + percent(row.dice_after) });
    const dice = [make("td", { className: "number dice", textContent: percent(row.dice_before) }), after];
    for (const cell of dice) cell.hidden = !about.has_reference;
    const name = row.region === undefined ? make("label", {}, box, swatch, names[row.label]) : row.region;
    return make("tr", { className: row.region === undefined ? "" : "region" }, make("td", {}, name), ...dice,
      make("td", { className: "number", textContent: count(row.before) }), make("td", { className: "number", textContent: count(row.after) }));
  });
  find("scores").tBodies[0].replaceChildren(...rows);
  find("scores-caption").textContent = `Labels, ${result.is_whole ? "whole case" : "in the dashed frame only"}`;
  showNotes([...about.notes, ...(result.notes ?? [])]);
  const steps = `${result.num_iterations} step${result.num_iterations === 1 ? "" : "s"}`;
  const device = result.device === "cpu" ? "" : `; on ${result.device}`;
  find("steps").textContent = `${steps}, ${result.converged ? "converged" : "not converged"}; ${result.filters.join("; ")}${device}`;
}

// ---- What people press

for (const [look, key] of Object.entries(LOOKS)) {
  const box = find(`show-${look}`);
  page.look[look] = box.checked;
  box.addEventListener("change", () => { page.look[look] = box.checked; drawAll(); });
  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() !== key || event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input[type=number], select, pre")) return;
    if (!box.disabled && box.checkVisibility()) box.click();
  });
}
for (const [id, isShown] of [["all-labels", true], ["no-labels", false]]) {
  find(id).addEventListener("click", () => {
    page.hidden = new Set(isShown ? [] : about.labels.map(({ label }) => label));
    for (const box of find("scores").querySelectorAll("input")) box.checked = isShown;
    drawAll();
  });
}
find("modality").addEventListener("change", () => { page.modality = Number(find("modality").value); loadAll(); });
find("preset").addEventListener("change", () => act("preset", { name: find("preset").value, place: page.place }, (found) => take(found, true)));
find("save").addEventListener("click", () => act("save", {}, (found) => { take(found, found.number !== number); find("saved").textContent = `saved to ${found.saved}`; }));
find("copy").addEventListener("click", () => navigator.clipboard.writeText(find("toml").textContent).then(
  () => { find("saved").textContent = "copied"; }, () => { find("saved").textContent = "the browser does not allow it; select the text"; }));
find("end").addEventListener("click", () => ask("end", {}).catch(() => {}));
window.addEventListener("resize", drawAll);

ask("describe").then((described) => { show(described); listen(); }, (error) => tell(error.message));
