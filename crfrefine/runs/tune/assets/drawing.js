// How a plane becomes pixels: gray values, colors of labels, contours, and lines of the screen.
import { make } from "./page.js";

export const BACKGROUND = 255; // value of a stroke that draws background
const WHITE = [255, 255, 255];
const GAP = 10; // pixels between the crosshair's lines and its place

// A canvas with a pixel for each voxel; color(place) is [red, green, blue, alpha] or null.
function raster({ rows, columns }, color) {
  const pixels = new ImageData(columns, rows);
  for (let place = 0; place < rows * columns; place += 1) {
    const value = color(place);
    if (value) pixels.data.set(value, 4 * place);
  }
  const canvas = make("canvas", { width: columns, height: rows });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

export function grayRaster(plane, { low, high }) {
  const factor = 255 / Math.max(high - low, 1e-30);
  return raster(plane, (place) => {
    const gray = (plane.image[place] - low) * factor; // NaN becomes black.
    return [gray, gray, gray, 255];
  });
}

// The color of each label that is not hidden, as numbers.
export function colorTable(labels, hidden) {
  const shown = labels.filter(({ label }) => !hidden.has(label));
  const rgb = (color) => [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
  return new Map(shown.map(({ label, color }) => [label, rgb(color)]));
}

// Labels with an opacity. With `base`, only those that differ from it, and white for background.
export const labelRaster = (plane, values, table, opacity, base = null) =>
  raster(plane, (place) => {
    if (base && values[place] === base[place]) return null;
    const color = base && values[place] === 0 ? WHITE : table.get(values[place]);
    return color && [...color, 255 * opacity];
  });

export const strokeRaster = (plane, table) =>
  raster(plane, (place) => {
    const value = plane.strokes[place];
    const color = value === BACKGROUND ? WHITE : table.get(value);
    return color && [...color, 230];
  });

// The borders of labels as a path for each color, in voxels from the upper left corner.
export function contourPaths({ rows, columns }, values, table, { isDotted, color } = {}) {
  const paths = new Map();
  const at = (row, column) => {
    const isInside = row >= 0 && column >= 0 && row < rows && column < columns;
    const value = isInside ? values[row * columns + column] : 0;
    return table.has(value) ? value : 0;
  };
  const add = (label, fromX, fromY, toX, toY) => {
    const key = color ?? `rgb(${table.get(label).join(",")})`;
    if (!paths.has(key)) paths.set(key, new Path2D());
    paths.get(key).moveTo(fromX, fromY);
    paths.get(key).lineTo(toX, toY);
  };
  for (let row = -1; row < rows; row += 1) {
    for (let column = -1; column < columns; column += 1) {
      if (isDotted && (row + column) % 2) continue;
      const [here, right, below] = [at(row, column), at(row, column + 1), at(row + 1, column)];
      if (here !== right) add(here || right, column + 1, row, column + 1, row + 1);
      if (here !== below) add(here || below, column, row + 1, column + 1, row + 1);
    }
  }
  return paths;
}

// Draw paths in voxels with lines of the screen; `view` has the place and size of a voxel.
export function strokePaths(pen, paths, { stepX, stepY, left, top }, lineWidth) {
  for (const [strokeStyle, path] of paths) {
    const onScreen = new Path2D();
    onScreen.addPath(path, new DOMMatrix([stepX, 0, 0, stepY, left, top]));
    Object.assign(pen, { strokeStyle, lineWidth, lineCap: "round" });
    pen.stroke(onScreen);
  }
}

export function drawCrosshair(pen, x, y, { width, height }) {
  Object.assign(pen, { strokeStyle: "#9aa4ad", lineWidth: 1 });
  pen.beginPath();
  for (const [start, end] of [[0, x - GAP], [x + GAP, width]]) {
    pen.moveTo(start, y);
    pen.lineTo(end, y);
  }
  for (const [start, end] of [[0, y - GAP], [y + GAP, height]]) {
    pen.moveTo(x, start);
    pen.lineTo(x, end);
  }
  pen.stroke();
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
