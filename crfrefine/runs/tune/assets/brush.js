// The voxels of a stroke, as a set of column + columns * row from below. Only numbers.

import { isInside } from "./geometry.js";

// The voxels of a line from one to another, both included.
export function lineBetween(
  /** @type {number[]} */ [fromX, fromY], /** @type {number[]} */ [toX, toY]) {
  const steps = Math.max(Math.abs(toX - fromX), Math.abs(toY - fromY), 1);
  const at = (from, to, step) => from + Math.round(((to - from) * step) / steps);
  return Array.from({ length: steps + 1 }, (_, step) =>
    [at(fromX, toX, step), at(fromY, toY, step)]);
}

export const radiusOf = ({ steps }, diameter) => (diameter / 2) * Math.min(...steps); // mm

// Add a disk to a set, round in mm; what lies outside of the image is left out.
export function addDisk(voxels, grid, /** @type {number[]} */ [x, y], radius) {
  const [wide, high] = grid.steps.map((step) => Math.floor(radius / step));
  for (let right = -wide; right <= wide; right += 1) {
    for (let above = -high; above <= high; above += 1) {
      const voxel = [x + right, y + above];
      const distance = Math.hypot(right * grid.steps[0], above * grid.steps[1]);
      if (distance <= radius && isInside(grid, voxel)) {
        voxels.add(voxel[0] + grid.size[0] * voxel[1]);
      }
    }
  }
}

// The voxels of a closed outline, and those whose middles lie in it. `points` are its voxels.
export function fillOutline(points, grid) {
  const [columns, rows] = grid.size;
  const filled = new Set();
  for (const point of points) addDisk(filled, grid, point, 0);
  for (let row = 0; row < rows; row += 1) {
    const crossings = [];
    points.forEach(([x, y], number) => {
      const [nextX, nextY] = points[(number + 1) % points.length];
      if (y > row === nextY > row) return;
      crossings.push(x + ((row - y) / (nextY - y)) * (nextX - x));
    });
    crossings.sort((one, other) => one - other);
    for (let pair = 0; pair + 1 < crossings.length; pair += 2) {
      const first = Math.max(0, Math.ceil(crossings[pair]));
      const last = Math.min(columns - 1, Math.floor(crossings[pair + 1]));
      for (let column = first; column <= last; column += 1) filled.add(column + columns * row);
    }
  }
  return filled;
}

// Those of the voxels whose intensity is in a range; the image has its rows from above.
export function limitTo(voxels, image, [columns, rows], { low, high }) {
  const isIn = (voxel) => {
    const row = rows - 1 - Math.floor(voxel / columns);
    const value = image[row * columns + (voxel % columns)];
    return value >= low && value <= high;
  };
  return new Set([...voxels].filter(isIn));
}
