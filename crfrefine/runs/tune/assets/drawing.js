// How a plane becomes pixels: gray values, colors of labels, contours, and lines of the screen.
import { make } from "./page.js";

export const BACKGROUND = 255; // value of a stroke that draws background
const WHITE = 0xffffff;
const GAP = 10; // pixels between the crosshair's lines and its place

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

// Labels with an opacity. With `base`, only those that differ from it, and white for background.
export const labelRaster = (plane, values, table, opacity, base = null) =>
  raster(plane, opacity, (place) => {
    if (base && values[place] === base[place]) return undefined;
    return base && values[place] === 0 ? WHITE : table.get(values[place]);
  });

export const strokeRaster = (plane, table) =>
  raster(plane, 0.9, (place) => {
    const value = plane.strokes[place];
    return value === BACKGROUND ? WHITE : table.get(value);
  });

// The borders of labels as a path for each label, in voxels from the upper left corner.
export function contourPaths({ rows, columns }, values, table, isDotted) {
  const paths = new Map();
  const wide = columns + 2; // of the plane with a margin, in which hidden labels are 0
  const shown = new Uint16Array((rows + 2) * wide);
  const isShown = new Uint8Array(65536);
  for (const label of table.keys()) isShown[label] = 1;
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const value = values[row * columns + column];
      if (isShown[value]) shown[(row + 1) * wide + column + 1] = value;
    }
  }
  const add = (label, fromX, fromY, toX, toY) => {
    if (!paths.has(label)) paths.set(label, new Path2D());
    paths.get(label).moveTo(fromX, fromY);
    paths.get(label).lineTo(toX, toY);
  };
  for (let row = 0; row <= rows; row += 1) {
    for (let column = isDotted ? row % 2 : 0; column <= columns; column += isDotted ? 2 : 1) {
      const here = shown[row * wide + column];
      const right = shown[row * wide + column + 1];
      const below = shown[(row + 1) * wide + column];
      if (here !== right) add(here || right, column, row - 1, column, row);
      if (here !== below) add(here || below, column - 1, row, column, row);
    }
  }
  return paths;
}

// Draw paths in voxels with lines of the screen; color(label) is that of a path.
export function strokePaths(pen, paths, { stepX, stepY, left, top }, lineWidth, color) {
  for (const [label, path] of paths) {
    const onScreen = new Path2D();
    const strokeStyle = color(label);
    onScreen.addPath(path, new DOMMatrix([stepX, 0, 0, stepY, left, top]));
    Object.assign(pen, { strokeStyle, lineWidth, lineCap: "round" });
    pen.stroke(onScreen);
  }
}

export function drawCrosshair(pen, x, y, { width, height }) {
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
