// The tools: where strokes may draw, what the program finds, and labels seen from three sides.
import { ask, askPlane, attempt, find, tell } from "./page.js";
import { set, state, watch } from "./store.js";
import { BACKGROUND } from "./drawing.js";

const FILLS = ["fill", "flood"]; // brushes that fill alike voxels around a seed
const FOUND = [...FILLS, "island"]; // brushes whose voxels the program finds

// The label that is chosen; 0 if another tool is.
function chosenLabel() {
  const value = Number(state.tool);
  return value > 0 && value !== BACKGROUND ? value : 0;
}

// The labels that a stroke may draw over, which begins on a label; undefined means all.
function drawnOver(label) {
  if (state.over === "background") return [0];
  if (state.over === "start") return [label ?? 0];
  if (state.over !== "shown") return undefined;
  return [0, ...state.labels.map((one) => one.label).filter((one) => !state.hidden.has(one))];
}

// What a stroke that begins at a voxel, on a label, has of its own.
export function beginAt(place, label) {
  const { highest: high, limit, lowest: low, modality, shape } = state;
  const within = { over: drawnOver(label) };
  if (limit || FILLS.includes(shape)) {
    Object.assign(within, { low, high, modality: Number(modality) });
  }
  return FOUND.includes(shape) ? { place, within } : { within };
}

// A stroke whose voxels the program finds at the crosshair.
export function strokeAt(plane, shape, value, within = {}) {
  const { spec: { number } } = plane;
  return { plane: number, place: state.place, path: [], value, shape, radius: 0, within };
}

// Fill with the chosen label, or background, between the slices in which it is drawn.
export function strokeBetween(plane) {
  const value = Number(state.tool);
  if (value > 0) return strokeAt(plane, "between", value, { over: drawnOver(0) });
  tell("Choose a label, draw it in two slices, and then fill between them.");
  return null;
}

// Move the crosshair to the next island of a label, or with -1 to the next change.
export function jump(name, label = chosenLabel()) {
  const { number, place } = state;
  return attempt(ask(`case/${number}/find`, { label, place }).then((found) => {
    tell("");
    set({ place: found.place });
    const voxels = found.voxels.toLocaleString("en");
    find("found").textContent = `${name} ${found.rank} of ${found.islands}: ${voxels} voxels`;
  }));
}

// Move the crosshair to a place, and across a plane to the nearest voxel of a label: another plane
// through that place has them all.
async function goTo(place, { number, through }, label) {
  const line = sides.map(({ plane: { spec } }) => spec).find((spec) => spec.number !== number);
  if (!line) return set({ place });
  const { number: plane, size } = line;
  const sent = { plane, place, modality: Number(state.modality), is_known: true };
  const query = encodeURIComponent(JSON.stringify(sent));
  const { columns, refined } = await askPlane(`case/${state.number}/plane/0?${query}`);
  const depths = [...Array(state.about.grid[through]).keys()].filter((depth) => {
    const voxel = place.with(through, depth);
    return refined[(size[1] - 1 - voxel[line.up]) * columns + voxel[line.across]] === label;
  });
  depths.sort((one, other) => Math.abs(one - place[through]) - Math.abs(other - place[through]));
  return set({ place: place.with(through, depths[0] ?? place[through]) });
}

// The pictures of a label from all sides, in which a click moves the crosshair.
let /** @type {any[]} */ sides = [];

export function buildSides(planes) {
  sides = planes.map((plane) => {
    const image = new Image();
    const { across, size: [width, height], steps: [stepX, stepY], up } = plane.spec;
    image.style.aspectRatio = `${width * stepX} / ${height * stepY}`;
    image.addEventListener("click", ({ offsetX: x, offsetY: y }) => {
      const voxel = [Math.floor((x / image.clientWidth) * width),
        height - 1 - Math.floor((y / image.clientHeight) * height)];
      const place = state.place.with(across, voxel[0]).with(up, voxel[1]);
      attempt(goTo(place, plane.spec, Number(image.dataset.label)));
    });
    return { image, plane };
  });
  find("projections").replaceChildren(...sides.map(({ image }) => image));
  for (const id of ["found", "measured"]) find(id).textContent = "";
}

function showSides() {
  if (!find("sides").open || !sides.length) return;
  const [{ plane: first }] = sides;
  const label = chosenLabel() || first.under(first.crosshair())?.refined || 0;
  const name = state.labels.find((one) => one.label === label)?.name;
  find("side-label").textContent = name ? `${name}.` : "Choose a label.";
  for (const { image, plane: { spec } } of sides) {
    const query = encodeURIComponent(JSON.stringify({ plane: spec.number, label }));
    Object.assign(image, { hidden: !name, alt: `${name}, ${spec.name}` });
    image.dataset.label = label;
    if (name) image.src = `case/${state.number}/projection/${state.version}?${query}`;
  }
}

watch("result tool", showSides);
find("sides").addEventListener("toggle", showSides);
watch("shape", () => {
  if (FILLS.includes(state.shape) && !state.limit) find("limit").click();
});
watch("measured", () => { find("measured").textContent = `${state.measured.toFixed(1)} mm`; });
