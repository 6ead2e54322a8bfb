// What a plane becomes: canvases with a pixel for each voxel, and contours. tune.css has the rest.
import { contoursOf } from "./contours.js";

export const BACKGROUND = 255; // value of a stroke that draws background
const WHITE = 0xffffff;
const INSET = 0.9; // pixels from a border to the middle of its line
const HATCH = 3; // voxels between the dark ones of strokes of background, which bright tissue needs

// Fill a canvas. color(place) has blue, green and red in its lowest bytes, undefined for nothing.
// An empty one is hidden: browsers take long to put a picture together of many canvases.
function fill(canvas, { rows, columns }, color) {
  const pixels = new ImageData(columns, rows);
  const words = new Uint32Array(pixels.data.buffer);
  let hidden = true;
  for (let place = 0; place < words.length; place += 1) {
    const value = color(place);
    if (value === undefined) continue;
    words[place] = value | (255 << 24);
    hidden = false;
  }
  Object.assign(canvas, { width: columns, height: rows, hidden });
  if (!hidden) canvas.getContext("2d").putImageData(pixels, 0, 0);
}

export function drawGray(canvas, plane, { level, width }) {
  const factor = 255 / Math.max(width, 1e-30);
  const lowest = level - width / 2;
  fill(canvas, plane, (place) => {
    const gray = Math.max(0, Math.min(255, (plane.image[place] - lowest) * factor)); // NaN: black
    return (gray & 255) * 0x10101;
  });
}

// The color of each label, for `fill`.
export function colorTable(labels) {
  const swap = (color) => parseInt(color.slice(5) + color.slice(3, 5) + color.slice(1, 3), 16);
  return new Map(labels.map(({ label, color }) => [label, swap(color)]));
}

// The color of what a value draws.
export function inkOf(value, labels) {
  if (value === BACKGROUND) return "#fff";
  return value === 0 ? "#888" : labels.find(({ label }) => label === value).color;
}

// Refined labels. With `base`, those that differ from it, and white for background.
export const drawLabels = (canvas, plane, table, base = null) =>
  fill(canvas, plane, (place) => {
    const label = plane.refined[place];
    if (label === (base ? base[place] : 0)) return undefined;
    return label === 0 ? WHITE : table.get(label);
  });

// Drawn voxels, those of hidden labels too; background is hatched.
export const drawStrokes = (canvas, plane, table) =>
  fill(canvas, plane, (place) => {
    const value = plane.strokes[place];
    if (value === 0) return undefined;
    if (value !== BACKGROUND) return table.get(value);
    const [row, column] = [Math.floor(place / plane.columns), place % plane.columns];
    return (row + column) % HATCH === 0 ? 0 : WHITE;
  });

// Strokes that are on their way, about as the program will draw them.
export function drawInk(canvas, { size: [width, height], steps: [stepX, stepY] }, strokes) {
  Object.assign(canvas, { width, height, hidden: !strokes.length });
  const pen = canvas.getContext("2d");
  pen.setTransform(1 / stepX, 0, 0, -1 / stepY, 0, height); // from mm, which begin below
  Object.assign(pen, { lineCap: "round", lineJoin: "round" });
  for (const { color, sent: { path, radius, shape } } of strokes) {
    Object.assign(pen, { fillStyle: color, strokeStyle: color });
    pen.lineWidth = Math.max(2 * radius, stepX, stepY);
    pen.beginPath();
    for (let at = 0; at < path.length; at += 2) {
      const [x, y] = [(path[at] + 0.5) * stepX, (path[at + 1] + 0.5) * stepY];
      pen.lineTo(x, y);
      pen.lineTo(x + stepX / 100, y); // A single point would be no line.
    }
    pen.stroke();
    if (shape === "outline") pen.fill();
  }
}

// The borders of the labels that are shown, as of `contoursOf`.
export function findContours(plane, values, labels) {
  const isShown = new Uint8Array(65536);
  for (const { label } of labels) isShown[label] = 1;
  return values ? contoursOf(plane, values, isShown) : new Map();
}

// Put borders into a group of an SVG, in voxels of so many pixels, from the upper left corner. Each
// label's line lies inside of it, so that neighbors have theirs side by side.
export function drawContours(group, contours, labels, steps) {
  const colors = new Map(labels.map(({ label, color }) => [label, color]));
  const [byX, byY] = steps.map((step) => Math.min(INSET / step, 0.45));
  const text = (line) => {
    let words = "";
    for (let at = 0; at < line.length; at += 4) {
      const [x, y] = [line[at] + byX * line[at + 2], line[at + 1] + byY * line[at + 3]];
      words += `${at ? "L" : "M"}${x} ${y}`;
    }
    return `${words}Z`;
  };
  group.replaceChildren(...[...contours].map(([label, lines]) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", lines.map(text).join(""));
    path.style.color = colors.get(label);
    return path;
  }));
}
