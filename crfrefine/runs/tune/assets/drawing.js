// How a plane becomes pixels: gray values, colors of labels, contours, and lines of the screen.
import { contoursOf } from "./contours.js";
import { make } from "./page.js";

export const BACKGROUND = 255; // value of a stroke that draws background
const WHITE = 0xffffff;
const GAP = 10; // pixels between the crosshair's lines and its place
const HATCH = 3; // voxels between the dark ones of strokes of background, which bright tissue needs

// A canvas with a pixel for each voxel. color(place) has blue, green and red in its lowest bytes,
// undefined for nothing; opacity is from 0 to 1.
function raster({ rows, columns }, opacity, color) {
  const pixels = new ImageData(columns, rows);
  const words = new Uint32Array(pixels.data.buffer);
  const alpha = Math.round(255 * opacity) << 24;
  for (let place = 0; place < words.length; place += 1) {
    const value = color(place);
    if (value !== undefined) words[place] = value | alpha;
  }
  const canvas = make("canvas", { width: columns, height: rows });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

export function grayRaster(plane, { low, high }) {
  const factor = 255 / Math.max(high - low, 1e-30);
  return raster(plane, 1, (place) => {
    const gray = Math.max(0, Math.min(255, (plane.image[place] - low) * factor)); // NaN is black.
    return (gray & 255) * 0x10101;
  });
}

// The color of each label that is not hidden, for `raster`.
export function colorTable(labels, hidden) {
  const shown = labels.filter(({ label }) => !hidden.has(label));
  const swap = (color) => parseInt(color.slice(5) + color.slice(3, 5) + color.slice(1, 3), 16);
  return new Map(shown.map(({ label, color }) => [label, swap(color)]));
}

// A color halfway to white.
export const paler = (color) =>
  `#${[1, 3, 5].map((at) => (255 + parseInt(color.slice(at, at + 2), 16)) >> 1)
    .map((share) => share.toString(16)).join("")}`;

// Labels with an opacity. With `base`, only those that differ from it, and white for background.
export const labelRaster = (plane, values, table, opacity, base = null) =>
  raster(plane, opacity, (place) => {
    if (base && values[place] === base[place]) return undefined;
    return base && values[place] === 0 ? WHITE : table.get(values[place]);
  });

const isDark = (row, column) => (row + column) % HATCH === 0;

// Drawn voxels, those of hidden labels too; background is hatched.
export const strokeRaster = (plane, table) =>
  raster(plane, 0.9, (place) => {
    const value = plane.strokes[place];
    if (value !== BACKGROUND) return table.get(value);
    return isDark(Math.floor(place / plane.columns), place % plane.columns) ? 0 : WHITE;
  });

// Voxels of a stroke that is on its way, as of `brush.js`.
export function drawInk(pen, { left, top, stepX, stepY }, [columns, rows], stroke) {
  const { voxels, value, color } = stroke;
  for (const voxel of voxels) {
    const [row, column] = [rows - 1 - Math.floor(voxel / columns), voxel % columns];
    pen.fillStyle = value === BACKGROUND && isDark(row, column) ? "#000" : color;
    pen.fillRect(left + column * stepX, top + row * stepY, Math.ceil(stepX), Math.ceil(stepY));
  }
}

// The borders of labels as a path for each label, in voxels from the upper left corner.
export function contourPaths(plane, values, table) {
  const isShown = new Uint8Array(65536);
  for (const label of table.keys()) isShown[label] = 1;
  const paths = new Map();
  for (const [label, lines] of contoursOf(plane, values, isShown)) {
    const path = new Path2D();
    for (const line of lines) {
      path.moveTo(line[0], line[1]);
      for (let at = 2; at < line.length; at += 2) path.lineTo(line[at], line[at + 1]);
    }
    paths.set(label, path);
  }
  return paths;
}

// Draw paths in voxels with lines of the screen; color(label) is that of a path.
export function strokePaths(pen, paths, { stepX, stepY, left, top }, { width, dash = [] }, color) {
  Object.assign(pen, { lineWidth: width, lineJoin: "round" });
  pen.setLineDash(dash);
  for (const [label, path] of paths) {
    const onScreen = new Path2D();
    onScreen.addPath(path, new DOMMatrix([stepX, 0, 0, stepY, left, top]));
    pen.strokeStyle = color(label);
    pen.stroke(onScreen);
  }
  pen.setLineDash([]);
}

export function drawCrosshair(pen, { x, y }, { width, height }) {
  Object.assign(pen, { strokeStyle: "#9aa4ad", lineWidth: 1 });
  const across = `M0 ${y}H${x - GAP}M${x + GAP} ${y}H${width}`;
  pen.stroke(new Path2D(`${across}M${x} 0V${y - GAP}M${x} ${y + GAP}V${height}`));
}

// The letters of the sides of the body: left, right, bottom, top.
export function drawSides(pen, sides, { width, height }) {
  Object.assign(pen, { font: "600 13px system-ui", fillStyle: "#fff", strokeStyle: "#000" });
  Object.assign(pen, { textAlign: "center", textBaseline: "middle", lineWidth: 3 });
  const [middleX, middleY] = [width / 2, height / 2];
  const places = [[10, middleY], [width - 10, middleY], [middleX, height - 11], [middleX, 11]];
  [...sides].forEach((letter, number) => {
    pen.strokeText(letter, ...places[number]);
    pen.fillText(letter, ...places[number]);
  });
}

// A ring of the size that a brush draws, in pixels.
export function drawRing(pen, { x, y }, radius, color) {
  for (const [strokeStyle, lineWidth] of [["#000", 3], [color, 1.5]]) {
    Object.assign(pen, { strokeStyle, lineWidth });
    pen.beginPath();
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    pen.stroke();
  }
}
